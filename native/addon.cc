// Makes `name` (a promise, on the thread pool) and `nameSync` (now) of every row in Calls(), and adds what
// does not fit in a row. No state of its own, so it can be loaded in any number of threads.
#include <napi.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "calls.h"
#include "sysfs.h"
#include "uevent.h"

namespace loopctl {
namespace {

using Napi::CallbackInfo;
using Napi::Uint8Array;
using Napi::Value;

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

bool IsData(const Call& call, const Value& value) {
  if (!value.IsTypedArray()) return false;
  const auto array = value.As<Napi::TypedArray>();
  return array.TypedArrayType() == napi_uint8_array && array.ByteLength() == call.data_size;
}

// Throws a TypeError and answers false for what is not the call's; reaching that is a bug in lib/.
bool Read(const CallbackInfo& info, const Call& call, Arguments& arguments) {
  if (info.Length() > kMaxParameters) return Refuse(info, call, "too many arguments");
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    const Value value = info[i];
    switch (call.parameters[i]) {
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
        if (!IsData(call, value)) return Refuse(info, call, "expected a Uint8Array of the struct's size");
        if (call.parameters[i] == Parameter::kIn) {
          std::memcpy(arguments.data.data(), value.As<Uint8Array>().Data(), call.data_size);
        }
        break;
    }
  }
  return true;
}

int OutIndex(const Call& call) {
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    if (call.parameters[i] == Parameter::kOut) return static_cast<int>(i);
  }
  return -1;
}

Value RunSync(const CallbackInfo& info) {
  const Call& call = *static_cast<const Call*>(info.Data());
  Arguments arguments;
  if (!Read(info, call, arguments)) return {};
  const long result = call.run(arguments);
  if (const int out = OutIndex(call); out >= 0 && result >= 0) {
    std::memcpy(info[static_cast<std::size_t>(out)].As<Uint8Array>().Data(), arguments.data.data(),
                call.data_size);
  }
  return Napi::Number::New(info.Env(), static_cast<double>(result));
}

class Job final : public Napi::AsyncWorker {
 public:
  Job(const CallbackInfo& info, const Call& call, const Arguments& arguments)
      : Napi::AsyncWorker(info.Env(), "loopctl"),
        call_(call),
        arguments_(arguments),
        deferred_(Napi::Promise::Deferred::New(info.Env())) {
    if (const int out = OutIndex(call); out >= 0) {
      out_ = Napi::Persistent(info[static_cast<std::size_t>(out)].As<Uint8Array>());
    }
  }

  Napi::Promise Promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override { result_ = call_.run(arguments_); }

  void OnOK() override {
    if (!out_.IsEmpty() && result_ >= 0) {
      Uint8Array out = out_.Value();
      // Transferred to another thread meanwhile: nowhere to put the answer.
      if (out.ByteLength() == call_.data_size) {
        std::memcpy(out.Data(), arguments_.data.data(), call_.data_size);
      } else {
        result_ = -EFAULT;
      }
    }
    deferred_.Resolve(Napi::Number::New(Env(), static_cast<double>(result_)));
  }

 private:
  const Call& call_;
  Arguments arguments_;
  long result_ = 0;
  Napi::Promise::Deferred deferred_;
  Napi::Reference<Uint8Array> out_;
};

Value RunAsync(const CallbackInfo& info) {
  const Call& call = *static_cast<const Call*>(info.Data());
  Arguments arguments;
  if (!Read(info, call, arguments)) return {};
  Job* job = new Job(info, call, arguments);  // deletes itself when done
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
  InitSysfs(env, exports);
  InitUevent(env, exports);
  return exports;
}

}  // namespace
}  // namespace loopctl

static Napi::Object Initialize(Napi::Env env, Napi::Object exports) { return loopctl::Init(env, exports); }
NODE_API_MODULE(loopctl, Initialize)
