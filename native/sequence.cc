#include "sequence.h"

#include <chrono>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "bytes.h"
#include "calls.h"
#include "environment.h"

namespace loopctl {
namespace {

// When a sequence goes on after the step; else it ends, or skips to its next part.
enum Flow : std::int32_t {
  kUnlessFailed = 0,
  kIfExpected = 1,
  kAlways = 2,
  kMask = 3,
  kNewPart = 4,  // the first step of a part: is made whatever became of those before
  kUndoing = 8,  // of a part that is made only where the sequence was given up on
  kTimed = 16,   // somebody wants to know how long it takes
};

// lib/kernel/sequence.ts writes these, and reads the answers.
struct Step {
  std::int32_t call;  // in Calls()
  std::int32_t flow;
  std::int32_t answers;  // bit i: argument i is the number of an earlier step, of which it takes the answer
  float microseconds;    // answered where the step is kTimed
  std::int32_t arguments[kMaxParameters];  // an int, or for data: where on the tape it begins
  double expected;
  double answer;  // stays as it is where the step is not reached
};
static_assert(sizeof(Step) == 48);

using Tape = std::vector<std::byte>;  // the steps, and then their data

Step ReadStep(const Tape& tape, std::size_t index) {
  Step step;
  std::memcpy(&step, tape.data() + index * sizeof step, sizeof step);
  return step;
}

void WriteAnswer(Tape& tape, std::size_t index, double answer) {
  std::memcpy(tape.data() + index * sizeof(Step) + offsetof(Step, answer), &answer, sizeof answer);
}

void WriteTime(Tape& tape, std::size_t index, float microseconds) {
  std::memcpy(tape.data() + index * sizeof(Step) + offsetof(Step, microseconds), &microseconds,
              sizeof microseconds);
}

bool TakesAnswer(const Step& step, std::size_t i) { return (step.answers >> i & 1) != 0; }

bool IsSound(const Call& call, const Step& step, std::size_t i, std::size_t index, const Tape& tape) {
  const Parameter parameter = call.parameters[i];
  if (parameter == Parameter::kNone || (IsNumber(parameter) && !TakesAnswer(step, i))) return true;
  if (parameter == Parameter::kU64 || parameter == Parameter::kBytes || parameter == Parameter::kRoom)
    return false;
  if (step.arguments[i] < 0) return false;
  const auto at = static_cast<std::size_t>(step.arguments[i]);
  if (IsNumber(parameter)) return at < index;
  if (at > tape.size()) return false;
  const std::size_t left = tape.size() - at;
  if (parameter == Parameter::kPath) return std::memchr(tape.data() + at, 0, left) != nullptr;
  return call.data_size <= left;
}

bool IsSound(std::size_t count, const Tape& tape) {
  if (count > tape.size() / sizeof(Step)) return false;
  for (std::size_t index = 0; index < count; ++index) {
    const Step step = ReadStep(tape, index);
    if (step.call < 0 || static_cast<std::size_t>(step.call) >= Calls().size()) return false;
    const Call& call = Calls()[static_cast<std::size_t>(step.call)];
    for (std::size_t i = 0; i < kMaxParameters; ++i) {
      if (!IsSound(call, step, i, index, tape)) return false;
    }
  }
  return true;
}

// -1, which no call takes for a descriptor, where that step was not reached or failed.
int AnswerOf(const Tape& tape, std::int32_t index) {
  const double answer = ReadStep(tape, static_cast<std::size_t>(index)).answer;
  return answer >= 0 && answer <= std::numeric_limits<int>::max() ? static_cast<int>(answer) : -1;
}

bool GoesOn(const Step& step, double answer) {
  switch (step.flow & kMask) {
    case kIfExpected:
      return answer == step.expected;
    case kAlways:
      return true;
    default:
      return answer >= 0;
  }
}

Arguments ArgumentsOf(const Call& call, const Step& step, Tape& tape) {
  Arguments arguments;
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    if (IsData(call.parameters[i])) {
      arguments.data[i] = tape.data() + step.arguments[i];
    } else {
      arguments.values[i] = TakesAnswer(step, i) ? AnswerOf(tape, step.arguments[i]) : step.arguments[i];
    }
  }
  return arguments;
}

class Sequence final : public Task {
 public:
  Sequence(std::size_t count, Tape tape) : count_(count), tape_(std::move(tape)) {}

 protected:
  void Run() override { RunParts(0); }

  void Undo() override {
    RunParts(kUndoing);
    Task::Undo();
  }

  bool Uses(int fd) const override {
    for (std::size_t index = 0; index < count_; ++index) {
      if (UsesAt(index, fd)) return true;
    }
    return false;
  }

  napi_value Answer(napi_env env, napi_value out) override {
    const auto bytes = BytesOf({env, out});
    // One without calls has no bytes, and then they are nowhere.
    if (bytes && bytes->size() == tape_.size() && !tape_.empty()) {
      std::memcpy(bytes->data(), tape_.data(), tape_.size());
    }
    return Napi::Env(env).Undefined();
  }

 private:
  void RunParts(std::int32_t kind) {
    bool goes_on = true;
    for (std::size_t index = 0; index < count_; ++index) {
      const Step step = ReadStep(tape_, index);
      if ((step.flow & kUndoing) != kind || (!goes_on && (step.flow & kNewPart) == 0)) continue;
      if (kind != kUndoing && is_given_up()) return;
      const Call& call = Calls()[static_cast<std::size_t>(step.call)];
      Arguments arguments = ArgumentsOf(call, step, tape_);
      const auto answer = static_cast<double>((step.flow & kTimed) == 0 ? Make(call, arguments)
                                                                        : MakeTimed(index, call, arguments));
      WriteAnswer(tape_, index, answer);
      goes_on = GoesOn(step, answer);
    }
  }

  long MakeTimed(std::size_t index, const Call& call, Arguments& arguments) {
    const auto start = std::chrono::steady_clock::now();
    const long answer = Make(call, arguments);
    const std::chrono::duration<float, std::micro> taken = std::chrono::steady_clock::now() - start;
    WriteTime(tape_, index, taken.count());
    return answer;
  }

  // Asked by another thread while this one writes answers and times: it reads the rest of the step only.
  bool UsesAt(std::size_t index, int fd) const {
    Step step{};
    const std::byte* from = tape_.data() + index * sizeof step;
    std::memcpy(&step, from, offsetof(Step, microseconds));
    std::memcpy(step.arguments, from + offsetof(Step, arguments), sizeof step.arguments);
    const Call& call = Calls()[static_cast<std::size_t>(step.call)];
    for (std::size_t i = 0; i < kMaxParameters; ++i) {
      if (call.parameters[i] == Parameter::kFd && !TakesAnswer(step, i) && step.arguments[i] == fd)
        return true;
    }
    return false;
  }

  std::size_t count_;
  Tape tape_;
};

// sequenceRun(count, tape, closes): a promise; the tape has the answers then. `closes`: it lets go of what is
// open, and so may begin although many calls do not come back.
Napi::Value Run(const Napi::CallbackInfo& info) {
  const auto bytes = BytesOf(info[1]);
  if (bytes && info.Length() == 3 && info[0].IsNumber() && info[2].IsBoolean()) {
    const Urgency urgency = info[2].As<Napi::Boolean>().Value() ? Urgency::kClosing : Urgency::kUsual;
    const auto count = info[0].As<Napi::Number>().Uint32Value();
    Tape tape(bytes->begin(), bytes->end());
    if (IsSound(count, tape)) {
      return Start(info.Env(), std::make_unique<Sequence>(count, std::move(tape)), info[1], urgency);
    }
  }
  Napi::TypeError::New(info.Env(), "sequenceRun: expected a number of steps, and the tape that holds them")
      .ThrowAsJavaScriptException();
  return {};
}

}  // namespace

void InitSequence(Napi::Env env, Napi::Object exports) {
  Napi::Array names = Napi::Array::New(env);
  for (const Call& call : Calls()) names.Set(names.Length(), Napi::String::New(env, call.name));
  exports.Set("sequenceRows", names);
  exports.Set("sequenceRun", Napi::Function::New<Run>(env, "sequenceRun"));
}

}  // namespace loopctl
