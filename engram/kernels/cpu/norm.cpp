// RMSNorm, and RMSNorm followed by a rotation of positions, over the last axis (references in kernels/norm.py).
#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace engram {
namespace {

using Maybe = std::optional<at::Tensor>;

template <typename T>
void normalize(const T* x, const wide_t<T>* weight, int64_t R, int64_t D, double eps, T* y, wide_t<T>* inverse) {
  using W = wide_t<T>;
  at::parallel_for(0, R, grain(3 * D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* in = x + r * D;
      W square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < D; ++d) square += widened(in[d]) * widened(in[d]);
      const W scale = inverse[r] = 1 / std::sqrt(square / D + W(eps));
      T* out = y + r * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[d] = narrowed<T>(widened(in[d]) * scale * weight[d]);
    }
  });
}

template <typename T>
void normalize_backward(const T* grad, const T* x, const wide_t<T>* weight, const wide_t<T>* inverse, int64_t R, int64_t D,
                        T* grad_x, PerThread<wide_t<T>>& grad_weight) {
  using W = wide_t<T>;
  at::parallel_for(0, R, grain(5 * D), [&](int64_t begin, int64_t end) {
    W* sums = grad_weight.mine();
    for (int64_t r = begin; r < end; ++r) {
      const T *g = grad + r * D, *in = x + r * D;
      const W scale = inverse[r];
      W along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t d = 0; d < D; ++d) along += widened(g[d]) * weight[d] * widened(in[d]);
      along *= scale * scale / D;  // x / rms(x) keeps its length whatever x does, so that part of the gradient goes
      T* out = grad_x + r * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const W one = widened(g[d]), value = widened(in[d]);
        out[d] = narrowed<T>(scale * (one * weight[d] - along * value));
        sums[d] += one * value * scale;
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x_, const at::Tensor& weight_, double eps) {
  const auto x = x_.contiguous();
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto weight = weight_.to(options.dtype()).contiguous();
  const int64_t D = weight.numel(), R = x.numel() / D;
  auto y = at::empty_like(x), inverse = at::empty({R}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm", [&] {
    using W = wide_t<scalar_t>;
    normalize(x.const_data_ptr<scalar_t>(), weight.const_data_ptr<W>(), R, D, eps, y.mutable_data_ptr<scalar_t>(),
              inverse.mutable_data_ptr<W>());
  });
  return {y, inverse};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad_, const at::Tensor& x_,
                                                     const at::Tensor& weight_, const at::Tensor& inverse) {
  const auto grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.to(inverse.options().dtype()).contiguous();
  const int64_t D = weight.numel(), R = x.numel() / D;
  auto grad_x = at::empty_like(x), grad_weight = at::empty({D}, inverse.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm_backward", [&] {
    using W = wide_t<scalar_t>;
    PerThread<W> sums(D);
    normalize_backward(grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), weight.const_data_ptr<W>(),
                       inverse.const_data_ptr<W>(), R, D, grad_x.mutable_data_ptr<scalar_t>(), sums);
    const auto total = sums.total();
    std::copy(total.begin(), total.end(), grad_weight.mutable_data_ptr<W>());
  });
  return {grad_x, grad_weight.to(weight_.scalar_type())};
}

// Heads [B, h, T, c] anywhere in memory, as long as the c values of a head lie side by side.
struct Heads {
  int64_t B, h, T, c, sB, sh, sT;
  explicit Heads(const at::Tensor& x)
      : B(x.size(0)), h(x.size(1)), T(x.size(2)), c(x.size(3)), sB(x.stride(0)), sh(x.stride(1)), sT(x.stride(2)) {}
  int64_t count() const { return B * h * T; }
  // Calls visit(number, position, where it starts) for heads `begin` to `end`, with one division for each T of them.
  template <typename Visit> void each(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / T, from = row / h * sB + row % h * sh, stop = std::min(end, (row + 1) * T);
      for (int64_t t = i - row * T; i < stop; ++i, ++t) visit(i, t, from + t * sT);
    }
  }
};

inline at::Tensor with_heads_together(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// Without a norm `inverse` is null, and the weights are ones.
template <typename T>
void rotate(const T* x, const Heads& s, const wide_t<T>* weight, const wide_t<T>* cosine, const wide_t<T>* sine,
            double eps, wide_t<T>* y, wide_t<T>* inverse) {
  using W = wide_t<T>;
  const int64_t c = s.c, half = c / 2;
  at::parallel_for(0, s.count(), grain(4 * c), [&](int64_t begin, int64_t end) {
    s.each(begin, end, [&](int64_t i, int64_t position, int64_t start) {
      const T* in = x + start;
      const W *cos = cosine + position * half, *sin = sine + position * half;
      W scale = 1;
      if (inverse) {
        W square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < c; ++d) square += widened(in[d]) * widened(in[d]);
        scale = inverse[i] = 1 / std::sqrt(square / c + W(eps));
      }
      W* out = y + i * c;
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        const W a = widened(in[d]) * scale * weight[d], b = widened(in[d + half]) * scale * weight[d + half];
        out[d] = a * cos[d] - b * sin[d];
        out[d + half] = b * cos[d] + a * sin[d];
      }
    });
  });
}

template <typename T>
void rotate_backward(const wide_t<T>* grad, const T* x, const Heads& s, const wide_t<T>* weight, const wide_t<T>* cosine,
                     const wide_t<T>* sine, const wide_t<T>* inverse, T* grad_x, PerThread<wide_t<T>>& grad_weight) {
  using W = wide_t<T>;
  const int64_t c = s.c, half = c / 2;
  at::parallel_for(0, s.count(), grain(6 * c), [&](int64_t begin, int64_t end) {
    std::vector<W> back(c);
    W* sums = grad_weight.mine();
    s.each(begin, end, [&](int64_t i, int64_t position, int64_t start) {
      const T* in = x + start;
      const W *cos = cosine + position * half, *sin = sine + position * half, *g = grad + i * c;
      W* turned = back.data();
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        turned[d] = g[d] * cos[d] + g[d + half] * sin[d];
        turned[d + half] = g[d + half] * cos[d] - g[d] * sin[d];
      }
      T* out = grad_x + i * c;
      if (!weight) {
        for (int64_t d = 0; d < c; ++d) out[d] = narrowed<T>(turned[d]);
        return;
      }
      const W scale = inverse[i];
      W along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t d = 0; d < c; ++d) along += turned[d] * weight[d] * widened(in[d]);
      along *= scale * scale / c;
#pragma omp simd
      for (int64_t d = 0; d < c; ++d) {
        const W value = widened(in[d]);
        out[d] = narrowed<T>(scale * (turned[d] * weight[d] - along * value));
        sums[d] += turned[d] * value * scale;
      }
    });
  });
}

std::tuple<at::Tensor, at::Tensor> norm_rotate(const at::Tensor& x_, const Maybe& weight_, const at::Tensor& cosine_,
                                               const at::Tensor& sine_, double eps) {
  const auto x = with_heads_together(x_);
  const Heads s(x);
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto cosine = cosine_.to(options.dtype()).contiguous(), sine = sine_.to(options.dtype()).contiguous();
  const auto weight = weight_ ? Maybe(weight_->to(options.dtype()).contiguous()) : Maybe();
  auto y = at::empty({s.B, s.h, s.T, s.c}, options), inverse = at::empty({weight ? s.count() : 0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_rotate", [&] {
    using W = wide_t<scalar_t>;
    const std::vector<W> ones(weight ? 0 : s.c, W(1));
    rotate<scalar_t>(x.const_data_ptr<scalar_t>(), s, weight ? weight->const_data_ptr<W>() : ones.data(),
                     cosine.const_data_ptr<W>(), sine.const_data_ptr<W>(), eps, y.mutable_data_ptr<W>(),
                     weight ? inverse.mutable_data_ptr<W>() : nullptr);
  });
  return {y, inverse};
}

std::tuple<at::Tensor, at::Tensor> norm_rotate_backward(const at::Tensor& grad_, const at::Tensor& x_,
                                                        const Maybe& weight_, const at::Tensor& cosine_,
                                                        const at::Tensor& sine_, const at::Tensor& inverse) {
  const auto x = with_heads_together(x_), grad = grad_.contiguous();
  const Heads s(x);
  const auto options = inverse.options();
  const auto cosine = cosine_.to(options.dtype()).contiguous(), sine = sine_.to(options.dtype()).contiguous();
  const auto weight = weight_ ? Maybe(weight_->to(options.dtype()).contiguous()) : Maybe();
  auto grad_x = at::empty({s.B, s.h, s.T, s.c}, x.options()), grad_weight = at::empty({weight ? s.c : 0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_rotate_backward", [&] {
    using W = wide_t<scalar_t>;
    PerThread<W> sums(s.c);
    rotate_backward<scalar_t>(grad.const_data_ptr<W>(), x.const_data_ptr<scalar_t>(), s, data_or_null<W>(weight),
                              cosine.const_data_ptr<W>(), sine.const_data_ptr<W>(), inverse.const_data_ptr<W>(),
                              grad_x.mutable_data_ptr<scalar_t>(), sums);
    if (!weight) return;
    const auto total = sums.total();
    std::copy(total.begin(), total.end(), grad_weight.mutable_data_ptr<W>());
  });
  return {grad_x, weight_ ? grad_weight.to(weight_->scalar_type()) : grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("norm_rotate", norm_rotate);
  m.impl("norm_rotate_backward", norm_rotate_backward);
}
}  // namespace engram
