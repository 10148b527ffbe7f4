// Keys and values of one head in strips of 32 tokens, laid out as their products read them.
//
// bfloat16 (Pairs): keys as two panels of 16 tokens (panels.h), values as [value / 16][pair of tokens][16][2]; sums of
// pairs in one instruction, or in a matrix unit's tiles. float32 and int8 (Plain): keys as two times [feature][16
// tokens], values as [token][feature]; int8 has the tokens' 32 scales, of float32, behind the codes.
#pragma once

#include "panels.h"
#include "values.h"

namespace zoo {

constexpr int kStrip = 32;  // tokens

inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Widths of keys and values, filled up with zeros to whole vectors.
struct Widths {
  int64_t key, value;
};

// How many sums go on at once, so that an instruction need not wait for the last.
template <int kRows>
constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;

template <int kRows>
inline void put_sums(Floats (&sums)[kRows][kChains<kRows>], float* const* out, int64_t at) {
  for (int row = 0; row < kRows; ++row) {
    for (int chain = 1; chain < kChains<kRows>; ++chain) sums[row][0] += sums[row][chain];
    store(out[row] + at, sums[row][0]);
  }
}

struct Pairs {
  using Stored = bf16;
  using Operand = bf16;  // what queries and probabilities are held as

  static Widths widths(int64_t key, int64_t value) { return {round_up(key, kBlock), round_up(value, kLanes)}; }
  static int64_t key_bytes(Widths w) { return kStrip * w.key * sizeof(bf16); }
  static int64_t value_bytes(Widths w) { return kStrip * w.value * sizeof(bf16); }
  static Floats value_scales(const char*, Widths, int) { return splat(1.0f); }

  // The products of rows with a strip's keys; `next` is what is read after it.
  template <int kRows>
  static void score(const bf16* const* q, const char* strip, const char* next, Widths w, float* const* out) {
    for (int half = 0; half < 2; ++half) {
      Floats sums[kRows][kChains<kRows>] = {};
      const int64_t from = half * w.key * kPanel * sizeof(bf16);
      const bf16* panel = reinterpret_cast<const bf16*>(strip + from);
      for (int64_t first = 0; first < w.key / 2; first += 16) {
        for (int pair = 0; pair < 16; ++pair) {
          const bf16* keys = panel + (first + pair) * 2 * kPanel;
          prefetch_far(next + from + (first + pair) * 64);
          for (int row = 0; row < kRows; ++row) {
            Floats& sum = sums[row][pair % kChains<kRows>];
            sum = add_pairs(sum, keys, q[row] + 2 * (first + pair));
          }
        }
      }
      put_sums<kRows>(sums, out, half * kPanel);
    }
  }

  // Adds a strip's values, weighted by the rows' probabilities of its tokens.
  template <int kRows>
  static void add(const bf16* const* p, const char* strip, const char* next, Widths w, float* const* out) {
    constexpr int kTogether = kRows >= 4 ? 4 : 8;
    int64_t tile = 0;
    for (; tile + kTogether <= w.value / kLanes; tile += kTogether)
      add_some<kRows, kTogether>(p, strip, next, tile, out);
    for (; tile < w.value / kLanes; ++tile) add_some<kRows, 1>(p, strip, next, tile, out);
  }

  template <int kRows, int kTiles>
  static void add_some(const bf16* const* p, const char* strip, const char* next, int64_t tile, float* const* out) {
    Floats sums[kRows][kTiles];
    for (int row = 0; row < kRows; ++row)
      for (int t = 0; t < kTiles; ++t) sums[row][t] = load<Floats>(out[row] + (tile + t) * kLanes);
    for (int pair = 0; pair < kStrip / 2; ++pair) {
      for (int t = 0; t < kTiles; ++t) {
        const int64_t at = (tile + t) * kBlockValues + pair * 2 * kPanel;
        prefetch_far(next + at * sizeof(bf16));
        for (int row = 0; row < kRows; ++row)
          sums[row][t] = add_pairs(sums[row][t], reinterpret_cast<const bf16*>(strip) + at, p[row] + 2 * pair);
      }
    }
    for (int row = 0; row < kRows; ++row)
      for (int t = 0; t < kTiles; ++t) store(out[row] + (tile + t) * kLanes, sums[row][t]);
  }
};

template <typename T>
struct Plain {
  using Stored = T;
  using Operand = float;
  static constexpr bool kScaled = sizeof(T) == 1;
  static constexpr int64_t kTail = kScaled ? kStrip * sizeof(float) : 0;

  static Widths widths(int64_t key, int64_t value) { return {round_up(key, 4), round_up(value, kLanes)}; }
  static int64_t key_bytes(Widths w) { return kStrip * w.key * sizeof(T) + kTail; }
  static int64_t value_bytes(Widths w) { return kStrip * w.value * sizeof(T) + kTail; }
  static float* key_scales(char* strip, Widths w) { return reinterpret_cast<float*>(strip + key_bytes(w) - kTail); }
  static float* value_scales(char* strip, Widths w) { return reinterpret_cast<float*>(strip + value_bytes(w) - kTail); }
  static Floats value_scales(const char* strip, Widths w, int half) {
    if (!kScaled) return splat(1.0f);
    return load<Floats>(strip + value_bytes(w) - kTail + half * sizeof(Floats));
  }

  template <int kRows>
  static void score(const float* const* q, const char* strip, const char* next, Widths w, float* const* out) {
    for (int half = 0; half < 2; ++half) {
      Floats sums[kRows][kChains<kRows>] = {};
      const T* panel = reinterpret_cast<const T*>(strip) + half * w.key * kPanel;
      const char* ahead = next + half * w.key * kPanel * sizeof(T);
      for (int64_t first = 0; first < w.key; first += 4) {
        for (int i = 0; i < 4; ++i) {
          const Floats keys = load_floats(panel + (first + i) * kPanel);
          if (sizeof(T) == 4 || i == 0) prefetch_far(ahead + (first + i) * kPanel * sizeof(T));
          for (int row = 0; row < kRows; ++row) sums[row][i % kChains<kRows>] += keys * q[row][first + i];
        }
      }
      put_sums<kRows>(sums, out, half * kPanel);
      if (kScaled) {
        const Floats scales = load<Floats>(strip + key_bytes(w) - kTail + half * sizeof(Floats));
        for (int row = 0; row < kRows; ++row)
          store(out[row] + half * kPanel, load<Floats>(out[row] + half * kPanel) * scales);
      }
    }
  }

  template <int kRows>
  static void add(const float* const* p, const char* strip, const char* next, Widths w, float* const* out) {
    constexpr int kTogether = kRows >= 4 ? 4 : 8;
    int64_t tile = 0;
    for (; tile + kTogether <= w.value / kLanes; tile += kTogether)
      add_some<kRows, kTogether>(p, strip, next, w, tile, out);
    for (; tile < w.value / kLanes; ++tile) add_some<kRows, 1>(p, strip, next, w, tile, out);
  }

  template <int kRows, int kTiles>
  static void add_some(
      const float* const* p, const char* strip, const char* next, Widths w, int64_t tile, float* const* out) {
    Floats sums[kRows][kTiles];
    for (int row = 0; row < kRows; ++row)
      for (int t = 0; t < kTiles; ++t) sums[row][t] = load<Floats>(out[row] + (tile + t) * kLanes);
    for (int token = 0; token < kStrip; ++token) {
      for (int t = 0; t < kTiles; ++t) {
        const int64_t at = token * w.value + (tile + t) * kLanes;
        const Floats values = load_floats(reinterpret_cast<const T*>(strip) + at);
        if (sizeof(T) == 4 || t % 4 == 0) prefetch_far(next + at * sizeof(T));
        for (int row = 0; row < kRows; ++row) sums[row][t] += values * p[row][token];
      }
    }
    for (int row = 0; row < kRows; ++row)
      for (int t = 0; t < kTiles; ++t) store(out[row] + (tile + t) * kLanes, sums[row][t]);
  }
};

}  // namespace zoo
