{
  "variables": {"werror%": "<!(node -p \"+!!process.env.WERROR\")"},
  "targets": [{
    "target_name": "loopctl",
    "conditions": [["OS != 'linux'", {"type": "none"}, {
      "sources": ["native/addon.cc", "native/calls.cc", "native/effects.cc", "native/environment.cc", "native/extents.cc", "native/processes.cc", "native/reading.cc", "native/sequence.cc", "native/signals.cc", "native/sysfs.cc", "native/uevent.cc", "native/workers.cc"],
      "defines": [
        "NAPI_VERSION=9",
        "NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS",
        "NODE_ADDON_API_DISABLE_DEPRECATED",
        # Without it a worker thread terminated while a call is in flight aborts the whole process.
        "NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS",
      ],
      "cflags_cc": [
        "-std=c++20",
        "-isystem <!(node -p \"path.resolve(require('node-addon-api').include_dir)\")",
        "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffunction-sections", "-fdata-sections",
        "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wsign-conversion",
        "-Wold-style-cast", "-Wnon-virtual-dtor",
      ],
      # Threads of the addon can be in a call when the environment that has loaded it ends.
      "ldflags": ["-Wl,-z,nodelete"],
      "conditions": [["werror==1", {"cflags_cc": ["-Werror"]}]],
      "configurations": {"Release": {
        "defines": ["NDEBUG"],
        "cflags_cc": ["-O2", "-fstack-protector-strong", "-fstack-clash-protection"],
        "ldflags": ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,--gc-sections", "-Wl,--as-needed"],
      }},
    }]],
  }],
}
