// x @ weight.T with weights of 8 and 4 bits and inputs in bfloat16.
#include "code_tiles.h"
#include "replay.h"
#include "widened_codes.h"

namespace {

using namespace zoo;

template <int kBits>
void pack_panel(const int8_t* codes, int64_t stride, int64_t channels, int64_t inputs, uint8_t* panel) {
  using Layout = Codes<kBits>;
  for (int64_t first = 0; first < filled_blocks(inputs) * kCodeBlock; first += Layout::kInputs, panel += 64) {
    for (int64_t channel = 0; channel < kPanel; ++channel) {
      uint8_t bytes[4] = {};
      for (int64_t i = 0; i < Layout::kInputs; ++i) {
        const bool real = channel < channels && first + i < inputs;
        const int code = real ? codes[channel * stride + first + i] : 0;
        bytes[i % 4] |= (code + Layout::kOffset) << (4 * (i / 4));
      }
      std::memcpy(panel + 4 * channel, bytes, sizeof bytes);
    }
  }
}

template <int kBits, int kRows>
void multiply_few(const Integers& x, int64_t row, const CodePanel& panel, int64_t number, const Output& out) {
  Floats sums[kRows];
  multiply_codes<kBits, kRows>(x, row, panel, sums);
  for (int r = 0; r < kRows; ++r) out.put(row + r, number, sums[r]);
}

template <int kBits>
void multiply_panels(const Integers& x, int64_t rows, const CodeWeight& weight, int64_t first, int64_t last,
                     const Output& out) {
#if defined(ZOO_TILES)
  if (rows > 1) {
    for (int64_t row = 0; row < rows; row += kPanel)
      multiply_codes_by_tiles<kBits>(x, row, std::min<int64_t>(kPanel, rows - row), weight, first, last, out);
    return;
  }
#endif
  for (int64_t panel = first; panel < last; ++panel) {
    const CodePanel codes = weight.panel(panel);
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_few<kBits, 8>(x, row, codes, panel, out);
    for (; row + 4 <= rows; row += 4) multiply_few<kBits, 4>(x, row, codes, panel, out);
    for (; row + 2 <= rows; row += 2) multiply_few<kBits, 2>(x, row, codes, panel, out);
    for (; row < rows; ++row) multiply_few<kBits, 1>(x, row, codes, panel, out);
  }
}

constexpr int64_t kFewRows = 16;  // above, widening codes once for all rows pays

template <int kBits>
void multiply_many(const bf16* x, int64_t x_stride, int64_t rows, const CodeWeight& weight, const Output& out,
                   int threads) {
  static thread_local Workspace inputs_as_tiles, widened_codes;
  const int64_t panels = ceil_div(out.channels, kPanel), groups = ceil_div(rows, kPanel);
  const int64_t inputs = weight.inputs(), blocks = inputs / kBlock;
  bf16* tiles = inputs_as_tiles.take<bf16>(groups * kPanel * inputs);
  const Rows packed = Rows::tiles(tiles, blocks);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t group = 0; group < groups; ++group) {
      const Part part{group * kPanel, std::min(rows, (group + 1) * kPanel), 0, blocks};
      fill_tiles([&](int64_t row) { return x + row * x_stride; }, part, tiles + group * kPanel * inputs);
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      multiply_widened_codes<kBits>(packed, rows, weight, panels * part / threads, panels * (part + 1) / threads,
                                    widened_codes.take<bf16>(2 * kPanel * inputs), out);
  }
}

template <int kBits>
void linear(const bf16* x, int64_t x_stride, int64_t rows, const CodeWeight& weight, const Output& out, int threads) {
  if (rows > kFewRows) return multiply_many<kBits>(x, x_stride, rows, weight, out, threads);
  static thread_local IntegerSpace space;
  const int64_t panels = ceil_div(out.channels, kPanel);
  const Integers integers = space.take(rows, weight.inputs(), weight.input_group());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t row = 0; row < rows; ++row)
      integers.quantize(x + row * x_stride, row, weight.inputs(), Codes<kBits>::kOffset);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      multiply_panels<kBits>(integers, rows, weight, panels * part / threads, panels * (part + 1) / threads, out);
  }
}

}  // namespace

extern "C" {

int64_t zoo_packed_code_bytes(int64_t channels, int64_t inputs, int bits) {
  return ceil_div(channels, kPanel) * code_bytes(inputs, bits);
}

// codes: [channels, inputs], a byte each, rows `stride` bytes apart.
void zoo_pack_codes(const int8_t* codes, int64_t stride, int64_t channels, int64_t inputs, int bits, uint8_t* packed,
                    int threads) {
  const int64_t bytes = code_bytes(inputs, bits);
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < ceil_div(channels, kPanel); ++panel) {
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, channels - first);
    auto pack = bits == 8 ? pack_panel<8> : pack_panel<4>;
    pack(codes + first * stride, stride, count, inputs, packed + panel * bytes);
  }
}

// x: [rows, inputs], rows `x_stride` values apart, filled up to a multiple of 64 inputs; scales: [panels, groups, 16],
// where a group is `group_size` inputs, a multiple of 32 where there are several; out: [rows, channels].
void zoo_linear_codes(const bf16* x, int64_t x_stride, int64_t rows, const uint8_t* packed, const float* scales,
                      int64_t channels, int64_t inputs, int64_t group_size, int bits, bf16* out, int threads) {
  const CodeWeight weight = CodeWeight::of(packed, scales, inputs, group_size, bits);
  auto multiply = bits == 8 ? linear<8> : linear<4>;
  multiply(x, x_stride, rows, weight, {out, channels, channels}, threads);
}
}

ZOO_REPLAYABLE(zoo_linear_codes)
