// exp of 16 floats, within two units of the last place.
#pragma once

#include "vectors.h"

namespace zoo {

// Splits x into n * ln(2) + r and takes a polynomial of r; what leaves float32's range goes to 0 or infinity.
inline Floats exponential(Floats x) {
  constexpr float kLog2e = 1.44269504f, kHigh = 0.693145752f, kLow = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves a whole number
  constexpr float kLeast = -87.0f, kMost = 88.0f;
  const Floats low = splat(kLeast), high = splat(kMost);
  Floats bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  const Floats shifted = bounded * kLog2e + kRound;
  const Floats whole = shifted - kRound;
  const Floats r = (bounded - whole * kHigh) - whole * kLow;
  Floats value = r * (1.0f / 720) + (1.0f / 120);
  value = value * r + (1.0f / 24);
  value = value * r + (1.0f / 6);
  value = value * r + 0.5f;
  value = value * r + 1.0f;
  value = value * r + 1.0f;
  Words bits = load<Words>(&value) + (load<Words>(&shifted) << 23);
  value = load<Floats>(&bits);
  value = x < low ? Floats{} : value;
  value = x > high ? splat(__builtin_inff()) : value;
  return x == x ? value : x;
}

// exp of what is zero or less, for weights that are summed: within 3e-6 of it, and 1e-38 for all that is smaller.
inline Floats exponential_of_negative(Floats x) {
  constexpr float kLog2e = 1.44269504f, kHigh = 0.693145752f, kLow = 1.42860677e-6f, kRound = 12582912.0f;
  const Floats low = splat(-87.0f);
  x = low > x ? low : x;
  const Floats shifted = x * kLog2e + kRound;
  const Floats whole = shifted - kRound;
  const Floats r = (x - whole * kHigh) - whole * kLow;
  Floats value = r * (1.0f / 120) + (1.0f / 24);
  value = value * r + (1.0f / 6);
  value = value * r + 0.5f;
  value = value * r + 1.0f;
  value = value * r + 1.0f;
  const Words bits = load<Words>(&value) + (load<Words>(&shifted) << 23);
  return load<Floats>(&bits);
}

}  // namespace zoo
