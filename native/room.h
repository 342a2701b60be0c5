// Memory that JavaScript sees as a Buffer and that threads of the addon read files into, without a copy. It
// lives until neither needs it: a thread may be in the kernel with it when JavaScript has ended.
#pragma once

#include <napi.h>

#include <cstddef>
#include <span>

namespace loopctl {

class Room;

// A use of the room that the bytes lie in; none where they are memory of another kind.
class RoomUse {
 public:
  RoomUse() = default;
  explicit RoomUse(std::span<const std::byte> bytes);
  ~RoomUse();
  RoomUse(const RoomUse&) = delete;
  RoomUse& operator=(const RoomUse&) = delete;

  bool is_one() const { return room_ != nullptr; }

 private:
  Room* room_ = nullptr;
};

// Adds newRoomSync.
void InitRoom(Napi::Env env, Napi::Object exports);

}  // namespace loopctl
