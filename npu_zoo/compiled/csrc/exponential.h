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

// A number's share of its next whole number, and that number's bits on top of an exponent.
struct Split {
  Floats rest;
  Words exponent;

  explicit Split(Floats x) {
    constexpr float kRound = 12582912.0f;
    const Floats shifted = x + kRound;
    rest = x - (shifted - kRound);
    exponent = load<Words>(&shifted) << 23;
  }

  Floats raise(Floats power_of_rest) const {
    const Words bits = load<Words>(&power_of_rest) + exponent;
    return load<Floats>(&bits);
  }
};

// 2 to the power of what is less than 127: within 4e-6 of it, or where it only has to do for results in bfloat16, within
// 8e-5; 1e-38 for all that is smaller.
template <bool kRounded>
inline Floats power_of_two(Floats x) {
  const Floats low = splat(-126.0f);
  const Split split(low > x ? low : x);
  const Floats r = split.rest;
  if (kRounded) return split.raise(((r * 0.05517167f + 0.24261113f) * r + 0.69326099f) * r + 0.99992807f);
  Floats value = r * 0.0013333558f + 0.0096181291f;
  value = value * r + 0.0555041087f;
  value = value * r + 0.2402265070f;
  value = value * r + 0.6931471806f;
  return split.raise(value * r + 1.0f);
}

}  // namespace zoo
