#include "processes.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>

namespace loopctl {
namespace {

constexpr std::size_t kMostDevices = 257;  // a device and its partitions
constexpr std::size_t kPathSize = 64;

enum Found : std::uint8_t {
  kOpen = 1,    // a descriptor of the device itself
  kWithin = 2,  // a file or folder on the filesystem of the device: a descriptor, or cwd, root, exe
};

struct ProcessUse {
  std::uint64_t mount_namespace;  // answered: its inode; 0 where it may not be looked at
  std::uint32_t device_count;
  std::int32_t ignored[3];  // descriptors that are not looked at; -1: none
  std::uint32_t reserved;
  std::uint32_t devices[kMostDevices];   // major << 20 | minor
  std::uint8_t found[kMostDevices + 3];  // answered, for each device
};
static_assert(sizeof(ProcessUse) == kProcessUseSize);

// Asks for nothing but what the kernel has at hand (no bit of the mask, no synchronising), so that no server
// is waited for, whatever filesystem the link leads to.
bool Look(const char* path, struct statx& st) {
  return ::syscall(SYS_statx, AT_FDCWD, path, AT_STATX_DONT_SYNC, 0, &st) == 0;
}

std::uint32_t Number(std::uint32_t major, std::uint32_t minor) { return major << 20 | minor; }

void Note(ProcessUse& use, std::uint32_t device, Found found) {
  const std::span known(use.devices, std::min<std::size_t>(use.device_count, kMostDevices));
  const auto at = std::find(known.begin(), known.end(), device);
  if (at != known.end()) use.found[at - known.begin()] |= found;
}

void LookAt(const char* path, ProcessUse& use) {
  struct statx st{};
  if (!Look(path, st)) return;
  if (S_ISBLK(st.stx_mode)) {
    Note(use, Number(st.stx_rdev_major, st.stx_rdev_minor), kOpen);
  }
  Note(use, Number(st.stx_dev_major, st.stx_dev_minor), kWithin);
}

}  // namespace

long ReadProcessUse(Arguments& a) {
  const int pid = a.Int(0);
  ProcessUse use;
  std::memcpy(&use, a.data[1], sizeof use);
  char path[kPathSize];
  struct statx st{};
  std::snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
  if (Look(path, st)) use.mount_namespace = st.stx_ino;
  for (const char* link : {"cwd", "root", "exe"}) {
    std::snprintf(path, sizeof path, "/proc/%d/%s", pid, link);
    LookAt(path, use);
  }
  std::snprintf(path, sizeof path, "/proc/%d/fd", pid);
  DIR* descriptors = ::opendir(path);
  if (descriptors == nullptr) return -errno;
  while (const dirent* entry = ::readdir(descriptors)) {
    char* end = nullptr;
    const long fd = std::strtol(entry->d_name, &end, 10);
    if (*end != '\0' ||
        std::find(std::begin(use.ignored), std::end(use.ignored), fd) != std::end(use.ignored))
      continue;
    std::snprintf(path, sizeof path, "/proc/%d/fd/%ld", pid, fd);
    LookAt(path, use);
  }
  ::closedir(descriptors);
  std::memcpy(a.data[1], &use, sizeof use);
  return 0;
}

}  // namespace loopctl
