// The system calls of the addon as plain C++: no JavaScript in here, and no decisions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace loopctl {

enum class Parameter : std::uint8_t {
  kNone,
  kInt,  // number: a descriptor or an int of the kernel's
  kU64,  // bigint
  kIn,   // Uint8Array of data_size bytes that the kernel reads
  kOut,  // Uint8Array of data_size bytes that is filled when the call succeeds
};

inline constexpr std::size_t kMaxParameters = 4;
inline constexpr std::size_t kMaxDataSize = 304;  // struct loop_config

// What a call is given: a copy, so that it stays valid on another thread whatever JavaScript does.
struct Arguments {
  std::array<std::int64_t, kMaxParameters> values{};
  alignas(8) std::array<std::byte, kMaxDataSize> data{};

  int Int(std::size_t i) const { return static_cast<int>(values[i]); }
  std::uint64_t U64(std::size_t i) const { return static_cast<std::uint64_t>(values[i]); }
};

// One row: `name` for JavaScript (and `name` + "Sync"), the function, its parameters.
// The function answers what the kernel answered: a value >= 0, or the negative errno.
struct Call {
  const char* name;
  long (*run)(Arguments&);
  std::array<Parameter, kMaxParameters> parameters;
  std::size_t data_size = 0;
};

std::span<const Call> Calls();

}  // namespace loopctl
