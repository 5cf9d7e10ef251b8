// Rows ordered by expert, in two passes over the copies of tokens (reference in kernels/layout.py).
#include "common.h"

namespace engram {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> lay_out_rows(const at::Tensor& experts_, const at::Tensor& load_,
                                                            int64_t multiple, bool worst) {
  const auto experts = experts_.contiguous(), load = load_.contiguous();
  const int64_t copies = experts.numel(), E = load.numel();
  auto place = at::empty_like(experts), ends = at::empty_like(load);
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  const int64_t* count = load.const_data_ptr<int64_t>();
  int64_t* end = ends.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(E);
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) {
    next[e] = total;
    total += (count[e] + multiple - 1) / multiple * multiple;
    end[e] = total;
  }
  const int64_t P = worst ? (copies + E * (multiple - 1)) / multiple * multiple : total;
  auto copy = at::empty({P}, experts.options());
  int64_t *row = place.mutable_data_ptr<int64_t>(), *held = copy.mutable_data_ptr<int64_t>();
  std::fill(held, held + P, copies);
  for (int64_t i = 0; i < copies; ++i) {
    const int64_t e = expert[i];
    TORCH_CHECK_INDEX(e >= 0 && e < E && next[e] < end[e], "expert ", e, " of ", E, " has more tokens than its load says");
    row[i] = next[e]++;
    held[row[i]] = i;
  }
  return {place, copy, ends};
}

}  // namespace

TORCH_LIBRARY_IMPL(engram, CPU, m) { m.impl("lay_out_rows", lay_out_rows); }
}  // namespace engram
