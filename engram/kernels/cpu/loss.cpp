// Softmax, loss and gradient of a chunk of logits while they are in cache (reference in kernels/loss.py).
#include "common.h"

namespace engram {
namespace {

template <typename T>
void cross_entropy(T* logits, int64_t stride, const int64_t* target, int64_t N, int64_t V, wide_t<T>* losses) {
  using W = wide_t<T>;
  parallel_for(0, N, grain(8 * V), [&](int64_t begin, int64_t end) {
    std::vector<W> buffer(V);
    W* p = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      T* row = logits + n * stride;
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
  check_axes("logits", logits, 2);
  const int64_t N = logits.size(0), V = logits.size(1);
  check_shape("targets", targets_, {N});
  const auto targets = targets_.contiguous();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n)
    TORCH_CHECK_INDEX(target[n] >= 0 && target[n] < V, "target is ", target[n], ": allowed is 0 to ", V - 1);
  auto rows = logits.stride(1) == 1 ? logits : logits.contiguous();
  auto losses = at::empty({N}, logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "cross_entropy_", [&] {
    cross_entropy(rows.mutable_data_ptr<scalar_t>(), rows.stride(0), target, N, V,
                  losses.mutable_data_ptr<wide_t<scalar_t>>());
  });
  if (!rows.is_same(logits)) logits.copy_(rows);
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("cross_entropy_", cross_entropy_); }
}  // namespace engram
