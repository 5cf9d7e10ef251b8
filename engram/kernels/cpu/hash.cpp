// Canonical ids -> table rows: multiply, XOR and reduce modulo each head's prime (reference in kernels/hashing.py).
#include "vectors.h"

#include <algorithm>

namespace engram {
namespace {

typedef uint64_t UnsignedLongs __attribute__((vector_size(64)));
constexpr int64_t kLongs = sizeof(Longs) / sizeof(int64_t);

inline Longs longs(const int64_t* from) {
  Longs x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

constexpr int64_t kTokens = 256;  // mixed at a time, so that mixes stay in cache
constexpr int64_t kAhead = 64;    // tokens whose rows are asked for before they are written

// Remainders by multiplication with inverses, eight heads of an order side by side in a vector.
//
// In double, x * (1 / p) is off by four roundings, each of at most 2^-53 of it. With the inverse lowered by as much it
// is never above x / p, and for x < 2^63 and p >= 2^13 less than 1 below: its floor is right or one less. Moduli below
// that take 64-bit fixed point: floor(x * floor((2^64 - 1) / p) / 2^64) is right or one less for every x below 2^64.
struct Moduli {
  std::vector<int64_t> p, offset;
  std::vector<double> inverse;
  std::vector<uint64_t> fixed;
  bool large = true;
  Moduli(const at::Tensor& moduli, const at::Tensor& offsets, int64_t ordinal) {
    const auto m = moduli.contiguous(), o = offsets.contiguous();
    const int64_t H = m.size(1), begin = ordinal * H, end = begin + H;
    p.assign(m.const_data_ptr<int64_t>() + begin, m.const_data_ptr<int64_t>() + end);
    offset.assign(o.const_data_ptr<int64_t>() + begin, o.const_data_ptr<int64_t>() + end);
    for (const int64_t modulus : p) {
      TORCH_CHECK_VALUE(modulus >= 1, "modulus is ", modulus, ": allowed is 1 or more");
      inverse.push_back((1 - 0x1p-51) / static_cast<double>(modulus));
      fixed.push_back(~uint64_t(0) / modulus);
      large = large && modulus >= (int64_t(1) << 13);
    }
  }
  // out[t * H + h] for every mix[o * kTokens + t] and the heads h of order o.
  void reduce(const int64_t* mix, int64_t n, int64_t heads, int64_t* out) const {
    const int64_t H = p.size(), beside = large ? heads / kLongs : 0, vectors = beside ? H / heads * beside : 0;
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) reduce_together<4>(mix, n, heads, v, out);
    for (; v + 2 <= vectors; v += 2) reduce_together<2>(mix, n, heads, v, out);
    for (; v < vectors; ++v) reduce_together<1>(mix, n, heads, v, out);
    for (int64_t h = 0; h < H; ++h)
      if (h % heads >= beside * kLongs) reduce_alone(mix + h / heads * kTokens, n, h, out);
  }

 private:
  void reduce_alone(const int64_t* x, int64_t n, int64_t h, int64_t* out) const {
    const int64_t H = p.size();
    const uint64_t scale = fixed[h], modulus = p[h], shift = offset[h];
    for (int64_t t = 0; t < n; ++t) {
      const uint64_t all = x[t], r = all - static_cast<uint64_t>((__uint128_t(all) * scale) >> 64) * modulus;
      out[t * H + h] = std::min(r, r - modulus) + shift;  // below zero is above all
    }
  }
  // V vectors of each token from the one numbered `first`: a row's cache lines are written one after the other, and
  // asked for ahead, since what the rows are written to is seldom in cache.
  template <int V>
  void reduce_together(const int64_t* mix, int64_t n, int64_t heads, int64_t first, int64_t* out) const {
    const int64_t H = p.size(), beside = heads / kLongs;
    const int64_t* x[V];
    int64_t begin[V];
    Doubles scale[V];
    Longs modulus[V], shift[V];
    for (int v = 0; v < V; ++v) {
      const int64_t order = (first + v) / beside;
      x[v] = mix + order * kTokens;
      begin[v] = order * heads + (first + v) % beside * kLongs;
      scale[v] = load(inverse.data() + begin[v]);
      modulus[v] = longs(p.data() + begin[v]);
      shift[v] = longs(offset.data() + begin[v]);
    }
    for (int64_t t = 0; t < n; ++t)
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(out + (t + kAhead) * H + begin[v], 1);
        const Longs all = Longs{} + x[v][t];
        const Longs quotient = __builtin_convertvector(__builtin_convertvector(all, Doubles) * scale[v], Longs);
        UnsignedLongs r = (UnsignedLongs)(all - quotient * modulus[v]);
        const UnsignedLongs less = r - (UnsignedLongs)modulus[v];
        r = less < r ? less : r;  // below zero is above all
        const Longs row = (Longs)r + shift[v];
        std::memcpy(out + t * H + begin[v], &row, sizeof row);
      }
  }
};

// Mixes of the N-grams of every order for `n` tokens: mix[o * kTokens + t]. `id` and `kind` (or null) hold their
// canonical and document ids and, before them, those of the context; what lies before the row is `pad`.
struct Mixer {
  at::IntArrayRef multipliers, orders;
  int64_t pad, eos;
  void operator()(const int64_t* id, const int64_t* kind, int64_t n, int64_t* mix) const {
    for (int64_t t = 0; t < n; t += kLongs) {
      UnsignedLongs now = {};
      Longs same = ~Longs{};
      int64_t back = 0;
      for (size_t o = 0; o < orders.size(); ++o) {
        for (; back < orders[o]; ++back) {
          const Longs then = longs(id + t - back);
          if (kind) same &= longs(kind + t - back) == longs(kind + t);
          if (eos >= 0 && back > 0) same &= then != eos;
          now ^= (UnsignedLongs)(same ? then : Longs{} + pad) * static_cast<uint64_t>(multipliers[back]);
        }
        std::memcpy(mix + o * kTokens + t, &now, sizeof now);
      }
    }
  }
};

at::Tensor hash_ngrams(const at::Tensor& ids, const std::optional<at::Tensor>& documents,
                       const at::Tensor& moduli, const at::Tensor& offsets, int64_t ordinal,
                       at::IntArrayRef multipliers, at::IntArrayRef orders, int64_t past, int64_t pad_id, int64_t eos_id,
                       int64_t n_ids) {
  check_axes("ids", ids, 2);
  check_shape("documents", documents, ids.sizes());
  check_axes("moduli", moduli, 2);
  check_shape("offsets", offsets, moduli.sizes());
  TORCH_CHECK_VALUE(ordinal >= 0 && ordinal < moduli.size(0), "ordinal is ", ordinal, ": allowed is 0 to ",
                    moduli.size(0) - 1);
  const int64_t B = ids.size(0), S = ids.size(1), T = S - past, H = moduli.size(1), n_orders = orders.size();
  TORCH_CHECK_VALUE(past >= 0 && T >= 0, "past is ", past, ": allowed is 0 to ", S);
  TORCH_CHECK_VALUE(n_orders > 0 && orders.front() >= 1 && std::is_sorted(orders.begin(), orders.end()), "orders are ", orders,
                    ": allowed are ascending ones from 1");
  check_shape(H % n_orders == 0, "moduli", moduli, "as many of each order");
  const int64_t heads = H / n_orders, context = orders.back() - 1;
  TORCH_CHECK_VALUE(static_cast<int64_t>(multipliers.size()) > context, "multipliers are ", multipliers.size(), ": allowed are ",
                    context + 1, " or more");
  const auto ids_c = ids.contiguous();
  const auto documents_c = documents ? std::optional(documents->contiguous()) : std::nullopt;
  const int64_t* id = ids_c.const_data_ptr<int64_t>();
  const int64_t* document = data_or_null<int64_t>(documents_c);
  const Moduli modulus(moduli, offsets, ordinal);
  const Mixer mixer{multipliers, orders, pad_id, eos_id};
  auto rows = at::empty({B, T, H}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();

  const int64_t blocks = (T + kTokens - 1) / kTokens;  // of a row
  parallel_for(0, B * blocks, grain(2 * H * std::min(T, kTokens)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> near(2 * (context + kTokens)), mix(n_orders * kTokens);
    int64_t *near_id = near.data() + context, *near_kind = near_id + kTokens + context;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, t = i % blocks * kTokens, now = past + t, n = b * T + t;
      const int64_t count = std::min(kTokens, T - t), before = std::min(context, now);
      std::fill(near_id - context, near_id - before, pad_id);
      std::copy(id + b * S + now - before, id + b * S + now + count, near_id - before);
      uint64_t worst = 0;  // below zero is above all
      for (int64_t k = -before; k < count; ++k) worst = std::max(worst, static_cast<uint64_t>(near_id[k]));
      TORCH_CHECK_VALUE(worst < static_cast<uint64_t>(n_ids), "token id is ", static_cast<int64_t>(worst),
                        ": allowed is 0 to ", n_ids - 1);
      if (document) std::copy(document + b * S + now - before, document + b * S + now + count, near_kind - before);
      mixer(near_id, document ? near_kind : nullptr, count, mix.data());
      modulus.reduce(mix.data(), count, heads, out + n * H);
    }
  });
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("hash_ngrams", hash_ngrams); }
}  // namespace engram
