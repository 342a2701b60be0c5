#include "extents.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace loopctl {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPiece = 1 << 20;       // copied in the kernel, between two looks at the clock
constexpr std::uint64_t kBufferSize = 1 << 18;  // stays in the processor's cache
constexpr std::uint64_t kSmallHole = 1 << 16;
constexpr std::uint64_t kBlock = 4096;  // zeros are left out in blocks of this size

enum Flag : std::uint32_t {
  kLookForHoles = 1,   // what is a hole is skipped
  kInKernel = 2,       // copy_file_range(2), else pread(2) and pwrite(2)
  kLeaveOutZeros = 4,  // not written, as the target is a hole there
  kCountOnly = 8,      // nothing is copied
};

enum Fault : std::int32_t { kNone, kRead, kWrite, kCopy, kEnds, kDiffers };

struct Copy {
  std::uint64_t at;      // in the target; moves on, and a fault is there
  std::uint64_t end;     // in the target
  std::uint64_t shift;   // what has to be added to a place in the target for that in the source, modulo 2^64
  std::uint64_t copied;  // bytes of data, added to
  std::uint32_t milliseconds;  // after which it returns
  std::uint32_t flags;
  std::int32_t fault;
  std::int32_t error;  // the negative errno of the call that failed
};
static_assert(sizeof(Copy) == kCopySize);

struct Comparison {
  std::uint64_t at;  // counted from both starts; moves on, and a fault is there
  std::uint64_t end;
  std::uint64_t starts[2];  // in the left and in the right file
  std::uint32_t milliseconds;
  std::uint32_t flags;
  std::int16_t fault;
  std::int16_t side;  // where it is: 0 left, 1 right
  std::int32_t error;
};
static_assert(sizeof(Comparison) == kComparisonSize);

struct Extent {
  std::uint64_t start;
  std::uint64_t stop;
};

// The first data at or after the place, up to the end; none: begins at the end. All is data to a filesystem
// that cannot tell.
Extent NextData(int fd, std::uint64_t at, std::uint64_t end) {
  const off_t data = ::lseek(fd, static_cast<off_t>(at), SEEK_DATA);
  if (data < 0) return errno == ENXIO ? Extent{end, end} : Extent{at, end};
  const off_t hole = ::lseek(fd, data, SEEK_HOLE);
  const auto start = std::min(static_cast<std::uint64_t>(data), end);
  return {start, hole < 0 ? end : std::min(static_cast<std::uint64_t>(hole), end)};
}

using Buffer = std::unique_ptr<std::byte[]>;

Buffer NewBuffer() { return Buffer(new (std::nothrow) std::byte[kBufferSize]); }

bool IsZero(const std::byte* bytes, std::size_t length) {
  static constexpr std::byte kZeros[kBlock]{};
  return std::memcmp(bytes, kZeros, length) == 0;
}

// As pread(2) and pwrite(2), until all is done or the file ends: the bytes, or the negative errno.
template <typename Call>
ssize_t Fully(Call call, int fd, std::byte* bytes, std::size_t length, std::uint64_t at) {
  std::size_t done = 0;
  while (done < length) {
    const ssize_t count = call(fd, bytes + done, length - done, static_cast<off_t>(at + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -errno;
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  return static_cast<ssize_t>(done);
}

void Fail(Copy& copy, Fault fault, ssize_t error) {
  copy.fault = fault;
  copy.error = static_cast<std::int32_t>(error);
}

void CopyInKernel(int from, int to, Copy& copy, std::uint64_t stop) {
  auto in = static_cast<off_t>(copy.at + copy.shift);
  auto out = static_cast<off_t>(copy.at);
  const ssize_t count = ::copy_file_range(from, &in, to, &out, std::min(kPiece, stop - copy.at), 0);
  if (count <= 0) return Fail(copy, kCopy, count < 0 ? -errno : 0);
  copy.at += static_cast<std::uint64_t>(count);
  copy.copied += static_cast<std::uint64_t>(count);
}

bool Write(int to, Copy& copy, std::byte* bytes, std::size_t length) {
  const ssize_t written = Fully(::pwrite, to, bytes, length, copy.at);
  if (written > 0) {
    copy.at += static_cast<std::uint64_t>(written);
    copy.copied += static_cast<std::uint64_t>(written);
  }
  if (written == static_cast<ssize_t>(length)) return true;
  Fail(copy, kWrite, written < 0 ? written : -ENOSPC);
  return false;
}

void WriteWithoutZeros(int to, Copy& copy, std::byte* bytes, std::size_t length) {
  for (std::size_t from = 0; from < length;) {
    std::size_t data = from;
    while (data < length && IsZero(bytes + data, std::min(kBlock, length - data))) data += kBlock;
    copy.at += std::min(data, length) - from;
    from = data;
    while (from < length && !IsZero(bytes + from, std::min(kBlock, length - from))) from += kBlock;
    const std::size_t stop = std::min(from, length);
    if (data < stop && !Write(to, copy, bytes + data, stop - data)) return;
  }
}

void ReadAndWrite(int from, int to, Copy& copy, std::uint64_t stop, std::byte* buffer) {
  const auto length = static_cast<std::size_t>(std::min(kBufferSize, stop - copy.at));
  const ssize_t count = Fully(::pread, from, buffer, length, copy.at + copy.shift);
  if (count < 0) return Fail(copy, kRead, count);
  if (count == 0) return Fail(copy, kEnds, 0);
  if ((copy.flags & kLeaveOutZeros) != 0) {
    WriteWithoutZeros(to, copy, buffer, static_cast<std::size_t>(count));
  } else {
    Write(to, copy, buffer, static_cast<std::size_t>(count));
  }
}

void CopyPiece(int from, int to, Copy& copy, std::uint64_t stop, std::byte* buffer) {
  if ((copy.flags & kCountOnly) != 0) {
    copy.copied += stop - copy.at;
    copy.at = stop;
  } else if ((copy.flags & kInKernel) != 0) {
    CopyInKernel(from, to, copy, stop);
  } else {
    ReadAndWrite(from, to, copy, stop, buffer);
  }
}

// The data of one side of a comparison that is next.
struct Side {
  int fd;
  std::uint64_t start;
  Buffer buffer = NewBuffer();
  Extent next{};

  void Find(const Comparison& all) {
    if (next.stop > all.at) return;
    next = (all.flags & kLookForHoles) == 0 ? Extent{start + all.at, start + all.end}
                                            : NextData(fd, start + all.at, start + all.end);
    next.start -= start;
    next.stop -= start;
  }
};

// Short of its length: as far as the file goes.
ssize_t Read(const Side& side, const Comparison& all, std::size_t length) {
  return Fully(::pread, side.fd, side.buffer.get(), length, side.start + all.at);
}

void ComparePiece(const Side (&sides)[2], Comparison& all, std::uint64_t stop) {
  const auto length = static_cast<std::size_t>(std::min(kBufferSize, stop - all.at));
  std::size_t common = length;
  for (std::int16_t i = 0; i < 2; ++i) {
    const ssize_t count = Read(sides[i], all, length);
    if (count == static_cast<ssize_t>(length)) continue;
    all.side = i;
    all.fault = count < 0 ? kRead : kEnds;
    all.error = count < 0 ? static_cast<std::int32_t>(count) : 0;
    if (count < 0) return;
    common = std::min(common, static_cast<std::size_t>(count));
  }
  const std::byte* left = sides[0].buffer.get();
  const std::byte* right = sides[1].buffer.get();
  if (std::memcmp(left, right, common) != 0) {
    all.at += static_cast<std::uint64_t>(std::mismatch(left, left + common, right).first - left);
    all.fault = kDiffers;
  } else {
    all.at += common;
  }
}

bool IsOver(Clock::time_point start, std::uint32_t milliseconds) {
  return Clock::now() - start >= std::chrono::milliseconds(milliseconds);
}

}  // namespace

// copyExtents(from, to, Copy)
long CopyExtents(Arguments& a) {
  const auto start = Clock::now();
  Copy copy;
  std::memcpy(&copy, a.data[2], sizeof copy);
  const bool reads = (copy.flags & (kInKernel | kCountOnly)) == 0;
  const Buffer buffer = reads ? NewBuffer() : nullptr;
  if (reads && buffer == nullptr) return -ENOMEM;
  Extent next{};
  while (copy.at < copy.end && copy.fault == kNone) {
    if (next.stop <= copy.at) {
      next = {copy.at, copy.end};
      if ((copy.flags & kLookForHoles) != 0) {
        next = NextData(a.Int(0), copy.at + copy.shift, copy.end + copy.shift);
        next.start -= copy.shift;
        next.stop -= copy.shift;
      }
      copy.at = next.start;
    } else {
      CopyPiece(a.Int(0), a.Int(1), copy, next.stop, buffer.get());
    }
    if (IsOver(start, copy.milliseconds)) break;
  }
  std::memcpy(a.data[2], &copy, sizeof copy);
  return 0;
}

// compareExtents(left, right, Comparison)
long CompareExtents(Arguments& a) {
  const auto start = Clock::now();
  Comparison all;
  std::memcpy(&all, a.data[2], sizeof all);
  Side sides[2] = {{.fd = a.Int(0), .start = all.starts[0]}, {.fd = a.Int(1), .start = all.starts[1]}};
  if (sides[0].buffer == nullptr || sides[1].buffer == nullptr) return -ENOMEM;
  while (all.at < all.end && all.fault == kNone) {
    for (Side& side : sides) side.Find(all);
    const Extent& next = sides[sides[1].next.start < sides[0].next.start].next;
    if (next.start > all.at) {
      all.at = next.start;
    } else {
      // To read a small hole costs less than to look where it ends.
      ComparePiece(sides, all, std::min(all.end, std::max(next.stop, all.at + kSmallHole)));
    }
    if (IsOver(start, all.milliseconds)) break;
  }
  std::memcpy(a.data[2], &all, sizeof all);
  return 0;
}

}  // namespace loopctl
