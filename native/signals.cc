#include "signals.h"

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>

namespace loopctl {
namespace {

constexpr int kSignals = 32;  // those before the real-time ones

struct Watched {
  struct sigaction former{};
  std::atomic<bool> was_kernel = false;
};

std::array<Watched, kSignals> watched;

// libuv's handler is not told who sent the signal: noted on the way to it.
void Note(int number, siginfo_t* info, void* context) {
  Watched& signal = watched[static_cast<std::size_t>(number)];
  signal.was_kernel.store(info->si_code > 0, std::memory_order_relaxed);
  if ((signal.former.sa_flags & SA_SIGINFO) != 0) {
    signal.former.sa_sigaction(number, info, context);
  } else {
    signal.former.sa_handler(number);
  }
}

}  // namespace

long SignalSender(Arguments& a) {
  const int number = a.Int(0);
  if (number <= 0 || number >= kSignals) return -EINVAL;
  Watched& signal = watched[static_cast<std::size_t>(number)];
  struct sigaction present{};
  if (::sigaction(number, nullptr, &present) != 0) return -errno;
  const bool is_noted = (present.sa_flags & SA_SIGINFO) != 0 && present.sa_sigaction == &Note;
  if (is_noted) return signal.was_kernel.load(std::memory_order_relaxed) ? 1 : 0;
  const bool has_handler = (present.sa_flags & SA_SIGINFO) != 0 ||
                           (present.sa_handler != SIG_DFL && present.sa_handler != SIG_IGN);
  if (!has_handler) return -EINVAL;
  signal.former = present;
  signal.was_kernel = false;
  struct sigaction noting = present;
  noting.sa_flags |= SA_SIGINFO;
  noting.sa_sigaction = &Note;
  return ::sigaction(number, &noting, nullptr) == 0 ? 0 : -errno;
}

}  // namespace loopctl
