// What the memory gives at most: how fast these threads can read it.
#include "panels.h"

using namespace zoo;

extern "C" {

// Adds up words of 32 bits, 64 bytes at once, so that they have to be read; `bytes` is a multiple of 64 for each thread.
int64_t zoo_read(const char* from, int64_t bytes, int threads) {
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int part = 0; part < threads; ++part) {
    Words sums[4] = {};
    const int64_t lines = bytes / 64, last = lines * (part + 1) / threads;
    int64_t line = lines * part / threads;
    for (; line + 4 <= last; line += 4) {
      touch_page(from + line * 64);
      for (int i = 0; i < 4; ++i) {
        prefetch(from + (line + i) * 64 + kPrefetch);
        sums[i] += load<Words>(from + (line + i) * 64);
      }
    }
    for (; line < last; ++line) sums[0] += load<Words>(from + line * 64);
    const Words all = sums[0] + sums[1] + sums[2] + sums[3];
    for (int lane = 0; lane < kLanes; ++lane) total += all[lane];
  }
  return total;
}
}
