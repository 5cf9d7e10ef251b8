// SwiGLU of one row and its gradient, times a weight: silu(gate) * up * weight.
#pragma once

#include "vectors.h"

namespace engram {

template <typename T> inline void swiglu_row(const T* gate, const T* up, int64_t F, wide_t<T> weight, T* h) {
  for (int64_t f = 0; f < F; f += kLanes<T>) {
    const auto g = load(gate + f, F - f);
    store<T>(g / (1 + exponential(-g)) * load(up + f, F - f) * weight, h + f, F - f);
  }
}

// Returns the gradient of the weight, given that of the result (of type T or wider); the result itself goes to `h` where
// there is one.
template <typename T, typename G>
inline wide_t<T> swiglu_row_backward(const G* grad, const T* gate, const T* up, int64_t F, wide_t<T> weight, T* by_gate,
                                     T* by_up, T* h = nullptr) {
  using V = vector_t<T>;
  V along{};
  for (int64_t f = 0; f < F; f += kLanes<T>) {
    const int64_t n = F - f;
    const V g = load(gate + f, n), u = load(up + f, n), sig = 1 / (1 + exponential(-g)), silu = g * sig, d = load(grad + f, n);
    along += d * silu * u;
    store<T>(d * weight * u * sig * (1 + g * (1 - sig)), by_gate + f, n);
    store<T>(d * weight * silu, by_up + f, n);
    if (h) store<T>(silu * u * weight, h + f, n);
  }
  return sum_of(along);
}

}  // namespace engram
