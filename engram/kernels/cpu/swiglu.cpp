// silu(gate) * up * weight, row by row (reference in kernels/swiglu.py).
#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace engram {
namespace {

template <typename T> void forward(const T* in, const wide_t<T>* weight, int64_t P, int64_t F, T* out) {
  using W = wide_t<T>;
  at::parallel_for(0, P, grain(4 * F), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T *gate = in + p * 2 * F, *up = gate + F;
      T* h = out + p * F;
      const W w = weight[p];
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) {
        const W x = widened(gate[f]);
        h[f] = narrowed<T>(x * sigmoid(x) * widened(up[f]) * w);
      }
    }
  });
}

template <typename T>
void backward(const T* grad, const T* in, const wide_t<T>* weight, int64_t P, int64_t F, T* out, wide_t<T>* out_weight) {
  using W = wide_t<T>;
  at::parallel_for(0, P, grain(6 * F), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T *gate = in + p * 2 * F, *up = gate + F, *g = grad + p * F;
      T *g_gate = out + p * 2 * F, *g_up = g_gate + F;
      const W w = weight[p];
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t f = 0; f < F; ++f) {
        const W x = widened(gate[f]), u = widened(up[f]), y = widened(g[f]);
        const W sig = sigmoid(x), silu = x * sig;
        g_gate[f] = narrowed<T>(y * w * u * sig * (1 + x * (1 - sig)));
        g_up[f] = narrowed<T>(y * w * silu);
        sum += y * silu * u;
      }
      out_weight[p] = sum;
    }
  });
}

at::Tensor widened_weights(const at::Tensor& weights, at::ScalarType narrow) {
  return weights.to(narrow == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

at::Tensor weighted_swiglu(const at::Tensor& gate_up_, const at::Tensor& weights_) {
  const auto gate_up = gate_up_.contiguous(), weights = widened_weights(weights_, gate_up.scalar_type());
  const int64_t P = gate_up.size(0), F = gate_up.size(1) / 2;
  auto result = at::empty({P, F}, gate_up.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up.scalar_type(), "weighted_swiglu", [&] {
    forward(gate_up.const_data_ptr<scalar_t>(), weights.const_data_ptr<wide_t<scalar_t>>(), P, F,
            result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> weighted_swiglu_backward(const at::Tensor& grad_, const at::Tensor& gate_up_,
                                                            const at::Tensor& weights_) {
  const auto grad = grad_.contiguous(), gate_up = gate_up_.contiguous();
  const auto weights = widened_weights(weights_, gate_up.scalar_type());
  const int64_t P = gate_up.size(0), F = gate_up.size(1) / 2;
  auto grad_gate_up = at::empty_like(gate_up), grad_weights = at::empty_like(weights);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up.scalar_type(), "weighted_swiglu_backward", [&] {
    backward(grad.const_data_ptr<scalar_t>(), gate_up.const_data_ptr<scalar_t>(), weights.const_data_ptr<wide_t<scalar_t>>(), P,
             F, grad_gate_up.mutable_data_ptr<scalar_t>(), grad_weights.mutable_data_ptr<wide_t<scalar_t>>());
  });
  return {grad_gate_up, grad_weights.to(weights_.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("weighted_swiglu", weighted_swiglu);
  m.impl("weighted_swiglu_backward", weighted_swiglu_backward);
}
}  // namespace engram
