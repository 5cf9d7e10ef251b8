// Rows of a mapped file, asked of the disk side by side (reference in kernels/elsewhere.py).
#include "common.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>

namespace engram {
namespace {

constexpr int64_t kUnseen = 64;  // rows that are announced at first: reads of one token are all of these
constexpr int64_t kProbe = 16;   // rows that are read unannounced, to see if they are in memory
constexpr int64_t kFirst = 1024, kMost = 64 * kFirst;  // rows to announce when they are not; more while that goes on
constexpr int64_t kAhead = 24;

int64_t trips_to_disk() {  // of this thread so far, not counting pages that were announced
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_majflt;
}

// Tells the system of the pages of n rows, neighbours in one call. It takes about a microsecond a row.
void announce(const char* from, int64_t width, const int64_t* row, int64_t n) {
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t base = reinterpret_cast<uintptr_t>(from);
  uintptr_t begin = 0, end = 0;
  const auto tell = [&] { if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED); };
  for (int64_t i = 0; i < n; ++i) {
    const uintptr_t first = (base + row[i] * width) / page * page, last = (base + (row[i] + 1) * width - 1) / page * page;
    if (first > end || first < begin) {
      tell();
      begin = first;
    }
    end = last + page;
  }
  tell();
}

at::Tensor gather_mapped(const at::Tensor& mapped, const at::Tensor& rows_) {
  TORCH_CHECK(mapped.is_contiguous(), "a mapped table is contiguous");
  const auto rows = rows_.contiguous();
  const int64_t R = mapped.size(0), width = mapped.size(1) * mapped.element_size(), n = rows.numel();
  auto values = at::empty({n, mapped.size(1)}, mapped.options());
  const char* from = static_cast<const char*>(mapped.const_data_ptr());
  char* to = static_cast<char*>(values.mutable_data_ptr());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  check_rows(row, n, R);
  bool announced = true;
  int64_t length = kUnseen, more = kFirst;
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = std::min(n, begin + length);
    if (announced) announce(from, width, row + begin, end - begin);
    const int64_t trips = announced ? 0 : trips_to_disk();
    for (int64_t i = begin; i < end; ++i) {
      if (!announced && i + kAhead < end) __builtin_prefetch(from + row[i + kAhead] * width);
      std::memcpy(to + i * width, from + row[i] * width, width);
    }
    const bool cold = !announced && trips_to_disk() > trips;
    if (!announced) more = cold ? std::min(2 * more, kMost) : kFirst;
    announced = cold;
    length = cold ? more : kProbe;
    begin = end;
  }
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("gather_mapped", gather_mapped); }
}  // namespace engram
