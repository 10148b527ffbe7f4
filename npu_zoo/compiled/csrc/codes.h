// Products with weights of 8 or 4 bits in panels of 16 output channels.
//
// A block is 32 inputs of 16 channels, and each channel has 32 bits of every vector of it: 4 codes of 8 bits, or 8 of
// 4 bits, those of the first four inputs in the lower halves of the bytes. Codes are stored without sign: 128 or 8 more
// than they are. A scale belongs to a channel and a group of blocks. Inputs are filled up to a multiple of 64, which is
// what a matrix unit takes at once.
//
// For few rows products are sums of integers: inputs become integers of 16 bits with a scale for each row and 128 inputs
// at most, and each is split into two of 8 bits, `upper * 256 + lower`, for which processors have instructions. What
// rounding inputs so takes away is below what bfloat16 rounds away of the result. For many rows codes are widened to
// bfloat16, exactly where a channel has one scale, otherwise times their group's and rounded, and products are those of
// panels.h.
#pragma once

#include <cmath>

#include "panel_parts.h"

namespace zoo {

constexpr int kCodeBlock = 32;      // inputs
constexpr int kTileBlocks = 2;      // blocks that a matrix unit takes at once
constexpr int kWidestGroup = 4;     // blocks that share a scale of the inputs, so that sums fit 32 bits
constexpr float kLargest = 32639;   // 127 * 256 + 127

template <int kBits>
struct Codes {
  static constexpr int kInputs = 32 / kBits;  // of a vector
  static constexpr int kVectors = kCodeBlock / kInputs;
  static constexpr int kBytes = kPanel * kCodeBlock * kBits / 8;
  static constexpr int kPlanes = kInputs / 4;
  static constexpr int kOffset = 1 << (kBits - 1);

  // Four inputs' codes of 16 channels, a byte each.
  static Words plane(Words vector, int number) {
    if constexpr (kBits == 8) return vector;
    else return (vector >> (4 * number)) & 0x0f0f0f0fu;
  }
};

// Rows of inputs as integers.
struct Integers {
  int8_t *upper, *lower;  // [rows][stride]
  int64_t stride;
  float* scales;          // [rows][groups]
  int32_t* offsets;       // [rows][groups]: what the offset of codes adds to the sums
  int64_t groups, blocks_of_group;

  void quantize(const bf16* x, int64_t row, int64_t inputs, int offset) const {
    const int64_t width = blocks_of_group * kCodeBlock;
    for (int64_t group = 0; group * width < inputs; ++group) {
      const int64_t begin = group * width, end = std::min(inputs, begin + width);
      Floats largest{};
      for (int64_t i = begin; i < end; i += kLanes) {
        const Floats values = load_bf16(x + i), size = values < 0 ? -values : values;
        largest = size > largest ? size : largest;
      }
      float most = 0;
      for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
      // An infinity or NaN has no integer: the scale takes it over, and so does every product of the group.
      const bool finite = std::isfinite(sum(largest_or_nan(x + begin, end - begin)));
      const float scale = finite ? most / kLargest : NAN, inverse = finite && most > 0 ? kLargest / most : 0;
      scales[row * groups + group] = scale;
      offsets[row * groups + group] = -offset * split(x, row, begin, end, inverse);
    }
  }

 private:
  static Floats largest_or_nan(const bf16* x, int64_t count) {
    Floats total{};
    for (int64_t i = 0; i < count; i += kLanes) total += load_bf16(x + i) * 0;
    return total;
  }

  int32_t split(const bf16* x, int64_t row, int64_t begin, int64_t end, float inverse) const {
    using Bytes = int8_t __attribute__((vector_size(16)));
    Ints total{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats scaled = load_bf16(x + i) * inverse;
      const Ints value = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), Ints);
      const Ints low = (value << 24) >> 24;
      total += value;
      store(lower + row * stride + i, __builtin_convertvector(low, Bytes));
      store(upper + row * stride + i, __builtin_convertvector((value - low) >> 8, Bytes));
    }
    int32_t count = 0;
    for (int lane = 0; lane < kLanes; ++lane) count += total[lane];
    return count;
  }
};

// Adds the products of 16 channels' codes of four inputs with those inputs.
inline Ints add_products(Ints sum, Words codes, const int8_t* x) {
#if defined(__AVX512VNNI__)
  const __m512i inputs = _mm512_set1_epi32(load<int>(x));
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, inputs);
#else
  for (int i = 0; i < 4; ++i) sum += (Ints)((codes >> (8 * i)) & 0xff) * x[i];
  return sum;
#endif
}

// Inputs as they are filled up, and what a panel of their codes takes.
inline int64_t filled_blocks(int64_t inputs) { return ceil_div(inputs, kTileBlocks * kCodeBlock) * kTileBlocks; }
inline int64_t code_bytes(int64_t inputs, int bits) { return filled_blocks(inputs) * kPanel * kCodeBlock * bits / 8; }

inline Floats to_floats(Ints upper, Ints lower) { return __builtin_convertvector((upper << 8) + lower, Floats); }

struct CodePanel {
  const uint8_t* codes;
  const float* scales;  // [groups][16]
  int64_t blocks, blocks_of_group;
};

struct CodeWeight {
  const uint8_t* codes;
  const float* scales;
  int64_t groups, blocks_of_group, blocks, bytes_of_panel;

  static CodeWeight of(const uint8_t* codes, const float* scales, int64_t inputs, int64_t group_size, int bits) {
    const int64_t blocks = ceil_div(inputs, kCodeBlock), of_group = ceil_div(group_size, kCodeBlock);
    return {codes, scales, ceil_div(blocks, of_group), of_group, blocks, code_bytes(inputs, bits)};
  }

  int64_t inputs() const { return filled_blocks(blocks * kCodeBlock) * kCodeBlock; }
  CodePanel panel(int64_t number) const {
    return {codes + number * bytes_of_panel, scales + number * groups * kPanel, blocks, blocks_of_group};
  }
  // Blocks of inputs that may share a scale.
  int64_t input_group() const {
    int64_t most = kWidestGroup;
    while (groups > 1 && blocks_of_group % most) most /= 2;
    return most;
  }
};

// What a step's inputs as integers take.
struct IntegerSpace {
  Workspace halves, scales, offsets;

  Integers take(int64_t rows, int64_t inputs, int64_t blocks_of_group) {
    const int64_t groups = ceil_div(inputs, blocks_of_group * kCodeBlock);
    const int64_t stride = inputs + 64;  // not a power of two, whose rows would share sets of the cache
    int8_t* upper = halves.take<int8_t>(2 * rows * stride);
    return {upper, upper + rows * stride, stride, scales.take<float>(rows * groups), offsets.take<int32_t>(rows * groups), groups,
            blocks_of_group};
  }
};

// The products of kRows rows with one panel, to sums[row].
template <int kBits, int kRows>
inline void multiply_codes(const Integers& x, int64_t row, const CodePanel& panel, Floats* sums) {
  using Layout = Codes<kBits>;
  constexpr int kChains = kRows == 1 ? 4 : 1;  // one row's sums would wait for each other
  for (int r = 0; r < kRows; ++r) sums[r] = Floats{};
  int64_t part = 0;  // of the inputs' groups
  for (int64_t group = 0, first = 0; first < panel.blocks; ++group, first += panel.blocks_of_group) {
    const int64_t last = std::min(panel.blocks, first + panel.blocks_of_group);
    Floats totals[kRows] = {};
    for (int64_t begin = first; begin < last; begin += x.blocks_of_group, ++part) {
      const int64_t end = std::min(last, begin + x.blocks_of_group);
      Ints upper[kRows][kChains] = {}, lower[kRows][kChains] = {};
      for (int64_t block = begin; block < end; ++block) {
#pragma GCC unroll 16  // or sums would live in memory, at an address that depends on the vector
        for (int vector = 0; vector < Layout::kVectors; ++vector) {
          const uint8_t* at = panel.codes + block * Layout::kBytes + vector * 64;
          touch_page(at);
          prefetch(at + kPrefetch);
          const Words bits = load<Words>(at);
#pragma GCC unroll 2
          for (int plane = 0; plane < Layout::kPlanes; ++plane) {
            const Words codes = Layout::plane(bits, plane);
            const int chain = (vector * Layout::kPlanes + plane) % kChains;
            const int64_t input = block * kCodeBlock + vector * Layout::kInputs + 4 * plane;
            for (int r = 0; r < kRows; ++r) {
              upper[r][chain] = add_products(upper[r][chain], codes, x.upper + (row + r) * x.stride + input);
              lower[r][chain] = add_products(lower[r][chain], codes, x.lower + (row + r) * x.stride + input);
            }
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int chain = 1; chain < kChains; ++chain) {
          upper[r][0] += upper[r][chain];
          lower[r][0] += lower[r][chain];
        }
        const int64_t at = (row + r) * x.groups + part;
        totals[r] += to_floats(upper[r][0], lower[r][0] + x.offsets[at]) * x.scales[at];
      }
    }
    const Floats scale = load<Floats>(panel.scales + group * kPanel);
    for (int r = 0; r < kRows; ++r) sums[r] += totals[r] * scale;
  }
}

// Blocks of codes as blocks of bfloat16: the codes, exactly, or where there are several groups their weights.
template <int kBits, bool kScaled>
inline void widen_codes(const CodePanel& panel, bf16* to) {
  using Layout = Codes<kBits>;
  constexpr Words kMask = Words{} + ((1u << kBits) - 1);
  const uint8_t* from = panel.codes;
  for (int64_t block = 0; block < panel.blocks; ++block) {
    Floats scale = splat(1.0f);
    if (kScaled) scale = load<Floats>(panel.scales + block / panel.blocks_of_group * kPanel);
    for (int vector = 0; vector < Layout::kVectors; ++vector, from += 64) {
      prefetch(from + kPrefetch);
      for (int plane = 0; plane < Layout::kPlanes; ++plane) {
        const Words codes = Layout::plane(load<Words>(from), plane);
        for (int shift = 0; shift < 32; shift += 16, to += 2 * kPanel) {
          const Floats even = __builtin_convertvector((Ints)((codes >> shift) & kMask) - Layout::kOffset, Floats);
          const Floats odd = __builtin_convertvector((Ints)((codes >> (shift + 8)) & kMask) - Layout::kOffset, Floats);
          if (kScaled) store_pairs(to, even * scale, odd * scale);
          else store(to, (load<Words>(&even) >> 16) | (load<Words>(&odd) & 0xffff0000u));
        }
      }
    }
  }
  settle_memory();
}

}  // namespace zoo
