// x W^T + b and its gradients in float32 (reference in kernels/linear.py), by the products of product.h: twice MKL's speed
// where MKL does not use AVX-512, as on AMD's processors.
#include "product.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

namespace engram {
namespace {

using T = float;
using Maybe = std::optional<at::Tensor>;

// Rows for which copying the weights would take longer than multiplying, forward and backward.
constexpr int64_t kFew = 16, kFewBackward = 64;
constexpr int64_t kRows = 512;   // of x at a time: 256 KiB of each 128 columns
constexpr int64_t kGroup = 8;    // panels in a task
constexpr int64_t kChunk = 1024;  // rows whose products are summed at a time for the gradient of the weights

struct Panels {
  at::Tensor data;
  Panels(int64_t summed, int64_t lanes, const at::Tensor& like) : data(at::empty({packed_size<T>(summed, lanes)}, like.options())) {}
  T* at(int64_t lane, int64_t summed) const { return data.mutable_data_ptr<T>() + lane * summed; }
};

// Calls pack(first lane, how many) for every panel.
template <typename Pack> void each_panel(int64_t lanes, int64_t work, const Pack& pack) {
  parallel_for(0, (lanes + kPanel - 1) / kPanel, grain(kPanel * work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i * kPanel, std::min(kPanel, lanes - i * kPanel));
  });
}

// out [N, lanes, padded] = x [N, P] B
void multiply(const T* x, int64_t N, int64_t P, const Panels& b, int64_t lanes, const T* bias, T* out) {
  const int64_t width = padded_lanes<T>(lanes), panels = (lanes + kPanel - 1) / kPanel;
  const int64_t blocks = (N + kRows - 1) / kRows, groups = (panels + kGroup - 1) / kGroup;
  parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / groups * kRows, M = std::min(kRows, N - from), first = task % groups * kGroup;
      for (int64_t i = first; i < std::min(first + kGroup, panels); ++i) {
        const int64_t n = i * kPanel, count = std::min(kPanel, lanes - n);
        T* to = out + from * width + n;
        product_with_panel<T>({x + from * P, P, 1}, b.at(0, P), n, lanes, M, P, to, width);
        if (bias)
          for (int64_t m = 0; m < M; ++m)
            for (int64_t c = 0; c < count; ++c) to[m * width + c] += bias[n + c];
      }
    }
  });
}

at::Tensor without_padding(const at::Tensor& x, int64_t lanes) {
  return x.size(1) == lanes ? x : x.narrow(1, 0, lanes).contiguous();
}

at::Tensor linear(const at::Tensor& x_, const at::Tensor& weight_, const Maybe& bias_) {
  check_axes("x", x_, 2);
  check_axes("weight", weight_, 2);
  const int64_t N = x_.size(0), K = x_.size(1), O = weight_.size(0);
  check_shape("weight", weight_, {O, K});
  check_shape("bias", bias_, {O});
  if (N < kFew) return at::linear(x_, weight_, bias_);
  const auto x = x_.contiguous(), weight = weight_.contiguous();
  const auto bias = bias_ ? Maybe(bias_->contiguous()) : Maybe();
  const Panels b(K, O, x);
  each_panel(O, K, [&](int64_t o, int64_t n) {
    pack_columns(weight.const_data_ptr<T>() + o * K, K, n, K, b.at(o, K), padded_lanes<T>(n));
  });
  auto out = at::empty({N, padded_lanes<T>(O)}, x.options());
  multiply(x.const_data_ptr<T>(), N, K, b, O, data_or_null<T>(bias), out.mutable_data_ptr<T>());
  return without_padding(out, O);
}

at::Tensor by_input(const at::Tensor& grad, const at::Tensor& weight) {
  const int64_t N = grad.size(0), O = weight.size(0), K = weight.size(1);
  const Panels b(O, K, grad);
  each_panel(K, O, [&](int64_t k, int64_t n) {
    pack_rows(weight.const_data_ptr<T>() + k, K, O, n, b.at(k, O), padded_lanes<T>(n));
  });
  auto out = at::empty({N, padded_lanes<T>(K)}, grad.options());
  multiply(grad.const_data_ptr<T>(), N, O, b, K, nullptr, out.mutable_data_ptr<T>());
  return without_padding(out, K);
}

at::Tensor by_weight(const at::Tensor& grad, const at::Tensor& x) {
  const int64_t N = grad.size(0), O = grad.size(1), K = x.size(1), width = padded_lanes<T>(K);
  auto out = at::empty({O, width}, grad.options());
  T* to = out.mutable_data_ptr<T>();
  const Panels left(kChunk, O, grad), right(kChunk, K, grad);
  for (int64_t from = 0; from < N; from += kChunk) {
    const int64_t R = std::min(kChunk, N - from);
    const auto pack = [&](const at::Tensor& rows, int64_t C, const Panels& panels) {
      each_panel(C, R, [&](int64_t c, int64_t n) {
        pack_rows(rows.const_data_ptr<T>() + from * C + c, C, R, n, panels.at(c, R), padded_lanes<T>(n));
      });
    };
    pack(grad, O, left);
    pack(x, K, right);
    each_panel(O, R * K, [&](int64_t o, int64_t n) {
      const Left<T> a{left.at(o, R), 1, padded_lanes<T>(n)};
      for (int64_t k = 0; k < K; k += kPanel)
        product_with_panel<T>(a, right.at(0, R), k, K, n, R, to + o * width + k, width, from > 0);
    });
  }
  return without_padding(out, K);
}

std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight_) {
  const auto grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  if (x.size(0) < kFewBackward) return {at::mm(grad, weight), at::mm(grad.t(), x)};
  return {by_input(grad, weight), by_weight(grad, x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_backward", linear_backward);
}
}  // namespace engram
