// What ops.cpp asks of gelu_cpu.cpp: plain pointers, no tensors. bfloat16 comes as its bits.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace varfast {

// out = gelu(x + bias), tanh form; x and out (rows, width), bias (width,).
template <typename T>
void gelu_bias_cpu(const T* x, const float* bias, T* out, int64_t rows, int64_t width);

// d_x of d_out, and d_bias, its sums over the rows.
template <typename T>
void gelu_bias_backward_cpu(const T* d_out, const T* x, const float* bias, T* d_x, float* d_bias, int64_t rows,
                            int64_t width);

}  // namespace varfast
