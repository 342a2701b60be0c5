// Makes `name` (a promise, on a thread of the addon) and `nameSync` (now) of every row in Calls(), and adds
// what does not fit in a row.
#include <napi.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <string>

#include "bytes.h"
#include "calls.h"
#include "environment.h"
#include "reading.h"
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
  if (parameter == Parameter::kBytes || parameter == Parameter::kRoom) return true;
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
      case Parameter::kFd:
        if (!ReadInt(value, arguments.values[i])) return Refuse(info, call, "expected a 32-bit integer");
        break;
      case Parameter::kU64:
        if (!ReadU64(value, arguments.values[i]))
          return Refuse(info, call, "expected an unsigned 64-bit bigint");
        break;
      case Parameter::kIn:
      case Parameter::kOut:
      case Parameter::kPath:
      case Parameter::kBytes:
      case Parameter::kRoom: {
        const auto bytes = BytesOf(value);
        if (!bytes || !FitsParameter(call, parameter, *bytes))
          return Refuse(info, call, "expected a Uint8Array of the struct's size, or a path that ends in NUL");
        arguments.data[i] = bytes->data();
        arguments.values[i] = static_cast<std::int64_t>(bytes->size());
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
  return Napi::Number::New(info.Env(), static_cast<double>(MakeNow(info.Env(), call, arguments)));
}

class Row final : public Task {
 public:
  Row(const Call& call, const Arguments& arguments, const Sizes& sizes) : call_(call), arguments_(arguments) {
    // A copy, so that it stays valid on another thread whatever JavaScript does.
    copy_ = std::make_unique_for_overwrite<std::byte[]>(
        std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}));
    std::byte* next = copy_.get();
    for (std::size_t i = 0; i < kMaxParameters; ++i) {
      if (!IsData(call.parameters[i])) continue;
      if (call.parameters[i] != Parameter::kRoom && sizes[i] > 0)
        std::memcpy(next, arguments.data[i], sizes[i]);
      arguments_.data[i] = next;
      next += sizes[i];
      if (IsFilled(call.parameters[i])) filled_ = {arguments_.data[i], sizes[i]};
    }
  }

 protected:
  void Run() override { result_ = Make(call_, arguments_); }

  bool Uses(int fd) const override {
    for (std::size_t i = 0; i < kMaxParameters; ++i) {
      if (call_.parameters[i] == Parameter::kFd && arguments_.Int(i) == fd) return true;
    }
    return false;
  }

  napi_value Answer(napi_env env, napi_value out) override {
    if (out != nullptr && result_ >= 0) {
      const auto bytes = BytesOf({env, out});
      // Transferred to another thread meanwhile: nowhere to put the answer.
      if (bytes && bytes->size() == filled_.size()) {
        const bool is_struct = call_.data_size != 0;
        const std::size_t size = is_struct ? filled_.size() : static_cast<std::size_t>(result_);
        if (size > 0) std::memcpy(bytes->data(), filled_.data(), size);
      } else {
        result_ = -EFAULT;
      }
    }
    return Napi::Number::New(env, static_cast<double>(result_));
  }

 private:
  const Call& call_;
  Arguments arguments_;
  std::unique_ptr<std::byte[]> copy_;
  std::span<const std::byte> filled_;
  long result_ = 0;
};

Value RunAsync(const CallbackInfo& info) {
  const Call& call = *static_cast<const Call*>(info.Data());
  Arguments arguments;
  Sizes sizes{};
  if (!Read(info, call, arguments, sizes)) return {};
  Value out;
  for (std::size_t i = 0; i < kMaxParameters; ++i) {
    if (IsFilled(call.parameters[i])) out = info[i];
  }
  const Urgency urgency = call.effect == Effect::kCloses ? Urgency::kClosing : Urgency::kUsual;
  return Start(info.Env(), std::make_unique<Row>(call, arguments, sizes), out, urgency);
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  for (const Call& call : Calls()) {
    const std::string name = call.name;
    void* data = const_cast<Call*>(&call);
    exports.Set(name, Napi::Function::New<RunAsync>(env, name.c_str(), data));
    exports.Set(name + "Sync", Napi::Function::New<RunSync>(env, (name + "Sync").c_str(), data));
  }
  InitEnvironment(env, exports);
  InitSequence(env, exports);
  InitReading(env, exports);
  InitSysfs(env, exports);
  InitUevent(env, exports);
  return exports;
}

}  // namespace
}  // namespace loopctl

static Napi::Object Initialize(Napi::Env env, Napi::Object exports) { return loopctl::Init(env, exports); }
NODE_API_MODULE(loopctl, Initialize)
