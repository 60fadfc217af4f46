// GELU (tanh form) of x + bias on the CPU; specified by kernels/reference.py.
#include "tensors.h"

#include <algorithm>
#include <vector>

namespace varfast {

struct GeluSizes {
  int64_t num_rows, width;  // N, C
};

namespace {

// Fewest numbers that justify another thread.
constexpr int64_t kGrain = 1 << 14;
// Rows of which the bias's gradient is summed in float32. The number is fixed, and these sums are added in order, in
// float64, so that the result does not depend on the number of threads.
constexpr int64_t kRows = 64;

// 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)) with 2 u = kSlope (x + kCubic x^3), sqrt(8 / pi) = kSlope.
constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;
// For |x| beyond this, GELU is 0 or x and its derivative 0 or 1, up to 1e-36: |2 u| is 85 there.
constexpr float kFar = 9.9f;

struct Gate {
  float x, e;  // x within [-kFar, kFar]; exp(-|2 u|)

  VARFAST_ALWAYS_INLINE explicit Gate(float wide) {
    const int32_t bits = std::bit_cast<int32_t>(wide), size = std::min(bits & 0x7fffffff, std::bit_cast<int32_t>(kFar));
    x = std::bit_cast<float>(size | (bits & int32_t(0x80000000)));
    e = exp_minus_size(kSlope * x * (1.0f + kCubic * x * x));
  }
  VARFAST_ALWAYS_INLINE float value() const { return if_negative(x, e, 1.0f) / (1.0f + e); }
};

template <typename T, bool kBias>
VARFAST_ALWAYS_INLINE void forward_of(const T* __restrict__ x, const float* __restrict__ bias, int64_t count,
                                      T* __restrict__ out) {
  for (int64_t c = 0; c < count; ++c) {
    const float sum = kBias ? load(x[c]) + bias[c] : load(x[c]);
    store(sum * Gate(sum).value(), out[c]);
  }
}

template <typename T, bool kBias>
VARFAST_ALWAYS_INLINE void backward_of(const T* __restrict__ grad, const T* __restrict__ x,
                                       const float* __restrict__ bias, int64_t count, T* __restrict__ d_x,
                                       float* __restrict__ d_bias) {
  for (int64_t c = 0; c < count; ++c) {
    const float sum = kBias ? load(x[c]) + bias[c] : load(x[c]);
    const Gate gate(sum);
    const float value = gate.value(), rest = if_negative(gate.x, 1.0f, gate.e) / (1.0f + gate.e);
    const float slope = kSlope * gate.x * (1.0f + 3.0f * kCubic * gate.x * gate.x);
    const float d = load(grad[c]) * (value + value * rest * slope + 0.0f * sum);  // NaN stays NaN
    if (kBias) d_bias[c] += d;
    store(d, d_x[c]);
  }
}

}  // namespace

// These are not templates, because g++ clones only ordinary functions for several instruction sets.
#define VARFAST_GELU(T)                                                                                              \
  VARFAST_CLONES void gelu_row(const T* x, const float* bias, int64_t count, T* out) {                               \
    bias ? forward_of<T, true>(x, bias, count, out) : forward_of<T, false>(x, bias, count, out);                     \
  }                                                                                                                  \
  VARFAST_CLONES void gelu_row_backward(const T* grad, const T* x, const float* bias, int64_t count, T* d_x,         \
                                        float* d_bias) {                                                             \
    bias ? backward_of<T, true>(grad, x, bias, count, d_x, d_bias)                                                   \
         : backward_of<T, false>(grad, x, bias, count, d_x, d_bias);                                                 \
  }
VARFAST_GELU(float)
VARFAST_GELU(uint16_t)
#undef VARFAST_GELU

// out (N, C) = GELU(x + bias), tanh form. T: float, or uint16_t for the bits of a bfloat16; bias (C,), or null.
template <typename T>
void gelu_cpu(const T* x, const float* bias, T* out, GeluSizes sizes) {
  const int64_t width = sizes.width;
  if (!width) return;
  parallel_for(sizes.num_rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    if (!bias) return gelu_row(x + begin * width, nullptr, (end - begin) * width, out + begin * width);
    for (int64_t row = begin; row < end; ++row) gelu_row(x + row * width, bias, width, out + row * width);
  });
}

// d_x (N, C) = grad * GELU'(x + bias). With a bias, d_bias (C,) is the sum over the rows of d_x before rounding.
template <typename T>
void gelu_backward_cpu(const T* grad, const T* x, const float* bias, T* d_x, float* d_bias, GeluSizes sizes) {
  const int64_t width = sizes.width, chunks = (sizes.num_rows + kRows - 1) / kRows;
  if (!width) return;
  std::vector<float> sums(bias ? chunks * width : 0);
  parallel_for(chunks, std::max<int64_t>(1, kGrain / (kRows * width)), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kRows, rows = std::min(kRows, sizes.num_rows - first), at = first * width;
      if (!bias) {
        gelu_row_backward(grad + at, x + at, nullptr, rows * width, d_x + at, nullptr);
        continue;
      }
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t of_row = at + row * width;
        gelu_row_backward(grad + of_row, x + of_row, bias, width, d_x + of_row, &sums[chunk * width]);
      }
    }
  });
  if (!bias) return;
  std::vector<double> total(width);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < width; ++c) total[c] += sums[chunk * width + c];
  }
  for (int64_t c = 0; c < width; ++c) d_bias[c] = float(total[c]);
}

// ---------------------------------------------------------------------------------------------------------------------
// The op: checks the arguments and allocates the results

namespace {

MaybeTensor gelu_bias(const Tensor& x, const MaybeTensor& bias) {
  STD_TORCH_CHECK(x.dim() > 0, "want (..., C)");
  if (!bias) return bias;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(x.dim() - 1) && bias->scalar_type() == ScalarType::Float,
                  "bias_C: want one float32 a channel");
  return torch::stable::contiguous(*bias);
}

GeluSizes gelu_sizes(const Tensor& x) {
  const int64_t width = x.size(x.dim() - 1);
  return {width ? x.numel() / width : 0, width};
}

}  // namespace

Tensor gelu_cpp(const Tensor& x_NC, const MaybeTensor& bias_C) {
  const Tensor x = torch::stable::contiguous(x_NC), out = torch::stable::empty_like(x);
  const MaybeTensor bias = gelu_bias(x, bias_C);
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gelu_cpu(data<T>(x), data<float>(bias), mutable_data<T>(out), gelu_sizes(x));
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward_cpp(const Tensor& grad_NC, const Tensor& x_NC, const MaybeTensor& bias_C) {
  const Tensor x = torch::stable::contiguous(x_NC), grad = torch::stable::contiguous(grad_NC);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(), "grad: want shape and dtype of x");
  const MaybeTensor bias = gelu_bias(x, bias_C);
  const Tensor d_x = torch::stable::empty_like(x),
               d_bias = new_empty(x, {bias ? bias->size(0) : 0}, ScalarType::Float);
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gelu_backward_cpu(data<T>(grad), data<T>(x), data<float>(bias), mutable_data<T>(d_x),
                      mutable_data<float>(d_bias), gelu_sizes(x));
  });
  return {d_x, d_bias};
}

}  // namespace varfast
