// GroupNorm and SiLU on the CPU. Each channel's mean and sum of squared deviations over a chunk of pixels are combined
// by group; a second pass normalises. All loops are written so that the compiler vectorises them over the channels.
#include "tensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

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

namespace {

// Numbers of a chunk: 32 KB of bfloat16. The size is fixed and chunks are combined in order, so that the result does
// not depend on the number of threads.
constexpr int64_t kChunk = 16384;

// x / (1 + exp(-x)). |x| in exp is limited to 86. For x < -86 the result is x * exp(-86) instead of 0, which is
// negligible because GroupNorm's results are far below 1e30.
VARFAST_ALWAYS_INLINE float silu(float x) {
  const float e = exp_minus_size(x);
  return x * if_negative(x, e, 1.0f) / (1.0f + e);
}

// For each channel over the rows: the mean, and the sum of squared deviations from it.
template <typename T>
VARFAST_ALWAYS_INLINE void moments_of(const T* __restrict__ x, int64_t rows, int64_t channels, float* __restrict__ mean,
                               float* __restrict__ squares) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0.0f;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) mean[c] += load(x[row * channels + c]);
  }
  const float share = 1.0f / float(rows);
  for (int64_t c = 0; c < channels; ++c) mean[c] *= share;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      const float deviation = load(x[row * channels + c]) - mean[c];
      squares[c] += deviation * deviation;
    }
  }
}

template <typename T>
VARFAST_ALWAYS_INLINE void normalise_of(const T* __restrict__ x, int64_t rows, int64_t channels,
                                 const float* __restrict__ factor, const float* __restrict__ offset, bool with_silu,
                                 T* __restrict__ out) {
  for (int64_t row = 0; row < rows; ++row, x += channels, out += channels) {
    if (with_silu) {
      for (int64_t c = 0; c < channels; ++c) store(silu(load(x[c]) * factor[c] + offset[c]), out[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) store(load(x[c]) * factor[c] + offset[c], out[c]);
    }
  }
}

}  // namespace

// These are not templates, because g++ clones only ordinary functions for several instruction sets.
VARFAST_CLONES void moments(const float* x, int64_t rows, int64_t channels, float* mean, float* squares) {
  moments_of(x, rows, channels, mean, squares);
}
VARFAST_CLONES void moments(const uint16_t* x, int64_t rows, int64_t channels, float* mean, float* squares) {
  moments_of(x, rows, channels, mean, squares);
}
VARFAST_CLONES void normalise(const float* x, int64_t rows, int64_t channels, const float* factor, const float* offset,
                              bool with_silu, float* out) {
  normalise_of(x, rows, channels, factor, offset, with_silu, out);
}
VARFAST_CLONES void normalise(const uint16_t* x, int64_t rows, int64_t channels, const float* factor,
                              const float* offset, bool with_silu, uint16_t* out) {
  normalise_of(x, rows, channels, factor, offset, with_silu, out);
}

// T: float, or uint16_t for the bits of a bfloat16.
template <typename T>
void group_norm_silu_cpu(const GroupNorm& norm, const T* x, T* out) {
  const int64_t channels = norm.num_channels, pixels = norm.num_pixels, width = channels / norm.num_groups;
  const int64_t rows = std::min(pixels, std::max(int64_t(1), kChunk / channels));
  const int64_t chunks = (pixels + rows - 1) / rows;
  const auto rows_of = [=](int64_t chunk) { return std::min(rows, pixels - chunk * rows); };

  std::vector<float> means(norm.num_images * chunks * channels), squares(means.size());
  parallel_for(norm.num_images * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / chunks, chunk = i % chunks;
      moments(x + (image * pixels + chunk * rows) * channels, rows_of(chunk), channels, &means[i * channels],
              &squares[i * channels]);
    }
  });

  std::vector<float> factors(norm.num_images * channels), offsets(factors.size());
  parallel_for(norm.num_images * norm.num_groups, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / norm.num_groups, first = i % norm.num_groups * width;
      const double count = double(pixels * width);
      double mean = 0.0, variance = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t c = first; c < first + width; ++c) {
          mean += (means[(image * chunks + chunk) * channels + c] + double(norm.input_bias[c])) * rows_of(chunk) / count;
        }
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t c = first; c < first + width; ++c) {
          const int64_t at = (image * chunks + chunk) * channels + c;
          const double away = means[at] + double(norm.input_bias[c]) - mean;
          variance += (squares[at] + rows_of(chunk) * away * away) / count;
        }
      }
      const double rstd = 1.0 / std::sqrt(variance + norm.eps);
      for (int64_t c = first; c < first + width; ++c) {
        const double factor = rstd * norm.weight[c];
        factors[image * channels + c] = float(factor);
        offsets[image * channels + c] = float(norm.bias[c] + (norm.input_bias[c] - mean) * factor);
      }
    }
  });

  parallel_for(norm.num_images * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / chunks, chunk = i % chunks, at = (image * pixels + chunk * rows) * channels;
      normalise(x + at, rows_of(chunk), channels, &factors[image * channels], &offsets[image * channels], norm.silu,
                out + at);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The op: checks the arguments and allocates the results

Tensor group_norm_silu_cpu(const Tensor& x_BPC, const Tensor& weight_C, const Tensor& bias_C,
                           const Tensor& input_bias_C, int64_t num_groups, double eps, bool silu) {
  const Tensor x = torch::stable::contiguous(x_BPC);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x_BPC: want float32 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "x_BPC: want three axes and at least one pixel");
  STD_TORCH_CHECK(num_groups > 0 && x.size(2) % num_groups == 0, "num_groups: want a divisor of the channels");
  std::array<Tensor, 3> vectors = {weight_C, bias_C, input_bias_C};
  for (Tensor& vector : vectors) {
    STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == x.size(2) && vector.scalar_type() == ScalarType::Float,
                    "weight_C, bias_C and input_bias_C: want one float32 a channel");
    vector = torch::stable::contiguous(vector);
  }
  const Tensor out = new_empty(x, {x.size(0), x.size(1), x.size(2)}, dtype);
  const GroupNorm norm{vectors[0].const_data_ptr<float>(),
                       vectors[1].const_data_ptr<float>(),
                       vectors[2].const_data_ptr<float>(),
                       x.size(0),
                       x.size(1),
                       x.size(2),
                       num_groups,
                       eps,
                       silu};
  if (dtype == ScalarType::Float) {
    group_norm_silu_cpu(norm, x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  } else {
    group_norm_silu_cpu(norm, static_cast<const uint16_t*>(x.const_data_ptr()),
                        static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace varfast
