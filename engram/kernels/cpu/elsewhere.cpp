// Tells the system which pages of a mapped file are read next (reference in kernels/elsewhere.py).
#include "common.h"

#include <sys/mman.h>
#include <unistd.h>

namespace engram {
namespace {

void read_ahead(const at::Tensor& mapped, const at::Tensor& rows_) {
  TORCH_CHECK(mapped.is_contiguous(), "a mapped table is contiguous");
  const auto rows = rows_.contiguous();
  const uintptr_t page = sysconf(_SC_PAGESIZE), base = reinterpret_cast<uintptr_t>(mapped.const_data_ptr());
  const int64_t R = mapped.size(0), width = mapped.size(1) * mapped.element_size(), n = rows.numel();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  uintptr_t begin = 0, end = 0;  // pages to ask for: neighbours in one call
  const auto ask = [&] { if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED); };
  for (int64_t i = 0; i < n; ++i) {
    if (row[i] < 0 || row[i] >= R) continue;  // whoever reads it says so
    const uintptr_t first = (base + row[i] * width) / page * page, last = (base + (row[i] + 1) * width - 1) / page * page;
    if (first > end || first < begin) {
      ask();
      begin = first;
    }
    end = last + page;
  }
  ask();
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("read_ahead", read_ahead); }
}  // namespace engram
