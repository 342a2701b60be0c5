#include "effects.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <ranges>

namespace loopctl {
namespace {

// 0, which is no block device's, where it cannot be told.
dev_t DeviceOf(int fd) {
  struct stat st{};
  return ::fstat(fd, &st) == 0 && S_ISBLK(st.st_mode) ? st.st_rdev : 0;
}

std::size_t LastPath(const Call& call) {
  std::size_t i = kMaxParameters - 1;
  while (call.parameters[i] != Parameter::kPath) --i;
  return i;
}

int FolderOf(const Call& call, const Arguments& arguments, std::size_t path) {
  return path > 0 && call.parameters[path - 1] == Parameter::kFd ? arguments.Int(path - 1) : AT_FDCWD;
}

// A descriptor that is no folder's, nor the one that stands for the working directory.
constexpr int kClosed = -1;

}  // namespace

void Effects::Note(const Call& call, const Arguments& arguments, long answer) {
  // The descriptor is gone also where close(2) fails.
  if (call.effect == Effect::kCloses) Closed(arguments.Int(0));
  if (answer < 0) return;
  const int fd = arguments.Int(0);
  switch (call.effect) {
    case Effect::kNone:
    case Effect::kCloses:
      break;
    case Effect::kOpens:
      opened_.push_back(static_cast<int>(answer));
      break;
    case Effect::kAttaches:
      attached_.push_back({fd, DeviceOf(fd)});
      break;
    case Effect::kDetaches:
      if (attached_.empty()) break;
      std::erase_if(attached_,
                    [device = DeviceOf(fd)](const Attachment& each) { return each.device == device; });
      break;
    case Effect::kAdds:
      added_.push_back({fd, static_cast<int>(answer)});
      break;
    case Effect::kCreates:
      opened_.push_back(static_cast<int>(answer));
      [[fallthrough]];
    case Effect::kNames: {
      const std::size_t path = LastPath(call);
      Name(FolderOf(call, arguments, path), arguments.Path(path), "", 0);
      break;
    }
    case Effect::kMoves:
      Name(fd, arguments.Path(2), arguments.Path(1), static_cast<unsigned>(arguments.Int(3)));
      break;
    case Effect::kMakes:
      made_.push_back({fd, arguments.Path(LastPath(call))});
      break;
  }
}

void Effects::Name(int folder, const char* name, const char* from, unsigned flags) {
  struct stat st{};
  if (::fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW) != 0) return;
  named_.push_back({folder, name, st.st_dev, st.st_ino, from, flags});
}

bool Effects::HasOpened(int fd) const {
  return std::find(opened_.begin(), opened_.end(), fd) != opened_.end();
}

void Effects::Closed(int fd) {
  std::erase(opened_, fd);
  for (Attachment& each : attached_) {
    if (each.fd == fd) each.fd = -1;
  }
  for (Addition& each : added_) {
    if (each.control == fd) each.control = -1;
  }
  for (Naming& each : named_) {
    if (each.folder == fd) each.folder = kClosed;
  }
  for (Folder& each : made_) {
    if (each.parent == fd) each.parent = -1;
  }
}

// By the descriptor that attached it, or by another of the same device where that one is closed.
void Effects::Detach(const Attachment& attachment) const {
  if (attachment.device == 0) return;
  int fd = attachment.fd;
  if (fd < 0) {
    const auto same = std::find_if(opened_.begin(), opened_.end(),
                                   [&](int each) { return DeviceOf(each) == attachment.device; });
    if (same == opened_.end()) return;
    fd = *same;
  }
  if (DeviceOf(fd) == attachment.device) DetachDevice(fd);
}

// Not where another file has the name by now. What a move has replaced is gone: that one is left as it is.
void Effects::TakeBack(const Naming& naming) {
  struct stat st{};
  if (::fstatat(naming.folder, naming.name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) return;
  if (st.st_dev != naming.device || st.st_ino != naming.inode) return;
  if (naming.from.empty()) {
    ::unlinkat(naming.folder, naming.name.c_str(), 0);
  } else if (naming.flags != 0) {
    ::syscall(SYS_renameat2, naming.folder, naming.name.c_str(), naming.folder, naming.from.c_str(),
              naming.flags);
  }
}

void Effects::Undo() {
  for (const Attachment& each : attached_) Detach(each);
  for (const Naming& each : std::views::reverse(named_)) TakeBack(each);
  for (const Folder& each : made_) {
    if (each.parent >= 0) ::unlinkat(each.parent, each.name.c_str(), AT_REMOVEDIR);
  }
  // A device that is open cannot be removed, and loop-control has to be open to remove it.
  const auto removes = [this](int fd) {
    return std::any_of(added_.begin(), added_.end(),
                       [fd](const Addition& each) { return each.control == fd; });
  };
  for (const int fd : opened_) {
    if (!removes(fd)) ::close(fd);
  }
  for (const Addition& each : added_) {
    if (each.control >= 0) RemoveDevice(each.control, each.number);
  }
  for (const int fd : opened_) {
    if (removes(fd)) ::close(fd);
  }
  *this = Effects();
}

}  // namespace loopctl
