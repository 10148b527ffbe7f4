// Routed experts, SwiGLU feed-forwards in bfloat16, added up by their weights in float32 and rounded once.
//
// The shared experts, one feed-forward of their own width, are one more that every token goes to with weight one.
// Threads share every expert's panels, so that they
// have as much to do whatever number of tokens goes where, and each reads its panels one after the other.
#include "activation.h"
#include "products.h"
#include "replay.h"
#include "slots.h"

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
  int64_t activations;  // where its own begin

  bool tiled() const { return kTiles && rows > 1; }
  int64_t row_values() const { return weights.blocks() * kBlock; }
  int64_t end() const { return activations + rows * row_values(); }
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
  bf16* activations;  // of each share [rows][width], filled up to whole blocks
  float* sums;        // [tokens][hidden], filled up to whole panels

  int64_t x_blocks() const { return ceil_div(hidden, kBlock); }
  const bf16* input(int64_t slot) const { return x + slot_tokens[slot] * x_stride; }
  bf16* activations_of(const Share& share, int64_t row) const {
    return activations + share.activations + row * share.row_values();
  }
};

// The experts that tokens go to, each with its part of the activations.
void find_shares(const SlotTable& slots, const Experts& experts, std::vector<Share>& shares) {
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
  for (int r = 0; r < kRows; ++r) x[r] = step.input(share.slot + row + r);
  const int64_t stride = panel_values(step.hidden), to_stride = share.row_values();
  Floats sums[kRows][2];
  const bf16* gate = share.weights.gate_up + panel * stride;
  multiply_rows<kRows, 2>(x, gate, share.weights.panels() * stride, step.x_blocks(), sums);
  bf16* to = step.activations_of(share, row) + panel * kPanel;
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
PanelPair gate_and_up(const Step& step, const FeedForward& weights, int64_t panel) {
  const int64_t stride = panel_values(step.hidden);
  return {weights.gate_up + panel * stride, weights.gate_up + (weights.panels() + panel) * stride};
}

// Puts activations of rows from panels of a share's gate, the first of which is `first`, and of what it meets.
struct ActivatePairs {
  const Step& step;
  const Share& share;
  int64_t first;

  bf16* at(int64_t row, int64_t panel) const { return step.activations_of(share, row) + panel * kPanel; }

  void fetch(int64_t pair, int64_t row, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) prefetch_to_write(at(row + r, first + pair));
  }

  void operator()(int64_t pair, int64_t row, int rows, const float* gate, const float* up) const {
    const int64_t panel = first + pair;
    for (int r = 0; r < rows; ++r)
      put_activations(at(row + r, panel), load<Floats>(gate + r * kLanes), load<Floats>(up + r * kLanes),
                      is_half_block(share, panel));
  }
};

// As `activate`; `then` is what is read afterwards.
void activate_tiled(const Step& step, const Share& share, int64_t first, int64_t last, const PanelPair& then) {
  auto row_at = [&](int64_t row) { return step.input(share.slot + row); };
  auto pair_at = [&](int64_t pair) { return gate_and_up(step, share.weights, first + pair); };
  const ActivatePairs finish{step, share, first};
  multiply_pairs(row_at, share.rows, step.x_blocks(), last - first, pair_at, then, finish);
}
#endif

// The panels of an expert's gate that a thread of several computes.
struct Channels {
  int64_t first, last;

  Channels(const Share& share, int part, int parts) {
    const int64_t turn = (part + share.slot) % parts;  // so that nobody always has the larger part
    first = share.weights.panels() * turn / parts, last = share.weights.panels() * (turn + 1) / parts;
  }
};

void activate_part(const Step& step, int part, int parts) {
  const std::vector<Share>& shares = *step.shares;
  for (size_t i = 0; i < shares.size(); ++i) {
    const Channels channels(shares[i], part, parts);
#if defined(ZOO_TILES)
    if (shares[i].tiled()) {
      PanelPair then{};
      if (i + 1 < shares.size()) then = gate_and_up(step, shares[i + 1].weights, Channels(shares[i + 1], part, parts).first);
      activate_tiled(step, shares[i], channels.first, channels.last, then);
      continue;
    }
#endif
    activate(step, shares[i], channels.first, channels.last);
  }
}

// What shares come to, each by its weight, added up for every token: [panels][tokens][16].
struct WeightedSums {
  const Step& step;
  const Share& share;

  float* at(int64_t row, int64_t panel) const {
    return step.sums + (panel * step.tokens + step.slot_tokens[share.slot + row]) * kPanel;
  }

  void fetch(int64_t row, int64_t panel) const {
    prefetch_to_write(at(row, panel));
    prefetch_to_write(at(row, panel + 1));
  }

  void put(int64_t row, int64_t panel, Floats sum) const {
    float* to = at(row, panel);
    store(to, load<Floats>(to) + sum * step.slot_scales[share.slot + row]);
  }
};

// Panels [first, last) of a share's output channels; `next` is the share after it, or null.
template <typename Out>
void project_share(
    const Step& step, const Share& share, const Share* next, int64_t first, int64_t last, const Out& out) {
  const bf16* rows = step.activations_of(share, 0);
#if defined(ZOO_TILES)
  if (share.tiled()) {
    auto range_of = [&](const Share& share) {
      return PanelRange{share.weights.down, share.weights.blocks(), first, last};
    };
    const PanelRange range = range_of(share);
    auto row_at = [&](int64_t row) { return rows + row * share.row_values(); };
    auto pair_at = [&](int64_t pair) { return range.at(pair); };
    const PanelPair then = next ? range_of(*next).at(0) : PanelPair{};
    const PutPairs<Out> finish{range, out};
    return multiply_pairs(row_at, share.rows, range.blocks, range.pairs(), pair_at, then, finish);
  }
#endif
  multiply_panels(rows, share.row_values(), share.rows, share.weights.down, share.weights.blocks(), first, last, out);
}

// Output channels of panels [first, last) for all tokens.
void project(const Step& step, int64_t first, int64_t last, const Output& out) {
  std::fill(step.sums + first * step.tokens * kPanel, step.sums + last * step.tokens * kPanel, 0.0f);
  for (size_t i = 0; i < step.shares->size(); ++i) {
    const Share* share = step.shares->data() + i;
    const Share* next = i + 1 < step.shares->size() ? share + 1 : nullptr;
    project_share(step, *share, next, first, last, WeightedSums{step, *share});
  }
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t token = 0; token < step.tokens; ++token)
      out.put(token, panel, load<Floats>(step.sums + (panel * step.tokens + token) * kPanel));
}

thread_local SlotTable slots;
thread_local Workspace sums, activations;
thread_local std::vector<Share> shares;

}  // namespace

extern "C" {

// One feed-forward for all tokens; arguments as of `zoo_experts`.
void zoo_feed_forward(const bf16* x, int64_t x_stride, int64_t tokens, int64_t hidden, int64_t width,
                      const bf16* gate_up, const bf16* down, bf16* out, int threads) {
  if (!tokens) return;
  const int64_t panels = ceil_div(hidden, kPanel);
  const Experts experts{nullptr, nullptr, 0, 0, {gate_up, down, width}};
  slots.sort(nullptr, nullptr, tokens, 0, 0, true);
  find_shares(slots, experts, shares);
  const Share& share = shares.front();
  Step step{x, x_stride, tokens, hidden, &shares, slots.tokens()};
  step.activations = activations.take<bf16>(share.end());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) activate_part(step, part, threads);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      project_share(step, share, nullptr, panels * part / threads, panels * (part + 1) / threads,
                    Output{out, hidden, hidden});
  }
}

// x: [tokens, hidden], rows `x_stride` values apart, filled up to a multiple of 32; widths: multiples of 16; ids and
// scales: [tokens, top_k]; gate_up, down: each expert's panels, of 2 * width and of hidden channels; shared_gate_up,
// shared_down: those of the shared experts, or null; out: [tokens, hidden].
void zoo_experts(const bf16* x, int64_t x_stride, int64_t tokens, int64_t hidden, int64_t width, const int64_t* ids,
                 const float* scales, int64_t top_k, const bf16* const* gate_up, const bf16* const* down,
                 int64_t count, const bf16* shared_gate_up, const bf16* shared_down, int64_t shared_width, bf16* out,
                 int threads) {
  const int64_t panels = ceil_div(hidden, kPanel);
  const Experts experts{gate_up, down, width, count, {shared_gate_up, shared_down, shared_width}};
  slots.sort(ids, scales, tokens, top_k, count, shared_gate_up);
  find_shares(slots, experts, shares);
  Step step{x, x_stride, tokens, hidden, &shares, slots.tokens(), slots.scales(), nullptr,
            sums.take<float>(tokens * panels * kPanel)};
  if (!shares.empty()) step.activations = activations.take<bf16>(shares.back().end());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) activate_part(step, part, threads);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      project(step, panels * part / threads, panels * (part + 1) / threads, Output{out, hidden, hidden});
  }
}
}

ZOO_REPLAYABLE(zoo_experts)
ZOO_REPLAYABLE(zoo_feed_forward)
