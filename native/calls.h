// The system calls of the addon as plain C++: no JavaScript in here, and no decisions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace loopctl {

enum class Parameter : std::uint8_t {
  kNone,
  kInt,    // number: an int of the kernel's
  kFd,     // number: a descriptor
  kU64,    // bigint
  kIn,     // Uint8Array of data_size bytes that the kernel reads
  kOut,    // Uint8Array of data_size bytes that is filled when the call succeeds
  kPath,   // Uint8Array that ends in a NUL
  kBytes,  // Uint8Array of any size that the kernel reads; not in sequences
  kRoom,   // Uint8Array of any size, of which as many bytes are filled as the answer says; not in sequences
};

inline constexpr std::size_t kMaxParameters = 4;

// What a call that succeeds leaves behind, for whoever has to undo it.
enum class Effect : std::uint8_t {
  kNone,
  kOpens,     // the answer is a new descriptor
  kCloses,    // the first argument, whatever the answer is
  kAttaches,  // the device of the first argument
  kDetaches,  // the same
  kAdds,      // the answer is the number of a new device
  kNames,     // its last path is there now, in the folder of the descriptor before it if there is one
  kCreates,   // that, and the answer is a new descriptor
  kMoves,     // from the first path to the second one, in the folder of the first argument; with flags at the
              // end
  kMakes,     // a folder of that name is in the folder of the first argument now
};

// What a call is given: numbers, and where its data is; for kBytes and kRoom the value is the size.
struct Arguments {
  std::array<std::int64_t, kMaxParameters> values{};
  std::array<std::byte*, kMaxParameters> data{};

  int Int(std::size_t i) const { return static_cast<int>(values[i]); }
  std::uint64_t U64(std::size_t i) const { return static_cast<std::uint64_t>(values[i]); }
  std::size_t Size(std::size_t i) const { return static_cast<std::size_t>(values[i]); }
  const char* Path(std::size_t i) const { return reinterpret_cast<const char*>(data[i]); }
};

// One row: `name` for JavaScript (and `name` + "Sync"), the function, its parameters.
// The function answers what the kernel answered: a value >= 0, or the negative errno.
struct Call {
  const char* name;
  long (*run)(Arguments&);
  std::array<Parameter, kMaxParameters> parameters;
  std::size_t data_size = 0;
  Effect effect = Effect::kNone;
};

std::span<const Call> Calls();

// LOOP_CLR_FD and LOOP_CTL_REMOVE, to undo what a call did.
void DetachDevice(int fd);
void RemoveDevice(int control, int number);

constexpr bool IsNumber(Parameter parameter) {
  return parameter == Parameter::kInt || parameter == Parameter::kFd;
}

// Whether JavaScript's array is filled.
constexpr bool IsFilled(Parameter parameter) {
  return parameter == Parameter::kOut || parameter == Parameter::kRoom;
}

constexpr bool IsData(Parameter parameter) {
  return parameter == Parameter::kIn || parameter == Parameter::kOut || parameter == Parameter::kPath ||
         parameter == Parameter::kBytes || parameter == Parameter::kRoom;
}

}  // namespace loopctl
