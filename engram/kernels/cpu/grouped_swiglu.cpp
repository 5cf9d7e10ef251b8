// Experts one after the other, each with the rows that chose it: gather, multiply, SwiGLU, multiply, and back (reference
// in kernels/grouped_swiglu.py). No padding, and nothing to set up for a new number of rows, which is what a library's
// products of small groups spend their time on.
#include "product.h"
#include "swiglu.h"

#include <ATen/ops/zeros.h>

#include <atomic>
#include <memory>
#include <numeric>

namespace engram {
namespace {

template <typename T> struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t n) : data(std::make_unique_for_overwrite<T[]>(n)) {}
  T* operator()(int64_t at = 0) const { return data.get() + at; }
};

// N tokens with K copies each among rows ordered by expert; experts of width F on D numbers.
struct Sizes {
  int64_t N, K, D, F, E;
  const int64_t *copy, *end;
  int64_t begin(int64_t e) const { return e ? end[e - 1] : 0; }
  int64_t rows(int64_t e) const { return end[e] - begin(e); }
  int64_t token(int64_t row) const { return copy[row] / K; }
};

// Calls start() in each thread and what that returned for every expert with rows, those with most of them first.
template <typename Start> void each_expert(const Sizes& s, const Start& start) {
  std::vector<int64_t> order(s.E);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s.rows(a) > s.rows(b); });
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(at::get_num_threads(), s.E), 1, [&](int64_t, int64_t) {
    auto visit = start();
    for (int64_t i = next++; i < s.E && s.rows(order[i]) > 0; i = next++) visit(order[i]);
  });
}

// Lines of T that hold whole units: the length of a row of n numbers.
template <typename T> int64_t line(int64_t n) { return units<T>(n) * Factor<T>::kPair; }

template <typename T> Left<T> left_rows(const T* x, int64_t length) {
  return {reinterpret_cast<const typename Factor<T>::Unit*>(x), length / Factor<T>::kPair, 1};
}

template <typename T> void copy_row(const T* from, int64_t n, T* to) {
  std::memcpy(to, from, n * sizeof(T));
  std::fill(to + n, to + line<T>(n), T(0));
}

template <typename T, typename S> void store_row(const wide_t<T>* from, int64_t n, S* to) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store<S>(load(from + i), to + i, n - i);
}

// An expert's matrix in the type to multiply in, from `scratch` if it is stored in another.
template <typename T, typename S> const T* matrix(const S* stored, int64_t size, T* scratch) {
  if constexpr (std::is_same_v<T, S>) {
    return stored;
  } else {
    for (int64_t i = 0; i < size; i += kLanes<T>) store<T>(load(stored + i, size - i), scratch + i, size - i);
    return scratch;
  }
}

// Rows at a time, so that their sums of `width` lanes stay in L2.
inline int64_t row_block(int64_t width) { return std::clamp<int64_t>(65536 / std::max<int64_t>(width, 1) / 12 * 12, 12, 192); }

template <typename T, typename S>
void forward(const Sizes& s, const T* x, const wide_t<T>* weights, const S* w_gate_up, const S* w_down, T* gate_up, T* y) {
  using Unit = typename Factor<T>::Unit;
  const int64_t D = s.D, F = s.F, wide_F = padded_lanes<T>(2 * F), wide_D = padded_lanes<T>(D);
  const int64_t block = row_block(std::max(wide_F, wide_D)), in = line<T>(D), inner = line<T>(F);
  each_expert(s, [&] {
    Buffer<T> narrow(std::is_same_v<T, S> ? 0 : D * 2 * F), rows(block * in), hidden(block * inner);
    Buffer<Unit> up_panels(packed_size<T>(D, 2 * F)), down_panels(packed_size<T>(F, D));
    Buffer<wide_t<T>> sums(block * std::max(wide_F, wide_D));
    return [=, &s, narrow = std::move(narrow), rows = std::move(rows), hidden = std::move(hidden),
            up_panels = std::move(up_panels), down_panels = std::move(down_panels), sums = std::move(sums)](int64_t e) {
      pack_row_panels(matrix(w_gate_up + e * D * 2 * F, D * 2 * F, narrow()), 2 * F, D, 2 * F, up_panels());
      pack_row_panels(matrix(w_down + e * F * D, F * D, narrow()), D, F, D, down_panels());
      for (int64_t from = s.begin(e); from < s.end[e]; from += block) {
        const int64_t M = std::min(block, s.end[e] - from);
        for (int64_t m = 0; m < M; ++m) copy_row(x + s.token(from + m) * D, D, rows(m * in));
        product_with_panels(left_rows(rows(), in), up_panels(), M, 2 * F, units<T>(D), sums(), wide_F);
        for (int64_t m = 0; m < M; ++m) {
          T *gate = gate_up + (from + m) * 2 * F, *up = gate + F, *h = hidden(m * inner);
          store_row<T>(sums(m * wide_F), 2 * F, gate);
          swiglu_row(gate, up, F, weights[s.copy[from + m]], h);
          std::fill(h + F, h + inner, T(0));
        }
        product_with_panels(left_rows(hidden(), inner), down_panels(), M, D, units<T>(F), sums(), wide_D);
        for (int64_t m = 0; m < M; ++m) store_row<T>(sums(m * wide_D), D, y + (from + m) * D);
      }
    };
  });
}

// left^T right of an expert's rows, [A, B] from packed panels: row by row to `out`.
template <typename T, typename S>
void outer(const typename Factor<T>::Unit* left, int64_t A, const typename Factor<T>::Unit* right, int64_t B, int64_t rows,
           wide_t<T>* sums, S* out) {
  const int64_t P = units<T>(rows);
  for (int64_t b = 0; b < B; b += kPanel)
    for (int64_t a = 0; a < A; a += kPanel) {
      const int64_t M = std::min(kPanel, A - a), N = std::min(kPanel, B - b);
      product_with_panel<T>({left + a * P, 1, padded_lanes<T>(M)}, right, b, B, M, P, sums, kPanel);
      for (int64_t m = 0; m < M; ++m) store_row<T>(sums + m * kPanel, N, out + (a + m) * B + b);
    }
}

template <typename T, typename S>
void backward(const Sizes& s, const T* grad, const T* x, const wide_t<T>* weights, const T* gate_up, const S* w_gate_up,
              const S* w_down, T* grad_rows, wide_t<T>* grad_weights, S* grad_gate_up, S* grad_down) {
  using Unit = typename Factor<T>::Unit;
  using W = wide_t<T>;
  const int64_t D = s.D, F = s.F, wide_F = padded_lanes<T>(F), wide_D = padded_lanes<T>(D);
  const int64_t block = row_block(std::max(wide_F, wide_D)), in = line<T>(D), inner = line<T>(F), both = line<T>(2 * F);
  int64_t most = 0;
  for (int64_t e = 0; e < s.E; ++e) most = std::max(most, s.rows(e));
  each_expert(s, [&] {
    // Of all rows of an expert: what comes in from both sides, the hidden layer, and the gradient of gate and up.
    Buffer<T> narrow(std::is_same_v<T, S> ? 0 : D * 2 * F), rows(most * in), grads(most * in), hidden(most * inner);
    Buffer<T> by_gate_up(most * both);
    Buffer<Unit> up_panels(packed_size<T>(2 * F, D)), down_panels(packed_size<T>(D, F));
    Buffer<Unit> left_panels(packed_size<T>(most, std::max(D, F))), right_panels(packed_size<T>(most, std::max(D, 2 * F)));
    Buffer<W> sums(std::max(block * std::max(wide_F, wide_D), kPanel * kPanel));
    return [=, &s, narrow = std::move(narrow), rows = std::move(rows), grads = std::move(grads), hidden = std::move(hidden),
            by_gate_up = std::move(by_gate_up), up_panels = std::move(up_panels), down_panels = std::move(down_panels),
            left_panels = std::move(left_panels), right_panels = std::move(right_panels), sums = std::move(sums)](int64_t e) {
      const int64_t begin = s.begin(e), R = s.rows(e);
      pack_column_panels(matrix(w_down + e * F * D, F * D, narrow()), D, F, D, down_panels());
      pack_column_panels(matrix(w_gate_up + e * D * 2 * F, D * 2 * F, narrow()), 2 * F, D, 2 * F, up_panels());
      for (int64_t r = 0; r < R; ++r) {
        copy_row(grad + s.token(begin + r) * D, D, grads(r * in));
        copy_row(x + s.token(begin + r) * D, D, rows(r * in));
      }
      for (int64_t from = 0; from < R; from += block) {
        const int64_t M = std::min(block, R - from);
        product_with_panels(left_rows(grads(from * in), in), down_panels(), M, F, units<T>(D), sums(), wide_F);
        for (int64_t m = 0; m < M; ++m) {
          const int64_t r = from + m, copy = s.copy[begin + r];
          const T *gate = gate_up + (begin + r) * 2 * F, *up = gate + F;
          T *h = hidden(r * inner), *by_gate = by_gate_up(r * both);
          grad_weights[copy] = swiglu_row_backward(sums(m * wide_F), gate, up, F, weights[copy], by_gate, by_gate + F, h);
          std::fill(h + F, h + inner, T(0));
          std::fill(by_gate + 2 * F, by_gate + both, T(0));
        }
        product_with_panels(left_rows(by_gate_up(from * both), both), up_panels(), M, D, units<T>(2 * F), sums(), wide_D);
        for (int64_t m = 0; m < M; ++m) store_row<T>(sums(m * wide_D), D, grad_rows + (begin + from + m) * D);
      }
      pack_row_panels(hidden(), inner, R, F, left_panels());
      pack_row_panels(grads(), in, R, D, right_panels());
      outer<T>(left_panels(), F, right_panels(), D, R, sums(), grad_down + e * F * D);
      pack_row_panels(rows(), in, R, D, left_panels());
      pack_row_panels(by_gate_up(), both, R, 2 * F, right_panels());
      outer<T>(left_panels(), D, right_panels(), 2 * F, R, sums(), grad_gate_up + e * D * 2 * F);
    };
  });
  for (int64_t e = 0; e < s.E; ++e)
    if (!s.rows(e)) {
      std::fill_n(grad_gate_up + e * D * 2 * F, D * 2 * F, S(0));
      std::fill_n(grad_down + e * F * D, F * D, S(0));
    }
}

// out [N, D]: the sum of each token's K rows.
template <typename T> void collect(const Sizes& s, const T* rows, const int64_t* place, T* out) {
  parallel_for(0, s.N, grain(s.K * s.D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t d = 0; d < s.D; d += kLanes<T>) {
        vector_t<T> sum{};
        for (int64_t k = 0; k < s.K; ++k) sum += load(rows + place[n * s.K + k] * s.D + d, s.D - d);
        store<T>(sum, out + n * s.D + d, s.D - d);
      }
  });
}

// What both passes take, ready to be read.
struct Inputs {
  at::Tensor x, weights, place, copy, ends, w_gate_up, w_down;
  at::ScalarType type, wide;  // to multiply in: bfloat16 where there are products of it; to sum in
  Inputs(const at::Tensor& x_, const at::Tensor& weights_, const at::Tensor& place_, const at::Tensor& copy_,
         const at::Tensor& ends_, const at::Tensor& w_gate_up_, const at::Tensor& w_down_)
      : place(place_.contiguous()), copy(copy_.contiguous()), ends(ends_.contiguous()),
        wide(x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    check_axes("x", x_, 2);
    check_axes("w_down", w_down_, 3);
    check_axes("place", place, 2);
    const int64_t D = x_.size(1), E = w_down_.size(0), F = w_down_.size(1);
    check_shape("w_down", w_down_, {E, F, D});
    check_shape("w_gate_up", w_gate_up_, {E, D, 2 * F});
    check_shape("ends", ends, {E});
    check_shape("place", place, {x_.size(0), place.size(1)});
    check_shape("weights", weights_, place.sizes());
    type = x_.scalar_type() == at::kBFloat16 && kHasBFloat16Products ? at::kBFloat16 : wide;
    x = x_.to(type).contiguous();
    weights = weights_.to(wide).contiguous();
    // In the type of x, or wider.
    const auto stored = w_gate_up_.scalar_type() == type ? type : wide;
    w_gate_up = w_gate_up_.to(stored).contiguous();
    w_down = w_down_.to(stored).contiguous();
  }
  Sizes sizes() const {
    return {place.size(0), place.size(1), x.size(1), w_down.size(1), w_down.size(0), copy.const_data_ptr<int64_t>(),
            ends.const_data_ptr<int64_t>()};
  }
};

// Calls call(of the type of x, of that of the weights).
template <typename Call> void dispatch(const Inputs& in, const Call& call) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if (in.type == at::kBFloat16)
    return in.w_down.scalar_type() == at::kBFloat16 ? call(at::BFloat16(), at::BFloat16()) : call(at::BFloat16(), float());
#endif
  in.type == at::kDouble ? call(double(), double()) : call(float(), float());
}

std::tuple<at::Tensor, at::Tensor> grouped_swiglu(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& place,
                                                  const at::Tensor& copy, const at::Tensor& ends,
                                                  const at::Tensor& w_gate_up, const at::Tensor& w_down) {
  const Inputs in(x, weights, place, copy, ends, w_gate_up, w_down);
  const Sizes s = in.sizes();
  auto out = at::empty({s.N, s.D}, in.x.options()), gate_up = at::empty({in.copy.numel(), 2 * s.F}, in.x.options());
  auto rows = at::empty({in.copy.numel(), s.D}, in.x.options());
  dispatch(in, [&](auto one, auto other) {
    using T = decltype(one);
    using S = decltype(other);
    forward<T, S>(s, in.x.const_data_ptr<T>(), in.weights.const_data_ptr<wide_t<T>>(), in.w_gate_up.const_data_ptr<S>(),
                  in.w_down.const_data_ptr<S>(), gate_up.mutable_data_ptr<T>(), rows.mutable_data_ptr<T>());
    collect<T>(s, rows.const_data_ptr<T>(), in.place.const_data_ptr<int64_t>(), out.mutable_data_ptr<T>());
  });
  return {out.to(x.scalar_type()), gate_up.to(x.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_swiglu_backward(
    const at::Tensor& grad_, const at::Tensor& x, const at::Tensor& weights, const at::Tensor& place, const at::Tensor& copy,
    const at::Tensor& ends, const at::Tensor& w_gate_up, const at::Tensor& w_down, const at::Tensor& gate_up_) {
  const Inputs in(x, weights, place, copy, ends, w_gate_up, w_down);
  const auto grad = grad_.to(in.type).contiguous(), gate_up = gate_up_.to(in.type).contiguous();
  const Sizes s = in.sizes();
  auto rows = at::empty({in.copy.numel(), s.D}, in.x.options()), grad_x = at::empty({s.N, s.D}, in.x.options());
  auto grad_weights = at::empty({s.N, s.K}, in.weights.options());
  auto grad_gate_up = at::empty(in.w_gate_up.sizes(), in.w_gate_up.options());
  auto grad_down = at::empty(in.w_down.sizes(), in.w_down.options());
  dispatch(in, [&](auto one, auto other) {
    using T = decltype(one);
    using S = decltype(other);
    backward<T, S>(s, grad.const_data_ptr<T>(), in.x.const_data_ptr<T>(), in.weights.const_data_ptr<wide_t<T>>(),
                   gate_up.const_data_ptr<T>(), in.w_gate_up.const_data_ptr<S>(), in.w_down.const_data_ptr<S>(),
                   rows.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<wide_t<T>>(),
                   grad_gate_up.mutable_data_ptr<S>(), grad_down.mutable_data_ptr<S>());
    collect<T>(s, rows.const_data_ptr<T>(), in.place.const_data_ptr<int64_t>(), grad_x.mutable_data_ptr<T>());
  });
  return {grad_x.to(x.scalar_type()), grad_weights.to(weights.scalar_type()), grad_gate_up.to(w_gate_up.scalar_type()),
          grad_down.to(w_down.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("grouped_swiglu", grouped_swiglu);
  m.impl("grouped_swiglu_backward", grouped_swiglu_backward);
}
}  // namespace engram
