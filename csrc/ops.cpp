// Registers the ops of csrc/ with PyTorch; nothing else does. Stable ABI only: one build runs on torch 2.11 and later.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "adaln.h"
#include "attention.h"
#include "gelu.h"
#include "group_norm.h"
#include "grpo_loss.h"
#include "split_heads.h"

namespace varfast {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// body(T{}) with the C++ type of a checked dtype.
template <typename F>
auto with_type(ScalarType dtype, const F& body) {
  return dtype == ScalarType::Float ? body(float{}) : body(double{});
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// The arguments of a forward pass, checked and contiguous, and the tensors that it writes.
struct Forward {
  Tensor logp, old, ref, advantages, loss, stats, grad;
  bool has_reference;
  double clip_eps, kl_beta;

  Forward(const Tensor& logp_BL, const Tensor& logp_old_BL, const std::optional<Tensor>& logp_ref_BL,
          const Tensor& advantages_BL, double clip_eps, double kl_beta)
      : logp(torch::stable::contiguous(logp_BL)),
        old(torch::stable::contiguous(logp_old_BL)),
        ref(logp_ref_BL ? torch::stable::contiguous(*logp_ref_BL) : logp),
        advantages(advantages_BL),  // by its strides: one number an image is an expanded tensor
        has_reference(logp_ref_BL.has_value()),
        clip_eps(clip_eps),
        kl_beta(kl_beta) {
    const ScalarType dtype = logp.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "logp_BL: want float32 or float64; the wrapper in kernels/grpo_loss.py converts");
    STD_TORCH_CHECK(logp.dim() == 2 && logp.numel() > 0, "logp_BL: want two axes and at least one token");
    for (const Tensor* other : {&old, &ref, &advantages}) {
      STD_TORCH_CHECK(other->dim() == 2 && other->size(0) == logp.size(0) && other->size(1) == logp.size(1),
                      "logp_old_BL, logp_ref_BL and advantages_BL: want the shape of logp_BL");
    }
    for (const Tensor* other : {&old, &ref, &advantages}) {
      STD_TORCH_CHECK(other->scalar_type() == dtype, "want one dtype for all tensors");
      STD_TORCH_CHECK(other->is_cuda() == logp.is_cuda() && other->get_device_index() == logp.get_device_index(),
                      "want all tensors on one device");
    }
    loss = new_empty(logp, {}, dtype);
    stats = new_empty(logp, {5}, dtype);
    grad = new_empty(logp, {logp.size(0), logp.size(1)}, dtype);
  }

  template <typename T>
  GrpoForward<T> pointers() const {
    // 1 - eps and 1 + eps are rounded once, as Python's scalars are in the reference.
    return {logp.const_data_ptr<T>(),
            old.const_data_ptr<T>(),
            ref.const_data_ptr<T>(),
            {advantages.const_data_ptr<T>(), advantages.stride(0), advantages.stride(1)},
            grad.mutable_data_ptr<T>(),
            loss.mutable_data_ptr<T>(),
            stats.mutable_data_ptr<T>(),
            logp.size(0),
            logp.size(1),
            1.0 / double(logp.numel()),
            {T(1.0 - clip_eps), T(1.0 + clip_eps), T(kl_beta), has_reference}};
  }
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;

struct Backward {
  Tensor grad, upstream, out;

  Backward(const Tensor& grad_BL, const Tensor& grad_loss)
      : grad(torch::stable::contiguous(grad_BL)), upstream(grad_loss) {
    const ScalarType dtype = grad.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "grad_BL: want float32 or float64");
    STD_TORCH_CHECK(grad.dim() == 2 && grad.numel() > 0, "grad_BL: want two axes and at least one token");
    STD_TORCH_CHECK(upstream.numel() == 1 && upstream.scalar_type() == dtype && upstream.is_cuda() == grad.is_cuda() &&
                        upstream.get_device_index() == grad.get_device_index(),
                    "grad_loss: want one number of the dtype and on the device of grad_BL");
    out = new_empty(grad, {grad.size(0), grad.size(1)}, dtype);
  }
};

ForwardResult forward_cpu(const Tensor& logp_BL, const Tensor& logp_old_BL, const std::optional<Tensor>& logp_ref_BL,
                          const Tensor& advantages_BL, double clip_eps, double kl_beta) {
  const Forward f(logp_BL, logp_old_BL, logp_ref_BL, advantages_BL, clip_eps, kl_beta);
  with_type(f.logp.scalar_type(), [&](auto zero) { grpo_forward_cpu(f.pointers<decltype(zero)>()); });
  return {f.loss, f.stats, f.grad};
}

Tensor backward_cpu(const Tensor& grad_BL, const Tensor& grad_loss) {
  const Backward b(grad_BL, grad_loss);
  with_type(b.grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    grpo_backward_cpu(b.grad.const_data_ptr<T>(), b.upstream.const_data_ptr<T>(), b.out.mutable_data_ptr<T>(),
                      b.grad.numel());
  });
  return b.out;
}

Tensor group_norm_cpu(const Tensor& x_BPC, const Tensor& weight_C, const Tensor& bias_C, const Tensor& input_bias_C,
                      int64_t num_groups, double eps, bool silu) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Split of the qkv product into heads, on the CPU

// body(T{}) with the C++ type of a dtype.
template <typename F>
void with_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "want float32, float64 or bfloat16");
  body(BFloat16{});
}

ScalarType wide_of(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Elements of a tensor, whose dtype was checked.
template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

using MaybeTensor = std::optional<Tensor>;

// (C,) in the dtype of the arithmetic, or nothing.
MaybeTensor bias_of(const Tensor& x, const MaybeTensor& bias) {
  if (!bias) return bias;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(-1) && bias->scalar_type() == wide_of(x.scalar_type()),
                  "want a bias of one float32 a channel, or float64 for float64");
  return torch::stable::contiguous(*bias);
}

template <typename T>
const T* data(const MaybeTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

template <typename T>
T* mutable_data(const MaybeTensor& x) {
  return x ? mutable_data<T>(*x) : nullptr;
}

template <typename T>
Heads<T> heads(const Tensor& x, T* data) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

HeadSizes head_sizes(const Tensor& product, int64_t num_heads) {
  STD_TORCH_CHECK(product.dim() == 3 && num_heads > 0 && product.size(2) == 3 * num_heads * kHeadDim,
                  "want a product (B, L, 3 * H * 64)");
  return {product.size(0), product.size(1), num_heads};
}

void check_heads(const Tensor& x, const HeadSizes& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == sizes.num_images && x.size(1) == sizes.num_heads &&
                      x.size(2) == sizes.num_tokens && x.size(3) == kHeadDim && (x.stride(3) == 1 || x.numel() == 0) &&
                      x.scalar_type() == dtype,
                  "want (B, H, L, 64) of the sizes and dtype of the product, with unit stride in D");
}

Tensor empty_heads(const Tensor& product, const HeadSizes& sizes) {
  return new_empty(product, {sizes.num_images, sizes.num_heads, sizes.num_tokens, kHeadDim}, product.scalar_type());
}

// inverse_q and inverse_k: null, or written.
void split_into(const Tensor& product, const MaybeTensor& bias_C3, const HeadSizes& sizes, bool l2_norm,
                const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* inverse_q, const Tensor* inverse_k) {
  const Tensor x = torch::stable::contiguous(product);
  const MaybeTensor bias = bias_of(x, bias_C3);
  with_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto inverse = [&](const Tensor* y) { return y ? mutable_data<Wide<T>>(*y) : nullptr; };
    split_heads_cpu(SplitForward<T>{data<T>(x), data<Wide<T>>(bias), heads(q, mutable_data<T>(q)),
                                    heads(k, mutable_data<T>(k)), heads(v, mutable_data<T>(v)), inverse(inverse_q),
                                    inverse(inverse_k), sizes, l2_norm});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> split_heads(const Tensor& product, const MaybeTensor& bias_C3,
                                                               int64_t num_heads, bool l2_norm) {
  const HeadSizes sizes = head_sizes(product, num_heads);
  const ScalarType wide = wide_of(product.scalar_type());
  const Tensor q = empty_heads(product, sizes), k = empty_heads(product, sizes), v = empty_heads(product, sizes);
  const auto empty_inverse = [&] {
    return l2_norm ? new_empty(product, {sizes.num_images, sizes.num_heads, sizes.num_tokens}, wide)
                   : new_empty(product, {0}, wide);
  };
  const Tensor inverse_q = empty_inverse(), inverse_k = empty_inverse();
  split_into(product, bias_C3, sizes, l2_norm, q, k, v, &inverse_q, &inverse_k);
  return {q, k, v, inverse_q, inverse_k};
}

Tensor split_heads_into(const Tensor& product, const MaybeTensor& bias_C3, int64_t num_heads, bool l2_norm,
                        Tensor k_BHlD, Tensor v_BHlD) {
  const HeadSizes sizes = head_sizes(product, num_heads);
  for (const Tensor* x : {&k_BHlD, &v_BHlD}) check_heads(*x, sizes, product.scalar_type());
  const Tensor q = empty_heads(product, sizes);
  split_into(product, bias_C3, sizes, l2_norm, q, k_BHlD, v_BHlD, nullptr, nullptr);
  return q;
}

std::tuple<Tensor, Tensor> split_heads_backward(const Tensor& d_q_BHLD, const Tensor& d_k_BHLD, const Tensor& d_v_BHLD,
                            const std::optional<Tensor>& q_BHLD, const std::optional<Tensor>& k_BHLD,
                            const std::optional<Tensor>& q_inverse_BHL, const std::optional<Tensor>& k_inverse_BHL,
                            bool with_bias) {
  const auto unit_stride = [](const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); };
  STD_TORCH_CHECK(d_q_BHLD.dim() == 4 && d_k_BHLD.dim() == 4 && d_v_BHLD.dim() == 4, "want gradients (B, H, L, 64)");
  const Tensor d_q = unit_stride(d_q_BHLD), d_k = unit_stride(d_k_BHLD), d_v = unit_stride(d_v_BHLD);
  const HeadSizes sizes{d_q.size(0), d_q.size(2), d_q.size(1)};
  for (const Tensor* x : {&d_q, &d_k, &d_v}) check_heads(*x, sizes, d_q.scalar_type());
  const bool normalised = q_BHLD && k_BHLD && q_inverse_BHL && k_inverse_BHL;
  // Contiguous: a saved-tensor hook may have changed their layout. Without normalisation they are not read.
  const auto kept = [&](const std::optional<Tensor>& x) { return normalised ? torch::stable::contiguous(*x) : d_q; };
  const Tensor q = kept(q_BHLD), k = kept(k_BHLD), q_inverse = kept(q_inverse_BHL), k_inverse = kept(k_inverse_BHL);
  for (const Tensor* x : {&q, &k}) check_heads(*x, sizes, d_q.scalar_type());
  const int64_t width = 3 * sizes.num_heads * kHeadDim;
  const Tensor out = new_empty(d_q, {sizes.num_images, sizes.num_tokens, width}, d_q.scalar_type());
  const int64_t tiles = sizes.num_images * head_tiles(sizes);
  const ScalarType wide = wide_of(d_q.scalar_type());
  const Tensor partial = new_empty(d_q, {with_bias ? tiles : 0, width}, wide),
               d_bias = new_empty(d_q, {with_bias ? width : 0}, wide);
  with_float(d_q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    split_heads_backward_cpu(SplitBackward<T>{
        heads(d_q, data<T>(d_q)), heads(d_k, data<T>(d_k)), heads(d_v, data<T>(d_v)), data<T>(q), data<T>(k),
        data<Wide<T>>(q_inverse), data<Wide<T>>(k_inverse), mutable_data<T>(out),
        with_bias ? mutable_data<Wide<T>>(partial) : nullptr, sizes, normalised});
    if (with_bias) column_sums_cpu(data<Wide<T>>(partial), tiles, width, mutable_data<Wide<T>>(d_bias));
  });
  return {out, d_bias};
}

// ---------------------------------------------------------------------------------------------------------------------
// adaLN, on the CPU

AdalnSizes adaln_sizes(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

Tensor empty_rows(const Tensor& x) { return new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()); }

// A large array, contiguous, or nothing.
MaybeTensor rows_like(const Tensor& x, const MaybeTensor& other) {
  if (!other) return other;
  STD_TORCH_CHECK(other->dim() == 3 && other->size(0) == x.size(0) && other->size(1) == x.size(1) &&
                      other->size(2) == x.size(2) && other->scalar_type() == x.scalar_type(),
                  "want arrays of one shape (B, L, C) and one dtype");
  return torch::stable::contiguous(*other);
}

// (B, C) with unit stride, in the dtype of the arithmetic, or nothing.
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

using AdalnResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

AdalnResult adaln(const Tensor& x_BLC, const MaybeTensor& branch_BLC, const MaybeTensor& bias_C,
                  const MaybeTensor& gate_BC, const Tensor& scale_BC, const Tensor& shift_BC, double eps) {
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

using AdalnGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AdalnGradients adaln_backward(const MaybeTensor& d_new_BLC, const MaybeTensor& d_out_BLC, const Tensor& new_BLC,
                              const MaybeTensor& branch_BLC, const MaybeTensor& bias_C, const MaybeTensor& gate_BC,
                              const Tensor& scale_BC, const Tensor& mean_BL, const Tensor& rstd_BL) {
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

// ---------------------------------------------------------------------------------------------------------------------
// GELU and attention, on the CPU, in float32 or bfloat16

// body(T{}) with the type in which a dtype's numbers are read.
template <typename F>
void with_bits(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "want float32 or bfloat16");
  body(uint16_t{});
}

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

Tensor gelu(const Tensor& x_NC, const MaybeTensor& bias_C) {
  const Tensor x = torch::stable::contiguous(x_NC), out = torch::stable::empty_like(x);
  const MaybeTensor bias = gelu_bias(x, bias_C);
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gelu_cpu(data<T>(x), data<float>(bias), mutable_data<T>(out), gelu_sizes(x));
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& grad_NC, const Tensor& x_NC, const MaybeTensor& bias_C) {
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

// Queries, or keys and values, of which a head's rows are read.
Tensor unit_stride(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale) {
  for (const Tensor* x : {&q, &k, &v}) {
    STD_TORCH_CHECK(x->dim() == 4 && x->size(3) == kHeadDim && x->size(0) == q.size(0) && x->size(1) == q.size(1) &&
                        x->scalar_type() == q.scalar_type(),
                    "want q, k, v (B, H, L, 64) of one dtype");
  }
  STD_TORCH_CHECK(k.size(2) == v.size(2) && k.size(2) > 0, "want as many keys as values");
  STD_TORCH_CHECK(logit_scale.dim() == 1 && logit_scale.size(0) == q.size(1) &&
                      logit_scale.scalar_type() == ScalarType::Float,
                  "logit_scale_H: want one float32 a head");
  return {q.size(0), q.size(1), q.size(2), k.size(2), 1, nullptr, nullptr};
}

// Every query sees the keys of its own scale and of the earlier ones.
AttentionSizes masked(AttentionSizes sizes, const Tensor& ends) {
  STD_TORCH_CHECK(ends.dim() == 1 && ends.size(0) > 0 && ends.scalar_type() == ScalarType::Long,
                  "scale_ends: want int64 (S,)");
  const int64_t* at = data<int64_t>(ends);
  for (int64_t g = 0; g < ends.size(0); ++g) {
    STD_TORCH_CHECK(at[g] > (g ? at[g - 1] : 0), "scale_ends: want every scale to end after the one before it");
  }
  STD_TORCH_CHECK(at[ends.size(0) - 1] == sizes.num_queries && sizes.num_queries == sizes.num_keys,
                  "scale_ends: want the last to be the number of queries and of keys");
  sizes.num_groups = ends.size(0), sizes.ends = sizes.visible = at;
  return sizes;
}

Tensor attention_out(const Tensor& q) {
  return new_empty(q, {q.size(0), q.size(1), q.size(2), kHeadDim}, q.scalar_type());
}

void attend(const Tensor& q_BHLD, const Tensor& k_BHLD, const Tensor& v_BHLD, const Tensor& logit_scale,
            const AttentionSizes& sizes, const Tensor& out, float* log_sum) {
  const Tensor q = unit_stride(q_BHLD), k = unit_stride(k_BHLD), v = unit_stride(v_BHLD);
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attention_cpu(AttentionForward<T>{heads(q, data<T>(q)), heads(k, data<T>(k)), heads(v, data<T>(v)),
                                      data<float>(logit_scale), mutable_data<T>(out), log_sum, sizes});
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale_H,
                                     const Tensor& scale_ends_S) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H), ends = torch::stable::contiguous(scale_ends_S);
  const AttentionSizes sizes = masked(attention_sizes(q, k, v, scale), ends);
  const Tensor out = attention_out(q), log_sum = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  attend(q, k, v, scale, sizes, out, mutable_data<float>(log_sum));
  return {out, log_sum};
}

Tensor cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& logit_scale_H,
                        int64_t num_keys) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H);
  AttentionSizes sizes = attention_sizes(q, k_cache, v_cache, scale);
  STD_TORCH_CHECK(num_keys > 0 && num_keys <= sizes.num_keys, "num_keys: want a number within the cache");
  sizes.num_keys = num_keys, sizes.ends = &sizes.num_queries, sizes.visible = &num_keys;
  const Tensor out = attention_out(q);
  attend(q, k_cache, v_cache, scale, sizes, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out_BHLD, const Tensor& q_BHLD,
                                                              const Tensor& k_BHLD, const Tensor& v_BHLD,
                                                              const Tensor& out_BHLD, const Tensor& log_sum_BHL,
                                                              const Tensor& logit_scale_H, const Tensor& scale_ends_S) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H), ends = torch::stable::contiguous(scale_ends_S),
               q = unit_stride(q_BHLD), k = unit_stride(k_BHLD), v = unit_stride(v_BHLD),
               d_out = unit_stride(d_out_BHLD), out = torch::stable::contiguous(out_BHLD),
               log_sum = torch::stable::contiguous(log_sum_BHL);
  const AttentionSizes sizes = masked(attention_sizes(q, k, v, scale), ends);
  for (const Tensor* x : {&d_out, &out}) {
    STD_TORCH_CHECK(x->dim() == 4 && x->numel() == q.numel() && x->size(2) == q.size(2) && x->size(1) == q.size(1) &&
                        x->scalar_type() == q.scalar_type(),
                    "want the output and its gradient of the shape and dtype of q");
  }
  STD_TORCH_CHECK(log_sum.numel() * kHeadDim == q.numel() && log_sum.scalar_type() == ScalarType::Float,
                  "log_sum_BHL: want what the forward pass returned");
  const Tensor d_q = attention_out(q), d_k = attention_out(q), d_v = attention_out(q),
               d_scale = new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attention_backward_cpu(AttentionBackward<T>{heads(q, data<T>(q)), heads(k, data<T>(k)), heads(v, data<T>(v)),
                                                heads(d_out, data<T>(d_out)), data<float>(scale), data<T>(out),
                                                data<float>(log_sum), mutable_data<T>(d_q), mutable_data<T>(d_k),
                                                mutable_data<T>(d_v), mutable_data<float>(d_scale), sizes});
  });
  return {d_q, d_k, d_v, d_scale};
}

int64_t built_for_cuda() {
#ifdef VARFAST_CUDA
  return cuda_version();
#else
  return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(varfast, m) {
  // Version of the CUDA toolkit that compiled the kernels, 13000 for 13.0; 0: CPU part only.
  m.def("built_for_cuda() -> int");
  // loss (), stats (5,), and d loss / d logp (B, L), which the backward pass multiplies by the upstream gradient.
  m.def(
      "grpo_token_loss(Tensor logp_BL, Tensor logp_old_BL, Tensor? logp_ref_BL, Tensor advantages_BL, float clip_eps, "
      "float kl_beta) -> (Tensor, Tensor, Tensor)");
  m.def("grpo_token_loss_backward(Tensor grad_BL, Tensor grad_loss) -> Tensor");
  // P pixels of an image, channels innermost; on the CPU alone, a GPU has Triton.
  m.def(
      "group_norm_silu_cpu(Tensor x_BPC, Tensor weight_C, Tensor bias_C, Tensor input_bias_C, int num_groups, "
      "float eps, bool silu) -> Tensor");
  // The ops of kernels/adaln.py: new stream, its normalised form, mean, 1 / deviation; d x, branch, bias, gate, scale,
  // shift.
  m.def(
      "adaln_cpp(Tensor x_BLC, Tensor? branch_BLC, Tensor? bias_C, Tensor? gate_BC, Tensor scale_BC, Tensor shift_BC, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_backward_cpp(Tensor? d_new_BLC, Tensor? d_out_BLC, Tensor new_BLC, Tensor? branch_BLC, Tensor? bias_C, "
      "Tensor? gate_BC, Tensor scale_BC, Tensor mean_BL, Tensor rstd_BL) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The ops of kernels/gelu.py: of x + bias, which is float32; d x, and d bias.
  m.def("gelu_cpp(Tensor x_NC, Tensor? bias_C) -> Tensor");
  m.def("gelu_backward_cpp(Tensor grad_NC, Tensor x_NC, Tensor? bias_C) -> (Tensor, Tensor)");
  // The ops of kernels/attention.py: out and the logarithm of each row's sum; d q, k, v and logit scale by image.
  m.def(
      "attention_cpp(Tensor q_BHLD, Tensor k_BHLD, Tensor v_BHLD, Tensor logit_scale_H, Tensor scale_ends_S) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward_cpp(Tensor d_out_BHLD, Tensor q_BHLD, Tensor k_BHLD, Tensor v_BHLD, Tensor out_BHLD, "
      "Tensor log_sum_BHL, Tensor logit_scale_H, Tensor scale_ends_S) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cached_attention_cpp(Tensor q_BHlD, Tensor k_cache_BHLD, Tensor v_cache_BHLD, Tensor logit_scale_H, "
      "int num_keys) -> Tensor");
  // The ops of kernels/qkv.py: q, k, v and the inverse norms of q and k; q, with k and v in place; d product.
  m.def(
      "split_heads_cpp(Tensor qkv_BLC3, Tensor? bias_C3, int num_heads, bool l2_norm) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "split_heads_into_cpp(Tensor qkv_BlC3, Tensor? bias_C3, int num_heads, bool l2_norm, Tensor(a!) k_BHlD, "
      "Tensor(b!) v_BHlD) -> Tensor");
  m.def(
      "split_heads_backward_cpp(Tensor d_q_BHLD, Tensor d_k_BHLD, Tensor d_v_BHLD, Tensor? q_BHLD, Tensor? k_BHLD, "
      "Tensor? q_inverse_BHL, Tensor? k_inverse_BHL, bool with_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(varfast, CompositeExplicitAutograd, m) {
  m.impl("built_for_cuda", TORCH_BOX(&built_for_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(varfast, CPU, m) {
  m.impl("grpo_token_loss", TORCH_BOX(&forward_cpu));
  m.impl("grpo_token_loss_backward", TORCH_BOX(&backward_cpu));
  m.impl("group_norm_silu_cpu", TORCH_BOX(&group_norm_cpu));
  m.impl("adaln_cpp", TORCH_BOX(&adaln));
  m.impl("adaln_backward_cpp", TORCH_BOX(&adaln_backward));
  m.impl("gelu_cpp", TORCH_BOX(&gelu));
  m.impl("gelu_backward_cpp", TORCH_BOX(&gelu_backward));
  m.impl("attention_cpp", TORCH_BOX(&attention));
  m.impl("attention_backward_cpp", TORCH_BOX(&attention_backward));
  m.impl("cached_attention_cpp", TORCH_BOX(&cached_attention));
  m.impl("split_heads_cpp", TORCH_BOX(&split_heads));
  m.impl("split_heads_into_cpp", TORCH_BOX(&split_heads_into));
  m.impl("split_heads_backward_cpp", TORCH_BOX(&split_heads_backward));
}

#ifdef VARFAST_CUDA
namespace {

// Torch's current stream: what is launched elsewhere is not ordered with torch's own kernels, nor captured.
void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

ForwardResult forward_cuda(const Tensor& logp_BL, const Tensor& logp_old_BL, const std::optional<Tensor>& logp_ref_BL,
                           const Tensor& advantages_BL, double clip_eps, double kl_beta) {
  const torch::stable::accelerator::DeviceGuard guard(logp_BL.get_device_index());
  const Forward f(logp_BL, logp_old_BL, logp_ref_BL, advantages_BL, clip_eps, kl_beta);
  STD_TORCH_CHECK(f.logp.numel() < int64_t(1) << 32, "logp_BL: want less than 2^32 tokens");
  const int device = f.logp.get_device_index();
  const Tensor scratch = new_empty(f.logp, {grpo_cuda_scratch(f.logp.numel())}, ScalarType::Double);
  with_type(f.logp.scalar_type(), [&](auto zero) {
    check(grpo_forward_cuda(f.pointers<decltype(zero)>(), scratch.mutable_data_ptr<double>(), device,
                            current_stream(device)));
  });
  return {f.loss, f.stats, f.grad};
}

Tensor backward_cuda(const Tensor& grad_BL, const Tensor& grad_loss) {
  const torch::stable::accelerator::DeviceGuard guard(grad_BL.get_device_index());
  const Backward b(grad_BL, grad_loss);
  with_type(b.grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check(grpo_backward_cuda(b.grad.const_data_ptr<T>(), b.upstream.const_data_ptr<T>(), b.out.mutable_data_ptr<T>(),
                             b.grad.numel(), current_stream(b.grad.get_device_index())));
  });
  return b.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(varfast, CUDA, m) {
  m.impl("grpo_token_loss", TORCH_BOX(&forward_cuda));
  m.impl("grpo_token_loss_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace varfast
