// What ops.cpp asks of gelu_cpu.cpp: plain pointers, no torch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace varfast {

// float, or double for double.
template <typename T>
using BiasOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct GeluSizes {
  int64_t num_rows, width;  // N, C
};

// T: float, double, or uint16_t for the bits of a bfloat16. bias (C,), or null.
// out (N, C) = GELU(x + bias), by tanh.
template <typename T>
void gelu_cpu(const T* x, const BiasOf<T>* bias, T* out, GeluSizes sizes);

// d_x (N, C) = grad * GELU'(x + bias), and d_bias (C,) its sum over the rows before it is rounded, where there is one.
template <typename T>
void gelu_backward_cpu(const T* grad, const T* x, const BiasOf<T>* bias, T* d_x, BiasOf<T>* d_bias, GeluSizes sizes);

}  // namespace varfast
