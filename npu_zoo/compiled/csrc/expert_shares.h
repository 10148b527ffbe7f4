// Experts that a step's tokens go to, and what threads share of the step.
#pragma once

#include <vector>

#include "activation.h"
#include "products.h"
#include "slots.h"
#include "token_sums.h"

namespace zoo {

struct FeedForward {
  const bf16 *gate_up, *down;
  int64_t width;

  int64_t panels() const { return width / kPanel; }
  int64_t blocks() const { return ceil_div(width, kBlock); }
};

// An expert that tokens go to.
struct Share {
  FeedForward weights;
  int64_t rows;
  int64_t slot;         // its first
  int64_t activations;  // where its own begin

  bool tiled() const { return rows > 1; }
  int64_t row_values() const { return weights.blocks() * kBlock; }
  int64_t end() const { return activations + (tiled() ? ceil_div(rows, kPanel) * kPanel : rows) * row_values(); }
};

struct Experts {
  const bf16 *const *gate_up, *const *down;
  int64_t width, count;
  FeedForward shared;  // without weights where there are none
};

struct Step {
  const bf16* x;
  int64_t x_stride, tokens, hidden;
  const std::vector<Share>* shares;
  const int64_t* slot_tokens;
  const float* slot_scales;
  bf16* activations;  // of each share, filled up to whole blocks

  int64_t x_blocks() const { return ceil_div(hidden, kBlock); }
  const bf16* input(int64_t slot) const { return x + slot_tokens[slot] * x_stride; }
  bf16* activations_of(const Share& share) const { return activations + share.activations; }
};

// The experts that tokens go to, each with its part of the activations.
inline void find_shares(const SlotTable& slots, const Experts& experts, std::vector<Share>& shares) {
  shares.clear();
  int64_t activations = 0;
  for (const Slots& group : slots.groups()) {
    const bool shared = group.expert == experts.count;
    const FeedForward weights =
        shared ? experts.shared : FeedForward{experts.gate_up[group.expert], experts.down[group.expert], experts.width};
    shares.push_back({weights, group.rows, group.first, activations});
    activations = shares.back().end();
  }
}

inline bool is_half_block(const FeedForward& weights, int64_t panel) {
  return panel + 1 == weights.panels() && panel % 2 == 0;
}

// Brings 16 values of activations to their place, and zeros after the last ones where those fill half a block.
inline void put_activations(bf16* to, Floats gate, Floats up, bool last) {
  store_bf16(to, silu(gate) * up);
  if (last) store_bf16(to + kPanel, Floats{});
}

// What experts made of each of their rows, rounded: [slots][hidden]. Many tokens' sums would pass through memory once for
// every expert of a token, in twice the bytes.
struct SlotResults {
  bf16* values;
  const int64_t* slots;  // of each token, `most` places
  int64_t most;

  void clear(int64_t, int64_t) const {}
  Output of_share(const Step& step, const Share& share) const {
    return {values + share.slot * step.hidden, step.hidden, step.hidden, true};
  }

  // Adds up panels [first, last) of all tokens by their experts' weights.
  void put(const Step& step, int64_t first, int64_t last, const Output& out) const {
    settle_stores();
    for (int64_t token = 0; token < step.tokens; ++token) {
      const int64_t* begin = slots + token * most;
      const int64_t* end = std::find(begin, begin + most, -1);
      for (int64_t panel = first; panel < last; panel += 2) {
        Floats sums[2] = {};
        for (const int64_t* slot = begin; slot < end; ++slot) {
          const bf16* from = values + *slot * step.hidden + panel * kPanel;
          sums[0] += load_bf16(from) * step.slot_scales[*slot];
          sums[1] += load_bf16(from + kPanel) * step.slot_scales[*slot];
        }
        out.put_two(token, panel, sums[0], sums[1]);
      }
    }
    settle_stores();
  }
};

// Adds what a share comes to, by its weights.
struct WeightedSums {
  const Step& step;
  const Share& share;
  TokenSums sums;

  void put(int64_t row, int64_t panel, Floats sum) const {
    sums.add(panel, step.slot_tokens[share.slot + row], sum * step.slot_scales[share.slot + row]);
  }

  void put_two(int64_t row, int64_t panel, Floats first, Floats second) const {
    put(row, panel, first);
    put(row, panel + 1, second);
  }
};

// The same as experts come: what fits the caches need not wait there.
struct ShareSums {
  TokenSums sums;

  void clear(int64_t first, int64_t last) const { sums.clear(first, last); }
  WeightedSums of_share(const Step& step, const Share& share) const { return {step, share, sums}; }
  void put(const Step&, int64_t first, int64_t last, const Output& out) const { sums.put(first, last, out); }
};

}  // namespace zoo
