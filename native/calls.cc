#include "calls.h"

#include <fcntl.h>
#include <linux/nsfs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
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
#include "signals.h"
#include "uapi.h"

namespace loopctl {
namespace {

constexpr unsigned kLoopMajor = 7;
constexpr unsigned kMiscMajor = 10;
constexpr std::size_t kPathSize = 32;  // /dev/loop1048575, /proc/self/fd/2147483647
constexpr std::size_t kSysfsPathSize = 64;
constexpr std::size_t kStatSize = 512;        // 17 figures of at most 20 digits
constexpr std::size_t kAttributeSize = 4096;  // what an attribute shows where pages are no larger
constexpr std::size_t kShortSize = 256;       // what is enough for most paths
constexpr std::size_t kStatfsSize = 6 * sizeof(std::uint64_t);
constexpr std::size_t kRangeSize = 2 * sizeof(std::uint64_t);
constexpr unsigned kLoopControlMinor = 237;
constexpr std::size_t kNameSize = 256;      // NAME_MAX and the NUL
constexpr std::size_t kMessageSize = 4096;  // the kernel's limit for a message of a filesystem context

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
long LeaseOf(int fd, int type) {
  if (::fcntl(fd, F_SETSIG, SIGURG) != 0) return -errno;
  if (::fcntl(fd, F_SETLEASE, type) != 0) return -errno;
  return Answer(::fcntl(fd, F_SETLEASE, F_UNLCK));
}
long LeaseProbe(Arguments& a) { return LeaseOf(a.Int(0), F_WRLCK); }
// The same with a read lease, on a descriptor that is open for reading only: succeeds only where no open
// file of the inode can be written.
long LeaseProbeRead(Arguments& a) { return LeaseOf(a.Int(0), F_RDLCK); }
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
// Of a link itself.
long StatxLink(Arguments& a) { return StatxOf(AT_FDCWD, a.Path(0), AT_SYMLINK_NOFOLLOW, a.data[1]); }

// What node:fs has too, on threads of libuv's pool and without an end
long Close(Arguments& a) { return Answer(::close(a.Int(0))); }
long Fsync(Arguments& a) { return Answer(::fsync(a.Int(0))); }
long Open(Arguments& a) { return Answer(::open(a.Path(0), a.Int(1) | O_CLOEXEC)); }
// A file that was not there.
long Create(Arguments& a) {
  return Answer(::open(a.Path(0), a.Int(1) | O_CREAT | O_EXCL | O_CLOEXEC, static_cast<mode_t>(a.Int(2))));
}
long Pread(Arguments& a) {
  return Answer(::pread(a.Int(0), a.data[1], a.Size(1), static_cast<off_t>(a.U64(2))));
}
long Pwrite(Arguments& a) {
  return Answer(::pwrite(a.Int(0), a.data[1], a.Size(1), static_cast<off_t>(a.U64(2))));
}
long Ftruncate(Arguments& a) { return Answer(::ftruncate(a.Int(0), static_cast<off_t>(a.U64(1)))); }
long Fchmod(Arguments& a) { return Answer(::fchmod(a.Int(0), static_cast<mode_t>(a.Int(1)))); }
long Access(Arguments& a) { return Answer(::access(a.Path(0), a.Int(1))); }
long Link(Arguments& a) { return Answer(::link(a.Path(0), a.Path(1))); }
long Rename(Arguments& a) { return Answer(::rename(a.Path(0), a.Path(1))); }
long Unlink(Arguments& a) { return Answer(::unlink(a.Path(0))); }
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
// 0 while the device is attached, or being detached; ENOENT where it is free, or there is none.
long SysfsLoop(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/loop", a.Int(0));
  return Answer(::access(path, F_OK));
}
// 1 or 0. Unlike LOOP_GET_STATUS64 it asks no filesystem.
long SysfsAutoclear(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/loop/autoclear", a.Int(0));
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  char text = 0;
  const ssize_t length = ::read(fd, &text, 1);
  const long answer = length < 0 ? -errno : text == '1';
  ::close(fd);
  return answer;
}
// How many sectors have been written to the device so far: the seventh figure of its file stat.
long SysfsSectorsWritten(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/stat", a.Int(0));
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  char text[kStatSize] = {};
  const ssize_t length = ::read(fd, text, sizeof text - 1);
  const long failed = length < 0 ? -errno : 0;
  ::close(fd);
  if (failed != 0) return failed;
  unsigned long long sectors = 0;
  return std::sscanf(text, "%*u %*u %*u %*u %*u %*u %llu", &sectors) == 1 ? static_cast<long>(sectors)
                                                                          : -EINVAL;
}
long SysfsLinks(Arguments& a) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d", a.Int(0));
  struct stat st{};
  return ::stat(path, &st) != 0 ? -errno : static_cast<long>(st.st_nlink);
}
// The path of the backing file as sysfs shows it: its length in bytes, with the newline at the end.
long ReadBackingFile(int number, std::byte* text, std::size_t size) {
  char path[kSysfsPathSize];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/loop/backing_file", number);
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  const long length = Answer(::read(fd, text, size));
  ::close(fd);
  return length;
}
long SysfsBackingFile(Arguments& a) { return ReadBackingFile(a.Int(0), a.data[1], kAttributeSize); }
// The same, of so many bytes at most: most paths are short, and a room for each costs time.
long SysfsBackingFileShort(Arguments& a) { return ReadBackingFile(a.Int(0), a.data[1], kShortSize); }
// The part of LOOP_GET_STATUS64 that a sequence can be told to expect.
long LoopGetFlags(Arguments& a) {
  struct loop_info64 info{};
  const long answer = LoopIoctl(a, LOOP_GET_STATUS64, &info);
  return answer < 0 ? answer : static_cast<long>(info.lo_flags);
}
// A node of a block device, for its owner only.
long MknodBlock(Arguments& a) {
  return Answer(::mknod(a.Path(0), S_IFBLK | S_IRUSR | S_IWUSR,
                        makedev(static_cast<unsigned>(a.Int(1)), static_cast<unsigned>(a.Int(2)))));
}
// The same in a folder that is open.
long MknodBlockAt(Arguments& a) {
  return Answer(::mknodat(a.Int(0), a.Path(1), S_IFBLK | S_IRUSR | S_IWUSR,
                          makedev(static_cast<unsigned>(a.Int(2)), static_cast<unsigned>(a.Int(3)))));
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

// Mounting: one filesystem context, the mount that it makes, and its place in the tree. Kernel 5.2.
long Fsopen(Arguments& a) { return Answer(::syscall(kSysFsopen, a.Path(0), kFsopenCloexec)); }
long Fsconfig(int fd, unsigned command, const char* key, const char* value) {
  return Answer(::syscall(kSysFsconfig, fd, command, key, value, 0));
}
long FsconfigFlag(Arguments& a) { return Fsconfig(a.Int(0), kFsconfigSetFlag, a.Path(1), nullptr); }
long FsconfigString(Arguments& a) { return Fsconfig(a.Int(0), kFsconfigSetString, a.Path(1), a.Path(2)); }
// Reads the superblock: it waits for the device.
long FsconfigCreate(Arguments& a) { return Fsconfig(a.Int(0), kFsconfigCmdCreate, nullptr, nullptr); }
// One message of the filesystem, its length in bytes; ENODATA where there is no more.
long FsMessage(Arguments& a) { return Answer(::read(a.Int(0), a.data[1], kMessageSize)); }
// A descriptor of a mount that is not in the tree; when it is closed there, the filesystem is unmounted.
long Fsmount(Arguments& a) {
  return Answer(::syscall(kSysFsmount, a.Int(0), kFsmountCloexec, static_cast<unsigned>(a.Int(1))));
}
// From one descriptor to the other: no path is looked up.
long MoveMount(Arguments& a) {
  return Answer(::syscall(kSysMoveMount, a.Int(0), "", a.Int(1), "", kMoveMountEmptyPaths));
}
// umount2(2) of a name in an open folder, so that no folder on the way is looked up again; without a name, of
// the mount that the descriptor is of.
long UmountAt(Arguments& a) {
  char path[kPathSize + kNameSize];
  const int length = std::snprintf(path, sizeof path, "/proc/self/fd/%d/%s", a.Int(0), a.Path(1));
  if (length < 0 || static_cast<std::size_t>(length) >= sizeof path) return -ENAMETOOLONG;
  return Answer(::umount2(path, a.Int(2)));
}
// Of a file, and of the mount that it is on; the number in mountinfo, which another mount can get later.
long StatxMount(Arguments& a) {
  return Answer(
      ::syscall(SYS_statx, a.Int(0), a.Path(1), a.Int(2), STATX_BASIC_STATS | kStatxMntId, a.data[3]));
}
// The same with a number that is never given out again; before kernel 6.8 that of StatxMount.
long StatxMountUnique(Arguments& a) {
  return Answer(::syscall(SYS_statx, a.Int(0), a.Path(1), a.Int(2),
                          STATX_BASIC_STATS | kStatxMntId | kStatxMntIdUnique, a.data[3]));
}

// Reserves blocks of the file, which becomes as long as that.
long Fallocate(Arguments& a) {
  return Answer(::fallocate(a.Int(0), a.Int(1), static_cast<off_t>(a.U64(2)), static_cast<off_t>(a.U64(3))));
}

// Files relative to an open folder, or by their descriptor: a path is not looked up a second time. What is
// made is for its owner only.
long Openat(Arguments& a) {
  return Answer(::openat(a.Int(0), a.Path(1), a.Int(2) | O_CLOEXEC, S_IRUSR | S_IWUSR));
}
// A file that was not there.
long Createat(Arguments& a) {
  return Answer(::openat(a.Int(0), a.Path(1), a.Int(2) | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR));
}
long Mkdirat(Arguments& a) { return Answer(::mkdirat(a.Int(0), a.Path(1), static_cast<mode_t>(a.Int(2)))); }
long Unlinkat(Arguments& a) { return Answer(::unlinkat(a.Int(0), a.Path(1), a.Int(2))); }
// The file of an O_PATH descriptor, opened: never another one than that.
long ReopenFile(Arguments& a) {
  char path[kPathSize];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", a.Int(0));
  return Answer(::open(path, a.Int(1) | O_CLOEXEC));
}
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
long Renameat2(Arguments& a) {
  return Answer(::syscall(SYS_renameat2, a.Int(0), a.Path(1), a.Int(0), a.Path(2), a.Int(3)));
}
long Fchown(Arguments& a) {
  return Answer(::fchown(a.Int(0), static_cast<uid_t>(a.Int(1)), static_cast<gid_t>(a.Int(2))));
}
long Fremovexattr(Arguments& a) { return Answer(::fremovexattr(a.Int(0), a.Path(1))); }
// Writes what is dirty of a range in the page cache to the filesystem; no flush of the disk. The range: where
// it begins, and its length, where 0 is all the rest.
long SyncFileRange(Arguments& a) {
  std::uint64_t range[2];
  static_assert(sizeof range == kRangeSize);
  std::memcpy(range, a.data[1], sizeof range);
  return Answer(::sync_file_range(a.Int(0), static_cast<off_t>(range[0]), static_cast<off_t>(range[1]),
                                  static_cast<unsigned>(a.Int(2))));
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

// Without what Node does at its end, which sets the terminal back to what it was at the start.
long ExitAtOnce(Arguments& a) { ::_exit(a.Int(0)); }

long PageSize(Arguments&) { return Answer(::sysconf(_SC_PAGESIZE)); }

using enum Parameter;

constexpr Call kCalls[] = {
    {"loopCtlAdd", LoopCtlAdd, {kFd, kInt}, 0, Effect::kAdds},
    {"loopCtlRemove", LoopCtlRemove, {kFd, kInt}},
    {"loopCtlGetFree", LoopCtlGetFree, {kFd}},
    {"loopSetFd", LoopSetFd, {kFd, kFd}, 0, Effect::kAttaches},
    {"loopChangeFd", LoopChangeFd, {kFd, kFd}},
    {"loopClrFd", LoopClrFd, {kFd}, 0, Effect::kDetaches},
    {"loopConfigure", LoopConfigure, {kFd, kFd, kIn}, sizeof(struct loop_config), Effect::kAttaches},
    {"loopConfigureProbe", LoopConfigureProbe, {kFd}},
    {"loopGetStatus64", LoopGetStatus64, {kFd, kOut}, sizeof(struct loop_info64)},
    {"loopSetStatus64", LoopSetStatus64, {kFd, kIn}, sizeof(struct loop_info64)},
    {"loopSetCapacity", LoopSetCapacity, {kFd}},
    {"loopSetDirectIo", LoopSetDirectIo, {kFd, kInt}},
    {"loopSetBlockSize", LoopSetBlockSize, {kFd, kInt}},
    {"blkGetSize64", BlkGetSize64, {kFd, kOut}, sizeof(std::uint64_t)},
    {"blkGetDiskSeq", BlkGetDiskSeq, {kFd}},
    {"blkSszGet", BlkSszGet, {kFd}},
    {"blkRoGet", BlkRoGet, {kFd}},
    {"blkRoSet", BlkRoSet, {kFd, kInt}},
    {"blkFlsBuf", BlkFlsBuf, {kFd}},
    {"blkRrPart", BlkRrPart, {kFd}},
    {"blkPgAddPartition", BlkPgAddPartition, {kFd, kInt, kU64, kU64}},
    {"blkPgResizePartition", BlkPgResizePartition, {kFd, kInt, kU64, kU64}},
    {"blkPgDelPartition", BlkPgDelPartition, {kFd, kInt}},
    {"fcntlGetFl", FcntlGetFl, {kFd}},
    {"fcntlSetFl", FcntlSetFl, {kFd, kInt}},
    {"fcntlGetSeals", FcntlGetSeals, {kFd}},
    {"flock", Flock, {kFd, kInt}},
    {"leaseProbe", LeaseProbe, {kFd}},
    {"leaseProbeRead", LeaseProbeRead, {kFd}},
    {"ficlone", FiClone, {kFd, kFd}},
    {"fadviseDontNeed", FadviseDontNeed, {kFd}},
    {"statx", Statx, {kFd, kOut}, sizeof(struct statx)},
    {"statxCached", StatxCached, {kFd, kOut}, sizeof(struct statx)},
    {"statxPath", StatxPath, {kPath, kOut}, sizeof(struct statx)},
    {"statxLink", StatxLink, {kPath, kOut}, sizeof(struct statx)},
    {"create", Create, {kPath, kInt, kInt}, 0, Effect::kCreates},
    {"pread", Pread, {kFd, kRoom, kU64}},
    {"pwrite", Pwrite, {kFd, kBytes, kU64}},
    {"ftruncate", Ftruncate, {kFd, kU64}},
    {"fchmod", Fchmod, {kFd, kInt}},
    {"access", Access, {kPath, kInt}},
    {"link", Link, {kPath, kPath}, 0, Effect::kNames},
    {"rename", Rename, {kPath, kPath}},
    {"unlink", Unlink, {kPath}},
    {"close", Close, {kFd}, 0, Effect::kCloses},
    {"fsync", Fsync, {kFd}},
    {"open", Open, {kPath, kInt}, 0, Effect::kOpens},
    {"openRegular", OpenRegular, {kPath, kInt}, 0, Effect::kOpens},
    {"openLoop", OpenLoop, {kInt, kInt}, 0, Effect::kOpens},
    {"dup3", Dup3, {kFd, kFd}},
    {"vacate", Vacate, {kFd}},
    {"sysfsLinks", SysfsLinks, {kInt}},
    {"sysfsLoop", SysfsLoop, {kInt}},
    {"sysfsAutoclear", SysfsAutoclear, {kInt}},
    {"sysfsSectorsWritten", SysfsSectorsWritten, {kInt}},
    {"sysfsBackingFile", SysfsBackingFile, {kInt, kOut}, kAttributeSize},
    {"sysfsBackingFileShort", SysfsBackingFileShort, {kInt, kOut}, kShortSize},
    {"loopGetFlags", LoopGetFlags, {kFd}},
    {"mknodBlockAt", MknodBlockAt, {kFd, kPath, kInt, kInt}},
    {"mknodBlock", MknodBlock, {kPath, kInt, kInt}, 0, Effect::kNames},
    {"nsGetUserNs", NsGetUserNs, {kFd, kOut}, sizeof(std::uint64_t)},
    {"fsopen", Fsopen, {kPath}, 0, Effect::kOpens},
    {"fsconfigFlag", FsconfigFlag, {kFd, kPath}},
    {"fsconfigString", FsconfigString, {kFd, kPath, kPath}},
    {"fsconfigCreate", FsconfigCreate, {kFd}},
    {"fsMessage", FsMessage, {kFd, kOut}, kMessageSize},
    {"fsmount", Fsmount, {kFd, kInt}, 0, Effect::kOpens},
    {"moveMount", MoveMount, {kFd, kFd}},
    {"umountAt", UmountAt, {kFd, kPath, kInt}},
    {"statxMount", StatxMount, {kFd, kPath, kInt, kOut}, sizeof(struct statx)},
    {"statxMountUnique", StatxMountUnique, {kFd, kPath, kInt, kOut}, sizeof(struct statx)},
    {"openat", Openat, {kFd, kPath, kInt}, 0, Effect::kOpens},
    {"mkdirat", Mkdirat, {kFd, kPath, kInt}, 0, Effect::kMakes},
    {"unlinkat", Unlinkat, {kFd, kPath, kInt}},
    {"readLink", ReadLink, {kFd, kOut}, kAttributeSize},
    {"fallocate", Fallocate, {kFd, kInt, kU64, kU64}},
    {"createat", Createat, {kFd, kPath, kInt}, 0, Effect::kCreates},
    {"reopenFile", ReopenFile, {kFd, kInt}, 0, Effect::kOpens},
    {"linkFile", LinkFile, {kFd, kFd, kPath}, 0, Effect::kNames},
    {"linkProcFile", LinkProcFile, {kFd, kFd, kPath}, 0, Effect::kNames},
    {"renameat2", Renameat2, {kFd, kPath, kPath, kInt}, 0, Effect::kMoves},
    {"fchown", Fchown, {kFd, kInt, kInt}},
    {"fremovexattr", Fremovexattr, {kFd, kPath}},
    {"syncFileRange", SyncFileRange, {kFd, kIn, kInt}, kRangeSize},
    {"fstatfs", Fstatfs, {kFd, kOut}, kStatfsSize},
    {"copyExtents", CopyExtents, {kFd, kFd, kOut}, kCopySize},
    {"compareExtents", CompareExtents, {kFd, kFd, kOut}, kComparisonSize},
    {"processUse", ReadProcessUse, {kInt, kOut}, kProcessUseSize},
    {"signalSender", SignalSender, {kInt}},
    {"exitAtOnce", ExitAtOnce, {kInt}},
    {"pageSize", PageSize, {}},
};

}  // namespace

std::span<const Call> Calls() { return kCalls; }

void DetachDevice(int fd) {
  if (NeedLoopDevice(fd) == 0) Ioctl(fd, LOOP_CLR_FD, 0L);
}

void RemoveDevice(int control, int number) {
  if (NeedLoopControl(control) == 0) Ioctl(control, LOOP_CTL_REMOVE, static_cast<long>(number));
}

}  // namespace loopctl
