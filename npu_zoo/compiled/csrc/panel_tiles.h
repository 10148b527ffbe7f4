// Products of many rows with panels, in a matrix unit.
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
      __builtin_prefetch(panels.first + i * kBlock, 0, 2);
      if (panels.second) __builtin_prefetch(panels.second + i * kBlock, 0, 2);
    }
    panels.first += lines * kBlock;
    if (panels.second) panels.second += lines * kBlock;
  }
};

inline void prefetch_block(const bf16* block) {
  for (int line = 0; line < 16; ++line) prefetch(block + line * kBlock);
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
// leave that cache alone; others are read two blocks ahead.
template <bool kTwoGroups, bool kTwoPanels, bool kStays>
inline void multiply_blocks(
    const Rows& x, int64_t row, int64_t begin, int64_t end, const PanelPair& panels, Ahead ahead) {
  const bf16 *upper = x.at(row), *lower = upper + x.group;
  const int x_bytes = x.stride * sizeof(bf16);
  constexpr int64_t kAhead = 2;
  for (int64_t block = begin; block < end; ++block) {
    const bool inside = block + kAhead < end;
    const PanelPair& soon = inside ? panels : ahead.panels;
    const int64_t place = (inside ? block + kAhead : block + kAhead - end) * kBlockValues;
    if (!kStays) prefetch_block(soon.first + place);
    _tile_loadd(6, panels.first + block * kBlockValues, 64);
    if (kStays) _tile_stream_loadd(4, upper + block * x.step, x_bytes);
    else _tile_loadd(4, upper + block * x.step, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      if (!kStays) prefetch_block(soon.second + place);
      _tile_loadd(7, panels.second + block * kBlockValues, 64);
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

constexpr int64_t kNearBlocks = 16;        // blocks of two panels that stay in the first cache while rows pass by
constexpr int64_t kFarRows = 256;          // rows whose inputs stay in the second cache while panels pass by,
constexpr int64_t kFarBlocks = 64;         // with at most so many blocks of them

template <typename Finish>
inline void finish_step(const Finish& finish, int64_t pair, int64_t row, int64_t end, const float* sums) {
  const int upper = std::min<int64_t>(end - row, kPanel), lower = std::min<int64_t>(end - row - upper, kPanel);
  finish(pair, row, upper, sums, sums + kTileValues);
  if (lower) finish(pair, row + kPanel, lower, sums + 2 * kTileValues, sums + 3 * kTileValues);
}

// Adds what a part's rows, in tiles, come to with a pair of panels to sums [steps][4][16][16]. `soon` is called with each
// step before its sums are complete.
template <typename Soon>
inline void multiply_part(
    const bf16* tiles, const Part& part, const PanelPair& panels, const PanelPair& next, float* sums, const Soon& soon) {
  const Rows x = Rows::tiles(tiles, part.blocks());
  const PanelPair own = panels.from(part.block);
  const int64_t blocks = part.blocks(), pieces = ceil_div(blocks, kNearBlocks), steps = part.steps();
  const int64_t lines = ceil_div(kPanel, steps);  // of 16 a block
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = blocks * piece / pieces, end = blocks * (piece + 1) / pieces;
    const PanelPair following = piece + 1 < pieces ? own.from(end) : next;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t row = step * kStepRows, passed = step * (end - begin) * lines;
      const bool reads = following.first && passed < (end - begin) * kPanel;
      const Ahead ahead{{following.first + passed * kBlock, following.second ? following.second + passed * kBlock : nullptr},
                        reads ? lines : 0};
      float* of_step = sums + step * 4 * kTileValues;
      if (piece + 1 == pieces) soon(step);
      if (part.block + begin == 0) clear_sums();
      else load_sums(of_step);
      multiply_blocks_of<true>(part.end_row - part.row - row > kPanel, own.second)(x, row, begin, end, own, ahead);
      store_sums(of_step);
    }
  }
}

// Up to 32 rows, which pairs of panels pass by once.
template <typename PairAt, typename Finish>
inline void multiply_step(
    const Rows& x, int64_t rows, int64_t blocks, int64_t pairs, const PairAt& pair_at, const PanelPair& then,
    const Finish& finish) {
  alignas(64) float sums[4 * kTileValues];
  const int upper = std::min<int64_t>(rows, kPanel), lower = rows - upper;
  shape_tiles(upper, std::max(lower, 1));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const PanelPair panels = pair_at(pair);
    const PanelPair next = pair + 1 < pairs ? pair_at(pair + 1) : then.first ? then : panels;
    clear_sums();
    multiply_blocks_of<false>(lower, panels.second)(x, 0, 0, blocks, panels, {next});
    store_sums(sums);
    finish_step(finish, pair, 0, rows, sums);
  }
  _tile_release();
}

// The products of rows with pairs of panels. `row_at` tells where a row of inputs is, `pair_at` the panels of a pair;
// `finish` takes a pair's number, a row, how many rows follow it (16 at most), and their sums with both panels, and has
// `fetch`, which has the cache fetch where those of some rows go. What is read after the last pair is `then`, which may be
// missing.
//
// As matrix products for caches are: panels are cut into pieces that stay in the first cache, inputs into parts that stay
// in the second, and sums wait in memory in between (Goto and van de Geijn, Anatomy of high-performance matrix
// multiplication, 2008).
template <typename RowAt, typename PairAt, typename Finish>
inline void multiply_pairs(
    const RowAt& row_at, int64_t rows, int64_t blocks, int64_t pairs, const PairAt& pair_at, const PanelPair& then,
    const Finish& finish) {
  static thread_local Workspace inputs, sums_of_pairs;
  if (rows == 0) return;
  if (rows <= kStepRows) {
    const Part all{0, rows, 0, blocks};
    bf16* tiles = inputs.take<bf16>(all.values());
    fill_tiles(row_at, all, tiles);
    return multiply_step(Rows::tiles(tiles, blocks), rows, blocks, pairs, pair_at, then, finish);
  }
  const int64_t steps = ceil_div(rows, kStepRows), chunks = ceil_div(rows, kFarRows), cuts = ceil_div(blocks, kFarBlocks);
  shape_tiles(kPanel, kPanel);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Part part{steps * chunk / chunks * kStepRows, std::min(rows, steps * (chunk + 1) / chunks * kStepRows)};
    const int64_t room = part.steps() * 4 * kTileValues;
    float* sums = sums_of_pairs.take<float>(room * (cuts > 1 ? pairs : 1));
    for (int64_t cut = 0; cut < cuts; ++cut) {
      part.block = blocks * cut / cuts, part.end_block = blocks * (cut + 1) / cuts;
      const bool last = cut + 1 == cuts;
      bf16* tiles = inputs.take<bf16>(part.values());
      fill_tiles(row_at, part, tiles);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        PanelPair next = then;
        if (pair + 1 < pairs) next = pair_at(pair + 1).from(part.block);
        else if (!last || chunk + 1 < chunks) next = pair_at(0).from(last ? 0 : part.end_block);
        float* of_pair = sums + (cuts > 1 ? pair * room : 0);
        multiply_part(tiles, part, pair_at(pair), next, of_pair, [&](int64_t step) {
          const int64_t row = part.row + step * kStepRows;
          if (last) finish.fetch(pair, row, std::min(kStepRows, part.end_row - row));
        });
        for (int64_t step = 0; last && step < part.steps(); ++step)
          finish_step(finish, pair, part.row + step * kStepRows, part.end_row, of_pair + step * 4 * kTileValues);
      }
    }
  }
  _tile_release();
}

// Panels [first, last) of a weight, two at once.
struct PanelRange {
  const bf16* packed;
  int64_t blocks, first, last;

  int64_t pairs() const { return ceil_div(last - first, 2); }
  PanelPair at(int64_t pair) const {
    const int64_t stride = blocks * kBlockValues;
    const bf16* panel = packed + (first + 2 * pair) * stride;
    return {panel, first + 2 * pair + 1 < last ? panel + stride : nullptr};
  }
};

// Puts sums of rows with two panels of a range.
template <typename Out>
struct PutPairs {
  PanelRange range;
  const Out& out;

  void fetch(int64_t pair, int64_t row, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) out.fetch(row + r, range.first + 2 * pair);
  }

  // Both panels of a row at once, since rows that lie apart by a power of two push each other out of the cache.
  void operator()(int64_t pair, int64_t row, int count, const float* first, const float* second) const {
    const int64_t panel = range.first + 2 * pair;
    for (int r = 0; r < count; ++r) {
      out.put(row + r, panel, load<Floats>(first + r * kLanes));
      if (panel + 1 < range.last) out.put(row + r, panel + 1, load<Floats>(second + r * kLanes));
    }
  }
};

// Rows of inputs, as they are if they are few, with panels.
template <typename Out>
inline void multiply_range(const bf16* x, int64_t x_stride, int64_t rows, const PanelRange& range, const Out& out) {
  auto pair_at = [&](int64_t pair) { return range.at(pair); };
  auto row_at = [&](int64_t row) { return x + row * x_stride; };
  const PutPairs<Out> finish{range, out};
  if (rows > kPanel) return multiply_pairs(row_at, rows, range.blocks, range.pairs(), pair_at, {}, finish);
  multiply_step(Rows::strided(x, x_stride), rows, range.blocks, range.pairs(), pair_at, {}, finish);
}

}  // namespace zoo
#endif
