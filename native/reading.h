// What is of any length, whole.
#pragma once

#include <napi.h>

namespace loopctl {

// Adds readWhole (a file) and readNames (of a directory).
void InitReading(Napi::Env env, Napi::Object exports);

}  // namespace loopctl
