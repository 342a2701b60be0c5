// What JavaScript hands over as bytes.
#pragma once

#include <napi.h>

#include <cstddef>
#include <optional>
#include <span>

namespace loopctl {

// Those of a Uint8Array, where JavaScript has them; nothing for any other value.
inline std::optional<std::span<std::byte>> BytesOf(const Napi::Value& value) {
  napi_typedarray_type type{};
  std::size_t length = 0;
  void* data = nullptr;
  if (!value.IsTypedArray() ||
      napi_get_typedarray_info(value.Env(), value, &type, &length, &data, nullptr, nullptr) != napi_ok ||
      type != napi_uint8_array) {
    return std::nullopt;
  }
  return std::span(static_cast<std::byte*>(data), length);
}

}  // namespace loopctl
