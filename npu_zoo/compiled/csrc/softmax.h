// The softmax of a row of scores that come in chunks: a score that none is far above, its sum so far, and what is summed.
#pragma once

#include "exponential.h"
#include "values.h"

namespace zoo {

struct RowState {
  float largest = -__builtin_inff(), total = 0;
};

// How far scores may lie above the largest that is known before sums are rescaled, which is seldom: e to that is far from
// what numbers hold.
constexpr float kLead = 8;

inline Floats lanes_from(int64_t first) {
  Floats lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = first + lane;
  return lanes;
}

// Turns the first `visible` of `count` scores, a multiple of 32, to weights, and the others to zeros.
//
// Args:
//   sums: [width], what the row has summed so far, rescaled where a larger score appears.
//   weight_scales: the factor of a half strip's weights, which is no part of their total.
template <typename Operand, typename Scales>
void weigh(
    const float* scores, int64_t count, int64_t visible, float scale, RowState& state, float* sums, int64_t width,
    Operand* weights, Scales weight_scales) {
  const Floats none = splat(-__builtin_inff());
  constexpr int kChains = 4;  // or each step would wait for the last
  Floats chains[kChains] = {none, none, none, none};
  int64_t i = 0;
  for (; i + kChains * kLanes <= visible; i += kChains * kLanes)
    for (int chain = 0; chain < kChains; ++chain)
      chains[chain] = larger(chains[chain], load<Floats>(scores + i + chain * kLanes));
  Floats most = larger(larger(chains[0], chains[1]), larger(chains[2], chains[3]));
  for (; i + kLanes <= visible; i += kLanes) most = larger(most, load<Floats>(scores + i));
  if (i < visible) most = larger(most, lanes_from(i) < splat(visible) ? load<Floats>(scores + i) : none);
  const float here = visible > 0 ? largest(most) * scale : state.largest;
  const float largest_now = here > state.largest + kLead ? here : state.largest;
  if (largest_now > state.largest && state.total > 0) {
    const float factor = exponential(splat(state.largest - largest_now))[0];
    state.total *= factor;
    for (int64_t at = 0; at < width; at += kLanes) store(sums + at, load<Floats>(sums + at) * factor);
  }
  state.largest = largest_now;
  constexpr float kLog2e = 1.44269504f;
  const float to_powers = scale * kLog2e, largest_power = largest_now * kLog2e;
  auto weight_at = [&](int64_t at) {
    return power_of_two<sizeof(Operand) == 2>(load<Floats>(scores + at) * to_powers - largest_power);
  };
  Floats totals[2] = {};
  for (i = 0; i + 2 * kLanes <= visible; i += 2 * kLanes) {
    const Floats first = weight_at(i), second = weight_at(i + kLanes);
    totals[0] += first, totals[1] += second;
    store_two(weights + i, first * weight_scales(i), second * weight_scales(i + kLanes));
  }
  for (; i < visible; i += kLanes) {
    const auto seen = lanes_from(i) < splat(visible);
    const Floats weight = seen ? weight_at(i) : Floats{};
    totals[0] += weight;
    store_floats(weights + i, seen ? weight * weight_scales(i) : Floats{});
  }
  for (; i < count; i += kLanes) store_floats(weights + i, Floats{});
  state.total += sum(totals[0] + totals[1]);
}

}  // namespace zoo
