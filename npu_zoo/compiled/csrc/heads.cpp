// Products with a matrix of each head's own, in bfloat16, summed in float32.
//
// The matrices stay as they are, [in][out]. One row of inputs is multiplied with them as they pass; for more a matrix is
// brought into panels on its way through the cache, which takes less time than its way from memory.
#include "products.h"
#include "replay.h"
#include "workspace.h"

namespace {

using namespace zoo;

// A head's [inputs, columns] matrix.
struct Matrix {
  const bf16* values;
  int64_t inputs, columns;

  const bf16* row(int64_t input) const { return values + input * columns; }
};

// 16 channels of two inputs, as pairs.
inline void pack_pair(const bf16* even, const bf16* odd, bf16* to) {
  store(to, widen(load<Halves>(even)) | widen(load<Halves>(odd)) << 16);
}

// Reads a row's lines one after the other: processors read ahead of that, and not of two rows in turn.
void bring_near(const bf16* row, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kBlock) {
    touch_page(row + column);
    asm volatile("" : : "r"(load<int64_t>(row + column)));
  }
}

// One row of inputs with an even number of them, and a multiple of 16 columns.
void multiply_one(const bf16* x, const Matrix& matrix, float* sums, bf16* out) {
  std::fill_n(sums, matrix.columns, 0.0f);
  for (int64_t input = 0; input < matrix.inputs; input += 2) {
    const bf16 *even = matrix.row(input), *odd = even + matrix.columns;
    bring_near(even, matrix.columns);
    for (int64_t column = 0; column < matrix.columns; column += kPanel) {
      touch_page(odd + column);
      bf16 pairs[2 * kPanel];
      pack_pair(even + column, odd + column, pairs);
      store(sums + column, add_pairs(load<Floats>(sums + column), pairs, x + input));
    }
  }
  for (int64_t column = 0; column < matrix.columns; column += kPanel)
    store_bf16(out + column, load<Floats>(sums + column));
}

// Up to 16 columns of two inputs, filled up with zeros.
void pack_part(const Matrix& matrix, int64_t input, int64_t column, bf16* to) {
  bf16 even[kPanel] = {}, odd[kPanel] = {};
  const int64_t count = std::min<int64_t>(kPanel, matrix.columns - column);
  std::copy_n(matrix.row(input) + column, count, even);
  if (input + 1 < matrix.inputs) std::copy_n(matrix.row(input + 1) + column, count, odd);
  pack_pair(even, odd, to);
}

void pack_matrix(const Matrix& matrix, bf16* panels) {
  const int64_t size = panel_values(matrix.inputs), filled = ceil_div(matrix.inputs, 2) * 2;
  for (int64_t input = 0; input < matrix.inputs; input += 2) {
    const bf16 *even = matrix.row(input), *odd = even + matrix.columns;
    for (int64_t column = 0; column < matrix.columns; column += kPanel) {
      bf16* to = panels + column / kPanel * size + input * kPanel;
      prefetch(reinterpret_cast<const char*>(even + column) + 2 * kPrefetch);
      prefetch(reinterpret_cast<const char*>(odd + column) + 2 * kPrefetch);
      if (input + 1 < matrix.inputs && column + kPanel <= matrix.columns) pack_pair(even + column, odd + column, to);
      else pack_part(matrix, input, column, to);
    }
  }
  for (int64_t panel = 0; panel < ceil_div(matrix.columns, kPanel); ++panel)
    std::fill(panels + panel * size + filled * kPanel, panels + (panel + 1) * size, 0);
}

thread_local Workspace panels, sums;

}  // namespace

extern "C" {

// x: [tokens, heads, inputs], tokens `x_stride` and heads `head_stride` values apart, inputs filled up to a multiple of
// 32; weight: [heads, inputs, outputs]; out: [tokens, heads, outputs].
void zoo_head_linear(const bf16* x, int64_t x_stride, int64_t head_stride, int64_t tokens, int64_t heads,
                     const bf16* weight, int64_t inputs, int64_t outputs, bf16* out, int threads) {
  const int64_t count = ceil_div(outputs, kPanel);
  const bool one = tokens == 1 && inputs % 2 == 0 && outputs % kPanel == 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < heads; ++head) {
    const Matrix matrix{weight + head * inputs * outputs, inputs, outputs};
    const bf16* rows = x + head * head_stride;
    if (one) {
      multiply_one(rows, matrix, sums.take<float>(outputs), out + head * outputs);
      continue;
    }
    bf16* packed = panels.take<bf16>(count * panel_values(inputs));
    pack_matrix(matrix, packed);
    const Output output{out + head * outputs, heads * outputs, outputs};
    multiply_panels(rows, x_stride, tokens, packed, ceil_div(inputs, kBlock), 0, count, output);
  }
}
}

ZOO_REPLAYABLE(zoo_head_linear)
