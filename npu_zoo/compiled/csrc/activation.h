// Activation functions of 16 values at once.
#pragma once

#include "exponential.h"

namespace zoo {

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// 1 / x, within 7e-5 of it.
inline Floats about_inverse(Floats x) {
#if defined(__AVX512F__)
  const __m512 inverse = _mm512_rcp14_ps(load<__m512>(&x));
  return load<Floats>(&inverse);
#else
  return 1.0f / x;
#endif
}

// x * sigmoid(x) within 2e-4 of it, for results that are rounded to bfloat16.
inline Floats silu(Floats x) {
  constexpr float kLog2e = 1.44269504f;
  const Floats power = x * -kLog2e, high = splat(126.0f);
  return x * about_inverse(1.0f + power_of_two<true>(power < high ? power : high));
}

}  // namespace zoo
