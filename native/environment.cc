#include "environment.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmath>
#include <utility>

namespace loopctl {
namespace {

// How long the end of an environment waits for what it has under way to be undone, and to be closed.
constexpr std::int64_t kEndMs = 1'000;

// An environment that ends here ends with the process, which closes all by itself.
bool IsMainThread() { return ::syscall(SYS_gettid) == ::getpid(); }

// Of the calls that are under way: what one is called by JavaScript is made of these.
constexpr double kSlots = 1 << 24;
constexpr std::uint32_t kRounds = 1 << 28;

}  // namespace

long Task::Make(const Call& call, Arguments& arguments) {
  // Not after close(2): the number may be another's by then.
  if (call.effect == Effect::kCloses && !effects_.HasOpened(arguments.Int(0))) {
    environment_->Disown(arguments.Int(0));
    // Given up on before it was disowned.
    if (is_given_up()) Workers::Get().CloseLeft(*this, arguments.Int(0));
  }
  const long answer = call.run(arguments);
  if (call.effect != Effect::kNone) effects_.Note(call, arguments, answer);
  return answer;
}

long MakeNow(Napi::Env env, const Call& call, Arguments& arguments) {
  if (call.effect == Effect::kNone) return call.run(arguments);
  if (call.effect == Effect::kCloses) Environment::Of(env).Disown(arguments.Int(0));
  const long answer = call.run(arguments);
  const bool opens = call.effect == Effect::kOpens || call.effect == Effect::kCreates;
  if (opens && answer >= 0) Environment::Of(env).Own(static_cast<int>(answer));
  return answer;
}

bool Environment::Start(std::unique_ptr<Task> task, napi_value out, Urgency urgency, napi_value* promise) {
  if (::napi_create_promise(env_, &task->deferred_, promise) != napi_ok) return false;
  if (out != nullptr) ::napi_create_reference(env_, out, 1, &task->out_);
  task->environment_ = this;
  Acquire();
  Occupy(*task);
  Expect();
  if (Workers::Get().Submit(*task, urgency)) {
    // Deletes itself, or is deleted once it has settled.
    static_cast<void>(task.release());
    return true;
  }
  ExpectNoMore();
  Discard(*task);
  return false;
}

// What has not begun, and never will.
void Environment::Discard(Task& task) {
  napi_value undefined = nullptr;
  ::napi_get_undefined(env_, &undefined);
  ::napi_resolve_deferred(env_, task.deferred_, undefined);
  Vacate(task);
  Forget(task);
  Release();
}

void Environment::Occupy(Task& task) {
  if (vacant_.empty()) {
    task.slot_ = static_cast<std::uint32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    task.slot_ = vacant_.back();
    vacant_.pop_back();
  }
  Slot& slot = slots_[task.slot_];
  slot.task = &task;
  last_ = slot.round * kSlots + task.slot_;
}

void Environment::Vacate(Task& task) {
  Slot& slot = slots_[task.slot_];
  slot.task = nullptr;
  slot.round = (slot.round + 1) % kRounds;
  vacant_.push_back(task.slot_);
}

// A call that is under way keeps the event loop alive.
void Environment::Expect() {
  if (expected_++ == 0) ::napi_ref_threadsafe_function(env_, function_);
}

void Environment::ExpectNoMore() {
  if (--expected_ == 0) ::napi_unref_threadsafe_function(env_, function_);
}

void Environment::Forget(Task& task) {
  if (task.out_ != nullptr) ::napi_delete_reference(env_, task.out_);
  task.out_ = nullptr;
}

Task* Environment::Find(double id) const {
  if (!(id >= 0 && id < kSlots * kRounds)) return nullptr;
  const double round = std::floor(id / kSlots);
  const auto at = static_cast<std::size_t>(id - round * kSlots);
  return at < slots_.size() && slots_[at].round == round ? slots_[at].task : nullptr;
}

napi_value Environment::Wait(double id, std::int64_t ms) {
  Task* task = Find(id);
  if (task == nullptr) return nullptr;
  {
    const std::int64_t end = NowMs() + ms;
    const Lock lock(mutex_);
    while (!task->is_delivered_) {
      if (!delivered_.WaitUntil(mutex_, end) && !task->is_delivered_) return nullptr;
    }
    done_.Remove(*task);
  }
  napi_value answer = SettleOne(*task);
  delete task;
  Release();
  return answer;
}

int Environment::GiveUp(double id) {
  Task* task = Find(id);
  if (task == nullptr || task->is_given_up()) return 0;
  switch (Workers::Get().GiveUp(*task)) {
    case Workers::GivenUp::kHasComeBack:
      return 0;
    case Workers::GivenUp::kHasNotBegun:
      ExpectNoMore();
      Discard(*task);
      delete task;
      return 1;
    case Workers::GivenUp::kIsRunning:
      ExpectNoMore();
      return 2;
  }
  return 0;
}

// Several that came back meanwhile at once.
void Environment::SettleAll() {
  TaskList done;
  {
    const Lock lock(mutex_);
    done = std::exchange(done_, {});
    is_signalled_ = false;
  }
  while (Task* task = done.first()) {
    done.Remove(*task);
    napi_handle_scope scope = nullptr;
    ::napi_open_handle_scope(env_, &scope);
    SettleOne(*task);
    ::napi_close_handle_scope(env_, scope);
    delete task;
    Release();
  }
}

napi_value Environment::SettleOne(Task& task) {
  if (!task.is_given_up()) {
    ExpectNoMore();
    for (const int fd : task.effects_.opened()) Own(fd);
  }
  Vacate(task);
  napi_value out = nullptr;
  if (task.out_ != nullptr) ::napi_get_reference_value(env_, task.out_, &out);
  napi_value answer = task.Answer(env_, out);
  bool has_thrown = false;
  ::napi_is_exception_pending(env_, &has_thrown);
  if (has_thrown) {
    ::napi_get_and_clear_last_exception(env_, &answer);
    ::napi_reject_deferred(env_, task.deferred_, answer);
  } else {
    ::napi_resolve_deferred(env_, task.deferred_, answer);
  }
  Forget(task);
  return answer;
}

// What becomes of an environment that ends: what has come back and was not told is undone, and all is closed.
class Environment::LastTask final : public Task {
 public:
  LastTask(Environment& environment, TaskList undone, std::vector<int> descriptors)
      : ending_(environment), undone_(undone), descriptors_(std::move(descriptors)) {}

 protected:
  void Run() override {
    while (Task* task = undone_.first()) {
      undone_.Remove(*task);
      if (!task->is_given_up()) task->Undo();
      delete task;
      ending_.Release();
    }
    for (const int fd : descriptors_) ::close(fd);
  }
  napi_value Answer(napi_env, napi_value) override { return nullptr; }

 private:
  friend class Environment;
  Environment& ending_;
  TaskList undone_;
  std::vector<int> descriptors_;
};

void Environment::Drop(Task& task) {
  if (!task.is_given_up()) task.Undo();
  const bool is_awaited = task.is_awaited_;
  delete &task;
  if (is_awaited) {
    const Lock lock(mutex_);
    if (--awaited_ == 0) ended_.Signal();
  }
  Release();
}

// What hangs as long already will not come back in time; at the end of the process nothing is waited for.
bool Environment::IsAwaited(const Task& task) const {
  return !task.is_delivered_ && !IsMainThread() && NowMs() - task.started_ < kEndMs;
}

// Whoever waits for a worker thread to end finds its devices detached and its descriptors closed.
void Environment::End() {
  Lock lock(mutex_);
  is_open_ = false;
  // No task is deleted before its thread has heard that, with this lock.
  const TaskList undone = std::exchange(done_, {});
  for (const Slot& slot : slots_) {
    if (slot.task == nullptr) continue;
    Task& task = *slot.task;
    Forget(task);
    const bool was_given_up = task.is_given_up();
    if (Workers::Get().GiveUp(task) == Workers::GivenUp::kHasNotBegun) {
      delete &task;
      Release();
    } else if (!was_given_up && IsAwaited(task)) {
      task.is_awaited_ = true;
      awaited_++;
    }
  }
  std::vector<int> descriptors;
  for (std::size_t fd = 0; fd < owned_.size(); ++fd) {
    if (owned_[fd] && !Workers::Get().Leave(static_cast<int>(fd)))
      descriptors.push_back(static_cast<int>(fd));
  }
  owned_.clear();
  while (signalling_.load(std::memory_order_acquire) > 0) ::sched_yield();
  ::napi_release_threadsafe_function(function_, napi_tsfn_abort);
  if (!undone.empty() || !descriptors.empty()) {
    auto* last = new LastTask(*this, undone, std::move(descriptors));
    last->environment_ = this;
    last->is_awaited_ = true;
    awaited_++;
    Acquire();
    if (!Workers::Get().Submit(*last, Urgency::kClosing)) {
      lock.Release();
      last->Run();
      Drop(*last);
      lock.Take();
    }
  }
  const std::int64_t end = NowMs() + kEndMs;
  while (awaited_ > 0 && ended_.WaitUntil(mutex_, end)) {
  }
  lock.Release();
  Release();
}

Napi::Value Start(Napi::Env env, std::unique_ptr<Task> task, Napi::Value out, Urgency urgency) {
  napi_value promise = nullptr;
  if (Environment::Of(env).Start(std::move(task), out, urgency, &promise)) return {env, promise};
  Napi::Error error = Napi::Error::New(env, "no thread is to be had for a call that can wait in the kernel");
  error.Set("code", Napi::String::New(env, "EAGAIN"));
  error.ThrowAsJavaScriptException();
  return {};
}

namespace {

bool Refuse(const Napi::CallbackInfo& info, const char* what) {
  Napi::TypeError::New(info.Env(), what).ThrowAsJavaScriptException();
  return false;
}

bool TakesNothing(const Napi::CallbackInfo& info, const char* what) {
  return info.Length() == 0 || Refuse(info, what);
}

bool TakesNumber(const Napi::CallbackInfo& info, const char* what) {
  return (info.Length() == 1 && info[0].IsNumber()) || Refuse(info, what);
}

// lastCallSync(): what the call that was started last is called by giveUpSync.
Napi::Value LastCall(const Napi::CallbackInfo& info) {
  if (!TakesNothing(info, "lastCallSync: too many arguments")) return {};
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).last());
}

// waitSync(call, milliseconds): its answer, once it has come back, and then its promise has settled too;
// null, it has not come back in that time. The thread of JavaScript does nothing else meanwhile.
Napi::Value Wait(const Napi::CallbackInfo& info) {
  if (info.Length() != 2 || !info[0].IsNumber() || !info[1].IsNumber()) {
    Refuse(info, "waitSync: expected what lastCallSync gave, and milliseconds");
    return {};
  }
  const std::int64_t ms = info[1].As<Napi::Number>().Int64Value();
  napi_value answer = Environment::Of(info.Env()).Wait(info[0].As<Napi::Number>().DoubleValue(), ms);
  return answer == nullptr ? info.Env().Null() : Napi::Value(info.Env(), answer);
}

// giveUpSync(call): 0, it has come back; 1, it had not begun, and never will: its promise is undefined; 2, it
// is left to its thread, and its promise is settled when that has come back and has undone what it did.
Napi::Value GiveUp(const Napi::CallbackInfo& info) {
  if (!TakesNumber(info, "giveUpSync: expected what lastCallSync gave")) return {};
  const double id = info[0].As<Napi::Number>().DoubleValue();
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).GiveUp(id));
}

// leaveSync(fd): 1, the descriptor is left to the thread of a call that was given up on, and closed when that
// has come back; 0, no such call uses it.
Napi::Value Leave(const Napi::CallbackInfo& info) {
  if (!TakesNumber(info, "leaveSync: expected a descriptor")) return {};
  const int fd = info[0].As<Napi::Number>().Int32Value();
  if (!Workers::Get().Leave(fd)) return Napi::Number::New(info.Env(), 0);
  Environment::Of(info.Env()).Disown(fd);
  return Napi::Number::New(info.Env(), 1);
}

// workersSync(): how many threads there are, by what they do, and how many calls they were given so far.
Napi::Value CountWorkers(const Napi::CallbackInfo& info) {
  if (!TakesNothing(info, "workersSync: too many arguments")) return {};
  const Workers::Counts counts = Workers::Get().counts();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("working", counts.working);
  result.Set("idle", counts.idle);
  result.Set("writtenOff", counts.written_off);
  result.Set("givenUp", counts.given_up);
  result.Set("queued", counts.queued);
  result.Set("made", static_cast<double>(counts.made));
  return result;
}

}  // namespace

void InitEnvironment(Napi::Env env, Napi::Object exports) {
  if (!Environment::Make(env)) {
    Napi::Error::New(env, "no thread-safe function is to be had").ThrowAsJavaScriptException();
    return;
  }
  exports.Set("lastCallSync", Napi::Function::New<LastCall>(env, "lastCallSync"));
  exports.Set("waitSync", Napi::Function::New<Wait>(env, "waitSync"));
  exports.Set("giveUpSync", Napi::Function::New<GiveUp>(env, "giveUpSync"));
  exports.Set("leaveSync", Napi::Function::New<Leave>(env, "leaveSync"));
  exports.Set("workersSync", Napi::Function::New<CountWorkers>(env, "workersSync"));
}

}  // namespace loopctl
