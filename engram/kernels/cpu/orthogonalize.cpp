// Newton-Schulz iteration on each matrix of a stack, which stays in cache for all steps (reference in
// kernels/orthogonalize.py). Only where bfloat16 is multiplied in hardware.
#include "product.h"

namespace engram {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
namespace {

using T = at::BFloat16;
using Unit = Factor<T>::Unit;

// What one thread needs for [a, b] matrices, a <= b; rows are padded to whole vectors, with zeros.
struct Scratch {
  int64_t a, b, square, wide;  // the last two are row lengths of [a, a] and [a, b]
  std::vector<T> x, gram;
  std::vector<float> sums;
  std::vector<Unit> columns, rows;
  Scratch(int64_t a_, int64_t b_)
      : a(a_), b(b_), square(padded_lanes<T>(a)), wide(padded_lanes<T>(b)), x(a * wide), gram(a * square), sums(a * wide),
        columns(wide / 2 * square), rows((a + 1) / 2 * wide) {}

  // to = bfloat16(beta to + alpha sums), over rows of `width`.
  void mix(float beta, float alpha, int64_t width, T* to) const {
    for (int64_t i = 0; i < a * width; i += kLanes<T>) {
      const Floats sum = alpha * load(sums.data() + i);
      store<T>(beta == 0 ? sum : beta * load(to + i) + sum, to + i);
    }
  }

  void step(const double* coefficient) {
    const auto left = [](const std::vector<T>& m, int64_t width) {
      return Left<T>{reinterpret_cast<const Unit*>(m.data()), width / 2, 1};
    };
    pack_columns(x.data(), wide, a, wide, columns.data(), square);
    product<T>(left(x, wide), columns.data(), square, a, square, wide / 2, sums.data(), square, false);
    mix(0, 1, square, gram.data());
    pack_rows(gram.data(), square, a, square, rows.data(), square);
    product<T>(left(gram, square), rows.data(), square, a, square, (a + 1) / 2, sums.data(), square, false);
    mix(coefficient[1], coefficient[2], square, gram.data());
    pack_rows(x.data(), wide, a, wide, rows.data(), wide);
    product<T>(left(gram, square), rows.data(), wide, a, wide, (a + 1) / 2, sums.data(), wide, false);
    mix(coefficient[0], 1, wide, x.data());
  }
};

// out = x / |x| after `steps`; both are [rows, columns], and turned on the way where that is tall.
template <typename S>
void orthogonalize_one(const S* from, int64_t rows, int64_t columns, const double* coefficient, int64_t steps, Scratch& s, T* out) {
  const bool tall = rows > columns;
  if (tall) std::fill(s.x.begin(), s.x.end(), T(0));  // padding, where the last matrix may have left a NaN
  Floats square{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const int64_t n = std::min(kLanes<T>, columns - c);
      Floats value = load(from + r * columns + c, n);
      T low[kLanes<T>];
      store<T>(value, low);
      value = load(low);
      square += value * value;
      if (tall)
        for (int64_t i = 0; i < n; ++i) s.x[(c + i) * s.wide + r] = low[i];
      else
        store<T>(value, s.x.data() + r * s.wide + c);
    }
  const float share = 1 / std::max(std::sqrt(sum_of(square)), 1e-7f);
  for (int64_t i = 0; i < s.a * s.wide; i += kLanes<T>) store<T>(share * load(s.x.data() + i), s.x.data() + i);
  for (int64_t i = 0; i < steps; ++i) s.step(coefficient);
  for (int64_t r = 0; r < rows; ++r)
    if (tall)
      for (int64_t c = 0; c < columns; ++c) out[r * columns + c] = s.x[c * s.wide + r];
    else
      std::memcpy(out + r * columns, s.x.data() + r * s.wide, columns * sizeof(T));
}

at::Tensor orthogonalize(const at::Tensor& updates_, at::ArrayRef<double> coefficients, int64_t steps) {
  const auto type = updates_.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const auto updates = updates_.to(type).contiguous();
  const int64_t E = updates.size(0), rows = updates.size(1), columns = updates.size(2), size = rows * columns;
  auto result = at::empty(updates.sizes(), updates.options().dtype(at::kBFloat16));
  T* out = result.mutable_data_ptr<T>();
  parallel_for(0, E, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(std::min(rows, columns), std::max(rows, columns));
    for (int64_t e = begin; e < end; ++e)
      if (type == at::kFloat)
        orthogonalize_one(updates.const_data_ptr<float>() + e * size, rows, columns, coefficients.data(), steps, scratch, out + e * size);
      else
        orthogonalize_one(updates.const_data_ptr<T>() + e * size, rows, columns, coefficients.data(), steps, scratch, out + e * size);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("orthogonalize", orthogonalize); }
#endif
}  // namespace engram
