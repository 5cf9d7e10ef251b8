// Canonical ids -> table rows: multiply, XOR and reduce modulo each head's prime (reference in kernels/hash.py).
#include "common.h"

#include <ATen/ops/empty.h>

namespace engram {
namespace {

// Remainders by multiplication with inverses, all heads of an order side by side so that they share vector registers.
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
  void reduce(int64_t x, int64_t begin, int64_t end, int64_t* out) const {
    if (!large) {
      for (int64_t h = begin; h < end; ++h) {
        const int64_t r = x - static_cast<int64_t>((__uint128_t(x) * fixed[h]) >> 64) * p[h];
        out[h] = (r >= p[h] ? r - p[h] : r) + offset[h];
      }
      return;
    }
    // Eight at a time, which is one register of AVX-512: a loop over any number spends more on its ends than inside.
    for (; begin + 8 <= end; begin += 8) reduce_some<8>(x, begin, out);
    for (; begin < end; ++begin) reduce_some<1>(x, begin, out);
  }
  template <int64_t Count> void reduce_some(int64_t x, int64_t begin, int64_t* out) const {
    const double wide = static_cast<double>(x), *scale = inverse.data() + begin;
    const int64_t *modulus = p.data() + begin, *shift = offset.data() + begin;
    int64_t* to = out + begin;
#pragma omp simd
    for (int64_t h = 0; h < Count; ++h) {
      const int64_t r = x - static_cast<int64_t>(wide * scale[h]) * modulus[h];
      to[h] = r + (r < 0 ? modulus[h] : 0) - (r >= modulus[h] ? modulus[h] : 0) + shift[h];
    }
  }
};

at::Tensor hash_ngrams(const at::Tensor& ids, const std::optional<at::Tensor>& documents,
                       const at::Tensor& moduli, const at::Tensor& offsets, at::IntArrayRef multipliers,
                       at::IntArrayRef orders, int64_t past, int64_t pad_id, int64_t eos_id) {
  const int64_t B = ids.size(0), S = ids.size(1), T = S - past, H = moduli.numel();
  const int64_t heads = H / static_cast<int64_t>(orders.size());
  const auto ids_c = ids.contiguous();
  const auto documents_c = documents ? std::optional(documents->contiguous()) : std::nullopt;
  const int64_t* id = ids_c.const_data_ptr<int64_t>();
  const int64_t* document = data_or_null<int64_t>(documents_c);
  const Moduli modulus(moduli, offsets);
  auto rows = at::empty({B, T, H}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();

  const int64_t n_orders = orders.size();
  at::parallel_for(0, B * T, grain(8 * H), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t b = n / T, stop = std::min(end, (b + 1) * T);
      const int64_t* row = id + b * S;
      const int64_t* kind = document ? document + b * S : nullptr;
      for (int64_t now = past + n - b * T; n < stop; ++n, ++now) {
        uint64_t mix = 0;
        bool same = true;
        int64_t back = 0;
        for (int64_t o = 0; o < n_orders; ++o) {
          for (; back < orders[o]; ++back) {
            const int64_t at = now - back;
            same = same && at >= 0 && (!kind || kind[at] == kind[now]);
            same = same && (back == 0 || eos_id < 0 || row[at] != eos_id);
            mix ^= static_cast<uint64_t>(same ? row[at] : pad_id) * static_cast<uint64_t>(multipliers[back]);
          }
          modulus.reduce(static_cast<int64_t>(mix), o * heads, (o + 1) * heads, out + n * H);
        }
      }
    }
  });
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("hash_ngrams", hash_ngrams); }
}  // namespace engram
