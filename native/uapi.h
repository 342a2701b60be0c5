// The kernel's own definitions, completed where the installed headers are older than the kernel.
#pragma once

#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/types.h>

#ifndef LOOP_SET_BLOCK_SIZE  // headers before 4.14
#define LOOP_SET_BLOCK_SIZE 0x4C09
#endif

#ifndef LOOP_CONFIGURE  // headers before 5.8
#define LOOP_CONFIGURE 0x4C0A
struct loop_config {
  __u32 fd;
  __u32 block_size;
  struct loop_info64 info;
  __u64 __reserved[8];
};
#endif

#ifndef BLKGETDISKSEQ  // headers before 5.15
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

#ifndef F_GET_SEALS  // libc headers without _GNU_SOURCE's memfd part
#define F_GET_SEALS 1034
#endif

// The mount API, kernel 5.2. Its numbers are the same on all of Linux's architectures but Alpha; its
// constants are not taken from <linux/mount.h>, which redefines those of some versions of <sys/mount.h>.
inline constexpr long kSysMoveMount = 429;
inline constexpr long kSysFsopen = 430;
inline constexpr long kSysFsconfig = 431;
inline constexpr long kSysFsmount = 432;
inline constexpr unsigned kFsopenCloexec = 1;
inline constexpr unsigned kFsmountCloexec = 1;
inline constexpr unsigned kFsconfigSetFlag = 0;
inline constexpr unsigned kFsconfigSetString = 1;
inline constexpr unsigned kFsconfigCmdCreate = 6;
inline constexpr unsigned kMoveMountEmptyPaths =
    0x04 | 0x40;                                       // MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH
inline constexpr unsigned kStatxMntId = 0x1000;        // kernel 5.8
inline constexpr unsigned kStatxMntIdUnique = 0x4000;  // kernel 6.8

// lib/kernel/uapi.ts encodes and decodes these byte for byte.
static_assert(sizeof(struct loop_info64) == 232);
static_assert(sizeof(struct loop_config) == 304);
