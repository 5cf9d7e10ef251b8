// Canonical ids -> table rows: multiply, XOR and reduce modulo each head's prime (reference in kernels/hash.py).
#include "common.h"

#include <ATen/ops/empty.h>

namespace engram {
namespace {

// x mod p by a multiplication: floor(x * floor(2^64 / p) / 2^64) is x / p or one less for every x below 2^64.
struct Modulus {
  uint64_t p, inverse;
  explicit Modulus(int64_t prime) : p(prime), inverse(static_cast<uint64_t>((__uint128_t(1) << 64) / prime)) {}
  uint64_t reduce(uint64_t x) const {
    const uint64_t quotient = static_cast<uint64_t>((__uint128_t(x) * inverse) >> 64);
    const uint64_t r = x - quotient * p;
    return r >= p ? r - p : r;
  }
};

at::Tensor hash_ngrams(const at::Tensor& ids, const std::optional<at::Tensor>& documents,
                       const at::Tensor& moduli, const at::Tensor& offsets, at::IntArrayRef multipliers,
                       at::IntArrayRef orders, int64_t past, int64_t pad_id, int64_t eos_id) {
  const int64_t B = ids.size(0), S = ids.size(1), T = S - past, H = moduli.numel();
  const int64_t heads = H / static_cast<int64_t>(orders.size());
  const auto ids_c = ids.contiguous();
  const auto documents_c = documents ? std::optional(documents->contiguous()) : std::nullopt;
  const auto offsets_c = offsets.contiguous();
  const int64_t* id = ids_c.const_data_ptr<int64_t>();
  const int64_t* document = data_or_null<int64_t>(documents_c);
  const int64_t* offset = offsets_c.const_data_ptr<int64_t>();
  std::vector<Modulus> modulus;
  const auto moduli_c = moduli.contiguous();
  for (int64_t h = 0; h < H; ++h) modulus.emplace_back(moduli_c.const_data_ptr<int64_t>()[h]);
  auto rows = at::empty({B, T, H}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();

  at::parallel_for(0, B * T, grain(8 * H), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t start = n / T * S, now = start + past + n % T;
      uint64_t mix = 0;
      bool same = true;
      int64_t back = 0;
      for (size_t o = 0; o < orders.size(); ++o) {
        for (; back < orders[o]; ++back) {
          const int64_t at = now - back;
          same = same && at >= start && (!document || document[at] == document[now]);
          same = same && (back == 0 || id[at] != eos_id);
          mix ^= static_cast<uint64_t>(same ? id[at] : pad_id) * static_cast<uint64_t>(multipliers[back]);
        }
        for (int64_t h = o * heads; h < static_cast<int64_t>(o + 1) * heads; ++h)
          out[n * H + h] = static_cast<int64_t>(modulus[h].reduce(mix)) + offset[h];
      }
    }
  });
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("hash_ngrams", hash_ngrams); }
}  // namespace engram
