/*
 * Preloaded into a user-mode Linux of before 6.16 or so. It holds its processes by ptrace, and sets their floating-point
 * state from a buffer that is smaller than the whole state of a CPU with AMX: Linux refuses to set a part of the state
 * (PTRACE_SETREGSET, NT_X86_XSTATE: EINVAL). What the buffer lacks is filled up here with what the process has.
 */

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdalign.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static long call(long request, pid_t pid, void *address, void *data) {
  return syscall(SYS_ptrace, request, (long)pid, address, data);
}

static long set_xstate(pid_t pid, const struct iovec *given) {
  static _Thread_local alignas(64) char state[1 << 16];
  struct iovec whole = {state, sizeof state};
  void *const type = (void *)NT_X86_XSTATE;
  if (call(PTRACE_GETREGSET, pid, type, &whole) != 0 || given->iov_len >= whole.iov_len)
    return call(PTRACE_SETREGSET, pid, type, (void *)given);
  memcpy(state, given->iov_base, given->iov_len);
  return call(PTRACE_SETREGSET, pid, type, &whole);
}

long ptrace(enum __ptrace_request request, ...) {
  va_list list;
  va_start(list, request);
  const pid_t pid = va_arg(list, pid_t);
  void *const address = va_arg(list, void *);
  void *const data = va_arg(list, void *);
  va_end(list);
  if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) return set_xstate(pid, data);
  if (request != PTRACE_PEEKTEXT && request != PTRACE_PEEKDATA && request != PTRACE_PEEKUSER)
    return call(request, pid, address, data);
  /* The C library answers with the word itself, and the system call writes it to where `data` points. */
  long word = 0;
  if (call(request, pid, address, &word) != 0) return -1;
  errno = 0;
  return word;
}
