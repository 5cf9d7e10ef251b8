// The products and layouts of product.h, compiled once for each type.
#include "product.h"

#include <algorithm>

namespace engram {
namespace {

template <typename T, int M, int N>
inline void tile(Left<T> a, const typename Factor<T>::Unit* b, int64_t ldb, int64_t P, wide_t<T>* c,
                 int64_t ldc, bool add) {
  using F = Factor<T>;
  using Sums = vector_t<T>;
  Sums sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[m][n] = Sums{};
      if (add) std::memcpy(&sum[m][n], c + m * ldc + n * kLanes<T>, 64);
    }
  for (int64_t p = 0; p < P; ++p) {
    Sums right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) std::memcpy(&right[n], b + p * ldb + n * kLanes<T>, 64);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto left = a.data[m * a.row + p * a.step];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = F::multiply_add(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) std::memcpy(c + m * ldc + n * kLanes<T>, &sum[m][n], 64);
}

// Rows that are left over after tiles of M: M - 1, M - 2, ... of them.
template <typename T, int M, int N, typename... Rest>
inline void last_tile(int64_t left, Left<T> a, Rest... rest) {
  if constexpr (M > 0) {
    if (left == M) tile<T, M, N>(a, rest...);
    else last_tile<T, M - 1, N>(left, a, rest...);
  }
}

template <typename T, int M, int N>
inline void panel(Left<T> a, const typename Factor<T>::Unit* b, int64_t ldb, int64_t rows, int64_t P,
                  wide_t<T>* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    tile<T, M, N>({a.data + m * a.row, a.row, a.step}, b, ldb, P, c + m * ldc, ldc, add);
  last_tile<T, M - 1, N>(rows - m, {a.data + m * a.row, a.row, a.step}, b, ldb, P, c + m * ldc, ldc, add);
}

}  // namespace

// Tiles keep up to 24 sums in registers.
template <typename T>
void product(Left<T> a, const typename Factor<T>::Unit* b, int64_t ldb, int64_t M, int64_t N, int64_t P,
             wide_t<T>* c, int64_t ldc, bool add) {
  constexpr int64_t L = kLanes<T>;
  int64_t n = 0;
  for (; n + 4 * L <= N; n += 4 * L) panel<T, 6, 4>(a, b + n, ldb, M, P, c + n, ldc, add);
  for (; n + 2 * L <= N; n += 2 * L) panel<T, 12, 2>(a, b + n, ldb, M, P, c + n, ldc, add);
  for (; n < N; n += L) panel<T, 12, 1>(a, b + n, ldb, M, P, c + n, ldc, add);
}

template <typename T>
void pack_rows(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b, int64_t ldb) {
  if constexpr (Factor<T>::kPair == 1) {
    for (int64_t r = 0; r < R; ++r, b += ldb) {
      std::memcpy(b, x + r * stride, C * sizeof(T));
      std::fill(b + C, b + ldb, T(0));
    }
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    for (int64_t r = 0; r < R; r += 2, b += ldb) {
      const uint16_t *first = bits + r * stride, *second = first + stride;
      if (r + 1 < R)
        for (int64_t i = 0; i < C; ++i) b[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
      else
        for (int64_t i = 0; i < C; ++i) b[i] = first[i];
      std::fill(b + C, b + ldb, 0u);
    }
  }
}

#ifndef __clang__  // which knows no shuffles by variables
namespace {

// 16 rows of 16 units, `stride` numbers of T apart, turned: unit (r, p) goes to b[p * ldb + r].
template <typename T> inline void turn_16(const T* x, int64_t stride, typename Factor<T>::Unit* b, int64_t ldb) {
  Ints rows[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) std::memcpy(&rows[r], x + r * stride, 64);
#pragma GCC unroll 4
  for (int d = 8; d > 0; d /= 2) {  // squares of d change places across the diagonal
    Ints low, high;
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) {
      low[l] = (l & d) ? 16 + l - d : l;
      high[l] = (l & d) ? 16 + l : l + d;
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      if (!(r & d)) {
        const Ints first = rows[r], second = rows[r + d];
        rows[r] = __builtin_shuffle(first, second, low);
        rows[r + d] = __builtin_shuffle(first, second, high);
      }
  }
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) std::memcpy(b + p * ldb, &rows[p], 64);
}

}  // namespace
#endif

template <typename T>
void pack_columns(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b, int64_t ldb) {
  using Unit = typename Factor<T>::Unit;
  constexpr int64_t pair = Factor<T>::kPair;
  const int64_t whole = C / pair;
  int64_t turned_r = 0, turned_p = 0;
#ifndef __clang__
  if constexpr (sizeof(Unit) == 4) {
    turned_r = R / 16 * 16;
    turned_p = whole / 16 * 16;
    for (int64_t r = 0; r < turned_r; r += 16)
      for (int64_t p = 0; p < turned_p; p += 16) turn_16(x + r * stride + p * pair, stride, b + p * ldb + r, ldb);
  }
#endif
  for (int64_t r = 0; r < R; ++r)
    for (int64_t p = r < turned_r ? turned_p : 0; p < whole; ++p)
      std::memcpy(b + p * ldb + r, x + r * stride + p * pair, sizeof(Unit));
  if (whole * pair < C)  // one column too few for a unit
    for (int64_t r = 0; r < R; ++r) {
      Unit last = 0;
      std::memcpy(&last, x + r * stride + C - 1, sizeof(T));
      b[whole * ldb + r] = last;
    }
  for (int64_t p = 0; p < units<T>(C); ++p) std::fill(b + p * ldb + R, b + (p + 1) * ldb, Unit(0));
}

#define INSTANTIATE(T)                                                                                                   \
  template void product<T>(Left<T>, const Factor<T>::Unit*, int64_t, int64_t, int64_t, int64_t, wide_t<T>*, int64_t, bool); \
  template void pack_rows<T>(const T*, int64_t, int64_t, int64_t, Factor<T>::Unit*, int64_t);                              \
  template void pack_columns<T>(const T*, int64_t, int64_t, int64_t, Factor<T>::Unit*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
INSTANTIATE(at::BFloat16)
#endif

}  // namespace engram
