// Sums of all experts that a token goes to.
#pragma once

#include "panels.h"

namespace zoo {

// What experts come to, in float32: [panels][tokens][16].
struct TokenSums {
  float* values;
  int64_t tokens;

  float* at(int64_t panel, int64_t token) const { return values + (panel * tokens + token) * kPanel; }

  void clear(int64_t panel, int64_t last) const { std::fill(at(panel, 0), at(last, 0), 0.0f); }

  void add(int64_t panel, int64_t token, Floats sum) const {
    float* to = at(panel, token);
    store(to, load<Floats>(to) + sum);
  }

  // Puts panels [panel, last) to where they go.
  void put(int64_t panel, int64_t last, const Output& out) const {
    for (; panel + 1 < last; panel += 2)
      for (int64_t token = 0; token < tokens; ++token)
        out.put_two(token, panel, load<Floats>(at(panel, token)), load<Floats>(at(panel + 1, token)));
    for (int64_t token = 0; panel < last && token < tokens; ++token)
      out.put(token, panel, load<Floats>(at(panel, token)));
    settle_stores();
  }
};

}  // namespace zoo
