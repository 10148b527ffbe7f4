// Experts' products with several rows. What the first comes to lies in tiles, as the second takes it.
#pragma once

#include "expert_shares.h"

namespace zoo {

inline PanelPair gate_and_up(const Step& step, const FeedForward& weights, int64_t panel) {
  const int64_t stride = panel_values(step.hidden);
  return {weights.gate_up + panel * stride, weights.gate_up + (weights.panels() + panel) * stride};
}

// Where a share's activations are: in tiles, or row by row where they are few and come from other threads' caches.
inline bool has_tiles(const Share& share) { return share.rows > kStepRows; }
inline Rows activations_of(const Step& step, const Share& share) {
  const bf16* values = step.activations_of(share);
  return has_tiles(share) ? Rows::tiles(values, share.weights.blocks()) : Rows::strided(values, share.row_values());
}

// Puts activations of a share's rows from panels [first, last) of its gate and what these meet. With `halves`, which
// has room for 16 values of every row, they go past the caches, and the first half of a line waits there for the second.
struct ActivateTiles {
  const FeedForward& weights;
  Rows to;
  int64_t first, last;
  bf16* halves;

  bf16* at(int64_t row, int64_t panel) const {
    return const_cast<bf16*>(to.at(row)) + panel / 2 * to.step + row % kPanel * to.stride + panel % 2 * kPanel;
  }

  void operator()(int64_t pair, int64_t row, int rows, const float* gate, const float* up) const {
    const int64_t panel = first + pair;
    const bool second = panel % 2, whole = halves && (second ? panel > first : panel + 1 < last);
    bf16 *here = at(row, panel), *half = halves + row * kPanel;
    for (int r = 0; r < rows; ++r, here += to.stride, half += kPanel) {
      const Floats one = load<Floats>(gate + r * kLanes), other = load<Floats>(up + r * kLanes);
      if (!whole) put_activations(here, one, other, is_half_block(weights, panel));
      else if (!second) store_bf16(half, silu(one) * other);
      else store_bf16_line(here - kPanel, load_bf16(half), silu(one) * other, true);
    }
  }
};

// A share's activations of panels [first, last) of the gate; `then` is what is read afterwards.
inline void activate_tiled(
    const Step& step, const Share& share, int64_t first, int64_t last, bool past_caches, const PanelPair& then) {
  static thread_local Workspace halves;
  auto row_at = [&](int64_t row) { return step.input(share.slot + row); };
  auto pair_at = [&](int64_t pair) { return gate_and_up(step, share.weights, first + pair); };
  const bool by_lines = past_caches && has_tiles(share);
  const ActivateTiles finish{share.weights, activations_of(step, share), first, last,
                             by_lines ? halves.take<bf16>(share.rows * kPanel) : nullptr};
  multiply_pairs(Gathered{row_at}, share.rows, step.x_blocks(), last - first, pair_at, then, finish);
}

// What a share's activations come to with panels [first, last) of its second weight.
template <typename Out>
inline void project_tiled(
    const Step& step, const Share& share, int64_t first, int64_t last, const PanelPair& then, const Out& out) {
  const PanelRange range{share.weights.down, share.weights.blocks(), first, last};
  auto pair_at = [&](int64_t pair) { return range.at(pair); };
  const PutPairs<Out> finish{range, out};
  const Rows rows = activations_of(step, share);
  if (has_tiles(share))
    return multiply_pairs(InTiles{rows}, share.rows, range.blocks, range.pairs(), pair_at, then, finish);
  auto row_at = [&](int64_t row) { return rows.values + row * rows.stride; };
  multiply_pairs(Gathered{row_at}, share.rows, range.blocks, range.pairs(), pair_at, then, finish);
}

}  // namespace zoo
