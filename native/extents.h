// Data of files: copied and compared extent by extent, many of them in one call.
#pragma once

#include <cstddef>

#include "calls.h"

namespace loopctl {

// For the rows of native/calls.cc. lib/kernel/extents.ts writes the structs, and says what is in them.
inline constexpr std::size_t kCopySize = 48;
inline constexpr std::size_t kComparisonSize = 48;

// Both answer 0, and what became of it is in the struct, also where a call failed half-way.
long CopyExtents(Arguments& a);
long CompareExtents(Arguments& a);

}  // namespace loopctl
