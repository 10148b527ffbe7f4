// Products of several rows with panels.
#pragma once

#include "panel_tiles.h"
#include "panel_vectors.h"

namespace zoo {

constexpr int64_t kFarRows = 256;   // rows whose inputs stay in the second cache while panels pass by,
constexpr int64_t kFarBlocks = 64;  // with at most so many blocks of them

template <typename Finish>
inline void finish_step(const Finish& finish, int64_t pair, int64_t row, int64_t end, const float* sums) {
  const int upper = std::min<int64_t>(end - row, kPanel), lower = std::min<int64_t>(end - row - upper, kPanel);
  finish(pair, row, upper, sums, sums + kTileValues);
  if (lower) finish(pair, row + kPanel, lower, sums + 2 * kTileValues, sums + 3 * kTileValues);
}

// Adds what a part's rows come to with a pair of panels to sums [steps][4][16][16].
inline void multiply_part(
    const Unit& unit, const Rows& x, const Part& part, const PanelPair& panels, const PanelPair& next, float* sums) {
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
      const int64_t rows = std::min(kStepRows, part.end_row - part.row - row);
      unit.add<true>(x, row, rows, begin, end, own, ahead, part.block + begin == 0, sums + step * 4 * kTileValues);
    }
  }
}

// Up to 32 rows, which pairs of panels pass by once.
template <typename PairAt, typename Finish>
inline void multiply_step(
    const Rows& x, int64_t rows, int64_t blocks, int64_t pairs, const PairAt& pair_at, const PanelPair& then,
    const Finish& finish) {
  alignas(64) float sums[4 * kTileValues];
  const Unit unit(rows);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const PanelPair panels = pair_at(pair);
    const PanelPair next = pair + 1 < pairs ? pair_at(pair + 1) : then.first ? then : panels;
    unit.add<false>(x, 0, rows, 0, blocks, panels, {next}, true, sums);
    finish_step(finish, pair, 0, rows, sums);
  }
}

// Rows that are brought into tiles part by part; `row_at` tells where a row of inputs is.
template <typename RowAt>
struct Gathered {
  const RowAt& row_at;
  explicit Gathered(const RowAt& row_at) : row_at(row_at) {}

  Rows take(const Part& part) const {
    static thread_local Workspace tiles;
    bf16* values = tiles.take<bf16>(part.values());
    fill_tiles(row_at, part, values);
    return Rows::tiles(values, part.blocks());
  }
};

// Rows that lie in tiles already.
struct InTiles {
  Rows rows;

  // Other threads may have written them: they are fetched at once rather than one by one.
  Rows take(const Part& part) const {
    const Rows from = rows.from(part.row, part.block);
    for (int64_t row = part.row; row < part.end_row; ++row) {
      const bf16* line = rows.at(row) + row % kPanel * rows.stride + part.block * rows.step;
      for (int64_t block = 0; block < part.blocks(); ++block) prefetch_far(line + block * rows.step);
    }
    return from;
  }
};

// The products of rows with pairs of panels. `inputs` gives the rows of a part, `pair_at` the panels of a pair; `finish`
// takes a pair's number, a row, how many rows follow it (16 at most), and their sums with both panels. What is read after
// the last pair is `then`, which may be missing.
//
// As matrix products for caches are: panels are cut into pieces that stay in the first cache, inputs into parts that stay
// in the second, and sums wait in memory in between (Goto and van de Geijn, Anatomy of high-performance matrix
// multiplication, 2008).
template <typename Inputs, typename PairAt, typename Finish>
inline void multiply_pairs(
    const Inputs& inputs, int64_t rows, int64_t blocks, int64_t pairs, const PairAt& pair_at, const PanelPair& then,
    const Finish& finish) {
  static thread_local Workspace sums_of_pairs;
  if (rows == 0) return;
  if (rows <= kStepRows)
    return multiply_step(inputs.take({0, rows, 0, blocks}), rows, blocks, pairs, pair_at, then, finish);
  const int64_t steps = ceil_div(rows, kStepRows), chunks = ceil_div(rows, kFarRows), cuts = ceil_div(blocks, kFarBlocks);
  const Unit unit;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Part part{steps * chunk / chunks * kStepRows, std::min(rows, steps * (chunk + 1) / chunks * kStepRows)};
    const int64_t room = part.steps() * 4 * kTileValues;
    float* sums = sums_of_pairs.take<float>(room * (cuts > 1 ? pairs : 1));
    for (int64_t cut = 0; cut < cuts; ++cut) {
      part.block = blocks * cut / cuts, part.end_block = blocks * (cut + 1) / cuts;
      const bool last = cut + 1 == cuts;
      const Rows x = inputs.take(part);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        PanelPair next = then;
        if (pair + 1 < pairs) next = pair_at(pair + 1).from(part.block);
        else if (!last || chunk + 1 < chunks) next = pair_at(0).from(last ? 0 : part.end_block);
        float* of_pair = sums + (cuts > 1 ? pair * room : 0);
        multiply_part(unit, x, part, pair_at(pair), next, of_pair);
        for (int64_t step = 0; last && step < part.steps(); ++step)
          finish_step(finish, pair, part.row + step * kStepRows, part.end_row, of_pair + step * 4 * kTileValues);
      }
    }
  }
  settle_stores();
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

  // Both panels of a row at once, since rows that lie apart by a power of two push each other out of the cache.
  void operator()(int64_t pair, int64_t row, int count, const float* first, const float* second) const {
    const int64_t panel = range.first + 2 * pair;
    if (panel + 1 == range.last) return put_tile(out, first, row, count, panel);
    for (int r = 0; r < count; ++r)
      out.put_two(row + r, panel, load<Floats>(first + r * kLanes), load<Floats>(second + r * kLanes));
  }
};

// Rows of inputs, as they are if they are few, with panels.
template <typename Out>
inline void multiply_range(const bf16* x, int64_t x_stride, int64_t rows, const PanelRange& range, const Out& out) {
  auto pair_at = [&](int64_t pair) { return range.at(pair); };
  auto row_at = [&](int64_t row) { return x + row * x_stride; };
  const PutPairs<Out> finish{range, out};
  if (rows > kPanel) return multiply_pairs(Gathered{row_at}, rows, range.blocks, range.pairs(), pair_at, {}, finish);
  multiply_step(Rows::strided(x, x_stride), rows, range.blocks, range.pairs(), pair_at, {}, finish);
}

}  // namespace zoo
