// Numbers of a stored type, 64 bytes of wide ones at a time, in vectors of the compiler's own (gcc and clang), which
// splits them where the machine's are shorter. For loops too short to leave to the compiler, whose leftovers after whole
// vectors take as long as all the rest.
#pragma once

#include "common.h"

#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace engram {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef uint16_t HalfBits __attribute__((vector_size(32)));

template <typename W> struct VectorOf { using type = Floats; using places = Ints; };
template <> struct VectorOf<double> { using type = Doubles; using places = Longs; };
template <typename T> using vector_t = typename VectorOf<wide_t<T>>::type;
template <typename T> using places_t = typename VectorOf<wide_t<T>>::places;
template <typename T> constexpr int64_t kLanes = 64 / sizeof(wide_t<T>);

template <typename T> inline vector_t<T> load(const T* from) {
  vector_t<T> x;
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    HalfBits bits;
    std::memcpy(&bits, from, sizeof bits);
    x = (Floats)(__builtin_convertvector(bits, Bits) << 16);
  } else if constexpr (std::is_same_v<T, at::Half>) {
    for (int64_t i = 0; i < kLanes<T>; ++i) x[i] = widened(from[i]);
  } else {
    std::memcpy(&x, from, sizeof x);
  }
  return x;
}

template <typename T> inline void store(vector_t<T> x, T* to) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
#ifdef __AVX512BF16__
    const auto low = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &low, sizeof low);
#else
    const Bits bits = (Bits)x, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits rounded = (x != x) ? Bits{} + 0x7fc0u : nearest;
    const HalfBits low = __builtin_convertvector(rounded, HalfBits);
    std::memcpy(to, &low, sizeof low);
#endif
  } else if constexpr (std::is_same_v<T, at::Half>) {
    for (int64_t i = 0; i < kLanes<T>; ++i) to[i] = narrowed<T>(x[i]);
  } else {
    std::memcpy(to, &x, sizeof x);
  }
}

// The first n numbers, and zeros.
template <typename T> inline vector_t<T> load(const T* from, int64_t n) {
  if (n >= kLanes<T>) return load(from);
  T some[kLanes<T>] = {};
  std::memcpy(some, from, n * sizeof(T));
  return load(some);
}

template <typename T> inline void store(vector_t<T> x, T* to, int64_t n) {
  if (n >= kLanes<T>) return store(x, to);
  T some[kLanes<T>];
  store(x, some);
  std::memcpy(to, some, n * sizeof(T));
}

inline float sum_of(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += x[i];
  return sum;
#endif
}
inline double sum_of(Doubles x) {
  double sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  return sum;
}

inline Floats exponential(Floats x) { return exponential_by_polynomial<Floats, Ints>(x); }
inline Doubles exponential(Doubles x) {
  for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace engram
