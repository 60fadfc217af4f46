// LayerNorm with modulation, alone or after a gated residual, on the CPU; specified by kernels/reference.py.
#include "adaln.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace varfast {
namespace {

// Numbers of a large array that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 13;
// Tokens of one image whose gradients of gate, scale and shift are summed before they are added to the others': less
// rounding than one by one.
constexpr int64_t kRows = 16;

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// One token. row: scratch of padded(width) numbers; zeros behind the width, here and below.
template <typename T>
VARFAST_CLONES void forward_row(const AdalnForward<T>& f, int64_t index, Wide<T>* __restrict row) {
  using W = Wide<T>;
  const int64_t width = f.sizes.width, image = index / f.sizes.num_tokens, at = index * width;
  const T* __restrict x = f.x + at;
  if (f.branch) {
    const T* __restrict branch = f.branch + at;
    const W* __restrict gate = f.gate.data + image * f.gate.stride;
    T* __restrict sum = f.sum + at;
    for (int64_t i = 0; i < width; ++i) row[i] = W(branch[i]);
    if (f.bias) {
      for (int64_t i = 0; i < width; ++i) row[i] += f.bias[i];
    }
    for (int64_t i = 0; i < width; ++i) row[i] = W(x[i]) + row[i] * gate[i];
    for (int64_t i = 0; i < width; ++i) sum[i] = T(row[i]);
    for (int64_t i = 0; i < width; ++i) row[i] = W(sum[i]);  // the stream is normalised as it is stored
  } else {
    for (int64_t i = 0; i < width; ++i) row[i] = W(x[i]);
  }
  const W mean = sum_of(row, padded(width)) / W(width);
  for (int64_t i = 0; i < width; ++i) row[i] -= mean;
  const W rstd = W(1) / std::sqrt(dot(row, row, padded(width)) / W(width) + W(f.eps));
  const W* __restrict scale = f.scale.data + image * f.scale.stride;
  const W* __restrict shift = f.shift.data + image * f.shift.stride;
  T* __restrict out = f.out + at;
  for (int64_t i = 0; i < width; ++i) out[i] = T(row[i] * rstd * (W(1) + scale[i]) + shift[i]);
  f.mean[index] = mean;
  f.rstd[index] = rstd;
}

// One token. chunk: sums of d_gate, d_scale, d_shift, d_bias, padded; scratch: two padded rows.
template <typename T>
VARFAST_CLONES void backward_row(const AdalnBackward<T>& f, int64_t image, int64_t index, Wide<T>* __restrict chunk,
                                 Wide<T>* __restrict scratch) {
  using W = Wide<T>;
  const int64_t width = f.sizes.width, pad = padded(width), at = index * width;
  W *__restrict d_gate = chunk, *__restrict d_scale = chunk + pad, *__restrict d_shift = chunk + 2 * pad,
     *__restrict d_bias = chunk + 3 * pad;
  W *__restrict d = scratch, *__restrict normed = scratch + pad;
  if (f.d_out) {
    const T *__restrict d_out = f.d_out + at, *__restrict sum = f.sum + at;
    const W* __restrict scale = f.scale.data + image * f.scale.stride;
    const W mean = f.mean[index], rstd = f.rstd[index];
    for (int64_t i = 0; i < width; ++i) {
      const W upstream = W(d_out[i]);
      normed[i] = (W(sum[i]) - mean) * rstd;
      d_scale[i] += upstream * normed[i];
      d_shift[i] += upstream;
      d[i] = upstream * (W(1) + scale[i]);
    }
    const W along = dot(d, normed, pad) / W(width), average = sum_of(d, pad) / W(width);
    for (int64_t i = 0; i < width; ++i) d[i] = (d[i] - average - normed[i] * along) * rstd;
  }
  if (f.d_sum) {
    const T* __restrict d_sum = f.d_sum + at;
    for (int64_t i = 0; i < width; ++i) d[i] = f.d_out ? d[i] + W(d_sum[i]) : W(d_sum[i]);
  }
  T* __restrict d_x = f.d_x + at;
  if (f.branch) {
    const T* __restrict branch = f.branch + at;
    const W* __restrict gate = f.gate.data + image * f.gate.stride;
    T* __restrict d_branch = f.d_branch + at;
    for (int64_t i = 0; i < width; ++i) {
      d_x[i] = T(d[i]);
      d_gate[i] += d[i] * (W(branch[i]) + (f.bias ? f.bias[i] : W(0)));
      d_branch[i] = T(d[i] * gate[i]);
    }
    if (f.bias) {
      for (int64_t i = 0; i < width; ++i) d_bias[i] += d[i] * gate[i];
    }
  } else {
    for (int64_t i = 0; i < width; ++i) d_x[i] = T(d[i]);
  }
}

}  // namespace

template <typename T>
void adaln_cpu(const AdalnForward<T>& f) {
  const int64_t width = f.sizes.width;
  parallel_for(f.sizes.num_images * f.sizes.num_tokens, std::max<int64_t>(1, kGrain / width),
               [&](int64_t begin, int64_t end) {
                 std::vector<Wide<T>> row(padded(width));
                 for (int64_t index = begin; index < end; ++index) forward_row(f, index, row.data());
               });
}

template <typename T>
void adaln_backward_cpu(const AdalnBackward<T>& f) {
  using W = Wide<T>;
  const int64_t num_tokens = f.sizes.num_tokens, width = f.sizes.width, pad = padded(width);
  W* const totals[] = {f.d_gate, f.d_scale, f.d_shift, f.d_bias};
  // A thread takes whole images: their sums need no second pass, and are added in one order however many threads run.
  const int64_t grain = kGrain / std::max<int64_t>(1, num_tokens * width);
  parallel_for(f.sizes.num_images, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    std::vector<W> chunk(4 * pad), scratch(2 * pad);
    for (int64_t image = begin; image < end; ++image) {
      for (W* total : totals) {
        if (total) std::fill_n(total + image * width, width, W(0));
      }
      for (int64_t first = 0; first < num_tokens; first += kRows) {
        std::fill(chunk.begin(), chunk.end(), W(0));
        for (int64_t l = first; l < std::min(first + kRows, num_tokens); ++l) {
          backward_row(f, image, image * num_tokens + l, chunk.data(), scratch.data());
        }
        for (int part = 0; part < 4; ++part) {
          if (!totals[part]) continue;
          for (int64_t i = 0; i < width; ++i) totals[part][image * width + i] += chunk[part * pad + i];
        }
      }
    }
  });
}

template void adaln_cpu(const AdalnForward<float>&);
template void adaln_cpu(const AdalnForward<double>&);
template void adaln_cpu(const AdalnForward<BFloat16>&);
template void adaln_backward_cpu(const AdalnBackward<float>&);
template void adaln_backward_cpu(const AdalnBackward<double>&);
template void adaln_backward_cpu(const AdalnBackward<BFloat16>&);

}  // namespace varfast
