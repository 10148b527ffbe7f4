// Tiles of a matrix unit: inputs, panels, and their sums.
#pragma once

#include "panels.h"
#include "workspace.h"

#if defined(ZOO_TILES)
namespace zoo {

constexpr int64_t kStepRows = 2 * kPanel;  // rows whose sums with two panels fill the tiles

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC does not know that instructions on tiles read memory: without this, stores that only they read may come to nothing.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums [rows][16 channels], 4 and 5 inputs [rows][`depth` words], 6 and 7 blocks of weights.
inline void shape_tiles(int first_rows, int second_rows, int depth = 16) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = tile == 4 || tile == 5 ? 4 * depth : 64;
    shapes.rows[tile] = tile >= 6 ? depth : (tile == 2 || tile == 3 || tile == 5) ? second_rows : first_rows;
  }
  settle_memory();
  _tile_loadconfig(&shapes);
}

template <typename Out>
inline void put_tile(const Out& out, const float* sums, int64_t row, int rows, int64_t panel) {
  for (int r = 0; r < rows; ++r) out.put(row + r, panel, load<Floats>(sums + r * kLanes));
}

// Some rows of inputs, some blocks of each.
struct Part {
  int64_t row, end_row;
  int64_t block, end_block;

  int64_t steps() const { return ceil_div(end_row - row, kStepRows); }
  int64_t blocks() const { return end_block - block; }
  int64_t values() const { return ceil_div(end_row - row, kPanel) * blocks() * kBlockValues; }
};

// A part of the inputs as tiles: [rows / 16][blocks][16][32], so that a tile's rows do not all fall into one set of the
// cache. `row_at` tells where a row is.
template <typename RowAt>
inline void fill_tiles(const RowAt& row_at, const Part& part, bf16* tiles) {
  for (int64_t row = part.row; row < part.end_row; ++row) {
    const int64_t at = row - part.row;
    const bf16* from = row_at(row) + part.block * kBlock;
    bf16* to = tiles + at / kPanel * part.blocks() * kBlockValues + at % kPanel * kBlock;
    for (int64_t block = 0; block < part.blocks(); ++block)
      std::memcpy(to + block * kBlockValues, from + block * kBlock, kBlock * sizeof(bf16));
  }
  settle_memory();
}

// Where a matrix unit finds 16 rows of inputs: tile after tile, the last filled up, or as they are.
struct Rows {
  const bf16* values;
  int64_t step;    // values between blocks
  int64_t stride;  // values between rows
  int64_t group;   // values between groups of 16 rows

  static Rows strided(const bf16* values, int64_t stride) { return {values, kBlock, stride, kPanel * stride}; }
  static Rows tiles(const bf16* values, int64_t blocks) { return {values, kBlockValues, kBlock, blocks * kBlockValues}; }
  const bf16* at(int64_t row) const { return values + row / kPanel * group; }
  Rows from(int64_t row, int64_t block) const { return {at(row) + block * step, step, stride, group}; }
};

// Panels that rows are multiplied with at once; the second may be missing.
struct PanelPair {
  const bf16 *first, *second;

  PanelPair from(int64_t block) const {
    return {first + block * kBlockValues, second ? second + block * kBlockValues : nullptr};
  }
};

// What is to come from memory while something else is computed: with every block some lines of both panels, or, where
// panels are read as they are used, what follows their last block.
struct Ahead {
  PanelPair panels;
  int64_t lines = 0;

  void read_some() {
    for (int64_t i = 0; i < lines; ++i) {
      prefetch_far(panels.first + i * kBlock);
      if (panels.second) prefetch_far(panels.second + i * kBlock);
    }
    panels.first += lines * kBlock;
    if (panels.second) panels.second += lines * kBlock;
  }
};

inline void prefetch_block(const bf16* block) {
  for (int line = 0; line < 16; ++line) prefetch(block + line * kBlock);
}

// As the other `touch_page`, of panels with `left` blocks to come, which others follow.
template <bool kTwoPanels>
inline void touch_page(const PanelPair& panels, int64_t left, const PanelPair& next) {
  if (left == kPageBlocks) {
    prefetch_far(next.first);
    if (kTwoPanels) prefetch_far(next.second);
  }
  touch_page(panels.first);
  if (kTwoPanels) touch_page(panels.second);
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

constexpr int64_t kTileValues = kPanel * kLanes;

// Tiles 0 to 3 from and to [4][16][16].
inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kTileValues, 64);
  _tile_loadd(2, sums + 2 * kTileValues, 64);
  _tile_loadd(3, sums + 3 * kTileValues, 64);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileValues, 64);
  _tile_stored(2, sums + 2 * kTileValues, 64);
  _tile_stored(3, sums + 3 * kTileValues, 64);
}

// Adds the products of up to 32 rows with one or two panels over blocks [begin, end) to tiles 0 to 3, which must have
// been shaped for these rows. Panels that stay in the first cache while rows pass by are there already, and inputs then
// leave that cache alone; a block of others is asked for at once, for a tile's load waits for one row after the other.
template <bool kTwoGroups, bool kTwoPanels, bool kStays>
inline void multiply_blocks(
    const Rows& x, int64_t row, int64_t begin, int64_t end, const PanelPair& panels, Ahead ahead) {
  const bf16 *upper = x.at(row), *lower = upper + x.group;
  const int x_bytes = x.stride * sizeof(bf16);
  for (int64_t block = begin; block < end; ++block) {
    const PanelPair at = panels.from(block);
    if (!kStays) touch_page<kTwoPanels>(at, end - block, ahead.panels);
    if (!kStays) prefetch_block(at.first);
    _tile_loadd(6, at.first, 64);
    if (kStays) _tile_stream_loadd(4, upper + block * x.step, x_bytes);
    else _tile_loadd(4, upper + block * x.step, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      if (!kStays) prefetch_block(at.second);
      _tile_loadd(7, at.second, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoGroups) {
      if (kStays) _tile_stream_loadd(5, lower + block * x.step, x_bytes);
      else _tile_loadd(5, lower + block * x.step, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
    if (kStays) ahead.read_some();
  }
}

template <bool kStays>
inline auto multiply_blocks_of(bool two_groups, bool two_panels) {
  if (two_groups) return two_panels ? multiply_blocks<true, true, kStays> : multiply_blocks<true, false, kStays>;
  return two_panels ? multiply_blocks<false, true, kStays> : multiply_blocks<false, false, kStays>;
}

}  // namespace zoo
#endif
