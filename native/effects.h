// What calls have done that somebody has to answer for: descriptors that are open, devices that are attached
// or made, names and folders in a directory. Where nobody waits for the calls any more, it is undone without JavaScript.
#pragma once

#include <sys/types.h>
#include <string>
#include <vector>

#include "calls.h"

namespace loopctl {

class Effects {
 public:
  // After the call: `answer` is what it answered.
  void Note(const Call& call, const Arguments& arguments, long answer);

  // The descriptors that were opened and are still open.
  const std::vector<int>& opened() const { return opened_; }
  bool HasOpened(int fd) const;

  // Detaches, closes, removes and unlinks, folders only where they are empty; then there is nothing left to be undone.
  void Undo();

 private:
  // A device that was attached by the descriptor; -1 where that is closed since.
  struct Attachment {
    int fd;
    dev_t device;
  };
  // A device that was made by the descriptor of loop-control; -1 where that is closed since.
  struct Addition {
    int control;
    int number;
  };

  // A folder that was made in the one of the descriptor; -1 where that is closed since.
  struct Folder {
    int parent;
    std::string name;
  };

  void Closed(int fd);
  void Detach(const Attachment& attachment) const;

  std::vector<int> opened_;
  std::vector<Attachment> attached_;
  std::vector<Addition> added_;
  std::vector<std::string> named_;
  std::vector<Folder> made_;
};

}  // namespace loopctl
