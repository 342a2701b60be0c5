#include "room.h"

#include <pthread.h>
#include <cstdint>
#include <memory>
#include <vector>

#include "lock.h"

namespace loopctl {

class Room {
 public:
  explicit Room(std::size_t size) : size_(size), bytes_(std::make_unique_for_overwrite<std::byte[]>(size)) {}

  std::byte* data() const { return bytes_.get(); }
  std::size_t size() const { return size_; }

  bool Contains(std::span<const std::byte> bytes) const {
    return bytes.data() >= data() && bytes.data() + bytes.size() <= data() + size();
  }

 private:
  friend class Rooms;

  std::size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
  unsigned uses_ = 1;
};

// All of the process. Few: two or three for each copy that is made.
class Rooms {
 public:
  // Never destroyed: threads use it until the process has ended.
  static Rooms& Get() {
    static Rooms& rooms = *new Rooms;
    return rooms;
  }

  Room* Make(std::size_t size) {
    auto* room = new Room(size);
    const Lock lock(mutex_);
    rooms_.push_back(room);
    return room;
  }

  Room* Use(std::span<const std::byte> bytes) {
    const Lock lock(mutex_);
    for (Room* room : rooms_) {
      if (!room->Contains(bytes)) continue;
      room->uses_++;
      return room;
    }
    return nullptr;
  }

  void Release(Room* room) {
    const Lock lock(mutex_);
    if (--room->uses_ > 0) return;
    std::erase(rooms_, room);
    delete room;
  }

 private:
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  std::vector<Room*> rooms_;
};

RoomUse::RoomUse(std::span<const std::byte> bytes)
    : room_(bytes.empty() ? nullptr : Rooms::Get().Use(bytes)) {}

RoomUse::~RoomUse() {
  if (room_ != nullptr) Rooms::Get().Release(room_);
}

namespace {

constexpr double kMostBytes = 1 << 30;

// The garbage collector has to know how much a small object keeps.
void Weigh(napi_env env, std::int64_t bytes) {
  std::int64_t all = 0;
  ::napi_adjust_external_memory(env, bytes, &all);
}

// newRoomSync(bytes): a Buffer; an ordinary one where the runtime takes no memory of others.
Napi::Value NewRoom(const Napi::CallbackInfo& info) {
  const double size =
      info.Length() == 1 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : -1;
  if (!(size >= 1 && size <= kMostBytes)) {
    Napi::TypeError::New(info.Env(), "newRoomSync: expected a number of bytes").ThrowAsJavaScriptException();
    return {};
  }
  Room* const room = Rooms::Get().Make(static_cast<std::size_t>(size));
  napi_value buffer = nullptr;
  const auto release = [](napi_env env, void*, void* hint) {
    auto* const released = static_cast<Room*>(hint);
    Weigh(env, -static_cast<std::int64_t>(released->size()));
    Rooms::Get().Release(released);
  };
  if (::napi_create_external_buffer(info.Env(), room->size(), room->data(), release, room, &buffer) ==
      napi_ok) {
    Weigh(info.Env(), static_cast<std::int64_t>(room->size()));
    return {info.Env(), buffer};
  }
  Rooms::Get().Release(room);
  return Napi::Buffer<std::byte>::New(info.Env(), static_cast<std::size_t>(size));
}

}  // namespace

void InitRoom(Napi::Env env, Napi::Object exports) {
  exports.Set("newRoomSync", Napi::Function::New<NewRoom>(env, "newRoomSync"));
}

}  // namespace loopctl
