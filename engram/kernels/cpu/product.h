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

// C [M, N] = A [M, P] B [P, N] in units, or added to C; N is a multiple of kLanes.
template <typename T>
void product(Left<T> a, const typename Factor<T>::Unit* b, int64_t ldb, int64_t M, int64_t N, int64_t P, wide_t<T>* c,
             int64_t ldc, bool add);

// Rows x [R, C], `stride` apart, as a B that is summed over rows: units [units(R), ldb], zeros where x ends.
template <typename T>
void pack_rows(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b, int64_t ldb);

// Rows x [R, C], `stride` apart, as a B that is summed over columns: units [units(C), ldb] with a lane for each row.
template <typename T>
void pack_columns(const T* x, int64_t stride, int64_t R, int64_t C, typename Factor<T>::Unit* b, int64_t ldb);

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
  int64_t p = 0;
  do {  // once for a sum of nothing
    product<T>({a.data + p * a.step, a.row, a.step}, panel + p * lanes, lanes, M, lanes, std::min(kSummed, P - p), c, ldc, add || p > 0);
    p += kSummed;
  } while (p < P);
}

// C [M, N] = A [M, P] B, of panels.
template <typename T>
void product_with_panels(Left<T> a, const typename Factor<T>::Unit* b, int64_t M, int64_t N, int64_t P, wide_t<T>* c, int64_t ldc) {
  for (int64_t n = 0; n < N; n += kPanel) product_with_panel(a, b, n, N, M, P, c + n, ldc);
}

}  // namespace engram
