// The functions that implement the ops. Each is defined in its kernel's file and checks its arguments. ops.cpp
// registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace varfast {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// grpo_loss.cpp
std::tuple<Tensor, Tensor, Tensor> grpo_token_loss_cpu(const Tensor& logp_BL, const Tensor& logp_old_BL,
                                                       const MaybeTensor& logp_ref_BL, const Tensor& advantages_BL,
                                                       double clip_eps, double kl_beta, bool sequence_ratio,
                                                       bool unbiased_kl);
Tensor grpo_token_loss_backward_cpu(const Tensor& grad_BL, const Tensor& grad_loss);
#ifdef VARFAST_CUDA
std::tuple<Tensor, Tensor, Tensor> grpo_token_loss_cuda(const Tensor& logp_BL, const Tensor& logp_old_BL,
                                                        const MaybeTensor& logp_ref_BL, const Tensor& advantages_BL,
                                                        double clip_eps, double kl_beta, bool sequence_ratio,
                                                        bool unbiased_kl);
Tensor grpo_token_loss_backward_cuda(const Tensor& grad_BL, const Tensor& grad_loss);
#endif

// dpo_loss.cpp
std::tuple<Tensor, Tensor, Tensor> dpo_loss_cpu(const Tensor& logp_BL, const Tensor& logp_ref_BL, double beta,
                                                double label_smoothing, int64_t loss_type);
#ifdef VARFAST_CUDA
std::tuple<Tensor, Tensor, Tensor> dpo_loss_cuda(const Tensor& logp_BL, const Tensor& logp_ref_BL, double beta,
                                                 double label_smoothing, int64_t loss_type);
#endif

// group_norm_cpu.cpp
Tensor group_norm_silu_cpu(const Tensor& x_BPC, const Tensor& weight_C, const Tensor& bias_C,
                           const Tensor& input_bias_C, int64_t num_groups, double eps, bool silu);

// adaln_cpu.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_cpp(const Tensor& x_BLC, const MaybeTensor& branch_BLC,
                                                     const MaybeTensor& bias_C, const MaybeTensor& gate_BC,
                                                     const Tensor& scale_BC, const Tensor& shift_BC, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cpp(const MaybeTensor& d_new_BLC,
    const MaybeTensor& d_out_BLC, const Tensor& new_BLC, const MaybeTensor& branch_BLC, const MaybeTensor& bias_C,
    const MaybeTensor& gate_BC, const Tensor& scale_BC, const Tensor& mean_BL, const Tensor& rstd_BL);

// gelu_cpu.cpp
Tensor gelu_cpp(const Tensor& x_NC, const MaybeTensor& bias_C);
std::tuple<Tensor, Tensor> gelu_backward_cpp(const Tensor& grad_NC, const Tensor& x_NC, const MaybeTensor& bias_C);

// attention_cpu.cpp
std::tuple<Tensor, Tensor> attention_cpp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale_H,
                                         const Tensor& scale_ends_S);
Tensor cached_attention_cpp(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& logit_scale_H,
                            int64_t num_keys);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpp(const Tensor& d_out_BHLD, const Tensor& q_BHLD,
                                                                  const Tensor& k_BHLD, const Tensor& v_BHLD,
                                                                  const Tensor& out_BHLD, const Tensor& log_sum_BHL,
                                                                  const Tensor& logit_scale_H,
                                                                  const Tensor& scale_ends_S);

// rms_norm_cpu.cpp
std::tuple<Tensor, Tensor, Tensor> rms_norm_cpp(const Tensor& x_NC, const MaybeTensor& branch_NC,
                                                const Tensor& weight_C, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward_cpp(const MaybeTensor& d_sum_NC, const Tensor& d_out_NC,
                                                 const Tensor& sum_NC, const Tensor& weight_C, const Tensor& rstd_N);
Tensor swiglu_cpp(const Tensor& gate_NF, const Tensor& up_NF);
std::tuple<Tensor, Tensor> swiglu_backward_cpp(const Tensor& d_out_NF, const Tensor& gate_NF, const Tensor& up_NF);

// rotary_cpu.cpp
std::tuple<Tensor, Tensor, Tensor> rotary_cpp(const Tensor& qkv_BLX, const MaybeTensor& rotary_LP2, int64_t num_heads,
                                              int64_t num_kv_heads, bool halves);
Tensor rotary_backward_cpp(const Tensor& d_q_BHLD, const Tensor& d_k_BGLD, const Tensor& d_v_BGLD,
                           const MaybeTensor& rotary_LP2, bool halves);
Tensor rotary_into_cpp(const Tensor& qkv_BX, const MaybeTensor& rotary_NP2, const Tensor& position_B, int64_t num_heads,
                       bool halves, Tensor k_cache_BGND, Tensor v_cache_BGND);
Tensor decode_attention_cpp(const Tensor& q_BHD, const Tensor& k_cache_BGND, const Tensor& v_cache_BGND,
                            const Tensor& position_B, double scale);

// split_heads_cpu.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> split_heads_cpp(const Tensor& product, const MaybeTensor& bias_C3,
                                                                   int64_t num_heads, bool l2_norm);
Tensor split_heads_into_cpp(const Tensor& product, const MaybeTensor& bias_C3, int64_t num_heads, bool l2_norm,
                            Tensor k_BHlD, Tensor v_BHlD);
std::tuple<Tensor, Tensor> split_heads_backward_cpp(const Tensor& d_q_BHLD, const Tensor& d_k_BHLD,
                                                    const Tensor& d_v_BHLD, const MaybeTensor& q_BHLD,
                                                    const MaybeTensor& k_BHLD,
                                                    const MaybeTensor& q_inverse_BHL,
                                                    const MaybeTensor& k_inverse_BHL, bool with_bias);

}  // namespace varfast
