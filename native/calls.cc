#include "calls.h"

#include <fcntl.h>
#include <linux/nsfs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "extents.h"
#include "processes.h"
#include "uapi.h"

namespace loopctl {
namespace {

constexpr unsigned kLoopMajor = 7;
constexpr unsigned kMiscMajor = 10;
constexpr std::size_t kPathSize = 32;  // /dev/loop1048575, /proc/self/fd/2147483647
constexpr std::size_t kSysfsPathSize = 64;
constexpr std::size_t kAttributeSize = 4096;  // what an attribute shows where pages are no larger
constexpr std::size_t kStatfsSize = 48;
constexpr unsigned kLoopControlMinor = 237;

long Answer(long result) { return result < 0 ? -static_cast<long>(errno) : result; }

// The type of the request differs: unsigned long to glibc, int to musl.
template <typename Request>
Request RequestOf(int (*)(int, Request, ...));
using Request = decltype(RequestOf(&::ioctl));

template <typename Argument>
long Ioctl(int fd, unsigned long request, Argument argument) {
  return Answer(::ioctl(fd, static_cast<Request>(request), argument));
}

// With the module's max_part > 0 partitions have the loop major too: a whole device is then one minor in
// (max_part + 1), and sysfs shows max_part rounded up to 2^n - 1. Read once, since it is fixed while the
// module is loaded and looking at every call would cost ten times the call. Without sysfs: as if 0.
unsigned PartitionMask() {
  static std::atomic<int> known = -1;
  int mask = known.load(std::memory_order_relaxed);
  if (mask >= 0) return static_cast<unsigned>(mask);
  const int fd = ::open("/sys/module/loop/parameters/max_part", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  char text[16] = {};
  const ssize_t length = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  if (length <= 0) return 0;
  mask = std::atoi(text);
  known.store(mask, std::memory_order_relaxed);
  return static_cast<unsigned>(mask);
}

bool IsLoop(const struct stat& st) { return S_ISBLK(st.st_mode) && major(st.st_rdev) == kLoopMajor; }

// 0 for a whole loop device. LOOP_CLR_FD on a partition would detach the device around it, and
// the same request number means something else to another driver.
long NeedLoopDevice(int fd) {
  struct stat st{};
  if (::fstat(fd, &st) != 0) return -errno;
  return IsLoop(st) && (minor(st.st_rdev) & PartitionMask()) == 0 ? 0 : -ENOTTY;
}

long NeedLoopControl(int fd) {
  struct stat st{};
  if (::fstat(fd, &st) != 0) return -errno;
  const bool control =
      S_ISCHR(st.st_mode) && major(st.st_rdev) == kMiscMajor && minor(st.st_rdev) == kLoopControlMinor;
  return control ? 0 : -ENOTTY;
}

template <typename Argument>
long LoopIoctl(const Arguments& a, unsigned long request, Argument argument) {
  if (const long refused = NeedLoopDevice(a.Int(0)); refused != 0) return refused;
  return Ioctl(a.Int(0), request, argument);
}

long ControlIoctl(const Arguments& a, unsigned long request, long argument) {
  if (const long refused = NeedLoopControl(a.Int(0)); refused != 0) return refused;
  return Ioctl(a.Int(0), request, argument);
}

// For the requests that write one int of answer.
long LoopIoctlInt(const Arguments& a, unsigned long request) {
  int value = 0;
  const long result = LoopIoctl(a, request, &value);
  return result < 0 ? result : value;
}

long Partition(const Arguments& a, int op) {
  struct blkpg_partition partition{};
  partition.pno = a.Int(1);
  partition.start = static_cast<long long>(a.U64(2));
  partition.length = static_cast<long long>(a.U64(3));
  struct blkpg_ioctl_arg argument{};
  argument.op = op;
  argument.datalen = sizeof partition;
  argument.data = &partition;
  return LoopIoctl(a, BLKPG, &argument);
}

// /dev/loop-control
long LoopCtlAdd(Arguments& a) { return ControlIoctl(a, LOOP_CTL_ADD, a.Int(1)); }
long LoopCtlRemove(Arguments& a) { return ControlIoctl(a, LOOP_CTL_REMOVE, a.Int(1)); }
long LoopCtlGetFree(Arguments& a) { return ControlIoctl(a, LOOP_CTL_GET_FREE, 0); }

// /dev/loopN
long LoopSetFd(Arguments& a) { return LoopIoctl(a, LOOP_SET_FD, static_cast<long>(a.Int(1))); }
long LoopChangeFd(Arguments& a) { return LoopIoctl(a, LOOP_CHANGE_FD, static_cast<long>(a.Int(1))); }
long LoopClrFd(Arguments& a) { return LoopIoctl(a, LOOP_CLR_FD, 0L); }
// The backing file apart: in a sequence its descriptor is not known before.
long LoopConfigure(Arguments& a) {
  struct loop_config config{};
  std::memcpy(&config, a.data[2], sizeof config);
  config.fd = static_cast<__u32>(a.Int(1));
  return LoopIoctl(a, LOOP_CONFIGURE, &config);
}
// EFAULT where the kernel knows LOOP_CONFIGURE; configures nothing in any case.
long LoopConfigureProbe(Arguments& a) { return LoopIoctl(a, LOOP_CONFIGURE, static_cast<void*>(nullptr)); }
long LoopGetStatus64(Arguments& a) { return LoopIoctl(a, LOOP_GET_STATUS64, a.data[1]); }
long LoopSetStatus64(Arguments& a) { return LoopIoctl(a, LOOP_SET_STATUS64, a.data[1]); }
long LoopSetCapacity(Arguments& a) { return LoopIoctl(a, LOOP_SET_CAPACITY, 0L); }
long LoopSetDirectIo(Arguments& a) { return LoopIoctl(a, LOOP_SET_DIRECT_IO, static_cast<long>(a.Int(1))); }
long LoopSetBlockSize(Arguments& a) { return LoopIoctl(a, LOOP_SET_BLOCK_SIZE, static_cast<long>(a.Int(1))); }

// Block devices in general, here only loop ones
long BlkGetSize64(Arguments& a) { return LoopIoctl(a, BLKGETSIZE64, a.data[1]); }
// Counts from 1, so it fits.
long BlkGetDiskSeq(Arguments& a) {
  std::uint64_t value = 0;
  const long result = LoopIoctl(a, BLKGETDISKSEQ, &value);
  return result < 0 ? result : static_cast<long>(value);
}
long BlkSszGet(Arguments& a) { return LoopIoctlInt(a, BLKSSZGET); }
long BlkRoGet(Arguments& a) { return LoopIoctlInt(a, BLKROGET); }
long BlkRoSet(Arguments& a) {
  int readOnly = a.Int(1);
  return LoopIoctl(a, BLKROSET, &readOnly);
}
long BlkFlsBuf(Arguments& a) { return LoopIoctl(a, BLKFLSBUF, 0L); }
long BlkRrPart(Arguments& a) { return LoopIoctl(a, BLKRRPART, 0L); }
long BlkPgAddPartition(Arguments& a) { return Partition(a, BLKPG_ADD_PARTITION); }
long BlkPgResizePartition(Arguments& a) { return Partition(a, BLKPG_RESIZE_PARTITION); }
long BlkPgDelPartition(Arguments& a) { return Partition(a, BLKPG_DEL_PARTITION); }

// Not ioctls, and not to be had from node:fs
long FcntlGetFl(Arguments& a) { return Answer(::fcntl(a.Int(0), F_GETFL)); }
long FcntlSetFl(Arguments& a) { return Answer(::fcntl(a.Int(0), F_SETFL, a.Int(1))); }
long FcntlGetSeals(Arguments& a) { return Answer(::fcntl(a.Int(0), F_GET_SEALS)); }
// Shares the blocks of the whole file, where the filesystem can.
long FiClone(Arguments& a) { return Ioctl(a.Int(0), FICLONE, a.Int(1)); }
// Clean pages of the whole file leave the cache: what is read next comes from the medium.
long FadviseDontNeed(Arguments& a) { return -::posix_fadvise(a.Int(0), 0, 0, POSIX_FADV_DONTNEED); }
long Flock(Arguments& a) { return Answer(::flock(a.Int(0), a.Int(1))); }
// Takes a write lease and gives it back: succeeds only where no other open file has the inode, a loop
// device's included. Whoever breaks the lease in that instant has the kernel send SIGURG, which is ignored
// by default, in place of SIGIO, which ends the process.
long LeaseProbe(Arguments& a) {
  const int fd = a.Int(0);
  if (::fcntl(fd, F_SETSIG, SIGURG) != 0) return -errno;
  if (::fcntl(fd, F_SETLEASE, F_WRLCK) != 0) return -errno;
  return Answer(::fcntl(fd, F_SETLEASE, F_UNLCK));
}
// musl has a function only since 1.2.5.
long StatxOf(int fd, const char* path, int flags, void* out) {
  return Answer(::syscall(SYS_statx, fd, path, flags, STATX_BASIC_STATS, out));
}
long Statx(Arguments& a) { return StatxOf(a.Int(0), "", AT_EMPTY_PATH, a.data[1]); }
// As far as the kernel knows it: a server that does not answer is not asked.
long StatxCached(Arguments& a) {
  return StatxOf(a.Int(0), "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, a.data[1]);
}
long StatxPath(Arguments& a) { return StatxOf(AT_FDCWD, a.Path(0), 0, a.data[1]); }

// What node:fs has too, for sequences
long Close(Arguments& a) { return Answer(::close(a.Int(0))); }
long Fsync(Arguments& a) { return Answer(::fsync(a.Int(0))); }
long Open(Arguments& a) { return Answer(::open(a.Path(0), a.Int(1) | O_CLOEXEC)); }
// A regular file: opening a FIFO can block, and opening a device can do something to it.
long OpenRegular(Arguments& a) {
  struct stat st{};
  if (::stat(a.Path(0), &st) != 0) return -errno;
  if (!S_ISREG(st.st_mode)) return -EINVAL;
  const int fd = ::open(a.Path(0), a.Int(1) | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return -errno;
  if (::fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) return fd;
  ::close(fd);
  return -EINVAL;
}
// /dev/loopN, where that is the node of the device, and no link: looked at before too, for the same reasons.
long OpenLoop(Arguments& a) {
  const auto device = makedev(kLoopMajor, static_cast<unsigned>(a.Int(0)) * (PartitionMask() + 1));
  char path[kPathSize];
  std::snprintf(path, sizeof path, "/dev/loop%d", a.Int(0));
  struct stat st{};
  if (::lstat(path, &st) != 0) return -errno;
  if (!IsLoop(st) || st.st_rdev != device) return -ENOTTY;
  const int fd = ::open(path, a.Int(1) | O_CLOEXEC);
  if (fd < 0) return -errno;
  if (::fstat(fd, &st) == 0 && IsLoop(st) && st.st_rdev == device) return fd;
  ::close(fd);
  return -ENOTTY;
}
// The file of one descriptor becomes that of the other too, whose own is closed.
long Dup3(Arguments& a) { return Answer(::dup3(a.Int(0), a.Int(1), O_CLOEXEC)); }
// Closes the file and keeps the number, so that nobody else in the process gets it before it is let go. By
// what takes its place nothing can be read, or waited for.
long Vacate(Arguments& a) {
  const int nothing = ::open("/", O_PATH | O_CLOEXEC);
  if (nothing < 0) return -errno;
  const long answer = Answer(::dup3(nothing, a.Int(0), O_CLOEXEC));
  ::close(nothing);
  return answer;
}
// One for each partition, and a few.
long SysfsLinks(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d", a.Int(0));
  struct stat st{};
  return ::stat(path, &st) != 0 ? -errno : static_cast<long>(st.st_nlink);
}
// The path of the backing file as sysfs shows it: its length in bytes, with the newline at the end.
long SysfsBackingFile(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/loop/backing_file", a.Int(0));
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  const long length = Answer(::read(fd, a.data[1], kAttributeSize));
  ::close(fd);
  return length;
}
// The part of LOOP_GET_STATUS64 that a sequence can be told to expect.
long LoopGetFlags(Arguments& a) {
  struct loop_info64 info{};
  const long answer = LoopIoctl(a, LOOP_GET_STATUS64, &info);
  return answer < 0 ? answer : static_cast<long>(info.lo_flags);
}
// Makes the descriptor an exclusive one, under the same number. For runtimes whose fs opens nothing with
// O_EXCL alone, and knows no descriptor that it has not opened.
long ReopenExclusive(Arguments& a) {
  if (const long refused = NeedLoopDevice(a.Int(0)); refused != 0) return refused;
  char path[kPathSize];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", a.Int(0));
  const int exclusive = ::open(path, a.Int(1) | O_EXCL | O_CLOEXEC);
  if (exclusive < 0) return -errno;
  const long answer = Answer(::dup3(exclusive, a.Int(0), O_CLOEXEC));
  ::close(exclusive);
  return answer;
}
// A node of a block device, for its owner only.
long MknodBlock(Arguments& a) {
  return Answer(::mknod(a.Path(0), S_IFBLK | S_IRUSR | S_IWUSR,
                        makedev(static_cast<unsigned>(a.Int(1)), static_cast<unsigned>(a.Int(2)))));
}
// The inode of the user namespace that owns the namespace, of which the kernel gives a descriptor.
long NsGetUserNs(Arguments& a) {
  const long fd = Ioctl(a.Int(0), NS_GET_USERNS, 0L);
  if (fd < 0) return fd;
  struct stat st{};
  const long answer = Answer(::fstat(static_cast<int>(fd), &st));
  ::close(static_cast<int>(fd));
  const std::uint64_t inode = st.st_ino;
  std::memcpy(a.data[1], &inode, sizeof inode);
  return answer;
}

// Files relative to an open folder, or by their descriptor: a path is not looked up a second time
long OpenAt(Arguments& a) {
  return Answer(::openat(a.Int(0), a.Path(1), a.Int(2) | O_CLOEXEC, S_IRUSR | S_IWUSR));
}
// The file of an O_PATH descriptor, opened: never another one than that.
long ReopenFile(Arguments& a) {
  char path[kPathSize];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", a.Int(0));
  return Answer(::open(path, a.Int(1) | O_CLOEXEC));
}
long StatxAt(Arguments& a) { return StatxOf(a.Int(0), a.Path(1), a.Int(2), a.data[3]); }
// The text of a link, of which there is an O_PATH descriptor: its length in bytes.
long ReadLink(Arguments& a) {
  return Answer(::readlinkat(a.Int(0), "", reinterpret_cast<char*>(a.data[1]), kAttributeSize));
}
// The name in the folder for a file that has none (O_TMPFILE). With CAP_DAC_READ_SEARCH:
long LinkFile(Arguments& a) { return Answer(::linkat(a.Int(0), "", a.Int(1), a.Path(2), AT_EMPTY_PATH)); }
// The same without, where /proc is mounted:
long LinkProcFile(Arguments& a) {
  char path[kPathSize];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", a.Int(0));
  return Answer(::linkat(AT_FDCWD, path, a.Int(1), a.Path(2), AT_SYMLINK_FOLLOW));
}
// Within one folder. musl has a function only since 1.2.6.
long RenameAt(Arguments& a) {
  return Answer(::syscall(SYS_renameat2, a.Int(0), a.Path(1), a.Int(0), a.Path(2), a.Int(3)));
}
long UnlinkAt(Arguments& a) { return Answer(::unlinkat(a.Int(0), a.Path(1), 0)); }
long Fchmod(Arguments& a) { return Answer(::fchmod(a.Int(0), static_cast<mode_t>(a.Int(1)))); }
long Fchown(Arguments& a) {
  return Answer(::fchown(a.Int(0), static_cast<uid_t>(a.Int(1)), static_cast<gid_t>(a.Int(2))));
}
long Ftruncate(Arguments& a) { return Answer(::ftruncate(a.Int(0), static_cast<off_t>(a.U64(1)))); }
long Fremovexattr(Arguments& a) { return Answer(::fremovexattr(a.Int(0), a.Path(1))); }
long SyncFileRange(Arguments& a) {
  return Answer(::sync_file_range(a.Int(0), static_cast<off_t>(a.U64(1)), static_cast<off_t>(a.U64(2)),
                                  static_cast<unsigned>(a.Int(3))));
}
// The type, flags, and the size of a block, blocks in all, free ones, and those free for ordinary users.
long Fstatfs(Arguments& a) {
  struct statfs st{};
  if (::fstatfs(a.Int(0), &st) != 0) return -errno;
  const std::uint64_t numbers[] = {static_cast<std::uint64_t>(st.f_type),
                                   static_cast<std::uint64_t>(st.f_flags),
                                   static_cast<std::uint64_t>(st.f_bsize),
                                   st.f_blocks,
                                   st.f_bfree,
                                   st.f_bavail};
  static_assert(sizeof numbers == kStatfsSize);
  std::memcpy(a.data[1], numbers, sizeof numbers);
  return 0;
}

long PageSize(Arguments&) { return Answer(::sysconf(_SC_PAGESIZE)); }

using enum Parameter;

constexpr Call kCalls[] = {
    {"loopCtlAdd", LoopCtlAdd, {kInt, kInt}},
    {"loopCtlRemove", LoopCtlRemove, {kInt, kInt}},
    {"loopCtlGetFree", LoopCtlGetFree, {kInt}},
    {"loopSetFd", LoopSetFd, {kInt, kInt}},
    {"loopChangeFd", LoopChangeFd, {kInt, kInt}},
    {"loopClrFd", LoopClrFd, {kInt}},
    {"loopConfigure", LoopConfigure, {kInt, kInt, kIn}, sizeof(struct loop_config)},
    {"loopConfigureProbe", LoopConfigureProbe, {kInt}},
    {"loopGetStatus64", LoopGetStatus64, {kInt, kOut}, sizeof(struct loop_info64)},
    {"loopSetStatus64", LoopSetStatus64, {kInt, kIn}, sizeof(struct loop_info64)},
    {"loopSetCapacity", LoopSetCapacity, {kInt}},
    {"loopSetDirectIo", LoopSetDirectIo, {kInt, kInt}},
    {"loopSetBlockSize", LoopSetBlockSize, {kInt, kInt}},
    {"blkGetSize64", BlkGetSize64, {kInt, kOut}, sizeof(std::uint64_t)},
    {"blkGetDiskSeq", BlkGetDiskSeq, {kInt}},
    {"blkSszGet", BlkSszGet, {kInt}},
    {"blkRoGet", BlkRoGet, {kInt}},
    {"blkRoSet", BlkRoSet, {kInt, kInt}},
    {"blkFlsBuf", BlkFlsBuf, {kInt}},
    {"blkRrPart", BlkRrPart, {kInt}},
    {"blkPgAddPartition", BlkPgAddPartition, {kInt, kInt, kU64, kU64}},
    {"blkPgResizePartition", BlkPgResizePartition, {kInt, kInt, kU64, kU64}},
    {"blkPgDelPartition", BlkPgDelPartition, {kInt, kInt}},
    {"fcntlGetFl", FcntlGetFl, {kInt}},
    {"fcntlSetFl", FcntlSetFl, {kInt, kInt}},
    {"fcntlGetSeals", FcntlGetSeals, {kInt}},
    {"flock", Flock, {kInt, kInt}},
    {"leaseProbe", LeaseProbe, {kInt}},
    {"ficlone", FiClone, {kInt, kInt}},
    {"fadviseDontNeed", FadviseDontNeed, {kInt}},
    {"statx", Statx, {kInt, kOut}, sizeof(struct statx)},
    {"statxCached", StatxCached, {kInt, kOut}, sizeof(struct statx)},
    {"statxPath", StatxPath, {kPath, kOut}, sizeof(struct statx)},
    {"close", Close, {kInt}},
    {"fsync", Fsync, {kInt}},
    {"open", Open, {kPath, kInt}},
    {"openRegular", OpenRegular, {kPath, kInt}},
    {"openLoop", OpenLoop, {kInt, kInt}},
    {"dup3", Dup3, {kInt, kInt}},
    {"vacate", Vacate, {kInt}},
    {"sysfsLinks", SysfsLinks, {kInt}},
    {"sysfsBackingFile", SysfsBackingFile, {kInt, kOut}, kAttributeSize},
    {"loopGetFlags", LoopGetFlags, {kInt}},
    {"reopenExclusive", ReopenExclusive, {kInt, kInt}},
    {"mknodBlock", MknodBlock, {kPath, kInt, kInt}},
    {"nsGetUserNs", NsGetUserNs, {kInt, kOut}, sizeof(std::uint64_t)},
    // Files relative to an open folder, extents, processes: for change/ and errors/
    {"openAt", OpenAt, {kInt, kPath, kInt}},
    {"reopenFile", ReopenFile, {kInt, kInt}},
    {"statxAt", StatxAt, {kInt, kPath, kInt, kOut}, sizeof(struct statx)},
    {"readLink", ReadLink, {kInt, kOut}, kAttributeSize},
    {"linkFile", LinkFile, {kInt, kInt, kPath}},
    {"linkProcFile", LinkProcFile, {kInt, kInt, kPath}},
    {"renameAt", RenameAt, {kInt, kPath, kPath, kInt}},
    {"unlinkAt", UnlinkAt, {kInt, kPath}},
    {"fchmod", Fchmod, {kInt, kInt}},
    {"fchown", Fchown, {kInt, kInt, kInt}},
    {"ftruncate", Ftruncate, {kInt, kU64}},
    {"fremovexattr", Fremovexattr, {kInt, kPath}},
    {"syncFileRange", SyncFileRange, {kInt, kU64, kU64, kInt}},
    {"fstatfs", Fstatfs, {kInt, kOut}, kStatfsSize},
    {"copyExtents", CopyExtents, {kInt, kInt, kOut}, kCopySize},
    {"compareExtents", CompareExtents, {kInt, kInt, kOut}, kComparisonSize},
    {"processUse", ReadProcessUse, {kInt, kOut}, kProcessUseSize},
    {"pageSize", PageSize, {}},
};

}  // namespace

std::span<const Call> Calls() { return kCalls; }

}  // namespace loopctl
