#include "sysfs.h"

#include <fcntl.h>
#include <unistd.h>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "bytes.h"
#include "environment.h"

namespace loopctl {
namespace {

// Both are lists of texts that each end in a NUL.
struct Request {
  std::string directories;
  std::string names;
};

void AppendNumber(std::string& out, std::int32_t number) {
  char bytes[sizeof number];
  std::memcpy(bytes, &number, sizeof number);
  out.append(bytes, sizeof bytes);
}

// One attribute is at most a page, and comes whole where there is room for it.
ssize_t ReadFile(int directory, const char* name, std::string& buffer) {
  if (directory < 0) return directory;
  const int fd = ::openat(directory, name, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  const ssize_t length = ::read(fd, buffer.data(), buffer.size());
  const ssize_t answer = length < 0 ? -errno : length;
  ::close(fd);
  return answer;
}

template <typename Each>
void ForEach(const std::string& list, Each each) {
  for (std::size_t i = 0; i < list.size(); i += std::strlen(list.c_str() + i) + 1) each(list.c_str() + i);
}

// For each directory, and in it for each name: the length and so many bytes, or the negative errno, be it
// that of the directory.
std::string ReadAll(const Request& request) {
  std::string out;
  std::string buffer(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)), '\0');
  ForEach(request.directories, [&](const char* path) {
    const int fd = ::open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    const int directory = fd < 0 ? -errno : fd;
    ForEach(request.names, [&](const char* name) {
      const ssize_t length = ReadFile(directory, name, buffer);
      AppendNumber(out, static_cast<std::int32_t>(length));
      if (length > 0) out.append(buffer.data(), static_cast<std::size_t>(length));
    });
    if (fd >= 0) ::close(fd);
  });
  return out;
}

bool ReadList(const Napi::Value& value, std::string& out) {
  const auto bytes = BytesOf(value);
  if (!bytes) return false;
  if (bytes->empty()) return true;
  out.assign(reinterpret_cast<const char*>(bytes->data()), bytes->size());
  return out.back() == '\0';
}

// Throws a TypeError and answers false for what is not the call's; reaching that is a bug in lib/.
bool Read(const Napi::CallbackInfo& info, Request& request) {
  if (info.Length() == 2 && ReadList(info[0], request.directories) && ReadList(info[1], request.names))
    return true;
  Napi::TypeError::New(info.Env(), "sysfsRead: expected two Uint8Array of texts that end in NUL")
      .ThrowAsJavaScriptException();
  return false;
}

Napi::Value ToBuffer(Napi::Env env, const std::string& bytes) {
  return Napi::Buffer<char>::Copy(env, bytes.data(), bytes.size());
}

class Reading final : public Task {
 public:
  explicit Reading(Request request) : request_(std::move(request)) {}

 protected:
  void Run() override { result_ = ReadAll(request_); }
  napi_value Answer(napi_env env, napi_value) override { return ToBuffer(env, result_); }

 private:
  Request request_;
  std::string result_;
};

Napi::Value RunSync(const Napi::CallbackInfo& info) {
  Request request;
  if (!Read(info, request)) return {};
  return ToBuffer(info.Env(), ReadAll(request));
}

Napi::Value RunAsync(const Napi::CallbackInfo& info) {
  Request request;
  if (!Read(info, request)) return {};
  return Start(info.Env(), std::make_unique<Reading>(std::move(request)), {});
}

}  // namespace

void InitSysfs(Napi::Env env, Napi::Object exports) {
  exports.Set("sysfsRead", Napi::Function::New<RunAsync>(env, "sysfsRead"));
  exports.Set("sysfsReadSync", Napi::Function::New<RunSync>(env, "sysfsReadSync"));
}

}  // namespace loopctl
