// Keys that are stored by token, and scores of them.
#pragma once

#include "pack.h"
#include "panel_parts.h"
#include "strips.h"
#include "transpose.h"

namespace zoo {

// Pairs whose keys are rows, [32 tokens][w.key], as products take them for their first operand: what is stored by token
// need not be brought into panels. Queries are, once a task: [rows / 16][w.key / 32][16][16 rows][2].
struct RowPairs : Pairs {};

// Scores by token of 32 tokens and up to 32 rows, [rows / 16][2][16 tokens][16 rows], as rows [rows][stride].
inline void turn_scores(const float (*scores)[kTileValues], int rows, float* out, int64_t stride) {
  for (int tile = 0; tile < (rows > kPanel ? 4 : 2); ++tile) {
    Words found[kLanes];
    for (int token = 0; token < kLanes; ++token) found[token] = load<Words>(scores[tile] + token * kLanes);
    transpose(found);
    float* to = out + tile / 2 * kPanel * stride + tile % 2 * kPanel;
    for (int row = 0; row < kLanes; ++row) store(to + row * stride, found[row]);
  }
}

}  // namespace zoo
