// Softmax over the keys that a query sees, and its gradient, in place (references in kernels/causal_attention.py).
#include "common.h"

#include <ATen/ops/empty.h>

namespace engram {
namespace {

using Maybe = std::optional<at::Tensor>;

// Query i of all heads: its row of scores, and the keys from `first` to `last` that it sees.
struct Queries {
  int64_t R, T, heads, first_head;
  const int64_t* starts;
  Queries(const at::Tensor& scores, const Maybe& starts_, int64_t heads_, int64_t first)
      : R(scores.size(1)), T(scores.size(2)), heads(heads_), first_head(first), starts(data_or_null<int64_t>(starts_)) {}
  int64_t last(int64_t i) const { return i % R % T; }
  int64_t first(int64_t i) const { return starts ? starts[(first_head + i / R) / heads * T + last(i)] : 0; }
};

template <typename T> void softmax(const Queries& s, int64_t count, T* scores, T* log_sum) {
  at::parallel_for(0, count, grain(4 * s.T), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = scores + i * s.T;
      const int64_t first = s.first(i), stop = s.last(i) + 1;
      T top = row[first], sum = 0;
#pragma omp simd reduction(max : top)
      for (int64_t j = first; j < stop; ++j) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = first; j < stop; ++j) sum += row[j] = exponential(row[j] - top);
      const T share = 1 / sum;
#pragma omp simd
      for (int64_t j = first; j < stop; ++j) row[j] *= share;
      std::fill(row, row + first, T(0));
      std::fill(row + stop, row + s.T, T(0));
      log_sum[i] = std::log(sum) + top;
    }
  });
}

template <typename T>
void softmax_backward(const Queries& s, int64_t count, const T* log_sum, const T* delta, T* scores, T* grad) {
  at::parallel_for(0, count, grain(4 * s.T), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T *row = scores + i * s.T, *g = grad + i * s.T;
      const int64_t first = s.first(i), stop = s.last(i) + 1;
#pragma omp simd
      for (int64_t j = first; j < stop; ++j) {
        const T p = exponential(row[j] - log_sum[i]);
        row[j] = p;
        g[j] = p * (g[j] - delta[i]);
      }
      for (T* x : {row, g}) {
        std::fill(x, x + first, T(0));
        std::fill(x + stop, x + s.T, T(0));
      }
    }
  });
}

at::Tensor visible_softmax_(at::Tensor scores, const Maybe& starts, int64_t heads, int64_t first) {
  const auto starts_c = starts ? Maybe(starts->contiguous()) : Maybe();
  const Queries s(scores, starts_c, heads, first);
  auto log_sum = at::empty({scores.size(0), s.R}, scores.options());
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "visible_softmax_", [&] {
    softmax(s, log_sum.numel(), scores.mutable_data_ptr<scalar_t>(), log_sum.mutable_data_ptr<scalar_t>());
  });
  return log_sum;
}

void visible_softmax_backward_(at::Tensor scores, at::Tensor grad, const at::Tensor& log_sum_, const at::Tensor& delta_,
                               const Maybe& starts, int64_t heads, int64_t first) {
  const auto starts_c = starts ? Maybe(starts->contiguous()) : Maybe();
  const auto log_sum = log_sum_.contiguous(), delta = delta_.contiguous();
  const Queries s(scores, starts_c, heads, first);
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "visible_softmax_backward_", [&] {
    softmax_backward(s, log_sum.numel(), log_sum.const_data_ptr<scalar_t>(), delta.const_data_ptr<scalar_t>(),
                     scores.mutable_data_ptr<scalar_t>(), grad.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("visible_softmax_", visible_softmax_);
  m.impl("visible_softmax_backward_", visible_softmax_backward_);
}
}  // namespace engram
