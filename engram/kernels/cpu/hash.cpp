// Canonical ids -> table rows: multiply, XOR and reduce modulo each head's prime (reference in kernels/hash.py).
#include "vectors.h"

namespace engram {
namespace {

typedef uint64_t UnsignedLongs __attribute__((vector_size(64)));

// Remainders by multiplication with inverses, eight heads of an order side by side in a vector.
//
// floor(x * (1 / p)) in double is off by at most 3 * 2^-53 x / p, which is below 1/2 for x < 2^63 and p >= 2^13; so the
// remainder is right but for one p more or less. Smaller moduli take 64-bit fixed point: floor(x * floor(2^64 / p) / 2^64)
// is x / p or one less for every x below 2^64.
struct Moduli {
  std::vector<int64_t> p, offset;
  std::vector<double> inverse;
  std::vector<uint64_t> fixed;
  bool large = true;
  Moduli(const at::Tensor& moduli, const at::Tensor& offsets) {
    const auto m = moduli.contiguous(), o = offsets.contiguous();
    p.assign(m.const_data_ptr<int64_t>(), m.const_data_ptr<int64_t>() + m.numel());
    offset.assign(o.const_data_ptr<int64_t>(), o.const_data_ptr<int64_t>() + o.numel());
    for (const int64_t modulus : p) {
      inverse.push_back(1.0 / static_cast<double>(modulus));
      fixed.push_back(static_cast<uint64_t>((__uint128_t(1) << 64) / modulus));
      large = large && modulus >= (int64_t(1) << 13);
    }
  }
  // out[t * stride + h] for every mix x[t] and the heads from `begin` to `end`.
  void reduce(const int64_t* x, int64_t n, int64_t begin, int64_t end, int64_t* out, int64_t stride) const {
    if (large)
      for (; begin + kHeads <= end; begin += kHeads) reduce_together(x, n, begin, out, stride);
    for (; begin < end; ++begin)
      for (int64_t t = 0; t < n; ++t) {
        const int64_t r = x[t] - static_cast<int64_t>((__uint128_t(x[t]) * fixed[begin]) >> 64) * p[begin];
        out[t * stride + begin] = (r >= p[begin] ? r - p[begin] : r) + offset[begin];
      }
  }

 private:
  static constexpr int64_t kHeads = kLanes<double>;
  void reduce_together(const int64_t* x, int64_t n, int64_t begin, int64_t* out, int64_t stride) const {
    const Doubles scale = load(inverse.data() + begin);
    Longs modulus, shift;
    std::memcpy(&modulus, p.data() + begin, sizeof modulus);
    std::memcpy(&shift, offset.data() + begin, sizeof shift);
    const UnsignedLongs step = (UnsignedLongs)modulus;
    for (int64_t t = 0; t < n; ++t) {
      const Longs quotient = __builtin_convertvector(static_cast<double>(x[t]) * scale, Longs);
      UnsignedLongs r = (UnsignedLongs)(x[t] - quotient * modulus);  // below zero is above all
      r = r + step < r ? r + step : r;
      r = r - step < r ? r - step : r;
      const Longs row = (Longs)r + shift;
      std::memcpy(out + t * stride + begin, &row, sizeof row);
    }
  }
};

constexpr int64_t kTokens = 256;  // mixed at a time, so that mixes stay in cache

// Mixes of the N-grams of every order for `n` tokens: mix[o * kTokens + t]. `id` and `kind` (or null) hold their
// canonical and document ids and, before them, those of the context; what lies before the row is `pad`.
struct Mixer {
  at::IntArrayRef multipliers, orders;
  int64_t pad, eos;
  void operator()(const int64_t* id, const int64_t* kind, int64_t n, int64_t* mix) const {
    uint64_t now[kTokens] = {};
    int64_t same[kTokens];
    std::fill(same, same + n, -1);
    int64_t back = 0;
    for (size_t o = 0; o < orders.size(); ++o) {
      for (; back < orders[o]; ++back) {
        const uint64_t factor = multipliers[back];
        const int64_t* then = id - back;
        if (kind)
          for (int64_t t = 0; t < n; ++t) same[t] &= -int64_t(kind[t - back] == kind[t]);
        if (eos >= 0 && back > 0)
          for (int64_t t = 0; t < n; ++t) same[t] &= -int64_t(then[t] != eos);
        // Masked, since gcc makes no vectors of `same[t] ? then[t] : pad`.
        for (int64_t t = 0; t < n; ++t) now[t] ^= static_cast<uint64_t>(pad ^ ((then[t] ^ pad) & same[t])) * factor;
      }
      std::memcpy(mix + o * kTokens, now, n * sizeof(int64_t));
    }
  }
};

at::Tensor hash_ngrams(const at::Tensor& ids, const std::optional<at::Tensor>& documents,
                       const at::Tensor& moduli, const at::Tensor& offsets, at::IntArrayRef multipliers,
                       at::IntArrayRef orders, int64_t past, int64_t pad_id, int64_t eos_id) {
  const int64_t B = ids.size(0), S = ids.size(1), T = S - past, H = moduli.numel();
  const int64_t n_orders = orders.size(), heads = H / n_orders, context = orders.back() - 1;
  const auto ids_c = ids.contiguous();
  const auto documents_c = documents ? std::optional(documents->contiguous()) : std::nullopt;
  const int64_t* id = ids_c.const_data_ptr<int64_t>();
  const int64_t* document = data_or_null<int64_t>(documents_c);
  const Moduli modulus(moduli, offsets);
  const Mixer mixer{multipliers, orders, pad_id, eos_id};
  auto rows = at::empty({B, T, H}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();

  at::parallel_for(0, B * T, grain(2 * H), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> near(2 * (context + kTokens)), mix(n_orders * kTokens);
    int64_t *near_id = near.data() + context, *near_kind = near_id + kTokens + context;
    for (int64_t n = begin; n < end;) {
      const int64_t b = n / T, now = past + n - b * T, count = std::min({kTokens, end - n, (b + 1) * T - n});
      const int64_t before = std::min(context, now);
      std::fill(near_id - context, near_id - before, pad_id);
      std::copy(id + b * S + now - before, id + b * S + now + count, near_id - before);
      if (document) std::copy(document + b * S + now - before, document + b * S + now + count, near_kind - before);
      mixer(near_id, document ? near_kind : nullptr, count, mix.data());
      for (int64_t o = 0; o < n_orders; ++o)
        modulus.reduce(mix.data() + o * kTokens, count, o * heads, (o + 1) * heads, out + n * H, H);
      n += count;
    }
  });
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("hash_ngrams", hash_ngrams); }
}  // namespace engram
