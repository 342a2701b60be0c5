// Who sends signals to this process.
#pragma once

#include "calls.h"

namespace loopctl {

// For the row of native/calls.cc. signalSender(number): 1 where the kernel sent the last signal of that
// number, as it does for a terminal, to all processes of its foreground group; 0 where a process sent it, or
// none has come yet. EINVAL where the signal has no handler, to which it is passed on.
long SignalSender(Arguments& a);

}  // namespace loopctl
