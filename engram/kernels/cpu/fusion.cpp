// Gate, value and short convolution of a memory layer in one pass each way (equations and reference: kernels/fusion.py).
//
// Forward never holds u = alpha v: RMSNorm(u) is a multiple of v, by a number for each token and branch. Backward takes
// two passes, since the gradient at a token needs what the convolution did at later ones.
#include "common.h"

#include <algorithm>

namespace engram {
namespace {

using Maybe = std::optional<at::Tensor>;
constexpr int64_t kStats = 4;  // of a token and branch: h . k, 1/rms(h), 1/rms(k), 1/rms(alpha v)

// Sizes, and where the taps of a token are.
struct Shape {
  int64_t B, T, M, D, taps, dilation, past;
  const int64_t* document;  // [B, past + T], or none: then all positions are one document
  Shape(const at::Tensor& hidden, const Maybe& conv_weight, const Maybe& documents, const Maybe& past_values,
        int64_t dilation_)
      : B(hidden.size(0)), T(hidden.size(1)), M(hidden.size(2)), D(hidden.size(3)),
        taps(conv_weight ? conv_weight->size(0) : 0), dilation(dilation_),
        past(past_values ? past_values->size(1) : 0), document(data_or_null<int64_t>(documents)) {}
  int64_t tokens() const { return B * T; }
  bool padding(int64_t n) const { return document && document[n / T * (past + T) + past + n % T] < 0; }
  // Whether position t + ahead (which may be negative) of token n's sequence is there and in n's document.
  bool joined(int64_t n, int64_t ahead) const {
    const int64_t t = n % T, other = t + ahead;
    if (other < -past || other >= T) return false;
    if (!document) return true;
    const int64_t* row = document + n / T * (past + T) + past;
    return row[other] == row[t];
  }
};

// Small products of weights, in the type to compute in: the norm's scale goes into the taps, the two norms into one.
template <typename W> struct Weights {
  std::vector<W> gate, conv, query, key, norm, taps;
  template <typename P>
  static std::vector<W> numbers_of(const at::Tensor& x) {
    const auto c = x.contiguous();
    const P* p = c.const_data_ptr<P>();
    return std::vector<W>(p, p + c.numel());
  }
  static std::vector<W> numbers_of(const at::Tensor& x) {
    std::vector<W> result;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "weights",
                                    [&] { result = numbers_of<scalar_t>(x); });
    return result;
  }
  Weights(const at::Tensor& query_norm, const at::Tensor& key_norm, const Maybe& conv_norm, const Maybe& conv_weight)
      : query(numbers_of(query_norm)), key(numbers_of(key_norm)) {
    gate.resize(query.size());
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = query[i] * key[i];
    if (conv_weight) {
      norm = numbers_of(*conv_norm);
      taps = numbers_of(*conv_weight);
      conv.resize(taps.size());
      for (size_t i = 0; i < conv.size(); ++i) conv[i] = taps[i] * norm[i % norm.size()];
    }
  }
};

template <typename W> W squashed(W g, bool squash) {
  return squash ? std::copysign(std::sqrt(std::max(std::abs(g), W(1e-6))), g) * W(g != 0) : g;
}
template <typename W> W squash_slope(W g, bool squash) {
  return squash ? (std::abs(g) >= W(1e-6) ? W(0.5) / std::sqrt(std::abs(g)) : W(0)) : W(1);
}

// z[d] = sum over taps of conv[j][m][d] * scale_j * v_j[d], for token n and branch m.
template <typename V, typename W>
void convolve(const Shape& s, const Weights<W>& w, int64_t n, int64_t m, const V* kv, const W* scales, const V* past_values,
              const W* past_scales, W* z) {
  std::fill(z, z + s.D, W(0));
  const int64_t width = (s.M + 1) * s.D;
  for (int64_t j = 0; j < s.taps; ++j) {
    const int64_t back = (s.taps - 1 - j) * s.dilation;
    if (!s.joined(n, -back)) continue;
    const int64_t t = n % s.T - back, b = n / s.T;
    const bool inside = t >= 0;
    const W c = inside ? scales[(n - back) * s.M + m] : past_scales[(b * s.past + s.past + t) * s.M + m];
    const V* v = inside ? kv + (n - back) * width + s.M * s.D : past_values + (b * s.past + s.past + t) * s.D;
    const W* tap = w.conv.data() + (j * s.M + m) * s.D;
#pragma omp simd
    for (int64_t d = 0; d < s.D; ++d) z[d] += tap[d] * c * widened(v[d]);
  }
}

// scales[n, m] = alpha / rms(alpha v), 0 at padding: what v is multiplied by to give RMSNorm(u) but for its weight.
template <typename W> void fill_scales(const Shape& s, const W* alpha, const W* stats, W* scales) {
  for (int64_t n = 0; n < s.tokens(); ++n)
    for (int64_t m = 0; m < s.M; ++m)
      scales[n * s.M + m] = s.padding(n) ? W(0) : alpha[n * s.M + m] * stats[(n * s.M + m) * kStats + 3];
}

template <typename H, typename V>
void forward(const Shape& s, const Weights<wide_t<H>>& w, const H* hidden, const V* kv, const V* past_values,
             const wide_t<H>* past_scales, double eps, bool squash, bool residual, H* out, wide_t<H>* alpha,
             wide_t<H>* stats) {
  using W = wide_t<H>;
  const int64_t M = s.M, D = s.D, width = (M + 1) * D;
  parallel_for(0, s.tokens(), grain(3 * M * D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const V* v = kv + n * width + M * D;
      W vv = 0;
#pragma omp simd reduction(+ : vv)
      for (int64_t d = 0; d < D; ++d) vv += widened(v[d]) * widened(v[d]);
      for (int64_t m = 0; m < M; ++m) {
        const H* h = hidden + (n * M + m) * D;
        const V* k = kv + n * width + m * D;
        const W* g = w.gate.data() + m * D;
        W hh = 0, kk = 0, hk = 0;
#pragma omp simd reduction(+ : hh, kk, hk)
        for (int64_t d = 0; d < D; ++d) {
          const W x = widened(h[d]), y = widened(k[d]);
          hh += x * x;
          kk += y * y;
          hk += x * y * g[d];
        }
        W* stat = stats + (n * M + m) * kStats;
        stat[0] = hk;
        stat[1] = 1 / std::sqrt(hh / D + W(eps));
        stat[2] = 1 / std::sqrt(kk / D + W(eps));
        const W a = sigmoid(squashed(hk * stat[1] * stat[2] / std::sqrt(W(D)), squash));
        alpha[n * M + m] = a;
        stat[3] = 1 / std::sqrt(a * a * vv / D + W(eps));
      }
    }
  });
  std::vector<W> scales(s.tokens() * M);
  if (s.taps) fill_scales(s, alpha, stats, scales.data());
  parallel_for(0, s.tokens(), grain(6 * M * D), [&](int64_t begin, int64_t end) {
    std::vector<W> z(D);
    for (int64_t n = begin; n < end; ++n) {
      const V* v = kv + n * width + M * D;
      for (int64_t m = 0; m < M; ++m) {
        const W a = s.padding(n) ? W(0) : alpha[n * M + m];
        const H* h = hidden + (n * M + m) * D;
        H* y = out + (n * M + m) * D;
        if (s.taps) {
          convolve(s, w, n, m, kv, scales.data(), past_values, past_scales, z.data());
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) z[d] *= sigmoid(z[d]);
        }
        const W* added = z.data();
        if (residual) {
#pragma omp simd
          for (int64_t d = 0; d < D; ++d)
            y[d] = narrowed<H>(widened(h[d]) + a * widened(v[d]) + added[d]);
        } else {
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) y[d] = narrowed<H>(a * widened(v[d]) + added[d]);
        }
      }
    }
  });
}

template <typename H, typename V>
void backward(const Shape& s, const Weights<wide_t<H>>& w, const H* grad_out, const wide_t<H>* grad_alpha, const H* hidden,
              const V* kv, const V* past_values, const wide_t<H>* past_scales, const wide_t<H>* alpha,
              const wide_t<H>* stats, double eps, bool squash, bool residual, H* grad_hidden, V* grad_kv, H* grad_z,
              PerThread<wide_t<H>>& grad_gate, PerThread<wide_t<H>>& grad_conv) {
  using W = wide_t<H>;
  const int64_t M = s.M, D = s.D, width = (M + 1) * D;
  std::vector<W> scales(s.tokens() * M);
  if (s.taps) {
    fill_scales(s, alpha, stats, scales.data());
    parallel_for(0, s.tokens(), grain(8 * M * D), [&](int64_t begin, int64_t end) {
      std::vector<W> z(D);
      W* sums = grad_conv.mine();
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t m = 0; m < M; ++m) {
          convolve(s, w, n, m, kv, scales.data(), past_values, past_scales, z.data());
          const H* gy = grad_out + (n * M + m) * D;
          H* gz = grad_z + (n * M + m) * D;
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) {
            const W sig = sigmoid(z[d]);
            z[d] = widened(gy[d]) * sig * (1 + z[d] * (1 - sig));
            gz[d] = narrowed<H>(z[d]);
          }
          for (int64_t j = 0; j < s.taps; ++j) {
            const int64_t back = (s.taps - 1 - j) * s.dilation;
            if (!s.joined(n, -back)) continue;
            const int64_t t = n % s.T - back, b = n / s.T;
            const bool inside = t >= 0;
            const W c = inside ? scales[(n - back) * M + m] : past_scales[(b * s.past + s.past + t) * M + m];
            const V* v = inside ? kv + (n - back) * width + M * D : past_values + (b * s.past + s.past + t) * D;
            W* sum = sums + (j * M + m) * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) sum[d] += z[d] * c * widened(v[d]);
          }
        }
      }
    });
  }
  parallel_for(0, s.tokens(), grain(10 * M * D), [&](int64_t begin, int64_t end) {
    std::vector<W> q(D), grad_v(D);
    W* gate_sums = grad_gate.mine();
    for (int64_t n = begin; n < end; ++n) {
      const V* v = kv + n * width + M * D;
      std::fill(grad_v.begin(), grad_v.end(), W(0));
      W along_v = 0;  // what grad_v gets along v itself, by the norm of u
      for (int64_t m = 0; m < M; ++m) {
        const H* gy = grad_out + (n * M + m) * D;
        const H* h = hidden + (n * M + m) * D;
        const V* k = kv + n * width + m * D;
        const W* stat = stats + (n * M + m) * kStats;
        const bool off = s.padding(n);
        const W a = alpha[n * M + m], a_used = off ? W(0) : a, rho = stat[3];
        W ga = grad_alpha ? grad_alpha[n * M + m] : W(0);
        W gate_v = 0, conv_v = 0;
        if (s.taps && !off) {
          std::fill(q.begin(), q.end(), W(0));
          for (int64_t j = 0; j < s.taps; ++j) {
            const int64_t ahead = (s.taps - 1 - j) * s.dilation;
            if (!s.joined(n, ahead)) continue;
            const H* gz = grad_z + ((n + ahead) * M + m) * D;
            const W* tap = w.conv.data() + (j * M + m) * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) q[d] += tap[d] * widened(gz[d]);
          }
          const W c = a * rho;
#pragma omp simd reduction(+ : gate_v, conv_v)
          for (int64_t d = 0; d < D; ++d) {
            const W x = widened(v[d]), y = widened(gy[d]);
            gate_v += y * x;
            conv_v += q[d] * x;
            grad_v[d] += c * q[d] + a * y;
          }
          const W cube = rho * rho * rho;
          ga += gate_v + conv_v * W(eps) * cube;
          along_v -= conv_v * cube * a * a * a / D;
        } else if (!off) {
#pragma omp simd reduction(+ : gate_v)
          for (int64_t d = 0; d < D; ++d) {
            const W x = widened(v[d]), y = widened(gy[d]);
            gate_v += y * x;
            grad_v[d] += a_used * y;
          }
          ga += gate_v;
        }
        const W root = 1 / std::sqrt(W(D)), g = stat[0] * stat[1] * stat[2] * root;
        const W slope = ga * a * (1 - a) * squash_slope(g, squash) * root;
        const W cross = slope * stat[1] * stat[2];
        const W along_h = -slope * stat[0] * stat[2] * stat[1] * stat[1] * stat[1] / D;
        const W along_k = -slope * stat[0] * stat[1] * stat[2] * stat[2] * stat[2] / D;
        const W* gate = w.gate.data() + m * D;
        W* sum = gate_sums + m * D;
        H* gh = grad_hidden + (n * M + m) * D;
        V* gk = grad_kv + n * width + m * D;
        const W kept = residual ? W(1) : W(0);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const W x = widened(h[d]), y = widened(k[d]);
          gh[d] = narrowed<H>(kept * widened(gy[d]) + cross * y * gate[d] + along_h * x);
          gk[d] = narrowed<V>(cross * x * gate[d] + along_k * y);
          sum[d] += cross * x * y;
        }
      }
      V* gv = grad_kv + n * width + M * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) gv[d] = narrowed<V>(grad_v[d] + along_v * widened(v[d]));
    }
  });
}

// Runs the code with H and V the types of hidden states and values.
#define ENGRAM_DISPATCH(HIDDEN, KV, NAME, ...)                                                             \
  [&] {                                                                                                    \
    using at::BFloat16;                                                                                    \
    const auto h_type = (HIDDEN).scalar_type(), v_type = (KV).scalar_type();                               \
    const bool narrow = v_type == at::kBFloat16;                                                           \
    if (h_type == at::kFloat && v_type == at::kFloat) { using H = float; using V = float; __VA_ARGS__(); } \
    else if (h_type == at::kFloat && narrow) { using H = float; using V = BFloat16; __VA_ARGS__(); }       \
    else if (h_type == at::kBFloat16 && narrow) { using H = BFloat16; using V = BFloat16; __VA_ARGS__(); } \
    else if (h_type == at::kDouble && v_type == at::kDouble) { using H = double; using V = double; __VA_ARGS__(); } \
    else TORCH_CHECK(false, NAME, ": no kernel for hidden states of ", h_type, " with values of ", v_type); \
  }()

Maybe contiguous(const Maybe& x) { return x ? Maybe(x->contiguous()) : Maybe(); }

void check(const at::Tensor& hidden, const at::Tensor& kv, const at::Tensor& query_norm, const at::Tensor& key_norm,
           const Maybe& conv_norm, const Maybe& conv_weight, const Maybe& documents, const Maybe& past_values,
           const Maybe& past_scales, int64_t dilation) {
  check_axes("hidden", hidden, 4);
  const int64_t B = hidden.size(0), T = hidden.size(1), M = hidden.size(2), D = hidden.size(3);
  const int64_t past = past_values && past_values->dim() > 1 ? past_values->size(1) : 0;
  check_shape("kv", kv, {B, T, (M + 1) * D});
  check_shape("query_norm", query_norm, {M, D});
  check_shape("key_norm", key_norm, {M, D});
  check_shape("conv_norm", conv_norm, {M, D});
  if (conv_weight) check_shape("conv_weight", conv_weight, {conv_weight->dim() ? conv_weight->size(0) : 0, M, D});
  check_shape("documents", documents, {B, past + T});
  check_shape("past_values", past_values, {B, past, D});
  check_shape("past_scales", past_scales, {B, past, M});
  TORCH_CHECK_VALUE(conv_norm.has_value() == conv_weight.has_value(), "conv_norm goes with conv_weight: one is missing");
  TORCH_CHECK_VALUE(past_values.has_value() == past_scales.has_value(), "past_values go with past_scales: one is missing");
  TORCH_CHECK_VALUE(dilation >= 1, "dilation is ", dilation, ": allowed is 1 or more");
}

template <typename W> at::Tensor tensor_of(const std::vector<W>& numbers, const at::Tensor& like) {
  auto x = at::empty(like.sizes(), like.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "tensor_of", [&] {
    std::transform(numbers.begin(), numbers.end(), x.mutable_data_ptr<scalar_t>(), [](W n) { return narrowed<scalar_t>(n); });
  });
  return x;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fuse_memory(
    const at::Tensor& hidden_, const at::Tensor& kv_, const at::Tensor& query_norm, const at::Tensor& key_norm,
    const Maybe& conv_norm, const Maybe& conv_weight, const Maybe& documents_, const Maybe& past_values_,
    const Maybe& past_scales_, double eps, bool squash, int64_t dilation, bool residual) {
  check(hidden_, kv_, query_norm, key_norm, conv_norm, conv_weight, documents_, past_values_, past_scales_, dilation);
  const auto hidden = hidden_.contiguous(), kv = kv_.contiguous();
  const auto documents = contiguous(documents_);
  const auto past_values = contiguous(past_values_), past_scales = contiguous(past_scales_);
  const Shape s(hidden, conv_weight, documents, past_values, dilation);
  const auto wide = hidden.options().dtype(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  auto out = at::empty_like(hidden);
  auto alpha = at::empty({s.B, s.T, s.M}, wide), stats = at::empty({s.B, s.T, s.M, kStats}, wide);
  ENGRAM_DISPATCH(hidden, kv, "fuse_memory", [&] {
    using W = wide_t<H>;
    forward<H, V>(s, Weights<W>(query_norm, key_norm, conv_norm, conv_weight), hidden.const_data_ptr<H>(),
                  kv.const_data_ptr<V>(), data_or_null<V>(past_values), data_or_null<W>(past_scales), eps, squash, residual,
                  out.mutable_data_ptr<H>(), alpha.mutable_data_ptr<W>(), stats.mutable_data_ptr<W>());
  });
  return {out, alpha, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fuse_memory_backward(
    const at::Tensor& grad_out_, const Maybe& grad_alpha_, const at::Tensor& hidden_, const at::Tensor& kv_,
    const at::Tensor& query_norm, const at::Tensor& key_norm, const Maybe& conv_norm, const Maybe& conv_weight,
    const Maybe& documents_, const Maybe& past_values_, const Maybe& past_scales_, const at::Tensor& alpha,
    const at::Tensor& stats, double eps, bool squash, int64_t dilation, bool residual) {
  const auto grad_out = grad_out_.contiguous(), hidden = hidden_.contiguous(), kv = kv_.contiguous();
  const auto grad_alpha = contiguous(grad_alpha_), documents = contiguous(documents_);
  const auto past_values = contiguous(past_values_), past_scales = contiguous(past_scales_);
  const Shape s(hidden, conv_weight, documents, past_values, dilation);
  auto grad_hidden = at::empty_like(hidden), grad_kv = at::empty_like(kv);
  auto grad_z = s.taps ? at::empty_like(hidden) : at::empty({0}, hidden.options());
  at::Tensor grad_query, grad_key, grad_norm = at::empty({0}, query_norm.options()), grad_weight = grad_norm;
  ENGRAM_DISPATCH(hidden, kv, "fuse_memory_backward", [&] {
    using W = wide_t<H>;
    const Weights<W> w(query_norm, key_norm, conv_norm, conv_weight);
    PerThread<W> grad_gate(s.M * s.D), grad_conv(s.taps * s.M * s.D);
    backward<H, V>(s, w, grad_out.const_data_ptr<H>(), data_or_null<W>(grad_alpha), hidden.const_data_ptr<H>(),
                   kv.const_data_ptr<V>(), data_or_null<V>(past_values), data_or_null<W>(past_scales),
                   alpha.const_data_ptr<W>(), stats.const_data_ptr<W>(), eps, squash, residual,
                   grad_hidden.mutable_data_ptr<H>(), grad_kv.mutable_data_ptr<V>(), grad_z.mutable_data_ptr<H>(),
                   grad_gate, grad_conv);
    const auto gate = grad_gate.total(), conv = grad_conv.total();
    std::vector<W> by_query(gate.size()), by_key(gate.size()), by_norm(w.norm.size()), by_tap(conv.size());
    for (size_t i = 0; i < gate.size(); ++i) {
      by_query[i] = gate[i] * w.key[i];
      by_key[i] = gate[i] * w.query[i];
    }
    for (size_t start = 0; start < by_tap.size(); start += by_norm.size())
      for (size_t i = 0; i < by_norm.size(); ++i) {
        by_tap[start + i] = conv[start + i] * w.norm[i];
        by_norm[i] += conv[start + i] * w.taps[start + i];
      }
    grad_query = tensor_of(by_query, query_norm);
    grad_key = tensor_of(by_key, key_norm);
    if (conv_weight) {
      grad_norm = tensor_of(by_norm, *conv_norm);
      grad_weight = tensor_of(by_tap, *conv_weight);
    }
  });
  return {grad_hidden, grad_kv, grad_query, grad_key, grad_norm, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("fuse_memory", fuse_memory);
  m.impl("fuse_memory_backward", fuse_memory_backward);
}
}  // namespace engram
