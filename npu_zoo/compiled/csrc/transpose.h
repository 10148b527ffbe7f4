// 16 x 16 words turned about their diagonal, in vectors.
#pragma once

#include "vectors.h"

namespace zoo {

// One step of a transposition: exchanges the halves of pairs of rows that are kWidth rows apart.
template <int kWidth>
inline void exchange(Words (&rows)[kLanes]) {
  Words low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool second = lane & kWidth;
    low[lane] = second ? kLanes + lane - kWidth : lane;
    high[lane] = second ? kLanes + lane : lane + kWidth;
  }
  for (int row = 0; row < kLanes; ++row) {
    if (row & kWidth) continue;
    const Words upper = rows[row], lower = rows[row + kWidth];
    rows[row] = __builtin_shuffle(upper, lower, low);
    rows[row + kWidth] = __builtin_shuffle(upper, lower, high);
  }
}

inline void transpose(Words (&rows)[kLanes]) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

}  // namespace zoo
