// The files of many directories of sysfs in one call: a hop to a thread for each would cost more than the
// reading.
#pragma once

#include <napi.h>

namespace loopctl {

// Adds sysfsRead and sysfsReadSync.
void InitSysfs(Napi::Env env, Napi::Object exports);

}  // namespace loopctl
