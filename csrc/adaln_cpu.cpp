// LayerNorm with modulation, alone or after a gated residual, on the CPU; specified by kernels/reference.py.
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace varfast {

// One vector for each image: (B, C), with `stride` numbers between the starts of rows.
template <typename W>
struct Vectors {
  const W* data;
  int64_t stride;
};

struct AdalnSizes {
  int64_t num_images, num_tokens, width;
};

// sum = x + (branch + bias) * gate; out = LayerNorm(sum) * (1 + scale) + shift. Without a branch (null), x takes the
// place of sum, which is not written. x, branch, sum and out are (B, L, C), mean and rstd (B, L), bias (C,) or null.
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

// sum: the normalised input. d_sum or d_out: null if it has no gradient. d_branch, d_gate: null without a branch.
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

namespace {

// Fewest numbers of a (B, L, C) array that justify another thread.
constexpr int64_t kGrain = 1 << 13;
// Gradients of gate, scale and shift are summed over this many tokens of an image before they are added to the total.
// This has less rounding than one long chain of additions.
constexpr int64_t kRows = 16;

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// One token. row: scratch of padded(width) numbers. In all scratch rows the numbers after the width are 0.
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
    for (int64_t i = 0; i < width; ++i) row[i] = W(sum[i]);  // normalise the rounded values that were stored
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

// One token. chunk: four padded rows, the sums of d_gate, d_scale, d_shift and d_bias; scratch: two padded rows.
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
  // A thread processes whole images, so their sums need no second pass and have the same order for any thread count.
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

// ---------------------------------------------------------------------------------------------------------------------
// The op: checks the arguments and allocates the results

namespace {

AdalnSizes adaln_sizes(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

Tensor empty_rows(const Tensor& x) { return new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()); }

// A (B, L, C) array, made contiguous, or nothing.
MaybeTensor rows_like(const Tensor& x, const MaybeTensor& other) {
  if (!other) return other;
  STD_TORCH_CHECK(other->dim() == 3 && other->size(0) == x.size(0) && other->size(1) == x.size(1) &&
                      other->size(2) == x.size(2) && other->scalar_type() == x.scalar_type(),
                  "want arrays of one shape (B, L, C) and one dtype");
  return torch::stable::contiguous(*other);
}

// (B, C) with unit stride in C, in the dtype of the arithmetic, or nothing.
MaybeTensor vectors_of(const Tensor& x, const MaybeTensor& vectors) {
  if (!vectors) return vectors;
  STD_TORCH_CHECK(vectors->dim() == 2 && vectors->size(0) == x.size(0) && vectors->size(1) == x.size(2) &&
                      vectors->scalar_type() == wide_of(x.scalar_type()),
                  "want gate, scale and shift (B, C) in float32, or in float64 for float64; kernels/adaln.py converts");
  return vectors->stride(1) == 1 ? vectors : torch::stable::contiguous(*vectors);
}

template <typename W>
Vectors<W> vectors(const MaybeTensor& x) {
  return {data<W>(x), x ? x->stride(0) : 0};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_cpp(const Tensor& x_BLC, const MaybeTensor& branch_BLC,
                                                     const MaybeTensor& bias_C, const MaybeTensor& gate_BC,
                                                     const Tensor& scale_BC, const Tensor& shift_BC, double eps) {
  STD_TORCH_CHECK(x_BLC.dim() == 3 && x_BLC.size(2) > 0, "want (B, L, C) with channels");
  STD_TORCH_CHECK(branch_BLC.has_value() == gate_BC.has_value(), "want branch and gate together");
  const AdalnSizes sizes = adaln_sizes(x_BLC);
  const ScalarType dtype = x_BLC.scalar_type(), wide = wide_of(dtype);
  const Tensor x = torch::stable::contiguous(x_BLC);
  const MaybeTensor branch = rows_like(x, branch_BLC), bias = bias_of(x, bias_C), gate = vectors_of(x, gate_BC),
                    scale = vectors_of(x, scale_BC), shift = vectors_of(x, shift_BC);
  const Tensor sum = branch ? empty_rows(x) : new_empty(x, {0}, dtype), out = empty_rows(x),
               mean = new_empty(x, {sizes.num_images, sizes.num_tokens}, wide),
               rstd = new_empty(x, {sizes.num_images, sizes.num_tokens}, wide);
  with_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    adaln_cpu(AdalnForward<T>{data<T>(x), data<T>(branch), data<W>(bias), vectors<W>(gate), vectors<W>(scale),
                              vectors<W>(shift), mutable_data<T>(sum), mutable_data<T>(out), mutable_data<W>(mean),
                              mutable_data<W>(rstd), sizes, eps});
  });
  return {sum, out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cpp(const MaybeTensor& d_new_BLC,
    const MaybeTensor& d_out_BLC, const Tensor& new_BLC, const MaybeTensor& branch_BLC, const MaybeTensor& bias_C,
    const MaybeTensor& gate_BC, const Tensor& scale_BC, const Tensor& mean_BL, const Tensor& rstd_BL) {
  STD_TORCH_CHECK(new_BLC.dim() == 3 && new_BLC.size(2) > 0, "want (B, L, C) with channels");
  STD_TORCH_CHECK(d_new_BLC || d_out_BLC, "want a gradient");
  STD_TORCH_CHECK(branch_BLC.has_value() == gate_BC.has_value(), "want branch and gate together");
  const AdalnSizes sizes = adaln_sizes(new_BLC);
  const ScalarType dtype = new_BLC.scalar_type(), wide = wide_of(dtype);
  const Tensor sum = torch::stable::contiguous(new_BLC), mean = torch::stable::contiguous(mean_BL),
               rstd = torch::stable::contiguous(rstd_BL);
  for (const Tensor* x : {&mean, &rstd}) {
    STD_TORCH_CHECK(x->numel() == sizes.num_images * sizes.num_tokens && x->scalar_type() == wide,
                    "want mean and 1 / deviation as the forward pass returned them");
  }
  const MaybeTensor d_sum = rows_like(sum, d_new_BLC), d_out = rows_like(sum, d_out_BLC),
                    branch = rows_like(sum, branch_BLC), bias = bias_of(sum, bias_C), gate = vectors_of(sum, gate_BC),
                    scale = vectors_of(sum, scale_BC);
  const Tensor d_x = empty_rows(sum), d_scale = new_empty(sum, {sizes.num_images, sizes.width}, wide),
               d_shift = new_empty(sum, {sizes.num_images, sizes.width}, wide);
  MaybeTensor d_branch, d_gate, d_bias_BC, d_bias;
  if (bias) {
    d_bias_BC = new_empty(sum, {sizes.num_images, sizes.width}, wide);
    d_bias = new_empty(sum, {sizes.width}, wide);
  }
  if (branch) d_branch = empty_rows(sum), d_gate = new_empty(sum, {sizes.num_images, sizes.width}, wide);
  with_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    adaln_backward_cpu(AdalnBackward<T>{data<T>(d_sum), data<T>(d_out), data<T>(sum), data<T>(branch),
                                        data<W>(bias), vectors<W>(gate), vectors<W>(scale), data<W>(mean),
                                        data<W>(rstd), mutable_data<T>(d_x), mutable_data<T>(d_branch),
                                        mutable_data<W>(d_bias_BC), mutable_data<W>(d_gate), mutable_data<W>(d_scale),
                                        mutable_data<W>(d_shift), sizes});
    if (bias) column_sums_cpu(data<W>(d_bias_BC), sizes.num_images, sizes.width, mutable_data<W>(d_bias));
  });
  const auto or_nothing = [&](const MaybeTensor& x, ScalarType type) { return x ? *x : new_empty(sum, {0}, type); };
  return {d_x, or_nothing(d_branch, dtype), or_nothing(d_bias, wide), or_nothing(d_gate, wide), d_scale, d_shift};
}

}  // namespace varfast
