// One environment of JavaScript (the main thread, or one of worker_threads): what it has under way, and the
// descriptors that it has open, which are closed when it ends.
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "lock.h"
#include "task.h"
#include "workers.h"

namespace loopctl {

// A promise of the answer. With an exception pending where no thread is to be had. `out` is kept until then.
Napi::Value Start(Napi::Env env, std::unique_ptr<Task> task, Napi::Value out,
                  Urgency urgency = Urgency::kUsual);

// One row of Calls(), now.
long MakeNow(Napi::Env env, const Call& call, Arguments& arguments);

// Adds lastCallSync, waitSync, giveUpSync, leaveSync and workersSync; called before anything is started.
void InitEnvironment(Napi::Env env, Napi::Object exports);

class Environment {
 public:
  static Environment& Of(napi_env env) {
    void* data = nullptr;
    ::napi_get_instance_data(env, &data);
    return *static_cast<Environment*>(data);
  }

  static bool Make(napi_env env) {
    auto* made = new Environment(env);
    napi_value name = nullptr;
    ::napi_create_string_utf8(env, "loopctl", NAPI_AUTO_LENGTH, &name);
    if (::napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, made, Settle,
                                          &made->function_) != napi_ok) {
      delete made;
      return false;
    }
    ::napi_unref_threadsafe_function(env, made->function_);
    ::napi_set_instance_data(env, made, nullptr, nullptr);
    // Added after the function, and so called before that goes.
    ::napi_add_env_cleanup_hook(env, End, made);
    return true;
  }

  bool Start(std::unique_ptr<Task> task, napi_value out, Urgency urgency, napi_value* promise);
  // The answer, where the call comes back in that time; else nullptr.
  napi_value Wait(double id, std::int64_t ms);
  // As giveUpSync answers.
  int GiveUp(double id);
  double last() const { return last_; }

  // On the task's thread, which is its owner again where the environment has ended: false.
  bool Deliver(Task& task) {
    Lock lock(mutex_);
    if (!is_open_) return false;
    task.is_delivered_ = true;
    done_.Push(task);
    delivered_.Signal();
    if (is_signalled_) return true;
    // Without the lock, which the thread of JavaScript takes at once when it is woken.
    is_signalled_ = true;
    signalling_.fetch_add(1, std::memory_order_relaxed);
    lock.Release();
    ::napi_call_threadsafe_function(function_, nullptr, napi_tsfn_nonblocking);
    signalling_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  // On the task's thread, after Deliver() has answered false: undoes and deletes it.
  void Drop(Task& task);

  void Own(int fd) {
    const Lock lock(mutex_);
    const auto at = static_cast<std::size_t>(fd);
    if (at >= owned_.size()) owned_.resize(at + 64);
    owned_[at] = true;
  }

  void Disown(int fd) {
    const Lock lock(mutex_);
    const auto at = static_cast<std::size_t>(fd);
    if (fd >= 0 && at < owned_.size()) owned_[at] = false;
  }

  void Acquire() { uses_.fetch_add(1, std::memory_order_relaxed); }
  void Release() {
    if (uses_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 private:
  struct Slot {
    Task* task = nullptr;
    std::uint32_t round = 0;
  };

  class LastTask;

  explicit Environment(napi_env env) : env_(env) {}
  ~Environment() = default;

  static void Settle(napi_env env, napi_value, void* self, void*) {
    if (env != nullptr) static_cast<Environment*>(self)->SettleAll();
  }
  static void End(void* self) { static_cast<Environment*>(self)->End(); }

  void SettleAll();
  napi_value SettleOne(Task& task);
  void End();
  // Nullptr where it has settled.
  Task* Find(double id) const;
  void Occupy(Task& task);
  void Vacate(Task& task);
  void Expect();
  void ExpectNoMore();
  void Forget(Task& task);
  void Discard(Task& task);
  bool IsAwaited(const Task& task) const;

  const napi_env env_;
  napi_threadsafe_function function_ = nullptr;
  std::atomic<unsigned> uses_ = 1;

  // Only the thread of JavaScript has to do with these.
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> vacant_;
  double last_ = -1;
  unsigned expected_ = 0;

  // Who holds it may take that of the workers; never the other way round.
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  Condition delivered_;
  Condition ended_;
  bool is_open_ = true;
  bool is_signalled_ = false;
  std::atomic<unsigned> signalling_ = 0;  // threads that are in a call of function_
  unsigned awaited_ = 0;                  // tasks that the end waits for
  TaskList done_;
  std::vector<bool> owned_;  // by descriptor
};

}  // namespace loopctl
