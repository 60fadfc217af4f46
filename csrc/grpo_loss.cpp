// The ops of kernels/grpo_loss.py: checks the arguments and allocates the results, for the CPU and the CUDA kernels.
#include "grpo_loss.h"

#include "cuda_host.h"
#include "tensors.h"

namespace varfast {
namespace {

// The arguments of a forward pass, checked and made contiguous, and the tensors that it writes.
struct Forward {
  Tensor logp, old, ref, advantages, image_ratio, loss, stats, grad;
  bool has_reference, sequence_ratio, unbiased_kl;
  double clip_eps, kl_beta;

  Forward(const Tensor& logp_BL, const Tensor& logp_old_BL, const MaybeTensor& logp_ref_BL,
          const Tensor& advantages_BL, double clip_eps, double kl_beta, bool sequence_ratio, bool unbiased_kl)
      : logp(torch::stable::contiguous(logp_BL)),
        old(torch::stable::contiguous(logp_old_BL)),
        ref(logp_ref_BL ? torch::stable::contiguous(*logp_ref_BL) : logp),
        advantages(advantages_BL),  // read by strides: one advantage for each image is an expanded tensor
        has_reference(logp_ref_BL.has_value()),
        sequence_ratio(sequence_ratio),
        unbiased_kl(unbiased_kl),
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
    image_ratio = new_empty(logp, {sequence_ratio ? logp.size(0) : 0}, dtype);
    loss = new_empty(logp, {}, dtype);
    stats = new_empty(logp, {5}, dtype);
    grad = new_empty(logp, {logp.size(0), logp.size(1)}, dtype);
  }

  template <typename T>
  GrpoForward<T> pointers() const {
    // 1 - eps and 1 + eps are computed in double and rounded once, like the Python scalars of the reference.
    return {logp.const_data_ptr<T>(),
            old.const_data_ptr<T>(),
            ref.const_data_ptr<T>(),
            {advantages.const_data_ptr<T>(), advantages.stride(0), advantages.stride(1)},
            image_ratio.mutable_data_ptr<T>(),
            grad.mutable_data_ptr<T>(),
            loss.mutable_data_ptr<T>(),
            stats.mutable_data_ptr<T>(),
            logp.size(0),
            logp.size(1),
            1.0 / double(logp.numel()),
            {T(1.0 - clip_eps), T(1.0 + clip_eps), T(kl_beta), has_reference, sequence_ratio, unbiased_kl}};
  }
};

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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grpo_token_loss_cpu(const Tensor& logp_BL, const Tensor& logp_old_BL,
                                                       const MaybeTensor& logp_ref_BL, const Tensor& advantages_BL,
                                                       double clip_eps, double kl_beta, bool sequence_ratio,
                                                       bool unbiased_kl) {
  const Forward f(logp_BL, logp_old_BL, logp_ref_BL, advantages_BL, clip_eps, kl_beta, sequence_ratio, unbiased_kl);
  with_wide(f.logp.scalar_type(), [&](auto zero) { grpo_forward_cpu(f.pointers<decltype(zero)>()); });
  return {f.loss, f.stats, f.grad};
}

Tensor grpo_token_loss_backward_cpu(const Tensor& grad_BL, const Tensor& grad_loss) {
  const Backward b(grad_BL, grad_loss);
  with_wide(b.grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    grpo_backward_cpu(b.grad.const_data_ptr<T>(), b.upstream.const_data_ptr<T>(), b.out.mutable_data_ptr<T>(),
                      b.grad.numel());
  });
  return b.out;
}

#ifdef VARFAST_CUDA
std::tuple<Tensor, Tensor, Tensor> grpo_token_loss_cuda(const Tensor& logp_BL, const Tensor& logp_old_BL,
                                                        const MaybeTensor& logp_ref_BL, const Tensor& advantages_BL,
                                                        double clip_eps, double kl_beta, bool sequence_ratio,
                                                        bool unbiased_kl) {
  const torch::stable::accelerator::DeviceGuard guard(logp_BL.get_device_index());
  const Forward f(logp_BL, logp_old_BL, logp_ref_BL, advantages_BL, clip_eps, kl_beta, sequence_ratio, unbiased_kl);
  STD_TORCH_CHECK(f.logp.numel() < int64_t(1) << 32, "logp_BL: want less than 2^32 tokens");
  const int device = f.logp.get_device_index();
  const Tensor scratch = new_empty(f.logp, {grpo_cuda_scratch(f.logp.numel())}, ScalarType::Double);
  with_wide(f.logp.scalar_type(), [&](auto zero) {
    check_launch(grpo_forward_cuda(f.pointers<decltype(zero)>(), scratch.mutable_data_ptr<double>(), device,
                            current_stream(device)));
  });
  return {f.loss, f.stats, f.grad};
}

Tensor grpo_token_loss_backward_cuda(const Tensor& grad_BL, const Tensor& grad_loss) {
  const torch::stable::accelerator::DeviceGuard guard(grad_BL.get_device_index());
  const Backward b(grad_BL, grad_loss);
  with_wide(b.grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch(grpo_backward_cuda(b.grad.const_data_ptr<T>(), b.upstream.const_data_ptr<T>(), b.out.mutable_data_ptr<T>(),
                             b.grad.numel(), current_stream(b.grad.get_device_index())));
  });
  return b.out;
}
#endif

}  // namespace varfast
