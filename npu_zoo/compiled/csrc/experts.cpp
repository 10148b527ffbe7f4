// Routed experts, SwiGLU feed-forwards in bfloat16, added up by their weights in float32 and rounded once.
//
// The shared experts, one feed-forward of their own width, are one more that every token goes to with weight one. Threads
// share every expert's panels, so that they have as much to do whatever number of tokens goes where, and each reads its
// panels one after the other.
#include "expert_tiles.h"
#include "replay.h"

namespace {

using namespace zoo;

// One row's panels [first, last) of an expert's gate, and as many of what it is multiplied with.
void activate_row(const Step& step, const Share& share, int64_t first, int64_t last) {
  const int64_t stride = panel_values(step.hidden);
  for (int64_t panel = first; panel < last; ++panel) {
    Floats sums[2];
    const bf16* gate = share.weights.gate_up + panel * stride;
    multiply_row(step.input(share.slot), gate, gate + share.weights.panels() * stride, step.x_blocks(), sums);
    put_activations(step.activations_of(share) + panel * kPanel, sums[0], sums[1], is_half_block(share.weights, panel));
  }
}

// The panels that a thread of several computes, two by two.
struct Channels {
  int64_t first, last;

  Channels(int64_t panels, int part, int parts) {
    const int64_t pairs = ceil_div(panels, 2);
    first = 2 * (pairs * part / parts), last = std::min(panels, 2 * (pairs * (part + 1) / parts));
  }

  // Of an expert's gate, in turn, so that nobody always has the larger part.
  static Channels of_gate(const Share& share, int part, int parts) {
    return {share.weights.panels(), static_cast<int>((part + share.slot) % parts), parts};
  }
};

void activate_part(const Step& step, int part, int parts, bool past_caches) {
  const std::vector<Share>& shares = *step.shares;
  for (size_t i = 0; i < shares.size(); ++i) {
    const Channels channels = Channels::of_gate(shares[i], part, parts);
    if (!shares[i].tiled()) {
      activate_row(step, shares[i], channels.first, channels.last);
      continue;
    }
    PanelPair then{};
    if (i + 1 < shares.size())
      then = gate_and_up(step, shares[i + 1].weights, Channels::of_gate(shares[i + 1], part, parts).first);
    activate_tiled(step, shares[i], channels.first, channels.last, past_caches, then);
  }
}

// Panels [first, last) of a share's output channels; `next` is the share after it, or null.
template <typename Out>
void project_share(
    const Step& step, const Share& share, const Share* next, int64_t first, int64_t last, const Out& out) {
  if (share.tiled()) {
    PanelPair then{};
    if (next) then = PanelRange{next->weights.down, next->weights.blocks(), first, last}.at(0);
    return project_tiled(step, share, first, last, then, out);
  }
  multiply_panels(step.activations_of(share), share.row_values(), share.rows, share.weights.down,
                  share.weights.blocks(), first, last, out);
}

// Output channels of panels [first, last) for all tokens; `results` holds what experts come to until it is added up.
template <typename Results>
void project(const Step& step, int64_t first, int64_t last, const Results& results, const Output& out) {
  results.clear(first, last);
  for (size_t i = 0; i < step.shares->size(); ++i) {
    const Share* share = step.shares->data() + i;
    const Share* next = i + 1 < step.shares->size() ? share + 1 : nullptr;
    project_share(step, *share, next, first, last, results.of_share(step, *share));
  }
  results.put(step, first, last, out);
}

thread_local SlotTable slots;
thread_local Workspace sums, activations, results;
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
    for (int part = 0; part < threads; ++part) activate_part(step, part, threads, outgrows_caches(share.end() * sizeof(bf16)));
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
      const Channels channels(panels, part, threads);
      project_share(step, share, nullptr, channels.first, channels.last, Output::of_rows(out, tokens, hidden));
    }
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
  Step step{x, x_stride, tokens, hidden, &shares, slots.tokens(), slots.scales()};
  const Output to = Output::of_rows(out, tokens, hidden);
  const int64_t room = shares.empty() ? 0 : shares.back().end();
  step.activations = activations.take<bf16>(room);
  const bool by_slot = hidden % kBlock == 0 && outgrows_caches(tokens * hidden * sizeof(bf16));
  SlotResults of_slots{};
  ShareSums of_shares{};
  if (by_slot) {
    const int64_t most = top_k + (shared_gate_up ? 1 : 0);
    of_slots = {results.take<bf16>(slots.size() * hidden), slots.by_token(tokens, most), most};
  } else {
    of_shares = {{sums.take<float>(tokens * panels * kPanel), tokens}};
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) activate_part(step, part, threads, outgrows_caches(room * sizeof(bf16)));
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
      const Channels channels(panels, part, threads);
      if (by_slot) project(step, channels.first, channels.last, of_slots, to);
      else project(step, channels.first, channels.last, of_shares, to);
    }
  }
}
}

ZOO_REPLAYABLE(zoo_experts)
ZOO_REPLAYABLE(zoo_feed_forward)
