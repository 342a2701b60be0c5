// Calls one after another in one hop to a thread: a hop costs more than most of them.
#pragma once

#include <napi.h>

namespace loopctl {

// Adds sequenceRun, and sequenceRows: the names of Calls(), in order.
void InitSequence(Napi::Env env, Napi::Object exports);

}  // namespace loopctl
