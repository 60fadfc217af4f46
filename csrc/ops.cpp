// Registers all ops of csrc/ with PyTorch. Uses only the stable ABI, so that one build runs on torch 2.11 and later.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#ifdef VARFAST_CUDA
#include "grpo_loss.h"
#endif

namespace varfast {
namespace {

int64_t built_for_cuda() {
#ifdef VARFAST_CUDA
  return cuda_version();
#else
  return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(varfast, m) {
  // Version of the CUDA toolkit that compiled the kernels, 13000 for 13.0; 0 if only the CPU part was built.
  m.def("built_for_cuda() -> int");
  // Returns loss (), stats (5,), and d loss / d logp (B, L), which the backward op multiplies by the upstream gradient.
  m.def(
      "grpo_token_loss(Tensor logp_BL, Tensor logp_old_BL, Tensor? logp_ref_BL, Tensor advantages_BL, float clip_eps, "
      "float kl_beta, bool sequence_ratio=False, bool unbiased_kl=False) -> (Tensor, Tensor, Tensor)");
  m.def("grpo_token_loss_backward(Tensor grad_BL, Tensor grad_loss) -> Tensor");
  // Returns loss (), stats (6,), and d loss / d logp of every token of an image, (B,). loss_type: index in LOSS_TYPES.
  m.def(
      "dpo_loss(Tensor logp_BL, Tensor logp_ref_BL, float beta, float label_smoothing, int loss_type) -> "
      "(Tensor, Tensor, Tensor)");
  // P pixels of an image, channels innermost. CPU only: on a GPU, Triton kernels run.
  m.def(
      "group_norm_silu_cpu(Tensor x_BPC, Tensor weight_C, Tensor bias_C, Tensor input_bias_C, int num_groups, "
      "float eps, bool silu) -> Tensor");
  // The ops of kernels/adaln.py. Forward returns the new residual stream, its normalised and modulated form, mean and
  // 1 / standard deviation; backward returns the gradients of x, branch, bias, gate, scale and shift.
  m.def(
      "adaln_cpp(Tensor x_BLC, Tensor? branch_BLC, Tensor? bias_C, Tensor? gate_BC, Tensor scale_BC, Tensor shift_BC, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_backward_cpp(Tensor? d_new_BLC, Tensor? d_out_BLC, Tensor new_BLC, Tensor? branch_BLC, Tensor? bias_C, "
      "Tensor? gate_BC, Tensor scale_BC, Tensor mean_BL, Tensor rstd_BL) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The ops of kernels/gelu.py. Forward returns GELU(x + bias), with a float32 bias; backward d x and d bias.
  m.def("gelu_cpp(Tensor x_NC, Tensor? bias_C) -> Tensor");
  m.def("gelu_backward_cpp(Tensor grad_NC, Tensor x_NC, Tensor? bias_C) -> (Tensor, Tensor)");
  // The ops of kernels/attention.py. Forward returns the output and the log of each row's sum of exponentials; backward
  // the gradients of q, k and v, and of logit_scale for each image.
  m.def(
      "attention_cpp(Tensor q_BHLD, Tensor k_BHLD, Tensor v_BHLD, Tensor logit_scale_H, Tensor scale_ends_S) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward_cpp(Tensor d_out_BHLD, Tensor q_BHLD, Tensor k_BHLD, Tensor v_BHLD, Tensor out_BHLD, "
      "Tensor log_sum_BHL, Tensor logit_scale_H, Tensor scale_ends_S) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cached_attention_cpp(Tensor q_BHlD, Tensor k_cache_BHLD, Tensor v_cache_BHLD, Tensor logit_scale_H, "
      "int num_keys) -> Tensor");
  // The ops of kernels/rms_norm.py, swiglu.py, rotary.py and decode_attention.py. RMSNorm returns x + branch (empty
  // without a branch), its RMSNorm and 1 / root mean square. Rotary returns q, k, v, or q with k and v written in
  // place.
  m.def("rms_norm_cpp(Tensor x_NC, Tensor? branch_NC, Tensor weight_C, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward_cpp(Tensor? d_sum_NC, Tensor d_out_NC, Tensor sum_NC, Tensor weight_C, Tensor rstd_N) -> "
      "(Tensor, Tensor)");
  m.def("swiglu_cpp(Tensor gate_NF, Tensor up_NF) -> Tensor");
  m.def("swiglu_backward_cpp(Tensor d_out_NF, Tensor gate_NF, Tensor up_NF) -> (Tensor, Tensor)");
  m.def(
      "rotary_cpp(Tensor qkv_BLX, Tensor? rotary_LP2, int num_heads, int num_kv_heads, bool halves) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "rotary_backward_cpp(Tensor d_q_BHLD, Tensor d_k_BGLD, Tensor d_v_BGLD, Tensor? rotary_LP2, bool halves) -> "
      "Tensor");
  m.def(
      "rotary_into_cpp(Tensor qkv_BX, Tensor? rotary_NP2, Tensor position_B, int num_heads, bool halves, "
      "Tensor(a!) k_cache_BGND, Tensor(b!) v_cache_BGND) -> Tensor");
  m.def(
      "decode_attention_cpp(Tensor q_BHD, Tensor k_cache_BGND, Tensor v_cache_BGND, Tensor position_B, float scale) -> "
      "Tensor");
  // The ops of kernels/qkv.py. They return q, k, v and the inverse norms of q and k; q, with k and v written in place;
  // and the gradient of qkv.
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
  m.impl("grpo_token_loss", TORCH_BOX(&grpo_token_loss_cpu));
  m.impl("grpo_token_loss_backward", TORCH_BOX(&grpo_token_loss_backward_cpu));
  m.impl("dpo_loss", TORCH_BOX(&dpo_loss_cpu));
  m.impl("group_norm_silu_cpu", TORCH_BOX(&group_norm_silu_cpu));
  m.impl("adaln_cpp", TORCH_BOX(&adaln_cpp));
  m.impl("adaln_backward_cpp", TORCH_BOX(&adaln_backward_cpp));
  m.impl("gelu_cpp", TORCH_BOX(&gelu_cpp));
  m.impl("gelu_backward_cpp", TORCH_BOX(&gelu_backward_cpp));
  m.impl("attention_cpp", TORCH_BOX(&attention_cpp));
  m.impl("attention_backward_cpp", TORCH_BOX(&attention_backward_cpp));
  m.impl("cached_attention_cpp", TORCH_BOX(&cached_attention_cpp));
  m.impl("rms_norm_cpp", TORCH_BOX(&rms_norm_cpp));
  m.impl("rms_norm_backward_cpp", TORCH_BOX(&rms_norm_backward_cpp));
  m.impl("swiglu_cpp", TORCH_BOX(&swiglu_cpp));
  m.impl("swiglu_backward_cpp", TORCH_BOX(&swiglu_backward_cpp));
  m.impl("rotary_cpp", TORCH_BOX(&rotary_cpp));
  m.impl("rotary_backward_cpp", TORCH_BOX(&rotary_backward_cpp));
  m.impl("rotary_into_cpp", TORCH_BOX(&rotary_into_cpp));
  m.impl("decode_attention_cpp", TORCH_BOX(&decode_attention_cpp));
  m.impl("split_heads_cpp", TORCH_BOX(&split_heads_cpp));
  m.impl("split_heads_into_cpp", TORCH_BOX(&split_heads_into_cpp));
  m.impl("split_heads_backward_cpp", TORCH_BOX(&split_heads_backward_cpp));
}

#ifdef VARFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(varfast, CUDA, m) {
  m.impl("grpo_token_loss", TORCH_BOX(&grpo_token_loss_cuda));
  m.impl("grpo_token_loss_backward", TORCH_BOX(&grpo_token_loss_backward_cuda));
  m.impl("dpo_loss", TORCH_BOX(&dpo_loss_cuda));
}
#endif

}  // namespace varfast
