// For the ops that launch CUDA kernels; empty in a build for the CPU alone.
#pragma once

#ifdef VARFAST_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

namespace varfast {

// Torch's current stream. Launches on another stream would not be ordered with torch's kernels, nor be captured.
inline void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// error: null, or CUDA's message.
inline void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

}  // namespace varfast
#endif
