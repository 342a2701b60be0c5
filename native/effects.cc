#include "effects.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>

namespace loopctl {
namespace {

// 0, which is no block device's, where it cannot be told.
dev_t DeviceOf(int fd) {
  struct stat st{};
  return ::fstat(fd, &st) == 0 && S_ISBLK(st.st_mode) ? st.st_rdev : 0;
}

const char* LastPath(const Call& call, const Arguments& arguments) {
  for (std::size_t i = kMaxParameters; i-- > 0;) {
    if (call.parameters[i] == Parameter::kPath) return arguments.Path(i);
  }
  return "";
}

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
      std::erase_if(attached_,
                    [device = DeviceOf(fd)](const Attachment& each) { return each.device == device; });
      break;
    case Effect::kAdds:
      added_.push_back({fd, static_cast<int>(answer)});
      break;
    case Effect::kCreates:
      opened_.push_back(static_cast<int>(answer));
      [[fallthrough]];
    case Effect::kNames:
      named_.emplace_back(LastPath(call, arguments));
      break;
    case Effect::kMakes:
      made_.push_back({fd, LastPath(call, arguments)});
      break;
  }
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

void Effects::Undo() {
  for (const Attachment& each : attached_) Detach(each);
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
  for (const std::string& path : named_) ::unlink(path.c_str());
  *this = Effects();
}

}  // namespace loopctl
