/*
 * without WHAT[,WHAT...] -- COMMAND [ARGUMENT...]
 *
 * Runs the command as on a filesystem that lacks something: a seccomp filter answers for the kernel.
 *   tmpfile  openat(2) with O_TMPFILE fails with EOPNOTSUPP, as on vfat
 *   flags    renameat2(2) with a flag fails with EINVAL, as on NFS
 *   links    linkat(2) fails with EPERM, as on vfat
 * Exits 125 for wrong arguments, 126 where no filter can be had, 127 where the command cannot be run.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
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

enum { TMPFILE = 020000000, ANY = 0 };

struct lack {
  const char *name;
  unsigned number;
  unsigned argument; /* which one has the flags */
  unsigned flags;    /* any of them; ANY: whatever they are */
  unsigned error;
};

static const struct lack lacks[] = {
    {"tmpfile", __NR_openat, 2, TMPFILE, EOPNOTSUPP},
    {"flags", __NR_renameat2, 4, 7, EINVAL},
    {"links", __NR_linkat, 4, ANY, EPERM},
};
#define COUNT(array) (sizeof(array) / sizeof *(array))

int main(int argc, char **argv) {
  if (argc < 4 || strcmp(argv[2], "--") != 0) {
    fprintf(stderr, "usage: without WHAT[,WHAT...] -- COMMAND [ARGUMENT...]\n");
    return 125;
  }
  struct sock_filter code[3 + 5 * COUNT(lacks) + 1] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  unsigned short length = 3;
  for (char *what = strtok(argv[1], ","); what != NULL; what = strtok(NULL, ",")) {
    const struct lack *lack = NULL;
    for (size_t i = 0; i < COUNT(lacks); i++) {
      if (strcmp(lacks[i].name, what) == 0) lack = &lacks[i];
    }
    if (lack == NULL || length + 5 >= (int)COUNT(code)) {
      fprintf(stderr, "without: %s\n", what);
      return 125;
    }
    const unsigned flags = offsetof(struct seccomp_data, args) + 8 * lack->argument;
    const struct sock_filter rule[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, lack->number, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, flags),
        BPF_JUMP(BPF_JMP | (lack->flags == ANY ? BPF_JGE : BPF_JSET) | BPF_K, lack->flags, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | lack->error),
    };
    memcpy(&code[length], rule, sizeof rule);
    length += COUNT(rule);
  }
  code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog filter = {.len = length, .filter = code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
    perror("without: seccomp");
    return 126;
  }
  execvp(argv[3], argv + 3);
  perror(argv[3]);
  return 127;
}
