// Activation functions of 16 values at once.
#pragma once

#include "exponential.h"

namespace zoo {

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }
inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

}  // namespace zoo
