/*
 * launcher REQUEST=ERRNO[,REQUEST=ERRNO...] -- COMMAND [ARGUMENT...]
 *
 * Runs the command with a seccomp filter under which every ioctl(2) of that request fails with that errno and never
 * reaches the kernel. Both are names (LOOP_CONFIGURE=EINVAL) or numbers (0x4c0a=22). Exits 125 for wrong arguments,
 * 126 where no filter can be had, 127 where the command cannot be run.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/blkpg.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "only for x86-64 and arm64: another ABI has other numbers and maybe another byte order"
#endif

/* newer than some headers */
#ifndef LOOP_CONFIGURE
#define LOOP_CONFIGURE 0x4C0A
#endif
#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, uint64_t)
#endif

struct name {
  const char *text;
  uint32_t value;
};

#define NAME(constant) {#constant, (uint32_t)(constant)}
static const struct name requests[] = {
    NAME(LOOP_CTL_ADD),       NAME(LOOP_CTL_REMOVE),    NAME(LOOP_CTL_GET_FREE),   NAME(LOOP_CONFIGURE),
    NAME(LOOP_SET_FD),        NAME(LOOP_CHANGE_FD),     NAME(LOOP_CLR_FD),         NAME(LOOP_GET_STATUS64),
    NAME(LOOP_SET_STATUS64),  NAME(LOOP_SET_CAPACITY),  NAME(LOOP_SET_DIRECT_IO),  NAME(LOOP_SET_BLOCK_SIZE),
    NAME(BLKGETSIZE64),       NAME(BLKSSZGET),          NAME(BLKROGET),            NAME(BLKROSET),
    NAME(BLKFLSBUF),          NAME(BLKRRPART),          NAME(BLKPG),               NAME(BLKGETDISKSEQ),
};
static const struct name errnos[] = {
    NAME(EACCES), NAME(EAGAIN), NAME(EBADF),  NAME(EBUSY),  NAME(EEXIST),    NAME(EFAULT),
    NAME(EFBIG),  NAME(EINTR),  NAME(EINVAL), NAME(EIO),    NAME(ENODEV),    NAME(ENOMEM),
    NAME(ENOSYS), NAME(ENOTTY), NAME(ENXIO),  NAME(EPERM),  NAME(EOVERFLOW), NAME(ESTALE),
};
#define COUNT(array) (sizeof(array) / sizeof *(array))
enum { MAX_FAULTS = 32 };

static int find(const struct name *names, size_t count, const char *text, uint32_t *value) {
  for (size_t i = 0; i < count; i++) {
    if (strcmp(names[i].text, text) != 0) continue;
    *value = names[i].value;
    return 0;
  }
  char *end;
  errno = 0;
  const unsigned long number = strtoul(text, &end, 0);
  if (errno != 0 || *text < '0' || *text > '9' || *end != '\0' || number > UINT32_MAX) return -1;
  *value = (uint32_t)number;
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 4 || strcmp(argv[2], "--") != 0) {
    fprintf(stderr, "usage: launcher REQUEST=ERRNO[,REQUEST=ERRNO...] -- COMMAND [ARGUMENT...]\n");
    return 125;
  }
  struct sock_filter code[6 + 2 * MAX_FAULTS + 1] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0),
      /* Another ABI's ioctl has another number and would slip through: nothing here has any business with one. */
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
  };
  unsigned short length = 4;
  const unsigned short other_calls = length++;
  /* To the kernel the request is an unsigned int: what is above its 32 bits does not count. */
  code[length++] =
      (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]));
  int faults = 0;
  for (char *pair = strtok(argv[1], ","); pair != NULL; pair = strtok(NULL, ",")) {
    char *error = strchr(pair, '=');
    uint32_t request;
    uint32_t number;
    if (error != NULL) *error++ = '\0';
    if (error == NULL || faults++ == MAX_FAULTS || find(requests, COUNT(requests), pair, &request) != 0 ||
        find(errnos, COUNT(errnos), error, &number) != 0 || number == 0 || number > 4095) {
      fprintf(stderr, "launcher: %s: not a request and an errno\n", pair);
      return 125;
    }
    code[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, request, 0, 1);
    code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | number);
  }
  code[other_calls] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 0,
                                                   (unsigned char)(length - other_calls - 1));
  code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog filter = {.len = length, .filter = code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
    perror("launcher: seccomp");
    return 126;
  }
  execvp(argv[3], argv + 3);
  perror(argv[3]);
  return 127;
}
