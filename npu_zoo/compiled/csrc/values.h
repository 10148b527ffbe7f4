// Sixteen values of a type as floats, and back; the last of a row may be fewer.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace zoo {

inline Floats load_floats(const float* from) { return load<Floats>(from); }
inline Floats load_floats(const bf16* from) { return load_bf16(from); }
inline Floats load_floats(const int8_t* from) {
#if defined(__AVX512F__)
  __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
  return load<Floats>(&values);
#else
  using Bytes = int8_t __attribute__((vector_size(16)));
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}
inline void store_floats(float* to, Floats value) { store(to, value); }
inline void store_floats(bf16* to, Floats value) { store_bf16(to, value); }

inline void store_two(bf16* to, Floats first, Floats second) { store_bf16_line(to, first, second, false); }
inline void store_two(float* to, Floats first, Floats second) {
  store(to, first);
  store(to + kLanes, second);
}

// `left` values at most; zeros behind them.
template <typename T>
inline Floats load_floats(const T* from, int64_t left) {
  if (left >= kLanes) return load_floats(from);
  T lanes[kLanes] = {};
  std::copy_n(from, left, lanes);
  return load_floats(lanes);
}

template <typename T>
inline void store_floats(T* to, Floats value, int64_t left) {
  if (left >= kLanes) return store_floats(to, value);
  T lanes[kLanes];
  store_floats(lanes, value);
  std::copy_n(lanes, left, to);
}

// Of two where one is no number, the second.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  const __m512 most = _mm512_max_ps(load<__m512>(&a), load<__m512>(&b));
  return load<Floats>(&most);
#else
  return a > b ? a : b;
#endif
}

inline float largest(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(load<__m512>(&value));
#else
  float lanes[kLanes];
  store(lanes, value);
  return *std::max_element(lanes, lanes + kLanes);
#endif
}

}  // namespace zoo
