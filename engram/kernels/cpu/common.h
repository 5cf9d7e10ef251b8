// What the CPU kernels share: the type to compute in, exp that vectorises, parallel work, and checks of what is given.
#pragma once

#include "torch.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace engram {

template <typename T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };
template <typename T> using wide_t = typename Wide<T>::type;

// Between a stored type and the one to compute in. torch's own conversion to bfloat16 branches on NaN, which keeps a
// loop from being vectorised: it took eight times as long.
template <typename T> inline wide_t<T> widened(T x) { return static_cast<wide_t<T>>(x); }
template <> inline float widened<at::BFloat16>(at::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }
template <typename T> inline T narrowed(wide_t<T> x) { return static_cast<T>(x); }
template <> inline at::BFloat16 narrowed<at::BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return at::BFloat16(static_cast<uint16_t>(nan ? 0x7fc0u : nearest), at::BFloat16::from_bits());
}

// A number of tokens or rows that is worth a thread of its own, when each touches `width` numbers.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// at::parallel_for takes as many threads as OpenMP gives it. clang's OpenMP is another one than torch's and knows nothing of
// torch's number of threads, so there the same parts go to as many as there are. The first error is thrown again at the end.
#ifndef __clang__
using at::parallel_for;
#else
template <typename Visit> void parallel_for(int64_t begin, int64_t end, int64_t least, const Visit& visit) {
  const int64_t n = end - begin, threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || n <= std::max<int64_t>(least, 1)) return at::parallel_for(begin, end, n, visit);
  const int64_t size = at::divup(n, std::min(threads, at::divup(n, least))), parts = at::divup(n, size);
  std::once_flag failed;
  std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const at::internal::ThreadIdGuard number(part);
    const c10::ParallelGuard inside(true);
    try {
      visit(begin + part * size, std::min(end, begin + (part + 1) * size));
    } catch (...) {
      std::call_once(failed, [&] { error = std::current_exception(); });
    }
  }
  if (error) std::rethrow_exception(error);
}
#endif

// Errors say what was given and what is allowed, as those of `engram.config.require` do, and are ValueErrors in Python.
template <typename Allowed>
void check_shape(bool ok, const char* name, const at::Tensor& x, const Allowed& allowed) {
  TORCH_CHECK_VALUE(ok, "shape of ", name, " is ", x.sizes(), ": allowed is ", allowed);
}
inline void check_shape(const char* name, const at::Tensor& x, at::IntArrayRef allowed) {
  check_shape(x.sizes() == allowed, name, x, allowed);
}
inline void check_shape(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef allowed) {
  if (x) check_shape(name, *x, allowed);
}
inline void check_axes(const char* name, const at::Tensor& x, int64_t axes) {
  TORCH_CHECK_VALUE(x.dim() == axes, "shape of ", name, " is ", x.sizes(), ": allowed is one of ", axes, " axes");
}

inline void check_rows(const int64_t* row, int64_t n, int64_t R) {
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < R, "row ", row[i], " of a table of ", R, " rows");
}

// All axes but the last n, and how many rows they number.
inline at::IntArrayRef leading(const at::Tensor& x, int64_t n = 1) { return x.sizes().slice(0, x.dim() - n); }
inline int64_t rows_of(const at::Tensor& x) { return c10::multiply_integers(leading(x)); }

template <typename T> const T* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

// Cephes' expf without branches, within 2 units in the last place: std::exp keeps a loop from being vectorised.
// F: float, or a vector of them; I: int32_t, or as many of them.
template <typename F, typename I> inline F exponential_by_polynomial(F x) {
  x = x > 88.0f ? F{} + 88.0f : x;  // NaN goes through both
  x = x < -87.0f ? F{} - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const F shifted = x * 1.44269504f + magic, n = shifted - magic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The last bits of the shifted number are n's.
  return p * std::bit_cast<F>(static_cast<I>((std::bit_cast<I>(shifted) + 127) << 23));
}
inline float exponential(float x) { return exponential_by_polynomial<float, int32_t>(x); }
inline double exponential(double x) { return std::exp(x); }

template <typename T> inline T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }

// Sums over tokens, one copy for each thread so that none waits, added up at the end in the order of threads.
template <typename W> struct PerThread {
  int64_t size;
  std::vector<std::vector<W>> parts;
  explicit PerThread(int64_t size_) : size(size_), parts(at::get_num_threads()) {}
  W* mine() {
    auto& part = parts[at::get_thread_num()];
    if (part.empty()) part.assign(size, W(0));
    return part.data();
  }
  std::vector<W> total() const {
    std::vector<W> sum(size, W(0));
    for (const auto& part : parts)
      for (size_t i = 0; i < part.size(); ++i) sum[i] += part[i];
    return sum;
  }
};

}  // namespace engram
