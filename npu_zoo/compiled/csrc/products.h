// Products of any number of rows with panels.
#pragma once

#include "panel_products.h"

namespace zoo {

template <int kRows, typename Out>
inline void multiply_few(
    const bf16* x, int64_t x_stride, int64_t row, const bf16* packed, int64_t stride, int64_t blocks, int64_t panel,
    int64_t last, const Out& out) {
  const bf16* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = x + (row + r) * x_stride;
  Floats sums[kRows][2];
  if (panel + 1 < last) {
    multiply_rows<kRows, 2>(rows, packed + panel * stride, stride, blocks, sums);
    for (int r = 0; r < kRows; ++r) out.put(row + r, panel + 1, sums[r][1]);
  } else {
    Floats one[kRows][1];
    multiply_rows<kRows, 1>(rows, packed + panel * stride, stride, blocks, one);
    for (int r = 0; r < kRows; ++r) sums[r][0] = one[r][0];
  }
  for (int r = 0; r < kRows; ++r) out.put(row + r, panel, sums[r][0]);
}

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
#if defined(ZOO_TILES)
  if (rows) multiply_range(x, x_stride, rows, {packed, blocks, first, last}, out);
#else
  for (int64_t panel = first; panel < last; panel += 2) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_few<8>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row + 4 <= rows; row += 4) multiply_few<4>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row + 2 <= rows; row += 2) multiply_few<2>(x, x_stride, row, packed, stride, blocks, panel, last, out);
    for (; row < rows; ++row) multiply_few<1>(x, x_stride, row, packed, stride, blocks, panel, last, out);
  }
#endif
}

}  // namespace zoo
