// Causal softmax attention within documents and its gradient, some queries at a time (reference in
// kernels/causal_attention.py). Keys that no query of a block sees are not multiplied, and scores are made anew for the
// backward pass, as in FlashAttention (arXiv:2205.14135); a row of scores is kept whole, since it fits in cache.
#include "heads.h"
#include "product.h"

#include <limits>

namespace engram {
namespace {

using Maybe = std::optional<at::Tensor>;

constexpr int64_t kBlock = 32;  // queries at a time

template <typename S> struct At : Heads {
  S* data;
  At(S* data_, const at::Tensor& x) : Heads(x), data(data_) {}
  S* head(int64_t b, int64_t i) const { return data + at(b, 0, i); }
};
template <typename T> At<const T> to_read(const at::Tensor& x) { return {x.const_data_ptr<T>(), x}; }
template <typename T> At<T> to_write(at::Tensor& x) { return {x.mutable_data_ptr<T>(), x}; }

// The keys that a block of queries sees lie from `first`, a multiple of lanes, over `count` places, a multiple too.
struct Block {
  int64_t from, queries, first, keys, count;
};

template <typename T, typename Visit> void each_block(int64_t positions, const int64_t* starts, const Visit& visit) {
  for (int64_t from = 0; from < positions; from += kBlock) {
    const int64_t queries = std::min(kBlock, positions - from);
    const int64_t first = starts ? starts[from] / kLanes<T> * kLanes<T> : 0, keys = from + queries - first;
    visit(Block{from, queries, first, keys, padded_lanes<T>(keys)});
  }
}

// The part of a block's row of scores that query i of it sees.
struct Seen {
  int64_t begin, end;
  Seen(const Block& b, int64_t i, const int64_t* starts)
      : begin(starts ? starts[b.from + i] - b.first : 0), end(b.from + i + 1 - b.first) {}
};

// Which of the places from `from` a query sees: all bits, or none.
template <typename T> inline places_t<T> seen_from(int64_t from, const Seen& seen) {
  places_t<T> place;
  for (int64_t i = 0; i < kLanes<T>; ++i) place[i] = i;
  using P = std::remove_cvref_t<decltype(place[0])>;
  const P begin = seen.begin - from, end = seen.end - from;
  return (place >= begin) & (place < end);
}

template <typename T, typename W> W largest(const W* row, int64_t count, const Seen& seen) {
  using V = vector_t<T>;
  V top = V{} - std::numeric_limits<W>::infinity();
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const V x = load(row + j);
    top = (seen_from<T>(j, seen) & (x > top)) ? x : top;
  }
  W best = top[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) best = std::max<W>(best, top[i]);
  return best;
}

template <typename T, typename W> void store_scaled(const W* from, int64_t n, W factor, T* to) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store<T>(factor * load(from + i), to + i, n - i);
}

template <typename T>
void forward(const At<const T>& q, const At<const T>& k, const At<const T>& v, const int64_t* starts,
             const At<T>& out, wide_t<T>* log_sum) {
  using Unit = typename Factor<T>::Unit;
  using W = wide_t<T>;
  using V = vector_t<T>;
  constexpr int64_t pair = Factor<T>::kPair;
  const int64_t N = padded_lanes<T>(q.T), wide = padded_lanes<T>(v.c), c = units<T>(q.c);
  const W scale = 1 / std::sqrt(W(q.c));
  parallel_for(0, q.B * q.h, 1, [&](int64_t begin, int64_t end) {
    std::vector<Unit> keys(c * N), values(N / pair * wide);
    std::vector<W> scores(kBlock * N), sums(kBlock * wide);
    std::vector<T> shares(kBlock * N);
    W of_row[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / q.h, i = task % q.h, group = i / (q.h / k.h);
      const int64_t* first = starts ? starts + b * q.T : nullptr;
      pack_columns(k.head(b, group), k.sT, k.T, k.c, keys.data(), N);
      pack_rows(v.head(b, group), v.sT, v.T, v.c, values.data(), wide);
      std::fill(values.begin() + units<T>(v.T) * wide, values.end(), Unit(0));
      each_block<T>(q.T, first, [&](const Block& block) {
        const auto* rows = reinterpret_cast<const Unit*>(q.head(b, i) + block.from * q.sT);
        product<T>({rows, q.sT / pair, 1}, keys.data() + block.first, N, block.queries, block.count, c, scores.data(), N, false);
        for (int64_t m = 0; m < block.queries; ++m) {
          const Seen seen(block, m, first);
          const W* row = scores.data() + m * N;
          T* share = shares.data() + m * N;
          const W top = largest<T>(row, block.count, seen);
          V sum{};
          for (int64_t j = 0; j < block.count; j += kLanes<T>) {
            const V p = seen_from<T>(j, seen) ? exponential(scale * (load(row + j) - top)) : V{};
            sum += p;
            store(p, share + j);
          }
          of_row[m] = sum_of(sum);
          log_sum[task * q.T + block.from + m] = std::log(of_row[m]) + scale * top;
        }
        product<T>({reinterpret_cast<const Unit*>(shares.data()), N / pair, 1}, values.data() + block.first / pair * wide,
                   wide, block.queries, wide, block.count / pair, sums.data(), wide, false);
        for (int64_t m = 0; m < block.queries; ++m)
          store_scaled(sums.data() + m * wide, out.c, 1 / of_row[m], out.head(b, i) + (block.from + m) * out.sT);
      });
    }
  });
}

template <typename T>
void backward(const At<const T>& grad, const At<const T>& q, const At<const T>& k, const At<const T>& v,
              const int64_t* starts, const At<const T>& out, const wide_t<T>* log_sum,
              const At<T>& grad_q, const At<T>& grad_k, const At<T>& grad_v) {
  using Unit = typename Factor<T>::Unit;
  using W = wide_t<T>;
  using V = vector_t<T>;
  constexpr int64_t pair = Factor<T>::kPair;
  const int64_t N = padded_lanes<T>(q.T), shared = q.h / k.h;
  const int64_t narrow = padded_lanes<T>(q.c), wide = padded_lanes<T>(v.c), c = units<T>(q.c), w = units<T>(v.c);
  const W scale = 1 / std::sqrt(W(q.c));
  parallel_for(0, q.B * k.h, 1, [&](int64_t begin, int64_t end) {
    std::vector<Unit> key_columns(c * N), value_columns(w * N), key_rows(N / pair * narrow);
    std::vector<Unit> query_rows(kBlock * narrow), grad_rows(kBlock * wide), turned(kBlock * N);
    std::vector<W> scores(kBlock * N), by_share(kBlock * N), sums(kBlock * narrow), by_key(N * narrow), by_value(N * wide);
    std::vector<T> shares(kBlock * N), by_score(kBlock * N);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / k.h, group = task % k.h;
      const int64_t* first = starts ? starts + b * q.T : nullptr;
      pack_columns(k.head(b, group), k.sT, k.T, k.c, key_columns.data(), N);
      pack_columns(v.head(b, group), v.sT, v.T, v.c, value_columns.data(), N);
      pack_rows(k.head(b, group), k.sT, k.T, k.c, key_rows.data(), narrow);
      std::fill(key_rows.begin() + units<T>(k.T) * narrow, key_rows.end(), Unit(0));
      std::fill(by_key.begin(), by_key.end(), W(0));
      std::fill(by_value.begin(), by_value.end(), W(0));
      for (int64_t i = group * shared; i < (group + 1) * shared; ++i) {
        const W* logs = log_sum + (b * q.h + i) * q.T;
        each_block<T>(q.T, first, [&](const Block& block) {
          const int64_t M = block.queries, count = block.count;
          const T *queries = q.head(b, i) + block.from * q.sT, *grads = grad.head(b, i) + block.from * grad.sT;
          product<T>({reinterpret_cast<const Unit*>(queries), q.sT / pair, 1}, key_columns.data() + block.first, N, M, count,
                     c, scores.data(), N, false);
          product<T>({reinterpret_cast<const Unit*>(grads), grad.sT / pair, 1}, value_columns.data() + block.first, N, M,
                     count, w, by_share.data(), N, false);
          for (int64_t m = 0; m < M; ++m) {
            const Seen seen(block, m, first);
            const T *g = grads + m * grad.sT, *y = out.head(b, i) + (block.from + m) * out.sT;
            V along{};
            for (int64_t d = 0; d < v.c; d += kLanes<T>) along += load(g + d, v.c - d) * load(y + d, v.c - d);
            const W delta = sum_of(along);
            W *row = scores.data() + m * N, *back = by_share.data() + m * N;
            T *share = shares.data() + m * N, *score = by_score.data() + m * N;
            const W log = logs[block.from + m];
            for (int64_t j = 0; j < count; j += kLanes<T>) {
              const auto sees = seen_from<T>(j, seen);
              const V x = scale * load(row + j) - log;  // 0 at most, but for rounding
              const V p = sees ? exponential(x > 0 ? V{} : x) : V{};
              store(p, share + j);
              store(sees ? scale * p * (load(back + j) - delta) : V{}, score + j);
            }
          }
          product<T>({reinterpret_cast<const Unit*>(by_score.data()), N / pair, 1},
                     key_rows.data() + block.first / pair * narrow, narrow, M, narrow, count / pair, sums.data(), narrow, false);
          for (int64_t m = 0; m < M; ++m)
            store_scaled(sums.data() + m * narrow, q.c, W(1), grad_q.head(b, i) + (block.from + m) * grad_q.sT);
          const auto add_up = [&](const T* of_pairs, const T* rows, int64_t stride, int64_t width, Unit* packed, int64_t lanes, W* total) {
            pack_rows(of_pairs, N, M, count, turned.data(), N);
            pack_rows(rows, stride, M, width, packed, lanes);
            product<T>({turned.data(), 1, N}, packed, lanes, block.keys, lanes, units<T>(M), total + block.first * lanes,
                       lanes, true);
          };
          add_up(by_score.data(), queries, q.sT, q.c, query_rows.data(), narrow, by_key.data());
          add_up(shares.data(), grads, grad.sT, v.c, grad_rows.data(), wide, by_value.data());
        });
      }
      for (int64_t t = 0; t < q.T; ++t) {
        store_scaled(by_key.data() + t * narrow, k.c, W(1), grad_k.head(b, group) + t * grad_k.sT);
        store_scaled(by_value.data() + t * wide, v.c, W(1), grad_v.head(b, group) + t * grad_v.sT);
      }
    }
  });
}

// The type to multiply in: bfloat16 where there are products of it and heads hold whole pairs.
at::ScalarType type_for(const at::Tensor& q, const at::Tensor& v) {
  if (v.scalar_type() == at::kDouble) return at::kDouble;
  const bool pairs = kHasBFloat16Products && q.size(3) % 2 == 0 && v.size(3) % 2 == 0;
  return v.scalar_type() == at::kBFloat16 && pairs ? at::kBFloat16 : at::kFloat;
}

at::Tensor ready(const at::Tensor& x_, at::ScalarType type) {
  const auto x = x_.to(type);
  bool whole = x.stride(3) == 1;  // units, for each head
  for (int64_t axis = 0; axis < 3; ++axis) whole = whole && x.stride(axis) % 2 == 0;
  return whole ? x : x.contiguous();
}

template <typename Call> void dispatch(at::ScalarType type, const Call& call) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if (type == at::kBFloat16) return call(at::BFloat16());
#endif
  type == at::kDouble ? call(double()) : call(float());
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                                             const Maybe& starts_) {
  check_axes("q", q_, 4);
  check_axes("v", v_, 4);
  const int64_t B = q_.size(0), T = q_.size(1), g = v_.size(2);
  check_shape(v_.size(0) == B && v_.size(1) == T && g > 0 && q_.size(2) % g == 0, "v", v_,
              "[B, T, g, w] with g dividing the heads of q");
  check_shape("k", k_, {B, T, g, q_.size(3)});
  check_shape("starts", starts_, {B, T});
  const auto type = type_for(q_, v_);
  const auto q = ready(q_, type), k = ready(k_, type), v = ready(v_, type);
  const auto starts = starts_ ? Maybe(starts_->contiguous()) : Maybe();
  auto out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, v.options());
  auto log_sum = at::empty({q.size(0), q.size(2), q.size(1)}, v.options().dtype(type == at::kDouble ? type : at::kFloat));
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(to_read<T>(q), to_read<T>(k), to_read<T>(v), data_or_null<int64_t>(starts), to_write<T>(out),
               log_sum.mutable_data_ptr<wide_t<T>>());
  });
  return {out.to(v_.scalar_type()), log_sum};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_, const at::Tensor& q_,
                                                                  const at::Tensor& k_, const at::Tensor& v_,
                                                                  const Maybe& starts_, const at::Tensor& out_,
                                                                  const at::Tensor& log_sum) {
  const auto type = type_for(q_, v_);
  const auto grad = ready(grad_, type), q = ready(q_, type), k = ready(k_, type), v = ready(v_, type), out = ready(out_, type);
  const auto starts = starts_ ? Maybe(starts_->contiguous()) : Maybe();
  auto grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
  auto grad_v = at::empty(v.sizes(), v.options());
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(to_read<T>(grad), to_read<T>(q), to_read<T>(k), to_read<T>(v), data_or_null<int64_t>(starts), to_read<T>(out),
                log_sum.const_data_ptr<wide_t<T>>(), to_write<T>(grad_q), to_write<T>(grad_k),
                to_write<T>(grad_v));
  });
  return {grad_q.to(q_.scalar_type()), grad_k.to(k_.scalar_type()), grad_v.to(v_.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}
}  // namespace engram
