// Scores, top-k, weights, loads and entropy of a router, a token at a time (reference in kernels/routing.py).
#include "common.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace engram {
namespace {

// log x for x >= 0 by Cephes' logf, without branches; 0 counts as the least normal number.
inline float logarithm(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(std::max(x, 1.17549435e-38f));
  const float half = std::bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // the mantissa, in [0.5, 1)
  const float low = half < 0.707106781f ? 1.0f : 0.0f;
  const float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126) - low;
  const float m = half + half * low - 1.0f, z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  return m + (y * m * z + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}
inline double logarithm(double x) { return std::log(std::max(x, std::numeric_limits<double>::min())); }

// Scores of one token's logits; returns their sum.
template <typename T> T score(const T* logit, int64_t E, bool sigmoids, T* s) {
  T top = 0, sum = 0;
  if (!sigmoids) {
    top = logit[0];
    for (int64_t e = 1; e < E; ++e) top = logit[e] > top ? logit[e] : top;
  }
  if (sigmoids) {
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < E; ++e) sum += s[e] = sigmoid(logit[e]);
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < E; ++e) sum += s[e] = exponential(logit[e] - top);
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) s[e] /= sum;
  return 1;
}

constexpr int64_t kBlock = 16;

// Largest of the kBlock keys from `key` on.
template <typename T> T largest(const T* key) {
  T best = key[0];
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < kBlock; ++i) best = key[i] > best ? key[i] : best;
  return best;
}

// The first expert that was not chosen yet: where scores are NaN, or a bias of -infinity leaves fewer than k.
int64_t first_left(const int64_t* chosen, int64_t k) {
  int64_t e = 0;
  while (std::find(chosen, chosen + k, e) != chosen + k) ++e;
  return e;
}

template <typename T>
void choose(const T* logits, const T* bias, int64_t N, int64_t E, int64_t K, bool sigmoids, bool normalize, T scale,
            int64_t* experts, T* weights, PerThread<int64_t>& load, PerThread<double>& entropy) {
  constexpr T never = std::numeric_limits<T>::lowest();  // or below
  const int64_t blocks = (E + kBlock - 1) / kBlock;
  parallel_for(0, N, grain(8 * E), [&](int64_t begin, int64_t end) {
    // Keys are filled up to whole blocks with what is never chosen.
    std::vector<T> scores(E), keys(blocks * kBlock, never), tops(blocks);
    int64_t* loads = load.mine();
    double* nats = entropy.mine();
    T *s = scores.data(), *key = keys.data(), *top = tops.data();
    for (int64_t n = begin; n < end; ++n) {
      const T sum = score(logits + n * E, E, sigmoids, s);
      T sum_log = 0;
#pragma omp simd reduction(+ : sum_log)
      for (int64_t e = 0; e < E; ++e) {
        key[e] = s[e] + bias[e];
        sum_log += s[e] * logarithm(s[e]);
      }
      *nats += logarithm(sum) - sum_log / sum;
      for (int64_t b = 0; b < blocks; ++b) top[b] = largest(key + b * kBlock);
      int64_t* chosen = experts + n * K;
      T* weight = weights + n * K;
      T total = 0;
      for (int64_t k = 0; k < K; ++k) {
        int64_t block = 0;
        for (int64_t b = 1; b < blocks; ++b) block = top[b] > top[block] ? b : block;
        int64_t at = block * kBlock;
        const int64_t last = std::min(E, at + kBlock) - 1;
        while (at < last && !(key[at] == top[block])) ++at;
        if (!(top[block] > never)) {
          at = first_left(chosen, k);
          block = at / kBlock;
        }
        key[at] = never;
        top[block] = largest(key + block * kBlock);
        chosen[k] = at;
        ++loads[at];
        total += weight[k] = s[at];
      }
      const T factor = normalize ? scale / std::max(total, T(1e-20)) : scale;
      for (int64_t k = 0; k < K; ++k) weight[k] *= factor;
    }
  });
}

template <typename T>
void choose_backward(const T* grad_weights, const T* logits, const int64_t* experts, int64_t N, int64_t E, int64_t K,
                     bool sigmoids, bool normalize, T scale, T* grad_logits) {
  parallel_for(0, N, grain(6 * E), [&](int64_t begin, int64_t end) {
    std::vector<T> scores(E), grads(K);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* chosen = experts + n * K;
      const T* g = grad_weights + n * K;
      T* out = grad_logits + n * E;
      T* s = scores.data();
      score(logits + n * E, E, sigmoids, s);
      T total = 0, along = 0;
      for (int64_t k = 0; k < K; ++k) {
        total += s[chosen[k]];
        along += g[k] * s[chosen[k]];
      }
      const bool floored = total < T(1e-20);
      total = std::max(total, T(1e-20));
      T mixed = 0;  // of a softmax: all scores fall when one rises
      for (int64_t k = 0; k < K; ++k) {
        grads[k] = normalize ? scale * (g[k] - (floored ? T(0) : along / total)) / total : scale * g[k];
        mixed += grads[k] * s[chosen[k]];
      }
      for (int64_t e = 0; e < E; ++e) out[e] = sigmoids ? T(0) : -s[e] * mixed;
      for (int64_t k = 0; k < K; ++k) {
        const T p = s[chosen[k]];
        out[chosen[k]] += grads[k] * (sigmoids ? p * (1 - p) : p);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route(const at::Tensor& logits_, const at::Tensor& bias_,
                                                                 int64_t K, bool sigmoids, bool normalize, double scale) {
  check_axes("logits", logits_, 2);
  const int64_t N = logits_.size(0), E = logits_.size(1);
  check_shape("bias", bias_, {E});
  TORCH_CHECK_VALUE(K >= 1 && K <= E, "k is ", K, ": allowed is 1 to ", E);
  const auto logits = logits_.contiguous(), bias = bias_.to(logits.scalar_type()).contiguous();
  const auto integers = logits.options().dtype(at::kLong);
  auto experts = at::empty({N, K}, integers), load = at::empty({E}, integers);
  auto weights = at::empty({N, K}, logits.options()), entropy = at::empty({}, logits.options());
  PerThread<int64_t> loads(E);
  PerThread<double> nats(1);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "route", [&] {
    choose(logits.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), N, E, K, sigmoids, normalize,
           static_cast<scalar_t>(scale), experts.mutable_data_ptr<int64_t>(), weights.mutable_data_ptr<scalar_t>(), loads,
           nats);
    *entropy.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(nats.total()[0] / N);
  });
  const auto total = loads.total();
  std::copy(total.begin(), total.end(), load.mutable_data_ptr<int64_t>());
  return {weights, experts, load, entropy};
}

at::Tensor route_backward(const at::Tensor& grad_weights_, const at::Tensor& logits_, const at::Tensor& experts_,
                          bool sigmoids, bool normalize, double scale) {
  const auto grad_weights = grad_weights_.contiguous(), logits = logits_.contiguous(), experts = experts_.contiguous();
  const int64_t N = logits.size(0), E = logits.size(1), K = experts.size(1);
  auto grad_logits = at::empty({N, E}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "route_backward", [&] {
    choose_backward(grad_weights.const_data_ptr<scalar_t>(), logits.const_data_ptr<scalar_t>(),
                    experts.const_data_ptr<int64_t>(), N, E, K, sigmoids, normalize, static_cast<scalar_t>(scale),
                    grad_logits.mutable_data_ptr<scalar_t>());
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("route", route);
  m.impl("route_backward", route_backward);
}
}  // namespace engram
