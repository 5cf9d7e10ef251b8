// Hyper-connections: Sinkhorn-Knopp on a small matrix for each token, and branches read and written (references in
// kernels/sinkhorn.py).
#include "vectors.h"

namespace engram {
namespace {

// Matrices [M, M] of several tokens, each in its own lane of vectors: alone, one is too small to fill any.
template <typename W> class Matrices {
 public:
  static constexpr int64_t lanes = kLanes<W>;

  Matrices(int64_t M_, int64_t steps_) : M(M_), steps(steps_), numbers((2 * M * M + 2 * steps * M) * lanes) {}

  template <typename T> void forward(const T* logits, int64_t tokens, T* out) {
    load(logits, tokens, p);
    scale();
    store(p, tokens, out);
  }

  // The gradient is that of the logarithm of p before a division, each time; p goes back with it.
  template <typename T> void backward(const T* grad, const T* logits, int64_t tokens, T* out) {
    load(logits, tokens, p);
    scale();
    load(grad, tokens, g);
    for (int64_t i = 0; i < M * M; ++i) g[i] *= p[i];
    for (int64_t step = steps; step--;) {
      undivide(M, 1, totals + (2 * step + 1) * M);
      undivide(1, M, totals + 2 * step * M);
    }
    store(g, tokens, out);
  }

 private:
  typedef W Vector __attribute__((vector_size(64), aligned(alignof(W)), may_alias));

  int64_t M, steps;
  std::vector<W> numbers;
  Vector* const p = reinterpret_cast<Vector*>(numbers.data());
  Vector* const g = p + M * M;
  Vector* const totals = g + M * M;

  // The first step works on logits, so that no sum can vanish (the reference says why).
  void scale() {
    for (int64_t n = 0; n < M; ++n) {
      Vector most = p[n], total = {}, e;
      for (int64_t m = 1; m < M; ++m) raise(most, p[m * M + n]);
      for (int64_t m = 0; m < M; ++m) {
        exponentials(p[m * M + n] -= most, e);
        total += e;
      }
      totals[n] = total;
      g[n] = 1 / total;  // a place for it: gradients are not here yet
    }
    for (int64_t m = 0; m < M; ++m) {
      Vector most = p[m * M], e;
      for (int64_t n = 1; n < M; ++n) raise(most, p[m * M + n]);
      for (int64_t n = 0; n < M; ++n) {
        exponentials(p[m * M + n] - most, e);
        p[m * M + n] = e * g[n];
      }
      divide(m * M, 1, totals[M + m]);
      exponentials(most, e);
      totals[M + m] *= e;
    }
    for (int64_t step = 1; step < steps; ++step) {
      for (int64_t n = 0; n < M; ++n) divide(n, M, totals[2 * step * M + n]);
      for (int64_t m = 0; m < M; ++m) divide(m * M, 1, totals[(2 * step + 1) * M + m]);
    }
  }

  // Divides M elements of p, `stride` apart, by their sum.
  void divide(int64_t first, int64_t stride, Vector& total) {
    Vector sum = p[first];
    for (int64_t i = 1; i < M; ++i) sum += p[first + i * stride];
    const Vector inverse = 1 / sum;
    for (int64_t i = 0; i < M; ++i) p[first + i * stride] *= inverse;
    total = sum;
  }

  // Backward through `divide` of all rows (next = M, stride = 1) or columns (next = 1, stride = M).
  void undivide(int64_t next, int64_t stride, const Vector* total) {
    for (int64_t line = 0; line < M; ++line) {
      const int64_t first = line * next;
      Vector sum = {};
      for (int64_t i = 0; i < M; ++i) sum += g[first + i * stride];
      for (int64_t i = 0; i < M; ++i) {
        g[first + i * stride] -= p[first + i * stride] * sum;
        p[first + i * stride] *= total[line];
      }
    }
  }

  static void raise(Vector& most, const Vector& x) { most = x > most ? x : most; }
  static void exponentials(const Vector& x, Vector& out) { out = exponential((vector_t<W>)x); }

  // Lanes without a token hold a matrix of zeros.
  template <typename T> void load(const T* from, int64_t tokens, Vector* to) const {
    W* lane = reinterpret_cast<W*>(to);
    if (tokens < lanes) std::fill(lane, lane + M * M * lanes, W(0));
    for (int64_t l = 0; l < tokens; ++l)
      for (int64_t i = 0; i < M * M; ++i) lane[i * lanes + l] = widened(from[l * M * M + i]);
  }
  template <typename T> void store(const Vector* from, int64_t tokens, T* to) const {
    const W* lane = reinterpret_cast<const W*>(from);
    for (int64_t l = 0; l < tokens; ++l)
      for (int64_t i = 0; i < M * M; ++i) to[l * M * M + i] = narrowed<T>(lane[i * lanes + l]);
  }
};

// Calls visit(matrices, first token, how many) for all N tokens, as many at a time as there are lanes.
template <typename W, typename Visit> void each(int64_t N, int64_t M, int64_t steps, const Visit& visit) {
  constexpr int64_t lanes = Matrices<W>::lanes;
  parallel_for(0, (N + lanes - 1) / lanes, grain(lanes * M * M * steps), [&](int64_t begin, int64_t end) {
    Matrices<W> matrices(M, steps);
    for (int64_t n = begin * lanes; n < std::min(N, end * lanes); n += lanes)
      visit(matrices, n, std::min(lanes, N - n));
  });
}

at::Tensor sinkhorn(const at::Tensor& logits_, int64_t steps) {
  check_shape(logits_.dim() > 1 && logits_.size(-1) == logits_.size(-2) && logits_.size(-1) > 0, "logits", logits_,
              "[..., M, M] with M 1 or more");
  TORCH_CHECK_VALUE(steps >= 1, "steps is ", steps, ": allowed is 1 or more");
  const auto logits = logits_.contiguous();
  const int64_t M = logits.size(-1), N = logits.numel() / (M * M);
  auto result = at::empty_like(logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "sinkhorn", [&] {
    const auto* in = logits.const_data_ptr<scalar_t>();
    auto* out = result.mutable_data_ptr<scalar_t>();
    each<wide_t<scalar_t>>(N, M, steps, [&](auto& matrices, int64_t n, int64_t tokens) {
      matrices.forward(in + n * M * M, tokens, out + n * M * M);
    });
  });
  return result;
}

at::Tensor sinkhorn_backward(const at::Tensor& grad_, const at::Tensor& logits_, int64_t steps) {
  const auto grad = grad_.contiguous(), logits = logits_.contiguous();
  const int64_t M = logits.size(-1), N = logits.numel() / (M * M);
  auto result = at::empty_like(logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "sinkhorn_backward", [&] {
    const auto *g = grad.const_data_ptr<scalar_t>(), *in = logits.const_data_ptr<scalar_t>();
    auto* out = result.mutable_data_ptr<scalar_t>();
    each<wide_t<scalar_t>>(N, M, steps, [&](auto& matrices, int64_t n, int64_t tokens) {
      matrices.backward(g + n * M * M, in + n * M * M, tokens, out + n * M * M);
    });
  });
  return result;
}

template <typename T>
void read(const T* hidden, const wide_t<T>* weights, int64_t N, int64_t M, int64_t D, T* out) {
  using W = wide_t<T>;
  parallel_for(0, N, grain(M * D), [&](int64_t begin, int64_t end) {
    std::vector<W> buffer(D);
    W* sum = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sum, sum + D, W(0));
      for (int64_t m = 0; m < M; ++m) {
        const T* h = hidden + (n * M + m) * D;
        const W weight = weights[n * M + m];
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) sum[d] += weight * widened(h[d]);
      }
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[n * D + d] = narrowed<T>(sum[d]);
    }
  });
}

template <typename T>
void read_backward(const T* grad, const T* hidden, const wide_t<T>* weights, int64_t N, int64_t M, int64_t D,
                   T* grad_hidden, wide_t<T>* grad_weights) {
  using W = wide_t<T>;
  parallel_for(0, N, grain(2 * M * D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* g = grad + n * D;
      for (int64_t m = 0; m < M; ++m) {
        const T* h = hidden + (n * M + m) * D;
        T* gh = grad_hidden + (n * M + m) * D;
        const W weight = weights[n * M + m];
        W along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < D; ++d) {
          const W one = widened(g[d]);
          along += one * widened(h[d]);
          gh[d] = narrowed<T>(weight * one);
        }
        grad_weights[n * M + m] = along;
      }
    }
  });
}

template <typename T, typename U>
void write(const T* hidden, const U* update, const wide_t<T>* post, const wide_t<T>* res, int64_t N, int64_t M,
           int64_t D, T* out) {
  using W = wide_t<T>;
  parallel_for(0, N, grain(M * M * D), [&](int64_t begin, int64_t end) {
    std::vector<W> buffer(D);
    W* sum = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      const T* h = hidden + n * M * D;
      const U* u = update + n * D;
      for (int64_t m = 0; m < M; ++m) {
        const W weight = post[n * M + m];
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) sum[d] = weight * widened(u[d]);
        for (int64_t k = 0; k < M; ++k) {
          const W share = res[(n * M + m) * M + k];
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) sum[d] += share * widened(h[k * D + d]);
        }
        T* y = out + (n * M + m) * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) y[d] = narrowed<T>(sum[d]);
      }
    }
  });
}

template <typename T, typename U>
void write_backward(const T* grad, const T* hidden, const U* update, const wide_t<T>* post, const wide_t<T>* res,
                    int64_t N, int64_t M, int64_t D, T* grad_hidden, U* grad_update, wide_t<T>* grad_post,
                    wide_t<T>* grad_res) {
  using W = wide_t<T>;
  parallel_for(0, N, grain(2 * M * M * D), [&](int64_t begin, int64_t end) {
    std::vector<W> buffer(D);
    W* sum = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      const T *g = grad + n * M * D, *h = hidden + n * M * D;
      const U* u = update + n * D;
      std::fill(sum, sum + D, W(0));
      for (int64_t m = 0; m < M; ++m) {
        const W weight = post[n * M + m];
        W along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < D; ++d) {
          const W one = widened(g[m * D + d]);
          along += one * widened(u[d]);
          sum[d] += weight * one;
        }
        grad_post[n * M + m] = along;
      }
      U* gu = grad_update + n * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) gu[d] = narrowed<U>(sum[d]);
      for (int64_t k = 0; k < M; ++k) {
        std::fill(sum, sum + D, W(0));
        for (int64_t m = 0; m < M; ++m) {
          const W share = res[(n * M + m) * M + k];
          W along = 0;
#pragma omp simd reduction(+ : along)
          for (int64_t d = 0; d < D; ++d) {
            const W one = widened(g[m * D + d]);
            along += one * widened(h[k * D + d]);
            sum[d] += share * one;
          }
          grad_res[(n * M + m) * M + k] = along;
        }
        T* gh = grad_hidden + (n * M + k) * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) gh[d] = narrowed<T>(sum[d]);
      }
    }
  });
}

// Runs the code with T the type of hidden states, and U that of an update which is bfloat16 or the type to compute in.
#define ENGRAM_DISPATCH(HIDDEN, UPDATE, NAME, ...)                                                                 \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (HIDDEN).scalar_type(), NAME, [&] {                    \
    using T = scalar_t;                                                                                            \
    if ((UPDATE).scalar_type() == at::kBFloat16) { using U = at::BFloat16; __VA_ARGS__(); }                        \
    else { using U = wide_t<T>; __VA_ARGS__(); }                                                                   \
  })

at::ScalarType wide_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor wide(const at::Tensor& x, const at::Tensor& like) { return x.to(wide_type(like)).contiguous(); }

at::Tensor bfloat16_or_wide(const at::Tensor& x, const at::Tensor& like) {
  return x.scalar_type() == at::kBFloat16 ? x.contiguous() : wide(x, like);
}

at::Tensor read_branches(const at::Tensor& hidden_, const at::Tensor& weights_) {
  check_shape(hidden_.dim() > 1, "hidden", hidden_, "[..., M, D]");
  check_shape("weights", weights_, leading(hidden_));
  const auto hidden = hidden_.contiguous(), weights = wide(weights_, hidden);
  const int64_t M = hidden.size(-2), D = hidden.size(-1), N = rows_of(weights);
  auto shape = hidden.sizes().vec();
  shape.erase(shape.end() - 2);
  auto result = at::empty(shape, hidden.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, hidden.scalar_type(), "read_branches", [&] {
    read(hidden.const_data_ptr<scalar_t>(), weights.const_data_ptr<wide_t<scalar_t>>(), N, M, D,
         result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> read_branches_backward(const at::Tensor& grad_, const at::Tensor& hidden_,
                                                          const at::Tensor& weights_) {
  const auto grad = grad_.contiguous(), hidden = hidden_.contiguous(), weights = wide(weights_, hidden);
  const int64_t M = hidden.size(-2), D = hidden.size(-1), N = rows_of(weights);
  auto grad_hidden = at::empty_like(hidden), grad_weights = at::empty_like(weights);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, hidden.scalar_type(), "read_branches_backward", [&] {
    using W = wide_t<scalar_t>;
    read_backward(grad.const_data_ptr<scalar_t>(), hidden.const_data_ptr<scalar_t>(), weights.const_data_ptr<W>(), N, M,
                  D, grad_hidden.mutable_data_ptr<scalar_t>(), grad_weights.mutable_data_ptr<W>());
  });
  return {grad_hidden, grad_weights.to(weights_.scalar_type())};
}

at::Tensor write_branches(const at::Tensor& hidden_, const at::Tensor& update_, const at::Tensor& post_,
                          const at::Tensor& res_) {
  check_shape(hidden_.dim() > 1, "hidden", hidden_, "[..., M, D]");
  auto shape = hidden_.sizes().vec();
  check_shape("post", post_, leading(hidden_));
  shape.back() = hidden_.size(-2);
  check_shape("res", res_, shape);
  shape.pop_back();
  shape.back() = hidden_.size(-1);
  check_shape("update", update_, shape);
  const auto hidden = hidden_.contiguous(), update = bfloat16_or_wide(update_, hidden);
  const auto post = wide(post_, hidden), res = wide(res_, hidden);
  const int64_t M = hidden.size(-2), D = hidden.size(-1), N = rows_of(post);
  auto result = at::empty_like(hidden);
  ENGRAM_DISPATCH(hidden, update, "write_branches", [&] {
    using W = wide_t<T>;
    write(hidden.const_data_ptr<T>(), update.const_data_ptr<U>(), post.const_data_ptr<W>(), res.const_data_ptr<W>(), N,
          M, D, result.mutable_data_ptr<T>());
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> write_branches_backward(
    const at::Tensor& grad_, const at::Tensor& hidden_, const at::Tensor& update_, const at::Tensor& post_,
    const at::Tensor& res_) {
  const auto grad = grad_.contiguous(), hidden = hidden_.contiguous(), update = bfloat16_or_wide(update_, hidden);
  const auto post = wide(post_, hidden), res = wide(res_, hidden);
  const int64_t M = hidden.size(-2), D = hidden.size(-1), N = rows_of(post);
  auto grad_hidden = at::empty_like(hidden), grad_update = at::empty_like(update);
  auto grad_post = at::empty_like(post), grad_res = at::empty_like(res);
  ENGRAM_DISPATCH(hidden, update, "write_branches_backward", [&] {
    using W = wide_t<T>;
    write_backward(grad.const_data_ptr<T>(), hidden.const_data_ptr<T>(), update.const_data_ptr<U>(),
                   post.const_data_ptr<W>(), res.const_data_ptr<W>(), N, M, D, grad_hidden.mutable_data_ptr<T>(),
                   grad_update.mutable_data_ptr<U>(), grad_post.mutable_data_ptr<W>(), grad_res.mutable_data_ptr<W>());
  });
  return {grad_hidden, grad_update.to(update_.scalar_type()), grad_post.to(post_.scalar_type()),
          grad_res.to(res_.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) {
  m.impl("sinkhorn", sinkhorn);
  m.impl("sinkhorn_backward", sinkhorn_backward);
  m.impl("read_branches", read_branches);
  m.impl("read_branches_backward", read_branches_backward);
  m.impl("write_branches", write_branches);
  m.impl("write_branches_backward", write_branches_backward);
}
}  // namespace engram
