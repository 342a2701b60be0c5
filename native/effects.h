// What calls have done that somebody has to answer for: descriptors that are open, devices that are attached
// or made, names and folders in a directory. Where nobody waits for the calls any more, it is undone without
// JavaScript.
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

  // Detaches, closes, removes, unlinks (folders only where they are empty) and moves back; then there is
  // nothing left to be undone.
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

  // A name in a folder, where that is given by its descriptor, and the file that has it; -1 where the folder
  // is closed since. `from` is what the file was called before, if it was.
  struct Naming {
    int folder;
    std::string name;
    dev_t device;
    ino_t inode;
    std::string from;
    unsigned flags;
  };

  void Name(int folder, const char* name, const char* from, unsigned flags);
  // A folder that was made in the one of the descriptor; -1 where that is closed since.
  struct Folder {
    int parent;
    std::string name;
  };

  void Closed(int fd);
  void Detach(const Attachment& attachment) const;
  static void TakeBack(const Naming& naming);

  std::vector<int> opened_;
  std::vector<Attachment> attached_;
  std::vector<Addition> added_;
  std::vector<Naming> named_;
  std::vector<Folder> made_;
};

}  // namespace loopctl
