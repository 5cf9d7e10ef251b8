// Row-sparse gradients: duplicates combined, and Adam on the rows that were read (reference in kernels/rows.py).
#include "common.h"

#include <ATen/ops/sort.h>

#include <cstring>

namespace engram {
namespace {

constexpr int64_t kAhead = 24;  // rows to prefetch ahead: they lie far apart in memory

at::Tensor gather_rows(const at::Tensor& table_, const at::Tensor& rows_) {
  check_axes("table", table_, 2);
  const auto table = table_.contiguous(), rows = rows_.contiguous();
  const int64_t R = table.size(0), width = table.size(1) * table.element_size(), n = rows.numel();
  auto shape = rows.sizes().vec();
  shape.push_back(table.size(1));
  auto values = at::empty(shape, table.options());
  const char* from = static_cast<const char*>(table.const_data_ptr());
  char* to = static_cast<char*>(values.mutable_data_ptr());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  check_rows(row, n, R);
  parallel_for(0, n, grain(table.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end)
        for (int64_t at = 0; at < width; at += 64) __builtin_prefetch(from + row[i + kAhead] * width + at);
      std::memcpy(to + i * width, from + row[i] * width, width);
    }
  });
  return values;
}

// Row i of `sum` is the sum of the gradients numbered from[starts[i]] to before from[starts[i + 1]].
template <typename T>
void sum_groups(const T* g, const int64_t* from, const std::vector<int64_t>& starts, int64_t W, T* sum) {
  using wide = wide_t<T>;
  const int64_t u = starts.size() - 1, n = starts.back();
  parallel_for(0, u, grain(2 * W), [&](int64_t begin, int64_t end) {
    std::vector<wide> total(W);
    for (int64_t i = begin; i < end; ++i) {
      if (starts[i] + kAhead < n) __builtin_prefetch(g + from[starts[i] + kAhead] * W);
      std::fill(total.begin(), total.end(), wide(0));
      for (int64_t k = starts[i]; k < starts[i + 1]; ++k) {
        const T* one = g + from[k] * W;
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) total[w] += widened(one[w]);
      }
      for (int64_t w = 0; w < W; ++w) sum[i * W + w] = narrowed<T>(total[w]);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> combine_rows(const at::Tensor& rows, const at::Tensor& grads) {
  check_axes("rows", rows, 1);
  check_axes("grads", grads, 2);
  const int64_t n = rows.numel(), W = grads.size(1);
  check_shape("grads", grads, {n, W});
  at::Tensor sorted, order;
  std::tie(sorted, order) = at::sort(rows.contiguous(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t* key = sorted.const_data_ptr<int64_t>();
  std::vector<int64_t> starts;
  starts.reserve(n + 1);
  for (int64_t i = 0; i < n; ++i)
    if (i == 0 || key[i] != key[i - 1]) starts.push_back(i);
  const int64_t u = starts.size();
  starts.push_back(n);
  auto unique = at::empty({u}, rows.options());
  auto sums = at::empty({u, W}, grads.options());
  for (int64_t i = 0; i < u; ++i) unique.mutable_data_ptr<int64_t>()[i] = key[starts[i]];
  const auto grads_c = grads.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grads.scalar_type(), "combine_rows", [&] {
    sum_groups(grads_c.const_data_ptr<scalar_t>(), order.const_data_ptr<int64_t>(), starts, W,
               sums.mutable_data_ptr<scalar_t>());
  });
  return {unique, sums};
}

inline uint32_t scramble(uint32_t x) {  // a bijection whose output bits each depend on all input bits
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

template <typename T> inline T rounded(wide_t<T> x, uint32_t) { return x; }
// Up or down in proportion to what is cut off, so that many small updates are not lost.
template <> inline at::BFloat16 rounded<at::BFloat16>(float x, uint32_t random) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t kept = bits | ((bits & 0xffffu) ? 0x10000u : 0u);  // a NaN stays one
  const uint32_t moved = finite ? bits + (random & 0xffffu) : kept;
  return at::BFloat16(static_cast<uint16_t>(moved >> 16), at::BFloat16::from_bits());
}

// beta^k for the few steps that most rows miss.
struct Powers {
  double beta;
  std::vector<double> table;
  explicit Powers(double b) : beta(b), table(256) {
    for (size_t k = 0; k < table.size(); ++k) table[k] = std::pow(b, k);
  }
  double operator()(int64_t k) const { return k >= 0 && k < 256 ? table[k] : std::pow(beta, k); }
};

struct Adam {
  int64_t step;
  double lr, beta1, beta2, eps;
  uint32_t key;  // of this step's random bits
};

template <typename T>
void move_rows(const Adam& a, const int64_t* row, int64_t u, const T* gradients, int64_t W, T* weights, wide_t<T>* states,
               int64_t S) {
  using wide = wide_t<T>;
  const Powers power1(a.beta1), power2(a.beta2);
  const wide rate = a.lr / (1 - std::pow(a.beta1, a.step)), unbias = 1 / (1 - std::pow(a.beta2, a.step));
  const int64_t firsts = a.beta1 ? W : 0;
  const bool by_row = S - 1 - firsts != W;
  const wide eps = a.eps, new1 = 1 - a.beta1, new2 = 1 - a.beta2;
  parallel_for(0, u, grain(4 * W), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) {
        const int64_t r = row[i + kAhead];
        __builtin_prefetch(weights + r * W, 1);
        for (int64_t at = 0; at < S; at += 64 / sizeof(wide)) __builtin_prefetch(states + r * S + at, 1);
        __builtin_prefetch(states + (r + 1) * S - 1, 1);
      }
      const int64_t r = row[i];
      wide *m = states + r * S, *v = m + firsts, *last = m + S - 1;
      const int64_t missed = a.step - static_cast<int64_t>(*last);
      *last = static_cast<wide>(a.step);
      const wide decay1 = power1(missed), decay2 = power2(missed);
      const T* g = gradients + i * W;
      T* w = weights + r * W;
      const uint32_t random = scramble(static_cast<uint32_t>(r) ^ a.key) ^ static_cast<uint32_t>(r >> 32);
      wide row_root = 0;
      if (by_row) {
        wide square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t k = 0; k < W; ++k) square += widened(g[k]) * widened(g[k]);
        *v = decay2 * *v + new2 * (square / W);
        row_root = std::sqrt(*v * unbias) + eps;
      }
#pragma omp simd
      for (int64_t k = 0; k < W; ++k) {
        const wide gradient = widened(g[k]);
        wide first = gradient, root = row_root;
        if (firsts) first = m[k] = decay1 * m[k] + new1 * gradient;
        if (!by_row) {
          v[k] = decay2 * v[k] + new2 * gradient * gradient;
          root = std::sqrt(v[k] * unbias) + eps;
        }
        w[k] = rounded<T>(widened(w[k]) - rate * first / root,
                          scramble(random + static_cast<uint32_t>(k) * 0x9e3779b9u));
      }
    }
  });
}

void row_adam(at::Tensor table, at::Tensor row_state, const at::Tensor& rows, const at::Tensor& grads, int64_t step,
              double lr, double beta1, double beta2, double eps, int64_t seed) {
  check_axes("table", table, 2);
  check_axes("row_state", row_state, 2);
  const int64_t R = table.size(0), W = table.size(1), u = rows.numel(), S = row_state.size(1), seconds = S - 1 - (beta1 ? W : 0);
  check_shape(row_state.size(0) == R && (seconds == 1 || seconds == W), "row_state", row_state,
              "[R, S] with S for moments and step");
  check_shape("rows", rows, {u});
  check_shape("grads", grads, {u, W});
  TORCH_CHECK_VALUE(table.is_contiguous() && row_state.is_contiguous(), "strides of table and row_state are ", table.strides(),
                    " and ", row_state.strides(), ": allowed are those of contiguous ones");
  const auto rows_c = rows.contiguous(), grads_c = grads.contiguous();
  const int64_t* row = rows_c.const_data_ptr<int64_t>();
  check_rows(row, u, R);
  const Adam a{step, lr, beta1, beta2, eps, scramble(static_cast<uint32_t>(seed) ^ scramble(static_cast<uint32_t>(step)))};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, table.scalar_type(), "row_adam", [&] {
    using wide = wide_t<scalar_t>;
    move_rows<scalar_t>(a, row, u, grads_c.const_data_ptr<scalar_t>(), W, table.mutable_data_ptr<scalar_t>(),
                        row_state.mutable_data_ptr<wide>(), S);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("gather_rows", gather_rows);
  m.impl("combine_rows", combine_rows);
  m.impl("row_adam_", row_adam);
}
}  // namespace engram
