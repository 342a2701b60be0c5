// What is given to a thread of the addon.
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "calls.h"
#include "effects.h"

namespace loopctl {

class Environment;
struct Worker;

// A call, or several, for one thread. Made, and asked for its answer, by the thread of JavaScript.
class Task {
 public:
  Task() = default;
  virtual ~Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

 protected:
  // On a thread of the addon.
  virtual void Run() = 0;
  // There, after Run() of a task that was given up on.
  virtual void Undo() { effects_.Undo(); }
  // Whether a descriptor that JavaScript handed over is among the arguments.
  virtual bool Uses(int) const { return false; }
  // On the thread of JavaScript; `out` is what Start() was given.
  virtual napi_value Answer(napi_env env, napi_value out) = 0;

  // One row of Calls(), its effects noted.
  long Make(const Call& call, Arguments& arguments);

  bool is_given_up() const { return given_up_.load(std::memory_order_relaxed); }

 private:
  friend class Environment;
  friend class Workers;
  friend class TaskList;

  enum class State : std::uint8_t { kQueued, kRunning, kDone };

  Effects effects_;
  Environment* environment_ = nullptr;
  napi_deferred deferred_ = nullptr;
  napi_ref out_ = nullptr;
  std::uint32_t slot_ = 0;
  bool is_delivered_ = false;
  bool is_awaited_ = false;  // by an environment that ends

  // These are the pool's.
  std::atomic<bool> given_up_ = false;
  State state_ = State::kQueued;
  bool is_written_off_ = false;
  std::int64_t started_ = 0;
  Worker* worker_ = nullptr;
  std::vector<int> left_;  // descriptors to be closed when it has come back
  Task* previous_ = nullptr;
  Task* next_ = nullptr;
};

// Chained by their own members.
class TaskList {
 public:
  bool empty() const { return first_ == nullptr; }
  Task* first() const { return first_; }
  static Task* After(const Task& task) { return task.next_; }

  void Push(Task& task) {
    task.previous_ = last_;
    task.next_ = nullptr;
    (last_ == nullptr ? first_ : last_->next_) = &task;
    last_ = &task;
  }

  void PushFirst(Task& task) {
    task.previous_ = nullptr;
    task.next_ = first_;
    (first_ == nullptr ? last_ : first_->previous_) = &task;
    first_ = &task;
  }

  void Remove(Task& task) {
    (task.previous_ == nullptr ? first_ : task.previous_->next_) = task.next_;
    (task.next_ == nullptr ? last_ : task.next_->previous_) = task.previous_;
    task.previous_ = task.next_ = nullptr;
  }

 private:
  Task* first_ = nullptr;
  Task* last_ = nullptr;
};

}  // namespace loopctl
