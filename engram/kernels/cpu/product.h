// Products of small matrices with sums in registers, for factors that stay in cache: C = A B, or C += A B.
//
// A "unit" is what one multiplication of a lane takes of each factor: one number, or for bfloat16 two neighbours along
// the summed axis (vdpbf16ps), 32 bits. A is read unit by unit from anywhere; B lies in rows of units, as `pack_*` make.
#pragma once

#include "vectors.h"

#include <algorithm>

namespace engram {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool kHasBFloat16Products = true;
#else
constexpr bool kHasBFloat16Products = false;  // there bfloat16 tensors are widened first
#endif

template <typename T> struct Factor;
template <> struct Factor<float> {
  using Unit = float;
  static constexpr int64_t kPair = 1;
  static inline Floats multiply_add(Floats sum, Unit a, Floats b) { return sum + a * b; }
};
template <> struct Factor<double> {
  using Unit = double;
  static constexpr int64_t kPair = 1;
  static inline Doubles multiply_add(Doubles sum, Unit a, Doubles b) { return sum + a * b; }
};
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <> struct Factor<at::BFloat16> {
  using Unit = uint32_t;
  static constexpr int64_t kPair = 2;
  static inline Floats multiply_add(Floats sum, Unit a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)(__m512)b);
  }
};
#endif

template <typename T> inline int64_t padded_lanes(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
template <typename T> inline int64_t units(int64_t n) { return (n + Factor<T>::kPair - 1) / Factor<T>::kPair; }

// A's units, [M, P]: element (m, p) at data[m * row + p * step].
template <typename T> struct Left {
  const typename Factor<T>::Unit* data;
  int64_t row, step;
};

namespace detail {

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

}  // namespace detail

// C [M, N] = A [M, P] B [P, N] in units, or added to C; N is a multiple of kLanes. Tiles keep 24 sums in registers.
template <typename T>
void product(Left<T> a, const typename Factor<T>::Unit* b, int64_t ldb, int64_t M, int64_t N, int64_t P,
             wide_t<T>* c, int64_t ldc, bool add) {
  constexpr int64_t L = kLanes<T>;
  int64_t n = 0;
  for (; n + 4 * L <= N; n += 4 * L) detail::panel<T, 6, 4>(a, b + n, ldb, M, P, c + n, ldc, add);
  for (; n + 2 * L <= N; n += 2 * L) detail::panel<T, 12, 2>(a, b + n, ldb, M, P, c + n, ldc, add);
  for (; n < N; n += L) detail::panel<T, 12, 1>(a, b + n, ldb, M, P, c + n, ldc, add);
}

// Rows x [R, C], `stride` apart, as a B that is summed over rows: units [units(R), ldb], zeros where x ends.
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

namespace detail {

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

}  // namespace detail

// Rows x [R, C], `stride` apart, as a B that is summed over columns: units [units(C), ldb] with a lane for each row.
template <typename T>
void pack_columns(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b, int64_t ldb) {
  using Unit = typename Factor<T>::Unit;
  constexpr int64_t pair = Factor<T>::kPair;
  const int64_t whole = C / pair;
  const int64_t turned_r = sizeof(Unit) == 4 ? R / 16 * 16 : 0, turned_p = sizeof(Unit) == 4 ? whole / 16 * 16 : 0;
  if constexpr (sizeof(Unit) == 4)
    for (int64_t r = 0; r < turned_r; r += 16)
      for (int64_t p = 0; p < turned_p; p += 16) detail::turn_16(x + r * stride + p * pair, stride, b + p * ldb + r, ldb);
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

// A packed B in panels of some lanes, each summed over all of its rows before the next: product() reads them one by one.
constexpr int64_t kPanel = 64, kSummed = 128;  // lanes, and units summed at a time: 32 KiB of B

template <typename T> int64_t packed_size(int64_t summed, int64_t lanes) { return units<T>(summed) * padded_lanes<T>(lanes); }

// Rows x [R, C] summed over rows, a lane for each column.
template <typename T> void pack_row_panels(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b) {
  for (int64_t c = 0; c < C; c += kPanel) {
    const int64_t n = std::min(kPanel, C - c);
    pack_rows(x + c, stride, R, n, b + c * units<T>(R), padded_lanes<T>(n));
  }
}

// Rows x [R, C] summed over columns, a lane for each row.
template <typename T> void pack_column_panels(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b) {
  for (int64_t r = 0; r < R; r += kPanel) {
    const int64_t n = std::min(kPanel, R - r);
    pack_columns(x + r * stride, stride, n, C, b + r * units<T>(C), padded_lanes<T>(n));
  }
}

// C [M, lanes] = A [M, P] times the panel of B that starts at lane n of N, or added to C.
template <typename T>
void product_with_panel(Left<T> a, const typename Factor<T>::Unit* b, int64_t n, int64_t N, int64_t M, int64_t P, wide_t<T>* c,
                        int64_t ldc, bool add = false) {
  const int64_t lanes = padded_lanes<T>(std::min(kPanel, N - n));
  const auto* panel = b + n * P;
  for (int64_t p = 0; p < P; p += kSummed)
    product<T>({a.data + p * a.step, a.row, a.step}, panel + p * lanes, lanes, M, lanes, std::min(kSummed, P - p), c, ldc, add || p > 0);
}

// C [M, N] = A [M, P] B, of panels.
template <typename T>
void product_with_panels(Left<T> a, const typename Factor<T>::Unit* b, int64_t M, int64_t N, int64_t P, wide_t<T>* c, int64_t ldc) {
  for (int64_t n = 0; n < N; n += kPanel) product_with_panel(a, b, n, N, M, P, c + n, ldc);
}

}  // namespace engram
