// The system calls of the addon as plain C++: no JavaScript in here, and no decisions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace loopctl {

enum class Parameter : std::uint8_t {
  kNone,
  kInt,   // number: a descriptor or an int of the kernel's
  kU64,   // bigint
  kIn,    // Uint8Array of data_size bytes that the kernel reads
  kOut,   // Uint8Array of data_size bytes that is filled when the call succeeds
  kPath,  // Uint8Array that ends in a NUL
};

inline constexpr std::size_t kMaxParameters = 4;

// What a call is given: numbers, and where its data is.
struct Arguments {
  std::array<std::int64_t, kMaxParameters> values{};
  std::array<std::byte*, kMaxParameters> data{};

  int Int(std::size_t i) const { return static_cast<int>(values[i]); }
  std::uint64_t U64(std::size_t i) const { return static_cast<std::uint64_t>(values[i]); }
  const char* Path(std::size_t i) const { return reinterpret_cast<const char*>(data[i]); }
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

constexpr bool IsData(Parameter parameter) {
  return parameter == Parameter::kIn || parameter == Parameter::kOut || parameter == Parameter::kPath;
}

}  // namespace loopctl
