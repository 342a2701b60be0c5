// A mutex for as long as a block lasts; with the condition variables of pthread.h, which std's cannot wait on
// by the monotonic clock with every libc that is supported.
#pragma once

#include <pthread.h>

#include <cerrno>
#include <cstdint>
#include <ctime>

namespace loopctl {

// A mutex, for as long as a block lasts.
class Lock {
 public:
  enum NotYet { kNotYet };

  explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { Take(); }
  Lock(pthread_mutex_t& mutex, NotYet) : mutex_(mutex) {}
  ~Lock() {
    if (is_held_) Release();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  bool is_held() const { return is_held_; }

  void Take() {
    ::pthread_mutex_lock(&mutex_);
    is_held_ = true;
  }
  void Release() {
    is_held_ = false;
    ::pthread_mutex_unlock(&mutex_);
  }

 private:
  pthread_mutex_t& mutex_;
  bool is_held_ = false;
};

// By the monotonic clock.
inline std::int64_t NowMs() {
  struct timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000 + now.tv_nsec / 1'000'000;
}

// A condition variable.
class Condition {
 public:
  Condition() {
    pthread_condattr_t attributes;
    ::pthread_condattr_init(&attributes);
    ::pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    ::pthread_cond_init(&condition_, &attributes);
    ::pthread_condattr_destroy(&attributes);
  }
  ~Condition() { ::pthread_cond_destroy(&condition_); }
  Condition(const Condition&) = delete;
  Condition& operator=(const Condition&) = delete;

  void Signal() { ::pthread_cond_signal(&condition_); }

  // False where the time is up. Can return before that, for no reason.
  bool WaitUntil(pthread_mutex_t& mutex, std::int64_t end_ms) {
    struct timespec end{};
    end.tv_sec = static_cast<time_t>(end_ms / 1'000);
    end.tv_nsec = static_cast<long>(end_ms % 1'000) * 1'000'000;
    return ::pthread_cond_timedwait(&condition_, &mutex, &end) != ETIMEDOUT;
  }

 private:
  pthread_cond_t condition_;
};

}  // namespace loopctl
