// Torch's threads, for the CPU kernels.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace varfast {

// body(begin, end) over parts of [0, count), each of at least `grain` but for the last.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, call, const_cast<F*>(&body)));
}

}  // namespace varfast
