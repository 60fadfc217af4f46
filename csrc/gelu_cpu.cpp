// GELU by tanh, with the bias before it, on the CPU; specified by kernels/reference.py.
#include "gelu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.h"

namespace varfast {
namespace {

// Numbers that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 14;
// Rows whose gradients of the bias are added up in float32. Fixed, and these sums are added in order, in float64: the
// result does not depend on the number of threads.
constexpr int64_t kRows = 64;

// 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)) with 2 u = kSlope (x + kCubic x^3), sqrt(8 / pi) = kSlope.
constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;
// Beyond, GELU is 0 or x to 1e-36, and so is its derivative 0 or 1: |2 u| is 85 there.
constexpr float kFar = 9.9f;

struct Gate {
  float x, e;  // x within [-kFar, kFar]; exp(-|2 u|)

  VARFAST_ALWAYS_INLINE explicit Gate(float wide) {
    const int32_t bits = std::bit_cast<int32_t>(wide), size = std::min(bits & 0x7fffffff, std::bit_cast<int32_t>(kFar));
    x = std::bit_cast<float>(size | (bits & int32_t(0x80000000)));
    e = exp_minus_size(kSlope * x * (1.0f + kCubic * x * x));
  }
  VARFAST_ALWAYS_INLINE float value() const { return if_negative(x, e, 1.0f) / (1.0f + e); }
  VARFAST_ALWAYS_INLINE float rest() const { return if_negative(x, 1.0f, e) / (1.0f + e); }  // 1 - value
  VARFAST_ALWAYS_INLINE float slope() const { return kSlope * x * (1.0f + 3.0f * kCubic * x * x); }
};

// In float64, for tests of whole models: not vectorised.
struct WideGate {
  double x, e;

  VARFAST_ALWAYS_INLINE explicit WideGate(double wide)
      : x(wide < -kFar ? -kFar : wide > kFar ? kFar : wide),
        e(std::exp(-std::abs(kWideSlope * x * (1.0 + kWideCubic * x * x)))) {}
  VARFAST_ALWAYS_INLINE double value() const { return (x < 0.0 ? e : 1.0) / (1.0 + e); }
  VARFAST_ALWAYS_INLINE double rest() const { return (x < 0.0 ? 1.0 : e) / (1.0 + e); }
  VARFAST_ALWAYS_INLINE double slope() const { return kWideSlope * x * (1.0 + 3.0 * kWideCubic * x * x); }

  static constexpr double kFar = 20.0, kWideSlope = 1.5957691216057307117597842397375, kWideCubic = 0.044715;
};

template <typename T>
using GateOf = std::conditional_t<std::is_same_v<T, double>, WideGate, Gate>;

template <typename T, bool kBias>
VARFAST_ALWAYS_INLINE void forward_of(const T* __restrict__ x, const BiasOf<T>* __restrict__ bias, int64_t count,
                                      T* __restrict__ out) {
  for (int64_t c = 0; c < count; ++c) {
    const BiasOf<T> sum = kBias ? load(x[c]) + bias[c] : load(x[c]);
    store(sum * GateOf<T>(sum).value(), out[c]);
  }
}

template <typename T, bool kBias>
VARFAST_ALWAYS_INLINE void backward_of(const T* __restrict__ grad, const T* __restrict__ x,
                                       const BiasOf<T>* __restrict__ bias, int64_t count, T* __restrict__ d_x,
                                       BiasOf<T>* __restrict__ d_bias) {
  for (int64_t c = 0; c < count; ++c) {
    const BiasOf<T> sum = kBias ? load(x[c]) + bias[c] : load(x[c]);
    const GateOf<T> gate(sum);
    const BiasOf<T> value = gate.value();
    const BiasOf<T> d = load(grad[c]) * (value + value * gate.rest() * gate.slope() + 0 * sum);  // NaN stays NaN
    if (kBias) d_bias[c] += d;
    store(d, d_x[c]);
  }
}

}  // namespace

// No templates: g++ clones only plain functions.
#define VARFAST_GELU(T)                                                                                              \
  VARFAST_CLONES void gelu_row(const T* x, const BiasOf<T>* bias, int64_t count, T* out) {                           \
    bias ? forward_of<T, true>(x, bias, count, out) : forward_of<T, false>(x, bias, count, out);                     \
  }                                                                                                                  \
  VARFAST_CLONES void gelu_row_backward(const T* grad, const T* x, const BiasOf<T>* bias, int64_t count, T* d_x,     \
                                        BiasOf<T>* d_bias) {                                                         \
    bias ? backward_of<T, true>(grad, x, bias, count, d_x, d_bias)                                                   \
         : backward_of<T, false>(grad, x, bias, count, d_x, d_bias);                                                 \
  }
VARFAST_GELU(float)
VARFAST_GELU(uint16_t)
VARFAST_GELU(double)
#undef VARFAST_GELU

template <typename T>
void gelu_cpu(const T* x, const BiasOf<T>* bias, T* out, GeluSizes sizes) {
  const int64_t width = sizes.width;
  if (!width) return;
  parallel_for(sizes.num_rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    if (!bias) return gelu_row(x + begin * width, nullptr, (end - begin) * width, out + begin * width);
    for (int64_t row = begin; row < end; ++row) gelu_row(x + row * width, bias, width, out + row * width);
  });
}

template <typename T>
void gelu_backward_cpu(const T* grad, const T* x, const BiasOf<T>* bias, T* d_x, BiasOf<T>* d_bias, GeluSizes sizes) {
  const int64_t width = sizes.width, chunks = (sizes.num_rows + kRows - 1) / kRows;
  if (!width) return;
  std::vector<BiasOf<T>> sums(bias ? chunks * width : 0);
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
  for (int64_t c = 0; c < width; ++c) d_bias[c] = BiasOf<T>(total[c]);
}

template void gelu_cpu(const float*, const float*, float*, GeluSizes);
template void gelu_cpu(const uint16_t*, const float*, uint16_t*, GeluSizes);
template void gelu_cpu(const double*, const double*, double*, GeluSizes);
template void gelu_backward_cpu(const double*, const double*, const double*, double*, double*, GeluSizes);
template void gelu_backward_cpu(const float*, const float*, const float*, float*, float*, GeluSizes);
template void gelu_backward_cpu(const uint16_t*, const uint16_t*, const float*, uint16_t*, float*, GeluSizes);

}  // namespace varfast
