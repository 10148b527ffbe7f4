// x @ weight.T in bfloat16, summed in float32.
#include "products.h"
#include "replay.h"
#include "transpose.h"
#include "values.h"

namespace {

using namespace zoo;

// 32 inputs of 16 channels, from [channel][pair][2] to [pair][channel][2].
void pack_block(const bf16* const* channels, bf16* block) {
  Words rows[kPanel];
  for (int channel = 0; channel < kPanel; ++channel) rows[channel] = load<Words>(channels[channel]);
  transpose(rows);
  for (int pair = 0; pair < kPanel; ++pair) store(block + pair * 2 * kPanel, rows[pair]);
}

void pack_panel(const bf16* weight, int64_t stride, int64_t channels, int64_t inputs, bf16* panel) {
  for (int64_t first = 0; first < inputs; first += kBlock, panel += kBlockValues) {
    bf16 padded[kPanel][kBlock] = {};
    const bf16* rows[kPanel];
    const int64_t left = std::min<int64_t>(kBlock, inputs - first);
    for (int channel = 0; channel < kPanel; ++channel) {
      rows[channel] = padded[channel];
      if (channel >= channels) continue;
      const bf16* from = weight + channel * stride + first;
      if (left == kBlock) rows[channel] = from;
      else std::copy_n(from, left, padded[channel]);
    }
    pack_block(rows, panel);
  }
}

// Where sums go that are not rounded: [row][channel].
struct Sums {
  float* values;
  int64_t channels;

  void put(int64_t row, int64_t panel, Floats sum) const {
    store_floats(values + row * channels + panel * kPanel, sum, channels - panel * kPanel);
  }

  void put_two(int64_t row, int64_t panel, Floats first, Floats second) const {
    put(row, panel, first);
    put(row, panel + 1, second);
  }
};

}  // namespace

extern "C" {

int64_t zoo_packed_bytes(int64_t channels, int64_t inputs) {
  return ceil_div(channels, kPanel) * panel_values(inputs) * sizeof(bf16);
}

// weight: [channels, inputs], rows `stride` values apart.
void zoo_pack_linear(const bf16* weight, int64_t stride, int64_t channels, int64_t inputs, bf16* packed, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < ceil_div(channels, kPanel); ++panel) {
    const int64_t first = panel * kPanel;
    pack_panel(weight + first * stride, stride, std::min<int64_t>(kPanel, channels - first), inputs,
               packed + panel * panel_values(inputs));
  }
}

// x: [rows, inputs], rows `x_stride` values apart, inputs a multiple of 32; out: [rows, channels].
void zoo_linear(const bf16* x, int64_t x_stride, int64_t rows, const bf16* packed, int64_t channels, int64_t inputs,
                bf16* out, int threads) {
  const int64_t panels = ceil_div(channels, kPanel), pairs = ceil_div(panels, 2), blocks = ceil_div(inputs, kBlock);
  const Output output = Output::of_rows(out, rows, channels);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; ++part)
    multiply_panels(x, x_stride, rows, packed, blocks, 2 * (pairs * part / threads),
                    std::min(panels, 2 * (pairs * (part + 1) / threads)), output);
}

// As `zoo_linear`, with sums that are not rounded, of weights so small that each thread takes some of the rows.
void zoo_linear_sums(const bf16* x, int64_t x_stride, int64_t rows, const bf16* packed, int64_t channels,
                     int64_t inputs, float* out, int threads) {
  constexpr int64_t kRowsOfThread = 32;
  const int64_t panels = ceil_div(channels, kPanel), blocks = ceil_div(inputs, kBlock);
  const int parts = std::clamp<int64_t>(rows / kRowsOfThread, 1, threads);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    multiply_panels(x + first * x_stride, x_stride, last - first, packed, blocks, 0, panels,
                    Sums{out + first * channels, channels});
  }
}
}

ZOO_REPLAYABLE(zoo_linear)
ZOO_REPLAYABLE(zoo_linear_sums)
