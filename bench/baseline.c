/*
 * What the same system calls cost without Node. One command a line on stdin; the answer is one line of
 * numbers, nanoseconds unless it says otherwise. Everything is attached with autoclear: nothing outlives this
 * process.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int control;

static long long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* The answer, if it is none of a failure. */
static int must(int answer, const char* what) {
  if (answer >= 0) return answer;
  printf("error: %s: %s\n", what, strerror(errno));
  exit(1);
}

/* 0 where the line is at its end. */
static long long number_of(char** rest) {
  const char* word = strsep(rest, " ");
  return word ? atoll(word) : 0;
}

static int open_device(int number, int flags) {
  char path[32];
  snprintf(path, sizeof path, "/dev/loop%d", number);
  return open(path, flags | O_CLOEXEC);
}

struct wish {
  const char* file;
  int read_only;
  unsigned block_size;
  unsigned long long offset, size_limit;
};

static int configure(int device, int file, const struct wish* wish) {
  struct loop_config config = {
      .fd = (unsigned)file,
      .block_size = wish->block_size,
      .info = {.lo_offset = wish->offset,
               .lo_sizelimit = wish->size_limit,
               .lo_flags = LO_FLAGS_AUTOCLEAR | (wish->read_only ? LO_FLAGS_READ_ONLY : 0)},
  };
  return ioctl(device, LOOP_CONFIGURE, &config);
}

/* Any free device; another process may be faster: then the next one. */
static int attach(const struct wish* wish, int* number, long* retries) {
  int flags = wish->read_only ? O_RDONLY : O_RDWR;
  int file = must(open(wish->file, flags | O_CLOEXEC), wish->file);
  for (;;) {
    *number = must(ioctl(control, LOOP_CTL_GET_FREE), "LOOP_CTL_GET_FREE");
    int device = open_device(*number, flags);
    if (device >= 0 && configure(device, file, wish) == 0) {
      close(file);
      return device;
    }
    /* ENXIO: it was attached, and is being detached. */
    if (errno != EBUSY && errno != ENXIO) must(-1, "LOOP_CONFIGURE");
    if (device >= 0) close(device);
    ++*retries;
  }
}

static void get_status(int device) {
  struct loop_info64 info;
  must(ioctl(device, LOOP_GET_STATUS64, &info), "LOOP_GET_STATUS64");
}

static void get_diskseq(int device) {
  unsigned long long value;
  ioctl(device, BLKGETDISKSEQ, &value);
}

static void detach(int device) {
  must(ioctl(device, LOOP_CLR_FD), "LOOP_CLR_FD");
  close(device);
}

/* attach, look, detach: as few calls as it takes. With a partition: added with BLKPG, and removed. */
static void bare(const struct wish* wish, const struct blkpg_partition* partition) {
  int number;
  long retries = 0;
  int device = attach(wish, &number, &retries);
  get_status(device);
  if (partition->length > 0) {
    struct blkpg_ioctl_arg arg = {
        .op = BLKPG_ADD_PARTITION, .datalen = sizeof *partition, .data = (void*)partition};
    must(ioctl(device, BLKPG, &arg), "BLKPG_ADD_PARTITION");
    arg.op = BLKPG_DEL_PARTITION;
    must(ioctl(device, BLKPG, &arg), "BLKPG_DEL_PARTITION");
  }
  detach(device);
}

/* ── the pass over sysfs ── */

static const char* const ATTRIBUTES[] = {"dev",
                                         "diskseq",
                                         "size",
                                         "ro",
                                         "queue/logical_block_size",
                                         "loop/offset",
                                         "loop/sizelimit",
                                         "loop/autoclear",
                                         "loop/partscan",
                                         "loop/dio"};

/* Bytes of the file; -1 where there is none. */
static ssize_t slurp(int directory, const char* name, char* buffer, size_t size) {
  int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t length = read(fd, buffer, size - 1);
  close(fd);
  buffer[length > 0 ? length : 0] = 0;
  return length;
}

/* All that loopctl tells of a device, with diskseq once more at the end; 0 where it is free. */
static int read_device(int block, const char* name, char* backing_file) {
  char value[64];
  int directory = openat(block, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return 0;
  int attached = slurp(directory, "loop/backing_file", backing_file, 4096) > 0;
  if (attached) {
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
      slurp(directory, ATTRIBUTES[i], value, sizeof value);
    slurp(directory, "diskseq", value, sizeof value);
  }
  close(directory);
  return attached;
}

/* Of the path alone, where a file is looked for; answers how many devices are attached (to it). */
static int list(const char* file) {
  char path[4096], name[300];
  struct stat wanted, found;
  int count = 0;
  if (file) must(stat(file, &wanted), file);
  DIR* block = opendir("/sys/block");
  for (struct dirent* entry; (entry = readdir(block));) {
    if (strncmp(entry->d_name, "loop", 4) != 0) continue;
    if (!file) {
      count += read_device(dirfd(block), entry->d_name, path);
      continue;
    }
    snprintf(name, sizeof name, "%s/loop/backing_file", entry->d_name);
    if (slurp(dirfd(block), name, path, sizeof path) <= 0) continue;
    path[strcspn(path, "\n")] = 0;
    if (stat(path, &found) < 0 || found.st_ino != wanted.st_ino || found.st_dev != wanted.st_dev) continue;
    count += read_device(dirfd(block), entry->d_name, path);
  }
  closedir(block);
  return count;
}

/* The calls of loopctl's status(). */
static void look(int device, int number) {
  char name[64], path[4096];
  unsigned long long size;
  int value;
  get_status(device);
  ioctl(device, BLKGETSIZE64, &size);
  ioctl(device, BLKSSZGET, &value);
  ioctl(device, BLKROGET, &value);
  snprintf(name, sizeof name, "/sys/block/loop%d/loop/backing_file", number);
  if (slurp(AT_FDCWD, name, path, sizeof path) <= 0) must(-1, name);
  get_diskseq(device);
}

/* ── with loopctl's care ── */

/* Whether the device has partitions shows in the links of its directory. */
static void count_links(int number) {
  char path[64];
  struct stat directory;
  snprintf(path, sizeof path, "/sys/block/loop%d", number);
  must(stat(path, &directory), path);
}

/*
 * The calls of loopctl's attach(), status() and detach(): under the lock of loop-control, with a lease to
 * find out whether somebody else has the file open, verified, kept by a read-only descriptor, detached by an
 * exclusive one.
 */
static void careful(const struct wish* wish) {
  struct loop_info64 info;
  struct stat before, opened;
  unsigned long long size;
  int read_only;
  must(stat(wish->file, &before), wish->file);
  int file = must(open(wish->file, O_RDWR | O_NONBLOCK | O_CLOEXEC), wish->file);
  must(fstat(file, &opened), wish->file);
  fcntl(file, F_SETFL, 0);
  int lock = must(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "/dev/loop-control");
  must(flock(lock, LOCK_EX), "flock");
  fcntl(file, F_SETSIG, SIGURG);
  if (fcntl(file, F_SETLEASE, F_WRLCK) == 0) fcntl(file, F_SETLEASE, F_UNLCK);
  int number, writable;
  for (;;) {
    number = must(ioctl(lock, LOOP_CTL_GET_FREE), "LOOP_CTL_GET_FREE");
    count_links(number);
    writable = must(open_device(number, O_RDWR), "open loop device");
    get_diskseq(writable);
    if (configure(writable, file, wish) == 0) break;
    /* Another program, which takes no lock, was faster. */
    if (errno != EBUSY && errno != ENXIO) must(-1, "LOOP_CONFIGURE");
    close(writable);
  }
  close(lock);
  get_diskseq(writable);
  get_status(writable);
  ioctl(writable, BLKGETSIZE64, &size);
  ioctl(writable, BLKROGET, &read_only);
  int device = must(open_device(number, O_RDONLY), "open loop device");
  close(writable);
  close(file);

  look(device, number);

  get_diskseq(device);
  get_status(device);
  count_links(number);
  int exclusive = must(open_device(number, O_RDONLY | O_EXCL), "open loop device exclusively");
  must(fsync(device), "fsync");
  close(device);
  must(ioctl(exclusive, LOOP_CLR_FD), "LOOP_CLR_FD");
  if (ioctl(exclusive, LOOP_GET_STATUS64, &info) == 0 || errno != ENXIO) must(-1, "still attached");
  close(exclusive);
  count_links(number);
}

/* ── many ── */

/* Attaches `count` files, then times their detaching, one after the other. */
static void detach_many(const char* prefix, int count) {
  char path[4096];
  int number, *devices = calloc((size_t)count, sizeof *devices);
  long retries = 0;
  for (int i = 0; i < count; i++) {
    snprintf(path, sizeof path, "%s%d", prefix, i);
    devices[i] = attach(&(struct wish){.file = path}, &number, &retries);
  }
  long long start = now();
  for (int i = 0; i < count; i++) detach(devices[i]);
  printf("%lld", now() - start);
  free(devices);
}

static void remove_many(char* rest) {
  long long start = now();
  while (rest && *rest) must(ioctl(control, LOOP_CTL_REMOVE, (long)number_of(&rest)), "LOOP_CTL_REMOVE");
  printf("%lld", now() - start);
}

/* As many processes at once; prints attaches a second, retries in all, and the slowest attach. */
static void contend(const char* prefix, int processes, int rounds, int with_lock) {
  struct result {
    long retries;
    long long slowest;
  }* results = mmap(NULL, sizeof *results * (size_t)processes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  int gate[2];
  must(pipe(gate), "pipe");
  fflush(stdout);
  for (int i = 0; i < processes; i++) {
    if (must(fork(), "fork") != 0) continue;
    char path[4096], byte;
    snprintf(path, sizeof path, "%s%d", prefix, i);
    close(gate[1]);
    control = must(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "/dev/loop-control");
    must((int)read(gate[0], &byte, 1), "gate");
    for (int round = 0; round < rounds; round++) {
      int number;
      long long start = now();
      if (with_lock) flock(control, LOCK_EX);
      int device = attach(&(struct wish){.file = path}, &number, &results[i].retries);
      if (with_lock) flock(control, LOCK_UN);
      long long took = now() - start;
      if (took > results[i].slowest) results[i].slowest = took;
      detach(device);
    }
    _exit(0);
  }
  long long start = now();
  close(gate[0]);
  close(gate[1]);
  while (wait(NULL) > 0) continue;
  double seconds = (double)(now() - start) / 1e9;
  struct result all = {0};
  for (int i = 0; i < processes; i++) {
    all.retries += results[i].retries;
    if (results[i].slowest > all.slowest) all.slowest = results[i].slowest;
  }
  printf("%.0f %ld %lld", processes * rounds / seconds, all.retries, all.slowest);
  munmap(results, sizeof *results * (size_t)processes);
}

#define TIME(work)                  \
  for (int i = 0; i < count; i++) { \
    long long start = now();        \
    work;                           \
    printf("%lld ", now() - start); \
  }

int main(void) {
  /* Ctrl-C is for the parent, which then ends this. */
  signal(SIGINT, SIG_IGN);
  control = must(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "/dev/loop-control");
  char* line = NULL;
  size_t size = 0;
  for (ssize_t length; (length = getline(&line, &size, stdin)) > 0;) {
    line[length - 1] = 0;
    char *rest = line, *command = strsep(&rest, " ");
    if (!strcmp(command, "remove"))
      remove_many(rest);
    else {
      int count = (int)number_of(&rest);
      if (!strcmp(command, "attach")) {
        struct wish wish = {.file = strsep(&rest, " ")};
        wish.read_only = (int)number_of(&rest);
        wish.offset = (unsigned long long)number_of(&rest);
        wish.size_limit = (unsigned long long)number_of(&rest);
        wish.block_size = (unsigned)number_of(&rest);
        struct blkpg_partition partition = {.pno = 1};
        partition.start = number_of(&rest);
        partition.length = number_of(&rest);
        TIME(bare(&wish, &partition))
      } else if (!strcmp(command, "careful")) {
        struct wish wish = {.file = strsep(&rest, " ")};
        TIME(careful(&wish))
      } else if (!strcmp(command, "status")) {
        int number = (int)number_of(&rest), whole = (int)number_of(&rest);
        int device = must(open_device(number, O_RDONLY), "open loop device");
        TIME(if (whole) look(device, number); else get_status(device))
        close(device);
      } else if (!strcmp(command, "list")) {
        TIME(list(NULL))
      } else if (!strcmp(command, "find")) {
        const char* file = strsep(&rest, " ");
        TIME(if (list(file) != 1) must(-1, file))
      } else if (!strcmp(command, "change")) {
        int device = must(open_device((int)number_of(&rest), O_RDONLY), "open loop device");
        const char* files[] = {strsep(&rest, " "), strsep(&rest, " ")};
        TIME(int file = must(open(files[i % 2], O_RDONLY | O_CLOEXEC), files[i % 2]);
             must(ioctl(device, LOOP_CHANGE_FD, file), "LOOP_CHANGE_FD"); close(file))
        close(device);
      } else if (!strcmp(command, "detach-many"))
        detach_many(strsep(&rest, " "), count);
      else if (!strcmp(command, "contend")) {
        const char* prefix = strsep(&rest, " ");
        int rounds = (int)number_of(&rest);
        contend(prefix, count, rounds, (int)number_of(&rest));
      } else
        printf("error: no such command: %s", command);
    }
    putchar('\n');
    fflush(stdout);
  }
  return 0;
}
