// What one process has of some devices.
#pragma once

#include <cstddef>

#include "calls.h"

namespace loopctl {

// For the row of native/calls.cc. lib/kernel/processes.ts writes the struct, and says what is in it.
inline constexpr std::size_t kProcessUseSize = 1320;

// processUse(pid, ProcessUse): 0, or the negative errno where the process is gone or may not be looked at.
long ReadProcessUse(Arguments& a);

}  // namespace loopctl
