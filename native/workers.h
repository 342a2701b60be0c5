// The threads of the addon, for calls that can wait in the kernel. They are started as they are needed and
// end when they are idle; none is ever waited for. A call that JavaScript gives up on is left to its thread,
// which undoes what the call did when that has come back. libuv's pool is not used: it belongs to the
// program, and a process does not end while one of its threads is in a call.
#pragma once

#include <pthread.h>

#include <cstdint>

#include "lock.h"
#include "task.h"

namespace loopctl {

// What a call may do although so many do not come back that others are refused: closing must always be
// possible.
enum class Urgency : std::uint8_t { kUsual, kClosing };

// Those of the process, for all its environments.
class Workers {
 public:
  // Never destroyed: threads use it until the process has ended.
  static Workers& Get();

  struct Counts {
    unsigned working = 0;
    unsigned idle = 0;
    unsigned written_off = 0;
    unsigned given_up = 0;
    unsigned queued = 0;
    std::uint64_t made = 0;
  };

  enum class GivenUp : std::uint8_t { kHasComeBack, kHasNotBegun, kIsRunning };

  // False where no thread is to be had.
  bool Submit(Task& task, Urgency urgency);

  // What is running is left to its thread, which is replaced; what has not begun never will.
  GivenUp GiveUp(Task& task);

  // Whether a call that was given up on uses the descriptor, which it then closes when it has come back.
  bool Leave(int fd);

  // The task closes the descriptor itself: it is not left to it any more.
  void CloseLeft(Task& task, int fd);

  Counts counts();

 private:
  static void* RunWorker(void* worker);
  static void* RunWatch(void*);

  void Work(Worker& self);

  // Locked. False where the thread is not needed any more.
  bool GetNext(Worker& self);
  bool TakeQueued(Worker& worker);
  void Begin(Task& task, Worker& worker);

  // Starts a thread; false where none is to be had.
  bool Hire(Task& task, Lock& lock);
  void Enqueue(Task& task, Lock& lock);

  // For as long as something has to wait for a thread.
  void Watch();

  // Locked, and so again when it returns.
  bool StartQueued(Lock& lock);

  // Writes off the thread that has been in one call for longest, where that is long.
  bool Relieve();

  void WriteOff(Worker& worker);
  void Finish(Task& task);
  bool LeaveLocked(int fd);

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  Condition watch_;
  bool is_watched_ = false;
  Counts counts_;
  TaskList queue_;
  TaskList running_;  // the oldest first
  Worker* idle_ = nullptr;
  Worker* free_ = nullptr;
};

}  // namespace loopctl
