// RMSNorm, and RMSNorm followed by a rotation of positions, over the last axis (references in kernels/norm.py).
#include "heads.h"
#include "vectors.h"

namespace engram {
namespace {

using Maybe = std::optional<at::Tensor>;

template <typename T>
void normalize(const T* x, const wide_t<T>* weight, int64_t R, int64_t D, double eps, T* y, wide_t<T>* inverse) {
  using W = wide_t<T>;
  parallel_for(0, R, grain(3 * D), [&](int64_t begin, int64_t end) {
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
  parallel_for(0, R, grain(5 * D), [&](int64_t begin, int64_t end) {
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
  check_shape(x_.dim() > 0, "x", x_, "one of 1 axis or more");
  check_shape("weight", weight_, {x_.size(-1)});
  const auto x = x_.contiguous();
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto weight = weight_.to(options.dtype()).contiguous();
  const int64_t D = weight.numel(), R = rows_of(x);
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
  const int64_t D = weight.numel(), R = rows_of(x);
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

// Calls visit(number, position, where it starts) for the heads of tokens `begin` to `end`.
template <typename Visit> void each_head(const Heads& s, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t n = 0; n < s.h; ++n) visit(i * s.h + n, i % s.T, s.at(i / s.T, i % s.T, n));
}

inline at::Tensor with_heads_together(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// Without a norm `inverse` is null, and the weights are ones.
template <typename T>
void rotate(const T* x, const Heads& s, const wide_t<T>* weight, const wide_t<T>* cosine, const wide_t<T>* sine,
            double eps, T* y, wide_t<T>* inverse) {
  using W = wide_t<T>;
  using V = vector_t<T>;
  const int64_t c = s.c, half = c / 2;
  parallel_for(0, s.B * s.T, grain(4 * c * s.h), [&](int64_t begin, int64_t end) {
    each_head(s, begin, end, [&](int64_t i, int64_t position, int64_t start) {
      const T* in = x + start;
      const W *cos = cosine + position * half, *sin = sine + position * half;
      W scale = 1;
      if (inverse) {
        V square{};
        for (int64_t d = 0; d < c; d += kLanes<T>) {
          const V value = load(in + d, c - d);
          square += value * value;
        }
        scale = inverse[i] = 1 / std::sqrt(sum_of(square) / c + W(eps));
      }
      T* out = y + i * c;
      for (int64_t d = 0; d < half; d += kLanes<T>) {
        const int64_t n = half - d;
        const V a = load(in + d, n) * scale * load(weight + d, n);
        const V b = load(in + half + d, n) * scale * load(weight + half + d, n);
        const V turn = load(cos + d, n), lift = load(sin + d, n);
        store<T>(a * turn - b * lift, out + d, n);
        store<T>(b * turn + a * lift, out + half + d, n);
      }
    });
  });
}

// Without a norm `weight` is null.
template <typename T>
void rotate_backward(const T* grad, const T* x, const Heads& s, const wide_t<T>* weight, const wide_t<T>* cosine,
                     const wide_t<T>* sine, const wide_t<T>* inverse, T* grad_x, PerThread<wide_t<T>>& grad_weight) {
  using W = wide_t<T>;
  using V = vector_t<T>;
  const int64_t c = s.c, half = c / 2;
  parallel_for(0, s.B * s.T, grain(6 * c * s.h), [&](int64_t begin, int64_t end) {
    std::vector<W> back(c);
    W *sums = grad_weight.mine(), *turned = back.data();
    each_head(s, begin, end, [&](int64_t i, int64_t position, int64_t start) {
      const T *in = x + start, *g = grad + i * c;
      const W *cos = cosine + position * half, *sin = sine + position * half;
      T* out = grad_x + i * c;
      for (int64_t d = 0; d < half; d += kLanes<T>) {
        const int64_t n = half - d;
        const V a = load(g + d, n), b = load(g + half + d, n), turn = load(cos + d, n), lift = load(sin + d, n);
        store<W>(a * turn + b * lift, turned + d, n);
        store<W>(b * turn - a * lift, turned + half + d, n);
      }
      if (!weight) {
        for (int64_t d = 0; d < c; d += kLanes<T>) store<T>(load(turned + d, c - d), out + d, c - d);
        return;
      }
      const W scale = inverse[i];
      V product{};
      for (int64_t d = 0; d < c; d += kLanes<T>) {
        const int64_t n = c - d;
        product += load(turned + d, n) * load(weight + d, n) * load(in + d, n);
      }
      const W along = sum_of(product) * scale * scale / c;
      for (int64_t d = 0; d < c; d += kLanes<T>) {
        const int64_t n = c - d;
        const V value = load(in + d, n), one = load(turned + d, n);
        store<T>(scale * (one * load(weight + d, n) - along * value), out + d, n);
        store<W>(load(sums + d, n) + one * value * scale, sums + d, n);
      }
    });
  });
}

std::tuple<at::Tensor, at::Tensor> norm_rotate(const at::Tensor& x_, const Maybe& weight_, const at::Tensor& cosine_,
                                               const at::Tensor& sine_, double eps) {
  check_axes("x", x_, 4);
  const int64_t T = x_.size(1), c = x_.size(3);
  check_shape(c % 2 == 0, "x", x_, "heads [B, T, h, c] with c even");
  check_shape("weight", weight_, {c});
  check_shape("cos", cosine_, {T, c / 2});
  check_shape("sin", sine_, {T, c / 2});
  const auto x = with_heads_together(x_);
  const Heads s(x);
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto cosine = cosine_.to(options.dtype()).contiguous(), sine = sine_.to(options.dtype()).contiguous();
  const auto weight = weight_ ? Maybe(weight_->to(options.dtype()).contiguous()) : Maybe();
  auto y = at::empty(x.sizes(), x.options()), inverse = at::empty({weight ? s.B * s.T * s.h : 0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_rotate", [&] {
    using W = wide_t<scalar_t>;
    const std::vector<W> ones(weight ? 0 : s.c, W(1));
    rotate<scalar_t>(x.const_data_ptr<scalar_t>(), s, weight ? weight->const_data_ptr<W>() : ones.data(),
                     cosine.const_data_ptr<W>(), sine.const_data_ptr<W>(), eps, y.mutable_data_ptr<scalar_t>(),
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
  auto grad_x = at::empty(x.sizes(), x.options()), grad_weight = at::empty({weight ? s.c : 0}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_rotate_backward", [&] {
    using W = wide_t<scalar_t>;
    PerThread<W> sums(s.c);
    rotate_backward<scalar_t>(grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), s, data_or_null<W>(weight),
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
