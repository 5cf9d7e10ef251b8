// Heads [B, T, h, c] anywhere in memory, as long as the c numbers of a head lie side by side.
#pragma once

#include "common.h"

namespace engram {

struct Heads {
  int64_t B, T, h, c, sB, sT, sh;
  explicit Heads(const at::Tensor& x)
      : B(x.size(0)), T(x.size(1)), h(x.size(2)), c(x.size(3)), sB(x.stride(0)), sT(x.stride(1)), sh(x.stride(2)) {}
  int64_t at(int64_t b, int64_t t, int64_t i) const { return b * sB + t * sT + i * sh; }
};

}  // namespace engram
