// silu(gate) * up, times a weight for each row if there are weights (reference in kernels/swiglu.py).
#include "swiglu.h"

namespace engram {
namespace {

template <typename T> void forward(const T* in, const wide_t<T>* weight, int64_t P, int64_t F, T* out) {
  parallel_for(0, P, grain(4 * F), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      swiglu_row(in + p * 2 * F, in + (p * 2 + 1) * F, F, weight ? weight[p] : wide_t<T>(1), out + p * F);
  });
}

template <typename T>
void backward(const T* grad, const T* in, const wide_t<T>* weight, int64_t P, int64_t F, T* out, wide_t<T>* out_weight) {
  using W = wide_t<T>;
  parallel_for(0, P, grain(6 * F), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* gate = in + p * 2 * F;
      T* by_gate = out + p * 2 * F;
      const W sum = swiglu_row_backward(grad + p * F, gate, gate + F, F, weight ? weight[p] : W(1), by_gate, by_gate + F);
      if (weight) out_weight[p] = sum;
    }
  });
}

using Maybe = std::optional<at::Tensor>;

at::ScalarType wide_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Maybe widened(const Maybe& weights, const at::Tensor& like) {
  return weights ? Maybe(weights->to(wide_type(like)).contiguous()) : Maybe();
}

at::Tensor swiglu(const at::Tensor& gate_up_, const Maybe& weights_) {
  check_shape(gate_up_.dim() > 0 && gate_up_.size(-1) % 2 == 0, "gate_up", gate_up_, "[..., 2F]");
  check_shape("weights", weights_, leading(gate_up_));
  const auto gate_up = gate_up_.contiguous();
  const auto weights = widened(weights_, gate_up);
  auto shape = gate_up.sizes().vec();
  const int64_t F = shape.back() /= 2;
  auto result = at::empty(shape, gate_up.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate_up.scalar_type(), "swiglu", [&] {
    forward(gate_up.const_data_ptr<scalar_t>(), data_or_null<wide_t<scalar_t>>(weights), rows_of(gate_up), F,
            result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad_, const at::Tensor& gate_up_,
                                                   const Maybe& weights_) {
  const auto grad = grad_.contiguous(), gate_up = gate_up_.contiguous();
  const auto weights = widened(weights_, gate_up);
  const int64_t F = grad.size(-1);
  auto grad_gate_up = at::empty_like(gate_up);
  auto grad_weights = weights ? at::empty_like(*weights) : at::empty({0}, gate_up.options().dtype(wide_type(gate_up)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate_up.scalar_type(), "swiglu_backward", [&] {
    using W = wide_t<scalar_t>;
    backward(grad.const_data_ptr<scalar_t>(), gate_up.const_data_ptr<scalar_t>(), data_or_null<W>(weights),
             rows_of(gate_up), F, grad_gate_up.mutable_data_ptr<scalar_t>(), grad_weights.mutable_data_ptr<W>());
  });
  return {grad_gate_up, weights_ ? grad_weights.to(weights_->scalar_type()) : grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}
}  // namespace engram
