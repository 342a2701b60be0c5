// The kernel's uevents: a netlink socket, and a thread that hands what it receives to JavaScript.
#pragma once

#include <napi.h>

namespace loopctl {

// Adds ueventOpenSync and ueventCloseSync.
void InitUevent(Napi::Env env, Napi::Object exports);

}  // namespace loopctl
