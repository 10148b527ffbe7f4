// Products of any number of rows with panels.
#pragma once

#include "panel_products.h"

namespace zoo {

// Panels [first, last) of x @ weight.T for rows of inputs whose length is a multiple of 32 (`blocks` times that).
template <typename Out>
inline void multiply_panels(
    const bf16* x, int64_t x_stride, int64_t rows, const bf16* packed, int64_t blocks, int64_t first, int64_t last,
    const Out& out) {
  const int64_t stride = blocks * kBlockValues;
  if (rows == 1) {
    for (int64_t panel = first; panel < last; ++panel) out.put(0, panel, multiply_row(x, packed + panel * stride, blocks));
    return;
  }
  if (rows) multiply_range(x, x_stride, rows, {packed, blocks, first, last}, out);
}

}  // namespace zoo
