// What ops.cpp asks of gelu_cpu.cpp: plain pointers, no torch.
#pragma once

#include <cstdint>

namespace varfast {

struct GeluSizes {
  int64_t num_rows, width;  // N, C
};

// T: float, or uint16_t for the bits of a bfloat16. bias (C,), or null.
// out (N, C) = GELU(x + bias), by tanh.
template <typename T>
void gelu_cpu(const T* x, const float* bias, T* out, GeluSizes sizes);

// d_x (N, C) = grad * GELU'(x + bias), and d_bias (C,) its sum over the rows before it is rounded, where there is one.
template <typename T>
void gelu_backward_cpu(const T* grad, const T* x, const float* bias, T* d_x, float* d_bias, GeluSizes sizes);

}  // namespace varfast
