// Routed experts, SwiGLU feed-forwards in bfloat16, added up by their weights in float32 and rounded once.
//
// The shared experts, one feed-forward of their own width, are one more that every token goes to with weight one.
// Slots, a token's place with one of its experts, are sorted by expert. Threads share every expert's panels, so that they
// have as much to do whatever number of tokens goes where, and each reads its panels one after the other.
#include <vector>

#include "activation.h"
#include "products.h"
#include "replay.h"
#include "workspace.h"

namespace {

using namespace zoo;

#if defined(ZOO_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

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
  int64_t group;        // its first 16 rows among the inputs
  int64_t activations;  // where its own begin

  bool tiled() const { return kTiles && rows > 1; }
  int64_t groups() const { return ceil_div(rows, kPanel); }
  int64_t end() const { return activations + groups() * weights.blocks() * kBlockValues; }
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
  bf16* inputs;       // of tiled shares: [group][hidden / 32][16][32]
  bf16* activations;  // of tiled shares: [group][width / 32][16][32]; of others rows in the room of their groups
  float* sums;        // [tokens][hidden], filled up to whole panels

  int64_t x_blocks() const { return ceil_div(hidden, kBlock); }
  bf16* activations_of(const Share& share) const { return activations + share.activations; }
};

void add_share(std::vector<Share>& shares, const FeedForward& weights, int64_t rows) {
  if (!rows) return;
  if (shares.empty()) return shares.push_back({weights, rows, 0, 0, 0});
  const Share& last = shares.back();
  shares.push_back({weights, rows, last.slot + last.rows, last.group + last.groups(), last.end()});
}

// Sorts slots by expert, tokens in order; experts of other ranks, whose ids are too large, are left out.
void sort_slots(
    const int64_t* ids, const float* scales, int64_t tokens, int64_t top_k, const Experts& experts,
    std::vector<Share>& shares, std::vector<int64_t>& next, int64_t* slot_tokens, float* slot_scales) {
  next.assign(experts.count, 0);
  for (int64_t at = 0; at < tokens * top_k; ++at)
    if (ids[at] < experts.count) ++next[ids[at]];
  shares.clear();
  int64_t slot = 0;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    const int64_t rows = next[expert];
    next[expert] = slot;
    slot += rows;
    add_share(shares, {experts.gate_up[expert], experts.down[expert], experts.width}, rows);
  }
  for (int64_t at = 0; at < tokens * top_k; ++at) {
    if (ids[at] >= experts.count) continue;
    const int64_t to = next[ids[at]]++;
    slot_tokens[to] = at / top_k;
    slot_scales[to] = scales[at];
  }
  if (!experts.shared.gate_up) return;
  add_share(shares, experts.shared, tokens);
  for (int64_t token = 0; token < tokens; ++token) {
    slot_tokens[slot + token] = token;
    slot_scales[slot + token] = 1.0f;
  }
}

// Brings 16 values of activations to their place, and zeros after the last ones where those fill half a block.
inline void put_activations(bf16* to, Floats gate, Floats up, bool last) {
  store_bf16(to, silu(gate) * up);
  if (last) store_bf16(to + kPanel, Floats{});
}

inline bool is_half_block(const Share& share, int64_t panel) {
  return panel + 1 == share.weights.panels() && panel % 2 == 0;
}

template <int kRows>
void activate_rows(const Step& step, const Share& share, int64_t row, int64_t panel) {
  const bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = step.x + step.slot_tokens[share.slot + row + r] * step.x_stride;
  const int64_t stride = panel_values(step.hidden), to_stride = share.weights.blocks() * kBlock;
  Floats sums[kRows][2];
  const bf16* gate = share.weights.gate_up + panel * stride;
  multiply_rows<kRows, 2>(x, gate, share.weights.panels() * stride, step.x_blocks(), sums);
  bf16* to = step.activations_of(share) + row * to_stride + panel * kPanel;
  for (int r = 0; r < kRows; ++r) put_activations(to + r * to_stride, sums[r][0], sums[r][1], is_half_block(share, panel));
}

// Panels [first, last) of an expert's gate, and as many of what it is multiplied with.
void activate(const Step& step, const Share& share, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    int64_t row = 0;
    for (; row + 4 <= share.rows; row += 4) activate_rows<4>(step, share, row, panel);
    for (; row < share.rows; ++row) activate_rows<1>(step, share, row, panel);
  }
}

#if defined(ZOO_TILES)
// Gathers the rows of tiled shares, of `parts` threads each some groups.
void gather(const Step& step, int part, int parts) {
  const int64_t blocks = step.x_blocks();
  for (const Share& share : *step.shares) {
    if (!share.tiled()) continue;
    for (int64_t row = 0; row < share.rows; ++row) {
      const int64_t group = share.group + row / kPanel;
      if (group % parts != part) continue;
      const bf16* from = step.x + step.slot_tokens[share.slot + row] * step.x_stride;
      bf16* to = step.inputs + group * blocks * kBlockValues + row % kPanel * kBlock;
      for (int64_t block = 0; block < blocks; ++block)
        std::memcpy(to + block * kBlockValues, from + block * kBlock, kBlock * sizeof(bf16));
    }
  }
}

void put_group(const Step& step, const Share& share, int64_t row, int rows, int64_t panel, const float* gate,
               const float* up) {
  const int64_t group = share.weights.blocks() * kBlockValues;
  bf16* to = step.activations_of(share) + row / kPanel * group + panel / 2 * kBlockValues + panel % 2 * kPanel;
  for (int r = 0; r < rows; ++r)
    put_activations(to + r * kBlock, load<Floats>(gate + r * kLanes), load<Floats>(up + r * kLanes),
                    is_half_block(share, panel));
}

// As `activate`, for a share whose rows were gathered.
void activate_tiled(const Step& step, const Share& share, int64_t first, int64_t last) {
  const int64_t blocks = step.x_blocks(), stride = panel_values(step.hidden);
  const Rows x = Rows::tiles(step.inputs + share.group * blocks * kBlockValues, blocks);
  auto pair_at = [&](int64_t pair) {
    const bf16* gate = share.weights.gate_up + (first + pair) * stride;
    return PanelPair{gate, gate + share.weights.panels() * stride};
  };
  auto finish = [&](int64_t pair, int64_t row, int rows, const float* gate, const float* up) {
    put_group(step, share, row, rows, first + pair, gate, up);
  };
  multiply_pairs(x, share.rows, blocks, last - first, pair_at, finish);
}
#endif

// Adds what a share's rows come to, each by its weight, to the sums of their tokens.
struct WeightedSums {
  const Step& step;
  const Share& share;

  void put(int64_t row, int64_t panel, Floats sum) const {
    const int64_t slot = share.slot + row, stride = ceil_div(step.hidden, kPanel) * kPanel;
    float* to = step.sums + step.slot_tokens[slot] * stride + panel * kPanel;
    store(to, load<Floats>(to) + sum * step.slot_scales[slot]);
  }
};

// Output channels of panels [first, last) for all tokens.
void project(const Step& step, int64_t first, int64_t last, const Output& out) {
  const int64_t stride = ceil_div(step.hidden, kPanel) * kPanel;
  for (int64_t token = 0; token < step.tokens; ++token)
    std::fill(step.sums + token * stride + first * kPanel, step.sums + token * stride + last * kPanel, 0.0f);
  for (const Share& share : *step.shares) {
    const int64_t blocks = share.weights.blocks();
    const bf16* packed = share.weights.down;
    const bf16* rows = step.activations_of(share);
    const WeightedSums sums{step, share};
#if defined(ZOO_TILES)
    if (share.tiled()) {
      multiply_panels_by_tiles(Rows::tiles(rows, blocks), share.rows, packed, blocks, first, last, sums);
      continue;
    }
#endif
    multiply_panels(rows, blocks * kBlock, share.rows, packed, blocks, first, last, sums);
  }
  for (int64_t token = 0; token < step.tokens; ++token)
    for (int64_t panel = first; panel < last; ++panel)
      out.put(token, panel, load<Floats>(step.sums + token * stride + panel * kPanel));
}

thread_local Workspace slot_tokens, slot_scales, sums, inputs, activations;
thread_local std::vector<Share> shares;
thread_local std::vector<int64_t> next_slot;

}  // namespace

extern "C" {

// x: [tokens, hidden], rows `x_stride` values apart, filled up to a multiple of 32; widths: multiples of 16; ids and
// scales: [tokens, top_k]; gate_up, down: each expert's panels, of 2 * width and of hidden channels; shared_gate_up,
// shared_down: those of the shared experts, or null; out: [tokens, hidden].
void zoo_experts(const bf16* x, int64_t x_stride, int64_t tokens, int64_t hidden, int64_t width, const int64_t* ids,
                 const float* scales, int64_t top_k, const bf16* const* gate_up, const bf16* const* down,
                 int64_t count, const bf16* shared_gate_up, const bf16* shared_down, int64_t shared_width, bf16* out,
                 int threads) {
  const int64_t slots = tokens * (top_k + 1), panels = ceil_div(hidden, kPanel);
  const Experts experts{gate_up, down, width, count, {shared_gate_up, shared_down, shared_width}};
  sort_slots(ids, scales, tokens, top_k, experts, shares, next_slot, slot_tokens.take<int64_t>(slots),
             slot_scales.take<float>(slots));
  const bool tiled = std::any_of(shares.begin(), shares.end(), [](const Share& share) { return share.tiled(); });
  Step step{x, x_stride, tokens, hidden, &shares, slot_tokens.take<int64_t>(slots), slot_scales.take<float>(slots), nullptr, nullptr,
            sums.take<float>(tokens * panels * kPanel)};
  if (!shares.empty()) {
    const Share& last = shares.back();
    step.activations = activations.take<bf16>(last.end());
    if (tiled) step.inputs = inputs.take<bf16>((last.group + last.groups()) * step.x_blocks() * kBlockValues);
  }
#pragma omp parallel num_threads(threads)
  {
#if defined(ZOO_TILES)
    if (tiled) {
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) gather(step, part, threads);
    }
#endif
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
      for (const Share& share : *step.shares) {
        const int64_t turn = (part + share.slot) % threads;  // so that nobody always has the larger part
        const int64_t channels = share.weights.panels();
        const int64_t first = channels * turn / threads, last = channels * (turn + 1) / threads;
#if defined(ZOO_TILES)
        if (share.tiled()) {
          activate_tiled(step, share, first, last);
          continue;
        }
#endif
        activate(step, share, first, last);
      }
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      project(step, panels * part / threads, panels * (part + 1) / threads, Output{out, hidden, hidden});
  }
}
}

ZOO_REPLAYABLE(zoo_experts)
