#include "uevent.h"

#include <linux/netlink.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

namespace loopctl {
namespace {

constexpr unsigned kKernelGroup = 1;            // 2 is udev's
constexpr int kReceiveBuffer = 1 << 20;         // some thousand messages
constexpr std::size_t kQueueSize = 256;         // what waits for JavaScript; the rest waits in the socket
constexpr std::size_t kMessageSize = 8 * 1024;  // the kernel's are a header and at most 2 KiB

// The bytes of a uevent, or the negative errno of recvmsg.
struct Message {
  long error = 0;
  std::string bytes;
};

class Uevents;
void Deliver(Napi::Env env, Napi::Function callback, Uevents*, Message* message);
using Function = Napi::TypedThreadSafeFunction<Uevents, Message, Deliver>;

class Uevents {
 public:
  explicit Uevents(Napi::Env env) : env_(env) {}
  ~Uevents() { Close(); }
  Uevents(const Uevents&) = delete;
  Uevents& operator=(const Uevents&) = delete;

  long Open(Napi::Function callback) {
    socket_ = ::socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    if (socket_ < 0) return -errno;
    // Beyond net.core.rmem_max only for an administrator of the network
    if (::setsockopt(socket_, SOL_SOCKET, SO_RCVBUFFORCE, &kReceiveBuffer, sizeof kReceiveBuffer) != 0) {
      ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &kReceiveBuffer, sizeof kReceiveBuffer);
    }
    struct sockaddr_nl address{};
    address.nl_family = AF_NETLINK;
    address.nl_groups = kKernelGroup;
    if (::bind(socket_, reinterpret_cast<struct sockaddr*>(&address), sizeof address) != 0) return -errno;
    wake_ = ::eventfd(0, EFD_CLOEXEC);
    if (wake_ < 0) return -errno;
    function_ = Function::New(env_, callback, "loopctl", kQueueSize, 1, this);
    function_.Unref(env_);
    if (const int error = ::pthread_create(&thread_, nullptr, Run, this); error != 0) {
      function_.Abort();
      return -error;
    }
    running_ = true;
    // Added after the function, so called before the function goes: the thread must not outlive that.
    ::napi_add_env_cleanup_hook(env_, CloseHook, this);
    return 0;
  }

  // Idempotent; waits for the thread, which waits for nothing by then.
  void Close() {
    if (running_) {
      running_ = false;
      ::napi_remove_env_cleanup_hook(env_, CloseHook, this);
      // First, so that the thread does not go on waiting for a place in the queue
      function_.Abort();
      const std::uint64_t one = 1;
      while (::write(wake_, &one, sizeof one) < 0 && errno == EINTR) {
      }
      ::pthread_join(thread_, nullptr);
    }
    for (int* fd : {&socket_, &wake_}) {
      if (*fd >= 0) ::close(*fd);
      *fd = -1;
    }
  }

 private:
  static void CloseHook(void* self) { static_cast<Uevents*>(self)->Close(); }

  static void* Run(void* self) {
    static_cast<Uevents*>(self)->Receive();
    return nullptr;
  }

  void Receive() {
    std::array<struct pollfd, 2> fds{{{socket_, POLLIN, 0}, {wake_, POLLIN, 0}}};
    for (;;) {
      auto message = std::make_unique<Message>();
      if (::poll(fds.data(), fds.size(), -1) < 0) {
        if (errno == EINTR) continue;
        message->error = -errno;
      } else {
        if (fds[1].revents != 0) return;
        if (fds[0].revents == 0 || !ReceiveOne(*message)) continue;
      }
      const bool last = message->error != 0 && message->error != -ENOBUFS;
      // Waits while the queue is full: what is too much is then lost in the socket, and the kernel says so.
      if (function_.BlockingCall(message.get()) != napi_ok) return;
      static_cast<void>(message.release());
      if (last) return;
    }
  }

  // False where there is nothing to tell. Other processes can send to the group too; the kernel's port is 0.
  bool ReceiveOne(Message& message) const {
    std::array<char, kMessageSize> buffer;
    struct sockaddr_nl sender{};
    socklen_t size = sizeof sender;
    const ssize_t length = ::recvfrom(socket_, buffer.data(), buffer.size(), MSG_DONTWAIT,
                                      reinterpret_cast<struct sockaddr*>(&sender), &size);
    if (length < 0) {
      message.error = -errno;
      return errno != EAGAIN && errno != EINTR;
    }
    message.bytes.assign(buffer.data(), static_cast<std::size_t>(length));
    return sender.nl_pid == 0;
  }

  Napi::Env env_;
  Function function_;
  pthread_t thread_{};
  int socket_ = -1;
  int wake_ = -1;
  bool running_ = false;
};

// Without an environment where that is about to end.
void Deliver(Napi::Env env, Napi::Function callback, Uevents*, Message* data) {
  const std::unique_ptr<Message> message(data);
  if (static_cast<napi_env>(env) == nullptr) return;
  if (message->error != 0) {
    callback.Call({Napi::Number::New(env, static_cast<double>(message->error))});
  } else {
    callback.Call({Napi::Buffer<char>::Copy(env, message->bytes.data(), message->bytes.size())});
  }
}

Napi::Value Open(const Napi::CallbackInfo& info) {
  if (info.Length() != 1 || !info[0].IsFunction()) {
    Napi::TypeError::New(info.Env(), "ueventOpenSync: expected a function").ThrowAsJavaScriptException();
    return {};
  }
  auto uevents = std::make_unique<Uevents>(info.Env());
  if (const long error = uevents->Open(info[0].As<Napi::Function>()); error != 0) {
    uevents->Close();
    return Napi::Number::New(info.Env(), static_cast<double>(error));
  }
  return Napi::External<Uevents>::New(info.Env(), uevents.release(),
                                      [](Napi::Env, Uevents* closed) { delete closed; });
}

Napi::Value Close(const Napi::CallbackInfo& info) {
  if (info.Length() != 1 || !info[0].IsExternal()) {
    Napi::TypeError::New(info.Env(), "ueventCloseSync: expected what ueventOpenSync gave")
        .ThrowAsJavaScriptException();
    return {};
  }
  info[0].As<Napi::External<Uevents>>().Data()->Close();
  return Napi::Number::New(info.Env(), 0);
}

}  // namespace

void InitUevent(Napi::Env env, Napi::Object exports) {
  exports.Set("ueventOpenSync", Napi::Function::New<Open>(env, "ueventOpenSync"));
  exports.Set("ueventCloseSync", Napi::Function::New<Close>(env, "ueventCloseSync"));
}

}  // namespace loopctl
