// The softmax of a row of scores that come in chunks: its largest score and its sum so far, and what is summed.
#pragma once

#include "exponential.h"
#include "values.h"

namespace zoo {

struct RowState {
  float largest = -__builtin_inff(), total = 0;
};

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
  Floats most = none;
  int64_t i = 0;
  for (; i + kLanes <= visible; i += kLanes) most = larger(most, load<Floats>(scores + i));
  if (i < visible) most = larger(most, lanes_from(i) < splat(visible) ? load<Floats>(scores + i) : none);
  const float largest_now = visible > 0 ? std::max(state.largest, largest(most) * scale) : state.largest;
  if (largest_now > state.largest && state.total > 0) {
    const float factor = exponential(splat(state.largest - largest_now))[0];
    state.total *= factor;
    for (int64_t at = 0; at < width; at += kLanes) store(sums + at, load<Floats>(sums + at) * factor);
  }
  state.largest = largest_now;
  constexpr float kLog2e = 1.44269504f;
  const float to_powers = scale * kLog2e, largest_power = largest_now * kLog2e;
  Floats total{};
  for (i = 0; i < visible; i += kLanes) {
    Floats weight = power_of_two<sizeof(Operand) == 2>(load<Floats>(scores + i) * to_powers - largest_power);
    Floats stored = weight * weight_scales(i);
    if (i + kLanes > visible) {
      const auto seen = lanes_from(i) < splat(visible);
      weight = seen ? weight : Floats{};
      stored = seen ? stored : Floats{};
    }
    total += weight;
    store_floats(weights + i, stored);
  }
  for (; i < count; i += kLanes) store_floats(weights + i, Floats{});
  state.total += sum(total);
}

}  // namespace zoo
