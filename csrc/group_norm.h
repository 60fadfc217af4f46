// What ops.cpp asks of the kernel: plain pointers, no torch.
#pragma once

#include <cstdint>

namespace varfast {

// B images of P pixels of C channels, channels innermost; P at least 1, num_groups divides C.
struct GroupNorm {
  const float* weight;      // (C,)
  const float* bias;        // (C,)
  const float* input_bias;  // (C,), added to x first
  int64_t num_images;
  int64_t num_pixels;    // P
  int64_t num_channels;  // C
  int64_t num_groups;
  double eps;
  bool silu;
};

// T: float, or uint16_t for the bits of a bfloat16.
template <typename T>
void group_norm_silu_cpu(const GroupNorm& norm, const T* x, T* out);

}  // namespace varfast
