// GELU of a product and its bias on the CPU, as kernels/reference.py, gelu_bias, specifies it; sums over rows.
#include "gelu.h"

#include <algorithm>
#include <vector>

namespace varfast {
namespace {

// Rows whose gradients are summed before they are added to the others', and that are worth a thread: with 4096 channels
// 128 KB of bfloat16.
constexpr int64_t kRows = 16;
// Columns of the partial sums that are joined at a time.
constexpr int64_t kColumns = 512;

// The tanh form, 0.5 x (1 + tanh u), is x * sigmoid(2 u) with 2 u = x (kLinear + kCubic x^2).
constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481282052303f;

// sigmoid(z) and its derivative by exp(-|z|), without a comparison of floats: g++ makes branches of those. |z| ends at 86.
VARFAST_ALWAYS_INLINE void sigmoid(float z, float& value, float& slope) {
  const int32_t bits = std::bit_cast<int32_t>(z), negative = bits >> 31;
  const int32_t size = std::min(bits & 0x7fffffff, std::bit_cast<int32_t>(86.0f));
  const float e = exp_bounded(-std::bit_cast<float>(size));
  const float above =
      std::bit_cast<float>((std::bit_cast<int32_t>(e) & negative) | (std::bit_cast<int32_t>(1.0f) & ~negative));
  const float inverse = 1.0f / (1.0f + e);
  value = above * inverse;
  slope = e * inverse * inverse;
}

template <typename T>
VARFAST_ALWAYS_INLINE void forward_row(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ out,
                                       int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float y = load(x[i]) + bias[i];
    float value, slope;
    sigmoid(y * (kLinear + kCubic * y * y), value, slope);
    store(y * value, out[i]);
  }
}

template <typename T>
VARFAST_ALWAYS_INLINE void backward_row(const T* __restrict__ d_out, const T* __restrict__ x,
                                        const float* __restrict__ bias, T* __restrict__ d_x, float* __restrict__ sums,
                                        int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float y = load(x[i]) + bias[i];
    float value, slope;
    sigmoid(y * (kLinear + kCubic * y * y), value, slope);
    const float d = load(d_out[i]) * (value + y * slope * (kLinear + 3.0f * kCubic * y * y));
    sums[i] += d;
    store(d, d_x[i]);
  }
}

// No templates: g++ clones only plain functions.
VARFAST_CLONES void forward(const float* x, const float* bias, float* out, int64_t width) {
  forward_row(x, bias, out, width);
}
VARFAST_CLONES void forward(const uint16_t* x, const float* bias, uint16_t* out, int64_t width) {
  forward_row(x, bias, out, width);
}
VARFAST_CLONES void backward(const float* d_out, const float* x, const float* bias, float* d_x, float* sums,
                             int64_t width) {
  backward_row(d_out, x, bias, d_x, sums, width);
}
VARFAST_CLONES void backward(const uint16_t* d_out, const uint16_t* x, const float* bias, uint16_t* d_x, float* sums,
                             int64_t width) {
  backward_row(d_out, x, bias, d_x, sums, width);
}

VARFAST_CLONES void add_row(const float* x, float* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += x[i];
}
VARFAST_CLONES void add_row(const double* x, double* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += x[i];
}
VARFAST_CLONES void add_row(const uint16_t* x, float* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += load(x[i]);
}

// Sums over all rows: body(row, sums) adds a row's numbers; chunks of rows are joined in order.
template <typename W, typename F>
void sum_rows(int64_t rows, int64_t width, W* out, const F& body) {
  const int64_t chunks = (rows + kRows - 1) / kRows;
  std::vector<W> partial(chunks * width);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); ++row) {
      body(row, partial.data() + row / kRows * width);
    }
  });
  parallel_for((width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, count = std::min(end * kColumns, width) - first;
    std::fill_n(out + first, count, W(0));
    // In pairs of pairs: a chain of 1360 chunks would be the largest error of all.
    for (int64_t step = 1; step < chunks; step *= 2) {
      for (int64_t i = 0; i + step < chunks; i += 2 * step) {
        add_row(partial.data() + (i + step) * width + first, partial.data() + i * width + first, count);
      }
    }
    if (chunks) add_row(partial.data() + first, out + first, count);
  });
}

}  // namespace

template <typename T>
void gelu_bias_cpu(const T* x, const float* bias, T* out, int64_t rows, int64_t width) {
  parallel_for(rows, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward(x + row * width, bias, out + row * width, width);
  });
}

template <typename T>
void gelu_bias_backward_cpu(const T* d_out, const T* x, const float* bias, T* d_x, float* d_bias, int64_t rows,
                            int64_t width) {
  sum_rows(rows, width, d_bias, [&](int64_t row, float* sums) {
    const int64_t at = row * width;
    backward(d_out + at, x + at, bias, d_x + at, sums, width);
  });
}

template <typename T>
void column_sums_cpu(const T* x, int64_t rows, int64_t width, Wide<T>* out) {
  sum_rows(rows, width, out, [&](int64_t row, Wide<T>* sums) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      add_row(reinterpret_cast<const uint16_t*>(x) + row * width, sums, width);
    } else {
      add_row(x + row * width, sums, width);
    }
  });
}

template void gelu_bias_cpu(const float*, const float*, float*, int64_t, int64_t);
template void gelu_bias_cpu(const uint16_t*, const float*, uint16_t*, int64_t, int64_t);
template void gelu_bias_backward_cpu(const float*, const float*, const float*, float*, float*, int64_t, int64_t);
template void gelu_bias_backward_cpu(const uint16_t*, const uint16_t*, const float*, uint16_t*, float*, int64_t,
                                     int64_t);
template void column_sums_cpu(const float*, int64_t, int64_t, float*);
template void column_sums_cpu(const double*, int64_t, int64_t, double*);
template void column_sums_cpu(const BFloat16*, int64_t, int64_t, float*);

}  // namespace varfast
