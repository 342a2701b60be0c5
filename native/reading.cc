#include "reading.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>
#include <cerrno>
#include <memory>
#include <string>
#include <string_view>

#include "bytes.h"
#include "environment.h"

namespace loopctl {
namespace {

constexpr std::size_t kChunk = 16 * 1024;

// Both answer 0 or the negative errno.
using Reader = long (*)(const char* path, std::string& out);

// Until there is no more: procfs gives a part at a time.
long ReadWhole(const char* path, std::string& out) {
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  long answer = 0;
  for (;;) {
    const std::size_t length = out.size();
    out.resize(length + kChunk);
    const ssize_t count = ::read(fd, out.data() + length, kChunk);
    if (count < 0) answer = -errno;
    out.resize(length + static_cast<std::size_t>(count < 0 ? 0 : count));
    if (count <= 0) break;
  }
  ::close(fd);
  return answer;
}

// Each with a NUL at the end.
long ReadNames(const char* path, std::string& out) {
  DIR* const directory = ::opendir(path);  // with O_CLOEXEC
  if (directory == nullptr) return -errno;
  long answer = 0;
  for (;;) {
    errno = 0;
    const struct dirent* const entry = ::readdir(directory);
    if (entry == nullptr) {
      answer = -errno;
      break;
    }
    const std::string_view name(entry->d_name);
    if (name != "." && name != "..") out.append(name).push_back('\0');
  }
  ::closedir(directory);
  return answer;
}

class Reading final : public Task {
 public:
  Reading(Reader read, std::string path) : read_(read), path_(std::move(path)) {}

 protected:
  void Run() override { answer_ = read_(path_.c_str(), result_); }

  napi_value Answer(napi_env env, napi_value) override {
    if (answer_ < 0) return Napi::Number::New(env, static_cast<double>(answer_));
    return Napi::Buffer<char>::Copy(env, result_.data(), result_.size());
  }

 private:
  Reader read_;
  std::string path_;
  std::string result_;
  long answer_ = 0;
};

template <Reader read>
Napi::Value Run(const Napi::CallbackInfo& info) {
  const auto path = BytesOf(info[0]);
  if (info.Length() != 1 || !path || path->empty() || path->back() != std::byte{0}) {
    Napi::TypeError::New(info.Env(), "readWhole, readNames: expected a path that ends in NUL")
        .ThrowAsJavaScriptException();
    return {};
  }
  return Start(info.Env(), std::make_unique<Reading>(read, reinterpret_cast<const char*>(path->data())), {});
}

}  // namespace

void InitReading(Napi::Env env, Napi::Object exports) {
  exports.Set("readWhole", Napi::Function::New<Run<ReadWhole>>(env, "readWhole"));
  exports.Set("readNames", Napi::Function::New<Run<ReadNames>>(env, "readNames"));
}

}  // namespace loopctl
