// Brings rows of bfloat16 into strips of pairs.
#pragma once

#include "strips.h"
#include "transpose.h"

namespace zoo {

inline Halves load_halves(const bf16* from, int64_t left) {
  if (left >= kLanes) return load<Halves>(from);
  bf16 lanes[kLanes] = {};
  std::copy_n(from, std::max<int64_t>(left, 0), lanes);
  return load<Halves>(lanes);
}

// 32 inputs of 16 rows to pairs [16][16 rows][2].
inline void pack_pairs(const bf16* const* rows, int64_t first, bf16* block) {
  Words words[kLanes];
  for (int row = 0; row < kLanes; ++row) words[row] = load<Words>(rows[row] + first);
  transpose(words);
  for (int pair = 0; pair < kLanes; ++pair) store(block + pair * 2 * kLanes, words[pair]);
}

// Two rows' values to [value / 16][16][2] at a pair's place in a strip.
inline void pack_value_pair(const bf16* first, const bf16* second, int64_t width, Widths w, bf16* pair) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes, pair += kBlockValues)
    store(pair, widen(load<Halves>(first + i)) | widen(load<Halves>(second + i)) << 16);
  for (; i < w.value; i += kLanes, pair += kBlockValues)
    store(pair, widen(load_halves(first + i, width - i)) | widen(load_halves(second + i, width - i)) << 16);
}

}  // namespace zoo
