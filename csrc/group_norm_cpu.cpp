// GroupNorm and SiLU on the CPU: per channel mean and squared deviations of a chunk of pixels, joined by group, then one
// pass that normalises. Everything is written for the compiler to vectorise over the channels.
#include "group_norm.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "cpu.h"

namespace varfast {
namespace {

// Numbers of a chunk: 32 KB of bfloat16. Fixed, and chunks are joined in order: the result does not depend on the number
// of threads.
constexpr int64_t kChunk = 16384;

// x / (1 + exp(-x)). |x| ends at 86; beyond, x * exp(-86) stands for 0, and what GroupNorm returns is far from 1e30.
VARFAST_ALWAYS_INLINE float silu(float x) {
  const float e = exp_minus_size(x);
  return x * if_negative(x, e, 1.0f) / (1.0f + e);
}

// Of each channel over the rows: mean, and sum of squared deviations from it.
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

// No templates: g++ clones only plain functions.
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

template void group_norm_silu_cpu(const GroupNorm&, const float*, float*);
template void group_norm_silu_cpu(const GroupNorm&, const uint16_t*, uint16_t*);

}  // namespace varfast
