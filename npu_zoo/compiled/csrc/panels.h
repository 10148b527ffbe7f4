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
  __m512i pair = _mm512_set1_epi32(load<int>(x));
  __m512 total = _mm512_dpbf16_ps(load<__m512>(&sum), (__m512bh)_mm512_loadu_si512(weights), (__m512bh)pair);
  return load<Floats>(&total);
#else
  Words bits = load<Words>(weights);
  Words even = bits << 16, odd = bits & 0xffff0000u;
  return sum + load<Floats>(&even) * widen(x[0]) + load<Floats>(&odd) * widen(x[1]);
#endif
}

// The products of one row of inputs with one panel.
inline Floats multiply_row(const bf16* x, const bf16* panel, int64_t blocks) {
  Floats sums[4] = {};
  for (int64_t block = 0; block < blocks; ++block, panel += kBlockValues, x += kBlock) {
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      prefetch(reinterpret_cast<const char*>(panel + pair * 2 * kPanel) + kPrefetch);
      sums[pair % 4] = add_pairs(sums[pair % 4], panel + pair * 2 * kPanel, x + 2 * pair);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The products of kRows rows with kPanels panels, to sums[row][panel].
template <int kRows, int kPanels>
inline void multiply_rows(
    const bf16* const* x, const bf16* panels, int64_t stride, int64_t blocks, Floats (*sums)[kPanels]) {
  Floats totals[kRows][kPanels] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      const int64_t at = block * kBlockValues + pair * 2 * kPanel;
      for (int p = 0; p < kPanels; ++p) {
        const bf16* weights = panels + p * stride + at;
        prefetch(reinterpret_cast<const char*>(weights) + kPrefetch);
        for (int row = 0; row < kRows; ++row)
          totals[row][p] = add_pairs(totals[row][p], weights, x[row] + block * kBlock + 2 * pair);
      }
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int p = 0; p < kPanels; ++p) sums[row][p] = totals[row][p];
}

// Where results go: [row][channel], of which `channels` are real.
struct Output {
  bf16* values;
  int64_t stride;
  int64_t channels;

  void put(int64_t row, int64_t panel, Floats sum) const {
    bf16* to = values + row * stride + panel * kPanel;
    const int64_t left = channels - panel * kPanel;
    if (left >= kPanel) return store_bf16(to, sum);
    bf16 lanes[kLanes];
    store_bf16(lanes, sum);
    std::copy_n(lanes, left, to);
  }
};

#if defined(ZOO_TILES)
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC does not know that instructions on tiles read memory: without this, stores that only they read may come to nothing.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums [rows][16 channels], 4 and 5 inputs [rows][32], 6 and 7 blocks of weights.
inline void shape_tiles(int first_rows, int second_rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile >= 6 ? 16 : (tile == 2 || tile == 3 || tile == 5) ? second_rows : first_rows;
  }
  settle_memory();
  _tile_loadconfig(&shapes);
}

template <typename Out>
inline void put_tile(const Out& out, const float* sums, int64_t row, int rows, int64_t panel) {
  for (int r = 0; r < rows; ++r) out.put(row + r, panel, load<Floats>(sums + r * kLanes));
}

inline void prefetch_block(const bf16* block) {
  for (int line = 0; line < 16; ++line) prefetch(reinterpret_cast<const char*>(block + line * kBlock) + 2 * kPrefetch);
}

// Inputs as tiles: [rows / 16][in / 32][16][32], so that a tile's rows do not all fall into one set of the cache.
inline void pack_rows(const bf16* x, int64_t x_stride, int64_t rows, int64_t blocks, int64_t group, bf16* tiles) {
  bf16* to = tiles + group * kPanel * blocks * kBlock;
  const int64_t count = std::min<int64_t>(kPanel, rows - group * kPanel);
  for (int64_t row = 0; row < count; ++row) {
    const bf16* from = x + (group * kPanel + row) * x_stride;
    for (int64_t block = 0; block < blocks; ++block)
      std::memcpy(to + block * kBlockValues + row * kBlock, from + block * kBlock, kBlock * sizeof(bf16));
  }
}

// Where a matrix unit finds 16 rows of inputs: tile after tile, or as they are.
struct Rows {
  const bf16* values;
  int64_t step;    // values between blocks
  int64_t stride;  // values between rows
  int64_t group;   // values between groups of 16 rows

  const bf16* at(int64_t row) const { return values + row / kPanel * group; }
};

// The sums of up to 32 rows with one or two panels over blocks [begin, end), in tiles 0 to 3. Tiles must have been shaped
// for these rows.
template <bool kTwoGroups, bool kTwoPanels>
inline void multiply_blocks(
    const Rows& x, int64_t row, int64_t begin, int64_t end, const bf16* panel, int64_t stride) {
  const bf16 *upper = x.at(row), *lower = upper + x.group;
  const int x_bytes = x.stride * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = begin; block < end; ++block) {
    const bf16* weights = panel + block * kBlockValues;
    prefetch_block(weights);
    _tile_loadd(4, upper + block * x.step, x_bytes);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      prefetch_block(weights + stride);
      _tile_loadd(7, weights + stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoGroups) {
      _tile_loadd(5, lower + block * x.step, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Up to 32 rows with one or two panels.
template <bool kTwoGroups, bool kTwoPanels, typename Out>
inline void multiply_tiles(
    const Rows& x, int64_t row, int first_rows, int second_rows, const bf16* panel, int64_t stride, int64_t blocks,
    int64_t panel_number, const Out& out) {
  multiply_blocks<kTwoGroups, kTwoPanels>(x, row, 0, blocks, panel, stride);
  alignas(64) float sums[kPanel * kLanes];
  _tile_stored(0, sums, 64);
  put_tile(out, sums, row, first_rows, panel_number);
  if (kTwoPanels) {
    _tile_stored(1, sums, 64);
    put_tile(out, sums, row, first_rows, panel_number + 1);
  }
  if (kTwoGroups) {
    _tile_stored(2, sums, 64);
    put_tile(out, sums, row + first_rows, second_rows, panel_number);
    if (kTwoPanels) {
      _tile_stored(3, sums, 64);
      put_tile(out, sums, row + first_rows, second_rows, panel_number + 1);
    }
  }
}

constexpr int64_t kCachedValues = 1 << 19;  // inputs that stay in the second cache while panels pass by

template <typename Out>
inline void multiply_panels_by_tiles(
    const Rows& x, int64_t rows, const bf16* packed, int64_t blocks, int64_t first, int64_t last, const Out& out) {
  const int64_t stride = blocks * kBlockValues, step = 2 * kPanel;
  const int64_t chunk = std::max<int64_t>(1, kCachedValues / (step * blocks * kBlock)) * step;
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(rows, begin + chunk);
    int shaped = -1;
    for (int64_t panel = first; panel < last; panel += 2) {
      for (int64_t row = begin; row < end; row += step) {
        const int upper = std::min<int64_t>(end - row, kPanel), lower = std::min<int64_t>(end - row - upper, kPanel);
        if (shaped != upper + lower) shape_tiles(upper, std::max(lower, 1)), shaped = upper + lower;
        auto multiply = lower ? (panel + 1 < last ? multiply_tiles<true, true, Out> : multiply_tiles<true, false, Out>)
                              : (panel + 1 < last ? multiply_tiles<false, true, Out> : multiply_tiles<false, false, Out>);
        multiply(x, row, upper, lower, packed + panel * stride, stride, blocks, panel, out);
      }
    }
  }
  _tile_release();
}
#endif

template <int kRows, typename Out>
inline void multiply_few(
    const bf16* x, int64_t x_stride, int64_t row, const bf16* packed, int64_t stride, int64_t blocks, int64_t panel,
    int64_t last, const Out& out) {
  const bf16* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = x + (row + r) * x_stride;
  Floats sums[kRows][2];
  if (panel + 1 < last) {
    multiply_rows<kRows, 2>(rows, packed + panel * stride, stride, blocks, sums);
    for (int r = 0; r < kRows; ++r) out.put(row + r, panel + 1, sums[r][1]);
  } else {
    Floats one[kRows][1];
    multiply_rows<kRows, 1>(rows, packed + panel * stride, stride, blocks, one);
    for (int r = 0; r < kRows; ++r) sums[r][0] = one[r][0];
  }
  for (int r = 0; r < kRows; ++r) out.put(row + r, panel, sums[r][0]);
}

// Panels [first, last) of x @ weight.T for rows of inputs whose length is a multiple of 32 (`blocks` times that).
template <typename Out>
inline void multiply_panels(
    const bf16* x, int64_t x_stride, int64_t rows, const bf16* packed, int64_t blocks, int64_t first, int64_t last,
    const Out& out) {
  const int64_t stride = blocks * kBlockValues;
  if (rows == 1) {
    for (int64_t panel = first; panel < last; ++panel) out.put(0, panel, multiply_row(x, packed + panel * stride, blocks));
    return;
  }
#if defined(ZOO_TILES)
  multiply_panels_by_tiles({x, kBlock, x_stride, kPanel * x_stride}, rows, packed, blocks, first, last, out);
#else
  for (int64_t panel = first; panel < last; panel += 2) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_few<8>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row + 4 <= rows; row += 4) multiply_few<4>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row + 2 <= rows; row += 2) multiply_few<2>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row < rows; ++row) multiply_few<1>(x, x_stride, row, packed, stride, blocks, panel, last, out);
  }
#endif
}

}  // namespace zoo
