// Products of many rows with weights of 8 or 4 bits, which are widened to bfloat16 for all of them at once.
#pragma once

#include "codes.h"
#include "panel_tiles.h"
#include "panel_vectors.h"

namespace zoo {

// Puts sums of some rows with two panels, of which the second may be missing.
inline void put_scaled(
    const Output& out, const float* sums, int64_t row, int rows, int64_t panel, bool two, const Floats* scales) {
  for (int number = 0; number < 1 + two; ++number)
    for (int r = 0; r < rows; ++r)
      out.put(row + r, panel + number, load<Floats>(sums + number * kTileValues + r * kLanes) * scales[number]);
}

// Panels [first, last) with many rows; `widened` has room for two panels of bfloat16.
template <int kBits>
inline void multiply_widened_codes(
    const Rows& x, int64_t rows, const CodeWeight& weight, int64_t first, int64_t last, bf16* widened,
    const Output& out) {
  const bool scaled = weight.groups > 1;
  const auto widen = scaled ? widen_codes<kBits, true> : widen_codes<kBits, false>;
  bf16* behind = widened + weight.blocks * kBlockValues;
  Unit unit(std::min(rows, kStepRows));
  for (int64_t panel = first; panel < last; panel += 2) {
    const bool two = panel + 1 < last;
    const CodePanel one = weight.panel(panel), other = weight.panel(two ? panel + 1 : panel);
    widen(one, widened);
    if (two) widen(other, behind);
    Floats scales[2] = {splat(1.0f), splat(1.0f)};
    if (!scaled) scales[0] = load<Floats>(one.scales), scales[1] = load<Floats>(other.scales);
    for (int64_t row = 0; row < rows; row += kStepRows) {
      const int64_t count = std::min(rows - row, kStepRows);
      const int upper = std::min<int64_t>(count, kPanel), lower = count - upper;
      const PanelPair panels{widened, two ? behind : nullptr};
      alignas(64) float sums[4 * kTileValues];
      unit.shape(count);
      unit.add<false>(x, row, count, 0, weight.blocks, panels, {{widened, behind}}, true, sums);
      put_scaled(out, sums, row, upper, panel, two, scales);
      put_scaled(out, sums + 2 * kTileValues, row + upper, lower, panel, two, scales);
    }
  }
}

}  // namespace zoo
