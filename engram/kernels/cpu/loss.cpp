// Softmax, loss and gradient of a chunk of logits while they are in cache (reference in kernels/loss.py).
#include "common.h"

namespace engram {
namespace {

template <typename T>
void cross_entropy(T* logits, const int64_t* target, int64_t N, int64_t V, wide_t<T>* losses) {
  using W = wide_t<T>;
  at::parallel_for(0, N, grain(8 * V), [&](int64_t begin, int64_t end) {
    std::vector<W> buffer(V);
    W* p = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      T* row = logits + n * V;
      W top = widened(row[0]);
#pragma omp simd reduction(max : top)
      for (int64_t v = 0; v < V; ++v) {
        const W x = widened(row[v]);
        top = x > top ? x : top;
      }
      W total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t v = 0; v < V; ++v) {
        p[v] = exponential(widened(row[v]) - top);
        total += p[v];
      }
      losses[n] = std::log(total) + top - widened(row[target[n]]);
      const W share = 1 / total;
      p[target[n]] -= total;
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) row[v] = narrowed<T>(p[v] * share);
    }
  });
}

at::Tensor cross_entropy_(at::Tensor logits, const at::Tensor& targets_) {
  const auto targets = targets_.contiguous();
  const int64_t N = logits.size(0), V = logits.size(1);
  auto losses = at::empty({N}, logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "cross_entropy_", [&] {
    cross_entropy(logits.mutable_data_ptr<scalar_t>(), targets.const_data_ptr<int64_t>(), N, V,
                  losses.mutable_data_ptr<wide_t<scalar_t>>());
  });
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("cross_entropy_", cross_entropy_); }
}  // namespace engram
