// Rows of inputs, pairs of panels, and what is computed of them at once.
#pragma once

#include "panels.h"
#include "workspace.h"

namespace zoo {

constexpr int64_t kStepRows = 2 * kPanel;         // rows whose sums with two panels are computed at once
constexpr int64_t kNearBlocks = 16;               // blocks of two panels that stay near while rows pass by
constexpr int64_t kTileValues = kPanel * kLanes;  // sums of 16 rows with a panel: [16][16]

// GCC does not know that instructions on tiles read memory: without this, stores that only they read may come to nothing.
inline void settle_memory() {
#if defined(ZOO_TILES)
  asm volatile("" ::: "memory");
#endif
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

// Where rows of inputs are: as tiles of 16 rows and a block, the last rows filled up, or one by one.
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

  // The same from a line of both panels on, with another number of lines a block.
  Ahead after(int64_t passed, int64_t of_block) const {
    const int64_t values = passed * kBlock;
    return {{panels.first + values, panels.second ? panels.second + values : nullptr}, of_block};
  }

  void read_some() {
    for (int64_t i = 0; i < lines; ++i) {
      prefetch_far(panels.first + i * kBlock);
      if (panels.second) prefetch_far(panels.second + i * kBlock);
    }
    panels.first += lines * kBlock;
    if (panels.second) panels.second += lines * kBlock;
  }
};

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

}  // namespace zoo
