#include "sequence.h"

#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "bytes.h"
#include "calls.h"

namespace loopctl {
namespace {

// When a sequence goes on after the step; else it ends, or skips to its next part.
enum Flow : std::int32_t {
  kUnlessFailed = 0,
  kIfExpected = 1,
  kAlways = 2,
  kMask = 3,
  kNewPart = 4,  // the first step of a part: is made whatever became of those before
};

// lib/kernel/sequence.ts writes these, and reads the answers.
struct Step {
  std::int32_t call;  // in Calls()
  std::int32_t flow;
  std::int32_t answers;  // bit i: argument i is the number of an earlier step, of which it takes the answer
  std::int32_t reserved;
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

bool TakesAnswer(const Step& step, std::size_t i) { return (step.answers >> i & 1) != 0; }

bool IsSound(const Call& call, const Step& step, std::size_t i, std::size_t index, const Tape& tape) {
  const Parameter parameter = call.parameters[i];
  if (parameter == Parameter::kNone || (parameter == Parameter::kInt && !TakesAnswer(step, i))) return true;
  if (parameter == Parameter::kU64 || step.arguments[i] < 0) return false;
  const auto at = static_cast<std::size_t>(step.arguments[i]);
  if (parameter == Parameter::kInt) return at < index;
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

long Make(const Call& call, const Step& step, Tape& tape) {
  Arguments arguments;
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    if (IsData(call.parameters[i])) {
      arguments.data[i] = tape.data() + step.arguments[i];
    } else {
      arguments.values[i] = TakesAnswer(step, i) ? AnswerOf(tape, step.arguments[i]) : step.arguments[i];
    }
  }
  return call.run(arguments);
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

void RunAll(std::size_t count, Tape& tape) {
  bool goes_on = true;
  for (std::size_t index = 0; index < count; ++index) {
    const Step step = ReadStep(tape, index);
    if (!goes_on && (step.flow & kNewPart) == 0) continue;
    const auto answer = static_cast<double>(Make(Calls()[static_cast<std::size_t>(step.call)], step, tape));
    WriteAnswer(tape, index, answer);
    goes_on = GoesOn(step, answer);
  }
}

class Job final : public Napi::AsyncWorker {
 public:
  Job(Napi::Env env, std::size_t count, Tape tape, Napi::Uint8Array out)
      : Napi::AsyncWorker(env, "loopctl"),
        count_(count),
        tape_(std::move(tape)),
        out_(Napi::Persistent(out)),
        deferred_(Napi::Promise::Deferred::New(env)) {}

  Napi::Promise Promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override { RunAll(count_, tape_); }

  void OnOK() override {
    Napi::Uint8Array out = out_.Value();
    if (out.ByteLength() == tape_.size()) std::memcpy(out.Data(), tape_.data(), tape_.size());
    deferred_.Resolve(Env().Undefined());
  }

 private:
  std::size_t count_;
  Tape tape_;
  Napi::Reference<Napi::Uint8Array> out_;
  Napi::Promise::Deferred deferred_;
};

// sequenceRun(count, tape): a promise; the tape has the answers then.
Napi::Value Run(const Napi::CallbackInfo& info) {
  if (const auto bytes = BytesOf(info[1]); bytes && info.Length() == 2 && info[0].IsNumber()) {
    const auto count = info[0].As<Napi::Number>().Uint32Value();
    Tape tape(bytes->begin(), bytes->end());
    if (IsSound(count, tape)) {
      // deletes itself when done
      Job* job = new Job(info.Env(), count, std::move(tape), info[1].As<Napi::Uint8Array>());
      const Napi::Promise promise = job->Promise();
      job->Queue();
      return promise;
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
