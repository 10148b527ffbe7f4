// Routed experts with weights of 8 or 4 bits for few tokens, added up by their weights in float32 and rounded once.
//
// Each slot's inputs become integers (codes.h), and its activations again; the shared experts are one more that every
// token goes to. Threads share every expert's panels, as in experts.cpp.
#include "activation.h"
#include "codes.h"
#include "products.h"
#include "replay.h"
#include "slots.h"
#include "token_sums.h"

namespace {

using namespace zoo;

struct CodeFeedForward {
  CodeWeight gate_up, down;
  int64_t width;

  int64_t panels() const { return width / kPanel; }
};

// What all weights of one form have in common, and where each lies.
struct CodeForm {
  const uint8_t* const* codes;
  const float* const* scales;
  int64_t inputs, group_size;
  int bits;

  CodeWeight at(int64_t expert) const {
    return CodeWeight::of(codes[expert], scales[expert], inputs, group_size, bits);
  }
};

constexpr int64_t kWidestStep = 64;  // tokens

struct CodeStep {
  int64_t tokens, hidden;
  const SlotTable* slots;
  const CodeFeedForward* experts;  // of each group of slots
  Integers inputs, activated;      // of each slot
  bf16* activations;               // [slots][stride]
  int64_t stride;
  float* sums;                     // [panels][tokens][16]
};

// Calls `put` with each of a group's rows and its sums with a panel.
template <int kBits, typename Put>
void multiply_group(const Integers& x, const Slots& group, const CodePanel& panel, const Put& put) {
  auto multiply = [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    Floats sums[kRows];
    multiply_codes<kBits, kRows>(x, group.first + row, panel, sums);
    for (int r = 0; r < kRows; ++r) put(group.first + row + r, sums[r]);
  };
  int64_t row = 0;
  for (; row + 8 <= group.rows; row += 8) multiply(std::integral_constant<int, 8>{}, row);
  for (; row + 4 <= group.rows; row += 4) multiply(std::integral_constant<int, 4>{}, row);
  for (; row + 2 <= group.rows; row += 2) multiply(std::integral_constant<int, 2>{}, row);
  for (; row < group.rows; ++row) multiply(std::integral_constant<int, 1>{}, row);
}

// A thread's channels of the activations of all slots.
template <int kBits>
void activate(const CodeStep& step, int part, int parts) {
  const std::vector<Slots>& groups = step.slots->groups();
  for (size_t i = 0; i < groups.size(); ++i) {
    const CodeFeedForward& expert = step.experts[i];
    const int64_t turn = (part + groups[i].first) % parts;  // so that nobody always has the larger part
    const int64_t first = expert.panels() * turn / parts, last = expert.panels() * (turn + 1) / parts;
    for (int64_t panel = first; panel < last; ++panel) {
      Floats gates[kWidestStep];
      multiply_group<kBits>(step.inputs, groups[i], expert.gate_up.panel(panel),
                            [&](int64_t slot, Floats sum) { gates[slot - groups[i].first] = sum; });
      multiply_group<kBits>(step.inputs, groups[i], expert.gate_up.panel(expert.panels() + panel),
                            [&](int64_t slot, Floats sum) {
                              store_bf16(step.activations + slot * step.stride + panel * kPanel,
                                         silu(gates[slot - groups[i].first]) * sum);
                            });
    }
  }
}

// Output channels of panels [first, last) for all tokens.
template <int kBits>
void project(const CodeStep& step, int64_t first, int64_t last, const Output& out) {
  const TokenSums sums{step.sums, step.tokens};
  sums.clear(first, last);
  const std::vector<Slots>& groups = step.slots->groups();
  for (size_t i = 0; i < groups.size(); ++i)
    for (int64_t panel = first; panel < last; ++panel)
      multiply_group<kBits>(step.activated, groups[i], step.experts[i].down.panel(panel), [&](int64_t slot, Floats sum) {
        sums.add(panel, step.slots->tokens()[slot], sum * step.slots->scales()[slot]);
      });
  sums.put(first, last, out);
}

template <int kBits>
void run(const bf16* x, int64_t x_stride, const CodeStep& step, const Output& out, int threads) {
  const int64_t panels = ceil_div(step.hidden, kPanel), slots = step.slots->size();
  const std::vector<Slots>& groups = step.slots->groups();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t slot = 0; slot < slots; ++slot)
      step.inputs.quantize(x + step.slots->tokens()[slot] * x_stride, slot, step.experts->gate_up.inputs(),
                           Codes<kBits>::kOffset);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) activate<kBits>(step, part, threads);
#pragma omp for
    for (size_t i = 0; i < groups.size(); ++i) {
      const CodeFeedForward& expert = step.experts[i];
      for (int64_t slot = groups[i].first; slot < groups[i].first + groups[i].rows; ++slot) {
        bf16* row = step.activations + slot * step.stride;
        std::fill(row + expert.width, row + expert.down.inputs(), bf16{});
        step.activated.quantize(row, slot, expert.down.inputs(), Codes<kBits>::kOffset);
      }
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      project<kBits>(step, panels * part / threads, panels * (part + 1) / threads, out);
  }
}

thread_local SlotTable slots;
thread_local IntegerSpace input_space, activation_space;
thread_local Workspace activations, sums;
thread_local std::vector<CodeFeedForward> experts;

}  // namespace

extern "C" {

// x: [tokens, hidden], at most 64 of them, rows `x_stride` values apart, filled up to a multiple of 64; widths: multiples
// of 16; ids and scales: [tokens, top_k]. Four addresses of every expert's weights and, where shared_width is not zero, of
// the shared experts' after them, each [count + 1]: codes and scales (quantized.cpp) of gate_up, and of down, which has a
// scale a channel where down_group is zero. out: [tokens, hidden].
void zoo_code_experts(const bf16* x, int64_t x_stride, int64_t tokens, int64_t hidden, int64_t width,
                      const int64_t* ids, const float* scales, int64_t top_k, const uint8_t* const* gate_up,
                      const float* const* gate_up_scales, const uint8_t* const* down, const float* const* down_scales,
                      int64_t count, int64_t shared_width, int64_t group, int64_t down_group, int bits, bf16* out,
                      int threads) {
  slots.sort(ids, scales, tokens, top_k, count, shared_width);
  const CodeForm first{gate_up, gate_up_scales, hidden, group, bits};
  experts.clear();
  int64_t widest = 0;
  for (const Slots& group : slots.groups()) {
    const int64_t own = group.expert == count ? shared_width : width;
    const CodeForm second{down, down_scales, own, down_group ? down_group : own, bits};
    experts.push_back({first.at(group.expert), second.at(group.expert), own});
    widest = std::max(widest, own);
  }
  if (experts.empty()) {
    std::fill_n(out, tokens * hidden, bf16{});
    return;
  }
  const int64_t size = slots.size(), stride = filled_blocks(widest) * kCodeBlock;
  const int64_t of_inputs = experts[0].gate_up.input_group();
  int64_t of_activations = kWidestGroup;
  for (const CodeFeedForward& expert : experts)
    of_activations = std::min(of_activations, expert.down.input_group());
  const CodeStep step{
      tokens,
      hidden,
      &slots,
      experts.data(),
      input_space.take(size, experts[0].gate_up.inputs(), of_inputs),
      activation_space.take(size, stride, of_activations),
      activations.take<bf16>(size * stride),
      stride,
      sums.take<float>(tokens * ceil_div(hidden, kPanel) * kPanel),
  };
  (bits == 8 ? run<8> : run<4>)(x, x_stride, step, {out, hidden, hidden}, threads);
}
}

ZOO_REPLAYABLE(zoo_code_experts)
