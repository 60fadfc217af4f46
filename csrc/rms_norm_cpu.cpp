// RMSNorm, alone or after a residual, and SwiGLU on the CPU; specified by kernels/reference_nexttoken.py.
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace varfast {

namespace {

// Fewest numbers that justify another thread.
constexpr int64_t kGrain = 1 << 13;
// Rows of which the weight's gradient is summed in one chain. The chains are added in order, for any number of threads.
constexpr int64_t kRows = 16;

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// One row. scratch: padded(width) numbers, 0 after the width. branch and sum: null without a residual.
template <typename T>
VARFAST_ALWAYS_INLINE void norm_of(const T* __restrict__ x, const T* __restrict__ branch,
                                   const float* __restrict__ weight, int64_t width, float eps,
                                   float* __restrict__ scratch, T* __restrict__ sum, T* __restrict__ out, float* rstd) {
  for (int64_t i = 0; i < width; ++i) scratch[i] = load(x[i]);
  if (branch) {
    for (int64_t i = 0; i < width; ++i) store(scratch[i] + load(branch[i]), sum[i]);
    for (int64_t i = 0; i < width; ++i) scratch[i] = load(sum[i]);  // normalise the rounded values that were stored
  }
  const float inverse = 1.0f / std::sqrt(dot(scratch, scratch, padded(width)) / float(width) + eps);
  for (int64_t i = 0; i < width; ++i) {
    T rounded;
    store(scratch[i] * inverse, rounded);
    store(load(rounded) * weight[i], out[i]);
  }
  *rstd = inverse;
}

// scratch: two padded rows; sums: the sums of d_weight. d_sum: null if no gradient of the stream itself arrived.
template <typename T>
VARFAST_ALWAYS_INLINE void norm_backward_of(const T* __restrict__ d_sum, const T* __restrict__ d_out,
                                            const T* __restrict__ sum, const float* __restrict__ weight, int64_t width,
                                            float rstd, float* __restrict__ scratch, float* __restrict__ sums,
                                            T* __restrict__ d_x) {
  float *__restrict__ d = scratch, *__restrict__ normed = scratch + padded(width);
  for (int64_t i = 0; i < width; ++i) {
    const float upstream = load(d_out[i]);
    normed[i] = load(sum[i]) * rstd;
    T rounded;
    store(normed[i], rounded);
    sums[i] += upstream * load(rounded);
    d[i] = upstream * weight[i];
  }
  const float along = dot(d, normed, padded(width)) / float(width);
  for (int64_t i = 0; i < width; ++i) d[i] = (d[i] - normed[i] * along) * rstd;
  if (d_sum) {
    for (int64_t i = 0; i < width; ++i) d[i] += load(d_sum[i]);
  }
  for (int64_t i = 0; i < width; ++i) store(d[i], d_x[i]);
}

// Sigmoid, computed from exp(-|x|), which does not overflow.
VARFAST_ALWAYS_INLINE float sigmoid(float x) {
  const float e = exp_minus_size(x);
  return if_negative(x, e, 1.0f) / (1.0f + e);
}

template <typename T>
VARFAST_ALWAYS_INLINE void swiglu_of(const T* __restrict__ gate, const T* __restrict__ up, int64_t count,
                                     T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = load(gate[i]);
    store(g * sigmoid(g) * load(up[i]), out[i]);
  }
}

template <typename T>
VARFAST_ALWAYS_INLINE void swiglu_backward_of(const T* __restrict__ d_out, const T* __restrict__ gate,
                                              const T* __restrict__ up, int64_t count, T* __restrict__ d_gate,
                                              T* __restrict__ d_up) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = load(gate[i]), d = load(d_out[i]), share = sigmoid(g);
    store(d * g * share, d_up[i]);
    store(d * load(up[i]) * share * (1.0f + g * (1.0f - share)), d_gate[i]);
  }
}

}  // namespace

// These are not templates, because g++ clones only ordinary functions for several instruction sets.
#define VARFAST_NORM(T)                                                                                               \
  VARFAST_CLONES void norm_row(const T* x, const T* branch, const float* weight, int64_t width, float eps,            \
                               float* scratch, T* sum, T* out, float* rstd) {                                         \
    norm_of<T>(x, branch, weight, width, eps, scratch, sum, out, rstd);                                               \
  }                                                                                                                   \
  VARFAST_CLONES void norm_row_backward(const T* d_sum, const T* d_out, const T* sum, const float* weight,            \
                                        int64_t width, float rstd, float* scratch, float* sums, T* d_x) {             \
    norm_backward_of<T>(d_sum, d_out, sum, weight, width, rstd, scratch, sums, d_x);                                  \
  }                                                                                                                   \
  VARFAST_CLONES void swiglu_row(const T* gate, const T* up, int64_t count, T* out) {                                 \
    swiglu_of<T>(gate, up, count, out);                                                                               \
  }                                                                                                                   \
  VARFAST_CLONES void swiglu_row_backward(const T* d_out, const T* gate, const T* up, int64_t count, T* d_gate,       \
                                          T* d_up) {                                                                  \
    swiglu_backward_of<T>(d_out, gate, up, count, d_gate, d_up);                                                      \
  }
VARFAST_NORM(float)
VARFAST_NORM(uint16_t)
#undef VARFAST_NORM

// ---------------------------------------------------------------------------------------------------------------------
// The ops: check the arguments and allocate the results

namespace {

void check_rows(const Tensor& x, const MaybeTensor& other, const char* what) {
  STD_TORCH_CHECK(x.dim() == 2 && (!other || (other->dim() == 2 && other->size(0) == x.size(0) &&
                                              other->size(1) == x.size(1) && other->scalar_type() == x.scalar_type())),
                  what);
}

Tensor norm_weight(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.scalar_type() == ScalarType::Float,
                  "weight_C: want one float32 a channel");
  return torch::stable::contiguous(weight);
}

MaybeTensor maybe_contiguous(const MaybeTensor& x) { return x ? MaybeTensor(torch::stable::contiguous(*x)) : x; }

int64_t rows_of_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rms_norm_cpp(const Tensor& x_NC, const MaybeTensor& branch_NC,
                                                const Tensor& weight_C, double eps) {
  check_rows(x_NC, branch_NC, "x_NC, branch_NC: want (N, C), one shape and dtype");
  const Tensor x = torch::stable::contiguous(x_NC), weight = norm_weight(x, weight_C);
  const MaybeTensor branch = maybe_contiguous(branch_NC);
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor sum = branch ? torch::stable::empty_like(x) : new_empty(x, {0}, x.scalar_type()),
               out = torch::stable::empty_like(x), rstd = new_empty(x, {rows}, ScalarType::Float);
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_for(rows, rows_of_grain(width), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(padded(width));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * width;
        norm_row(data<T>(x) + at, branch ? data<T>(*branch) + at : nullptr, data<float>(weight), width, float(eps),
                 scratch.data(), branch ? mutable_data<T>(sum) + at : nullptr, mutable_data<T>(out) + at,
                 mutable_data<float>(rstd) + row);
      }
    });
  });
  return {sum, out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpp(const MaybeTensor& d_sum_NC, const Tensor& d_out_NC,
                                                 const Tensor& sum_NC, const Tensor& weight_C, const Tensor& rstd_N) {
  check_rows(sum_NC, d_out_NC, "d_out_NC: want the shape and dtype of x");
  check_rows(sum_NC, d_sum_NC, "d_sum_NC: want the shape and dtype of x");
  const Tensor sum = torch::stable::contiguous(sum_NC), d_out = torch::stable::contiguous(d_out_NC),
               weight = norm_weight(sum, weight_C), rstd = torch::stable::contiguous(rstd_N);
  const MaybeTensor d_sum = maybe_contiguous(d_sum_NC);
  const int64_t rows = sum.size(0), width = sum.size(1), chunks = (rows + kRows - 1) / kRows;
  STD_TORCH_CHECK(rstd.numel() == rows && rstd.scalar_type() == ScalarType::Float,
                  "rstd_N: want what the forward pass returned");
  const Tensor d_x = torch::stable::empty_like(sum), d_weight = new_empty(sum, {width}, ScalarType::Float);
  std::vector<float> sums(chunks * width);
  with_bits(sum.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_for(chunks, std::max<int64_t>(1, rows_of_grain(width) / kRows), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * padded(width));
      for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); ++row) {
        const int64_t at = row * width;
        norm_row_backward(d_sum ? data<T>(*d_sum) + at : nullptr, data<T>(d_out) + at, data<T>(sum) + at,
                          data<float>(weight), width, data<float>(rstd)[row], scratch.data(),
                          sums.data() + row / kRows * width, mutable_data<T>(d_x) + at);
      }
    });
  });
  column_sums_cpu(sums.data(), chunks, width, mutable_data<float>(d_weight));
  return {d_x, d_weight};
}

Tensor swiglu_cpp(const Tensor& gate_NF, const Tensor& up_NF) {
  check_rows(gate_NF, up_NF, "gate_NF, up_NF: want (N, F), one shape and dtype");
  const Tensor gate = torch::stable::contiguous(gate_NF), up = torch::stable::contiguous(up_NF),
               out = torch::stable::empty_like(gate);
  with_bits(gate.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      swiglu_row(data<T>(gate) + begin, data<T>(up) + begin, end - begin, mutable_data<T>(out) + begin);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpp(const Tensor& d_out_NF, const Tensor& gate_NF, const Tensor& up_NF) {
  check_rows(gate_NF, up_NF, "gate_NF, up_NF: want (N, F), one shape and dtype");
  check_rows(gate_NF, d_out_NF, "d_out_NF: want the shape and dtype of gate");
  const Tensor gate = torch::stable::contiguous(gate_NF), up = torch::stable::contiguous(up_NF),
               d_out = torch::stable::contiguous(d_out_NF), d_gate = torch::stable::empty_like(gate),
               d_up = torch::stable::empty_like(gate);
  with_bits(gate.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      swiglu_row_backward(data<T>(d_out) + begin, data<T>(gate) + begin, data<T>(up) + begin, end - begin,
                          mutable_data<T>(d_gate) + begin, mutable_data<T>(d_up) + begin);
    });
  });
  return {d_gate, d_up};
}

}  // namespace varfast
