// What ops.cpp asks of adaln_cpu.cpp: plain pointers, no tensors.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace varfast {

// One vector an image: (B, C), rows `stride` apart.
template <typename W>
struct Vectors {
  const W* data;
  int64_t stride;
};

struct AdalnSizes {
  int64_t num_images, num_tokens, width;
};

// sum = x + (branch + bias) * gate; out = LayerNorm(sum) * (1 + scale) + shift. Without a branch (null) sum is x and not
// written.
// Large arrays are (B, L, C), mean and rstd (B, L), bias (C,) or null.
template <typename T>
struct AdalnForward {
  const T* x;
  const T* branch;
  const Wide<T>* bias;
  Vectors<Wide<T>> gate, scale, shift;
  T* sum;
  T* out;
  Wide<T>* mean;
  Wide<T>* rstd;
  AdalnSizes sizes;
  double eps;
};

// sum: what was normalised. d_sum or d_out: null where there is no gradient. d_branch, d_gate: null without a branch.
// d_bias (null without a bias), d_gate, d_scale and d_shift: (B, C).
template <typename T>
struct AdalnBackward {
  const T* d_sum;
  const T* d_out;
  const T* sum;
  const T* branch;
  const Wide<T>* bias;
  Vectors<Wide<T>> gate, scale;
  const Wide<T>* mean;
  const Wide<T>* rstd;
  T* d_x;
  T* d_branch;
  Wide<T>* d_bias;
  Wide<T>* d_gate;
  Wide<T>* d_scale;
  Wide<T>* d_shift;
  AdalnSizes sizes;
};

template <typename T>
void adaln_cpu(const AdalnForward<T>& forward);
template <typename T>
void adaln_backward_cpu(const AdalnBackward<T>& backward);

}  // namespace varfast
