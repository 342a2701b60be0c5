// Makes `name` (a promise, on the thread pool) and `nameSync` (now) of every row in Calls(), and adds what
// does not fit in a row. No state of its own, so it can be loaded in any number of threads.
#include <napi.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "bytes.h"
#include "calls.h"
#include "sequence.h"
#include "sysfs.h"
#include "uevent.h"

namespace loopctl {
namespace {

using Napi::CallbackInfo;
using Napi::Uint8Array;
using Napi::Value;

// Of the data, by parameter.
using Sizes = std::array<std::size_t, kMaxParameters>;

bool Refuse(const CallbackInfo& info, const Call& call, const char* what) {
  Napi::TypeError::New(info.Env(), std::string(call.name) + ": " + what).ThrowAsJavaScriptException();
  return false;
}

bool ReadInt(const Value& value, std::int64_t& out) {
  if (!value.IsNumber()) return false;
  const double number = value.As<Napi::Number>().DoubleValue();
  if (number != std::trunc(number) || number < std::numeric_limits<std::int32_t>::min() ||
      number > std::numeric_limits<std::int32_t>::max()) {
    return false;
  }
  out = static_cast<std::int64_t>(number);
  return true;
}

bool ReadU64(const Value& value, std::int64_t& out) {
  if (!value.IsBigInt()) return false;
  bool lossless = false;
  out = static_cast<std::int64_t>(value.As<Napi::BigInt>().Uint64Value(&lossless));
  return lossless;
}

bool FitsParameter(const Call& call, Parameter parameter, std::span<const std::byte> bytes) {
  if (parameter != Parameter::kPath) return bytes.size() == call.data_size;
  return !bytes.empty() && bytes.back() == std::byte{0};
}

// Throws a TypeError and answers false for what is not the call's; reaching that is a bug in lib/. Data is
// pointed to where JavaScript has it: with `sizes` it can be copied from there.
bool Read(const CallbackInfo& info, const Call& call, Arguments& arguments, Sizes& sizes) {
  if (info.Length() > kMaxParameters) return Refuse(info, call, "too many arguments");
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    const Value value = info[i];
    switch (const Parameter parameter = call.parameters[i]; parameter) {
      case Parameter::kNone:
        if (!value.IsUndefined()) return Refuse(info, call, "too many arguments");
        break;
      case Parameter::kInt:
        if (!ReadInt(value, arguments.values[i])) return Refuse(info, call, "expected a 32-bit integer");
        break;
      case Parameter::kU64:
        if (!ReadU64(value, arguments.values[i]))
          return Refuse(info, call, "expected an unsigned 64-bit bigint");
        break;
      case Parameter::kIn:
      case Parameter::kOut:
      case Parameter::kPath: {
        const auto bytes = BytesOf(value);
        if (!bytes || !FitsParameter(call, parameter, *bytes))
          return Refuse(info, call, "expected a Uint8Array of the struct's size, or a path that ends in NUL");
        arguments.data[i] = bytes->data();
        sizes[i] = bytes->size();
        break;
      }
    }
  }
  return true;
}

Value RunSync(const CallbackInfo& info) {
  const Call& call = *static_cast<const Call*>(info.Data());
  Arguments arguments;
  Sizes sizes{};
  if (!Read(info, call, arguments, sizes)) return {};
  return Napi::Number::New(info.Env(), static_cast<double>(call.run(arguments)));
}

class Job final : public Napi::AsyncWorker {
 public:
  Job(const CallbackInfo& info, const Call& call, const Arguments& arguments, const Sizes& sizes)
      : Napi::AsyncWorker(info.Env(), "loopctl"),
        call_(call),
        arguments_(arguments),
        copy_(std::accumulate(sizes.begin(), sizes.end(), std::size_t{0})),
        deferred_(Napi::Promise::Deferred::New(info.Env())) {
    // A copy, so that it stays valid on another thread whatever JavaScript does.
    std::byte* next = copy_.data();
    for (std::size_t i = 0; i < kMaxParameters; ++i) {
      if (!IsData(call.parameters[i])) continue;
      std::memcpy(next, arguments.data[i], sizes[i]);
      arguments_.data[i] = next;
      next += sizes[i];
      if (call.parameters[i] == Parameter::kOut) {
        filled_ = arguments_.data[i];
        out_ = Napi::Persistent(info[i].As<Uint8Array>());
      }
    }
  }

  Napi::Promise Promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override { result_ = call_.run(arguments_); }

  void OnOK() override {
    if (filled_ != nullptr && result_ >= 0) {
      Uint8Array out = out_.Value();
      // Transferred to another thread meanwhile: nowhere to put the answer.
      if (out.ByteLength() == call_.data_size) {
        std::memcpy(out.Data(), filled_, call_.data_size);
      } else {
        result_ = -EFAULT;
      }
    }
    deferred_.Resolve(Napi::Number::New(Env(), static_cast<double>(result_)));
  }

 private:
  const Call& call_;
  Arguments arguments_;
  std::vector<std::byte> copy_;
  std::byte* filled_ = nullptr;
  long result_ = 0;
  Napi::Promise::Deferred deferred_;
  Napi::Reference<Uint8Array> out_;
};

Value RunAsync(const CallbackInfo& info) {
  const Call& call = *static_cast<const Call*>(info.Data());
  Arguments arguments;
  Sizes sizes{};
  if (!Read(info, call, arguments, sizes)) return {};
  Job* job = new Job(info, call, arguments, sizes);  // deletes itself when done
  const Napi::Promise promise = job->Promise();
  job->Queue();
  return promise;
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  for (const Call& call : Calls()) {
    const std::string name = call.name;
    void* data = const_cast<Call*>(&call);
    exports.Set(name, Napi::Function::New<RunAsync>(env, name.c_str(), data));
    exports.Set(name + "Sync", Napi::Function::New<RunSync>(env, (name + "Sync").c_str(), data));
  }
  InitSequence(env, exports);
  InitSysfs(env, exports);
  InitUevent(env, exports);
  return exports;
}

}  // namespace
}  // namespace loopctl

static Napi::Object Initialize(Napi::Env env, Napi::Object exports) { return loopctl::Init(env, exports); }
NODE_API_MODULE(loopctl, Initialize)
