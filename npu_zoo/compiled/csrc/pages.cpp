// The pages that weights lie on.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = 2 << 20;
constexpr uintptr_t kSmallestPart = 4 << 20;
constexpr uintptr_t kMostParts = 8192;  // a process may have some ten thousand mappings, and each move makes one

// Linux's PAGEMAP_SCAN, since 6.7, which not every system's headers have.
struct ScanPages {
  uint64_t size = sizeof(ScanPages), flags = 0, start, end, walk_end = 0, regions = 0, num_regions = 0, max_pages = 0;
  uint64_t inverted = kHuge, wanted = kHuge, any = 0, returned = kHuge;  // pages that are not huge

  static constexpr uint64_t kHuge = 1 << 6;
};

struct Region {
  uint64_t start, end, categories;
};

// Whether some of the pages are small, or may be.
bool has_small_pages(uintptr_t first, uintptr_t last) {
  const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (file < 0) return true;
  Region region;
  ScanPages scan;
  scan.start = first, scan.end = last, scan.regions = reinterpret_cast<uint64_t>(&region), scan.num_regions = 1;
  const int found = ioctl(file, _IOWR('f', 16, ScanPages), &scan);
  close(file);
  return found != 0;
}

// Puts a copy on huge pages in the place of what is mapped there; who reads it meanwhile sees one or the other.
bool move(uintptr_t first, uintptr_t last) {
  const size_t bytes = last - first, room = bytes + kHugePage;
  void* taken = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (taken == MAP_FAILED) return false;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(taken), copy = (begin + kHugePage - 1) / kHugePage * kHugePage;
  void *from = reinterpret_cast<void*>(first), *to = reinterpret_cast<void*>(copy);
  madvise(to, bytes, MADV_HUGEPAGE);
  std::memcpy(to, from, bytes);
  mprotect(to, bytes, PROT_READ);
  const bool moved = mremap(to, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, from) != MAP_FAILED;
  if (!moved) munmap(to, bytes);
  if (copy > begin) munmap(taken, copy - begin);
  if (copy + bytes < begin + room) munmap(reinterpret_cast<void*>(copy + bytes), begin + room - copy - bytes);
  return moved;
}

}  // namespace
#endif

extern "C" {

// Asks for huge pages under memory that is about to be written; a hint, which may come to nothing.
void zoo_huge_pages(void* address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Moves mapped memory that is only read to huge pages of the process, at the same addresses, where it lies on small ones:
// the next part that does, from `offset` on. Returns where the part ends; `bytes` when nothing is left.
int64_t zoo_move_to_huge_pages(void* address, int64_t bytes, int64_t offset) {
#if defined(__linux__)
  const uintptr_t base = reinterpret_cast<uintptr_t>(address), end = (base + bytes) / kHugePage * kHugePage;
  const uintptr_t share = (bytes / kMostParts + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t part = std::max(kSmallestPart, share);
  for (uintptr_t first = (base + offset + kHugePage - 1) / kHugePage * kHugePage, last; first < end; first = last) {
    last = std::min(first + part, end);
    if (has_small_pages(first, last)) return move(first, last) && last < end ? last - base : bytes;
  }
#endif
  return bytes;
}
}
