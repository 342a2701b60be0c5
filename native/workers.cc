#include "workers.h"

#include <unistd.h>
#include <csignal>
#include <utility>
#include <vector>

#include "environment.h"

namespace loopctl {
namespace {

constexpr unsigned kMostWorking = 32;
constexpr unsigned kMostWrittenOff = 128;
constexpr std::int64_t kIdleMs = 2'000;
// A call that takes longer does not keep others waiting: where all threads are in such, there are more
// threads.
constexpr std::int64_t kSlowMs = 100;
constexpr std::size_t kStackSize = 256 * 1024;

// Detached, with every signal blocked: those are for the program's own threads.
bool Launch(void* (*run)(void*), void* argument) {
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  pthread_attr_t attributes;
  if (::pthread_attr_init(&attributes) != 0) return false;
  ::pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  ::pthread_attr_setstacksize(&attributes, kStackSize);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread{};
  const int error = ::pthread_create(&thread, &attributes, run, argument);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_attr_destroy(&attributes);
  if (error == 0) ::pthread_setname_np(thread, "loopctl");
  return error == 0;
}

}  // namespace

// A thread. Never freed, but used again: it may be signalled when it has just ended.
struct Worker {
  Condition wake;
  Task* task = nullptr;
  Worker* next = nullptr;
  bool is_written_off = false;
};

Workers& Workers::Get() {
  static Workers& workers = *new Workers;
  return workers;
}

bool Workers::Submit(Task& task, Urgency urgency) {
  Lock lock(mutex_);
  if (urgency == Urgency::kUsual && counts_.given_up >= kMostWrittenOff) return false;
  counts_.made++;
  if (Worker* worker = idle_) {
    idle_ = worker->next;
    counts_.idle--;
    counts_.working++;
    Begin(task, *worker);
    lock.Release();
    worker->wake.Signal();
    return true;
  }
  if (counts_.working < kMostWorking || Relieve()) {
    if (Hire(task, lock)) return true;
    if (counts_.working == 0) return false;
  }
  Enqueue(task, lock);
  return true;
}

Workers::GivenUp Workers::GiveUp(Task& task) {
  Lock lock(mutex_);
  if (task.state_ == Task::State::kDone) return GivenUp::kHasComeBack;
  if (task.state_ == Task::State::kQueued) {
    queue_.Remove(task);
    counts_.queued--;
    return GivenUp::kHasNotBegun;
  }
  if (task.is_given_up()) return GivenUp::kIsRunning;
  task.given_up_.store(true, std::memory_order_relaxed);
  counts_.given_up++;
  WriteOff(*task.worker_);
  StartQueued(lock);
  return GivenUp::kIsRunning;
}

bool Workers::Leave(int fd) {
  const Lock lock(mutex_);
  return LeaveLocked(fd);
}

void Workers::CloseLeft(Task& task, int fd) {
  const Lock lock(mutex_);
  std::erase(task.left_, fd);
}

Workers::Counts Workers::counts() {
  const Lock lock(mutex_);
  return counts_;
}

void* Workers::RunWorker(void* worker) {
  Get().Work(*static_cast<Worker*>(worker));
  return nullptr;
}

void* Workers::RunWatch(void*) {
  Get().Watch();
  return nullptr;
}

void Workers::Work(Worker& self) {
  Lock lock(mutex_, Lock::kNotYet);
  do {
    Task& task = *self.task;
    self.task = nullptr;
    task.Run();
    Finish(task);
    lock.Take();
    if (!GetNext(self)) break;
    lock.Release();
  } while (true);
  self.next = free_;
  free_ = &self;
}

bool Workers::GetNext(Worker& self) {
  if (self.is_written_off) {
    self.is_written_off = false;
    counts_.written_off--;
    if (queue_.empty() || counts_.working >= kMostWorking) return false;
    counts_.working++;
  }
  if (TakeQueued(self)) return true;
  counts_.working--;
  counts_.idle++;
  self.next = idle_;
  idle_ = &self;
  const std::int64_t end = NowMs() + kIdleMs;
  while (self.task == nullptr) {
    if (self.wake.WaitUntil(mutex_, end) || self.task != nullptr) continue;
    Worker** link = &idle_;
    while (*link != &self) link = &(*link)->next;
    *link = self.next;
    counts_.idle--;
    return false;
  }
  return true;
}

bool Workers::TakeQueued(Worker& worker) {
  Task* task = queue_.first();
  if (task == nullptr) return false;
  queue_.Remove(*task);
  counts_.queued--;
  Begin(*task, worker);
  return true;
}

void Workers::Begin(Task& task, Worker& worker) {
  task.state_ = Task::State::kRunning;
  task.started_ = NowMs();
  task.worker_ = &worker;
  running_.Push(task);
  worker.task = &task;
}

bool Workers::Hire(Task& task, Lock& lock) {
  Worker* worker = free_;
  if (worker != nullptr) {
    free_ = worker->next;
  } else {
    worker = new Worker;
  }
  counts_.working++;
  Begin(task, *worker);
  lock.Release();
  if (Launch(RunWorker, worker)) return true;
  lock.Take();
  running_.Remove(task);
  task.state_ = Task::State::kQueued;
  if (worker->is_written_off) {
    worker->is_written_off = false;
    counts_.written_off--;
  } else {
    counts_.working--;
  }
  worker->task = nullptr;
  worker->next = free_;
  free_ = worker;
  return false;
}

void Workers::Enqueue(Task& task, Lock& lock) {
  queue_.Push(task);
  counts_.queued++;
  if (is_watched_) return;
  is_watched_ = true;
  lock.Release();
  if (Launch(RunWatch, nullptr)) return;
  lock.Take();
  is_watched_ = false;
}

void Workers::Watch() {
  Lock lock(mutex_);
  while (!queue_.empty()) {
    watch_.WaitUntil(mutex_, NowMs() + kSlowMs);
    while (!queue_.empty() && Relieve() && StartQueued(lock)) {
    }
  }
  is_watched_ = false;
}

bool Workers::StartQueued(Lock& lock) {
  Task* task = queue_.first();
  if (task == nullptr || counts_.working >= kMostWorking) return false;
  queue_.Remove(*task);
  counts_.queued--;
  if (Hire(*task, lock)) {
    lock.Take();
    return true;
  }
  // A thread that gets free takes it; or it is given up on.
  queue_.PushFirst(*task);
  counts_.queued++;
  return false;
}

bool Workers::Relieve() {
  if (counts_.written_off >= kMostWrittenOff) return false;
  const std::int64_t since = NowMs() - kSlowMs;
  for (Task* task = running_.first(); task != nullptr && task->started_ <= since;
       task = TaskList::After(*task)) {
    if (task->worker_->is_written_off) continue;
    WriteOff(*task->worker_);
    return true;
  }
  return false;
}

void Workers::WriteOff(Worker& worker) {
  if (worker.is_written_off || counts_.written_off >= kMostWrittenOff) return;
  worker.is_written_off = true;
  counts_.working--;
  counts_.written_off++;
}

bool Workers::LeaveLocked(int fd) {
  for (Task* task = running_.first(); task != nullptr; task = TaskList::After(*task)) {
    if (!task->is_given_up() || !task->Uses(fd)) continue;
    task->left_.push_back(fd);
    return true;
  }
  return false;
}

void Workers::Finish(Task& task) {
  Environment& environment = *task.environment_;
  {
    Lock lock(mutex_);
    task.state_ = Task::State::kDone;
    if (!task.is_given_up()) running_.Remove(task);
  }
  if (task.is_given_up()) {
    task.Undo();
    std::vector<int> closed;
    {
      const Lock lock(mutex_);
      counts_.given_up--;
      running_.Remove(task);
      for (const int fd : std::exchange(task.left_, {})) {
        if (!LeaveLocked(fd)) closed.push_back(fd);
      }
    }
    for (const int fd : closed) {
      environment.Disown(fd);
      ::close(fd);
    }
  }
  if (!environment.Deliver(task)) environment.Drop(task);
}

}  // namespace loopctl
