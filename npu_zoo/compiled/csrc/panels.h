// Products with weights in panels of 16 output channels.
//
// A panel holds [in / 32] blocks of 1 KiB, and a block 16 pairs of inputs for 16 channels: [pair][channel][2], which is
// both what a dot-product instruction adds to 16 channels at once and what a matrix unit takes as its second operand.
// Inputs are padded with zeros to a multiple of 32, channels to one of 16.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace zoo {

constexpr int kPanel = 16;       // output channels
constexpr int kBlock = 32;       // inputs
constexpr int kBlockValues = kPanel * kBlock;
constexpr int kPrefetch = 1024;  // bytes ahead; of the distances tried the one with the highest bandwidth

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t panel_values(int64_t inputs) { return ceil_div(inputs, kBlock) * kBlockValues; }

// Adds the products of 16 channels' pairs of weights with one pair of inputs.
inline Floats add_pairs(Floats sum, const bf16* weights, const bf16* x) {
#if defined(ZOO_BF16_DOT)
  const __m512i pair = _mm512_set1_epi32(load<int>(x));
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)pair);
#else
  Words bits = load<Words>(weights);
  Words even = bits << 16, odd = bits & 0xffff0000u;
  return sum + load<Floats>(&even) * widen(x[0]) + load<Floats>(&odd) * widen(x[1]);
#endif
}

constexpr int64_t kPageBytes = 4096, kPageBlocks = kPageBytes / (kBlockValues * sizeof(bf16));

// Processors read ahead by themselves, but not past the end of a page: two lines of the next one set them off again.
inline void touch_page(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % kPageBytes) return;
  const char* next = static_cast<const char*>(address) + kPageBytes;
  prefetch_far(next);
  prefetch_far(next + 64);
}

// The products of one row of inputs with one panel.
inline Floats multiply_row(const bf16* x, const bf16* panel, int64_t blocks) {
  Floats sums[4] = {};
  for (int64_t block = 0; block < blocks; ++block, panel += kBlockValues, x += kBlock) {
    touch_page(panel);
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      prefetch(reinterpret_cast<const char*>(panel + pair * 2 * kPanel) + kPrefetch);
      sums[pair % 4] = add_pairs(sums[pair % 4], panel + pair * 2 * kPanel, x + 2 * pair);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The products of one row of inputs with two panels.
inline void multiply_row(const bf16* x, const bf16* first, const bf16* second, int64_t blocks, Floats (&sums)[2]) {
  Floats upper[2] = {}, lower[2] = {};
  for (int64_t block = 0; block < blocks; ++block, first += kBlockValues, second += kBlockValues, x += kBlock) {
    touch_page(first);
    touch_page(second);
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      const int64_t at = pair * 2 * kPanel;
      prefetch(reinterpret_cast<const char*>(first + at) + 2 * kPrefetch);
      prefetch(reinterpret_cast<const char*>(second + at) + 2 * kPrefetch);
      upper[pair % 2] = add_pairs(upper[pair % 2], first + at, x + 2 * pair);
      lower[pair % 2] = add_pairs(lower[pair % 2], second + at, x + 2 * pair);
    }
  }
  sums[0] = upper[0] + upper[1], sums[1] = lower[0] + lower[1];
}

// Where results go: [row][channel], of which `channels` are real.
struct Output {
  bf16* values;
  int64_t stride;
  int64_t channels;
  bool past_caches = false;  // results of many rows, which caches do not keep until they are read

  static Output of_rows(bf16* values, int64_t rows, int64_t channels) {
    const bool by_lines = reinterpret_cast<uintptr_t>(values) % 64 == 0 && channels % kBlock == 0;
    return {values, channels, channels, by_lines && outgrows_caches(rows * channels * sizeof(bf16))};
  }

  bf16* at(int64_t row, int64_t panel) const { return values + row * stride + panel * kPanel; }

  void put(int64_t row, int64_t panel, Floats sum) const {
    bf16* to = at(row, panel);
    const int64_t left = channels - panel * kPanel;
    if (left >= kPanel) return store_bf16(to, sum);
    bf16 lanes[kLanes];
    store_bf16(lanes, sum);
    std::copy_n(lanes, left, to);
  }

  // Puts sums with a panel and the one after it.
  void put_two(int64_t row, int64_t panel, Floats first, Floats second) const {
    if ((panel + 2) * kPanel <= channels)
      return store_bf16_line(at(row, panel), first, second, past_caches && panel % 2 == 0);
    put(row, panel, first);
    put(row, panel + 1, second);
  }
};

}  // namespace zoo
