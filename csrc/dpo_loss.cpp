// The op of kernels/dpo_loss.py: checks the arguments, allocates the results, and computes them on the CPU.
#include <algorithm>
#include <vector>

#include "cuda_host.h"
#include "dpo_math.h"
#include "tensors.h"

namespace varfast {
namespace {

// Fewest tokens that justify another thread.
constexpr int64_t kGrain = 1 << 14;

// The arguments, checked, and the tensors that are written.
struct Forward {
  Tensor logp, ref, loss, stats, slope;
  DpoSettings settings;

  Forward(const Tensor& logp_BL, const Tensor& logp_ref_BL, double beta, double label_smoothing, int64_t loss_type)
      : logp(logp_BL), ref(logp_ref_BL), settings{beta, label_smoothing, loss_type} {
    const ScalarType dtype = logp.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "logp_BL: want float32 or float64; the wrapper in kernels/dpo_loss.py converts");
    STD_TORCH_CHECK(logp.dim() == 2 && logp.numel() > 0 && logp.size(0) % 2 == 0,
                    "logp_BL: want two axes, an even number of images and at least one token");
    STD_TORCH_CHECK(ref.dim() == 2 && ref.size(0) == logp.size(0) && ref.size(1) == logp.size(1) &&
                        ref.scalar_type() == dtype && ref.is_cuda() == logp.is_cuda() &&
                        ref.get_device_index() == logp.get_device_index(),
                    "logp_ref_BL: want the shape, dtype and device of logp_BL");
    STD_TORCH_CHECK(loss_type >= kSigmoid && loss_type <= kIpo, "loss_type: want 0, 1 or 2");
    loss = new_empty(logp, {}, dtype);
    stats = new_empty(logp, {kDpoStats}, dtype);
    slope = new_empty(logp, {logp.size(0)}, dtype);
  }

  template <typename T>
  DpoForward<T> pointers() const {
    const auto rows = [](const Tensor& x) { return DpoRows<T>{data<T>(x), x.stride(0), x.stride(1)}; };
    return {rows(logp), rows(ref), mutable_data<T>(loss), mutable_data<T>(stats), mutable_data<T>(slope),
            logp.size(0) / 2, logp.size(1), settings};
  }
};

template <typename T>
DpoRow row_sums(const DpoForward<T>& f, int64_t image) {
  DpoRow row{0.0, 0.0};
  for (int64_t token = 0; token < f.num_tokens; ++token) f.add(image, token, row);
  return row;
}

template <typename T>
void forward_cpu(const DpoForward<T>& f) {
  std::vector<DpoPair> pairs(f.num_pairs);
  parallel_for(f.num_pairs, std::max(int64_t(1), kGrain / (2 * f.num_tokens)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pairs[i] = f.pair(i, row_sums(f, 2 * i), row_sums(f, 2 * i + 1));
  });
  double sums[kDpoMeans] = {};
  for (const DpoPair& pair : pairs) {
    for (int i = 0; i < kDpoMeans; ++i) sums[i] += pair.means[i];
  }
  f.write(sums);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dpo_loss_cpu(const Tensor& logp_BL, const Tensor& logp_ref_BL, double beta,
                                                double label_smoothing, int64_t loss_type) {
  const Forward f(logp_BL, logp_ref_BL, beta, label_smoothing, loss_type);
  with_wide(f.logp.scalar_type(), [&](auto zero) { forward_cpu(f.pointers<decltype(zero)>()); });
  return {f.loss, f.stats, f.slope};
}

#ifdef VARFAST_CUDA
std::tuple<Tensor, Tensor, Tensor> dpo_loss_cuda(const Tensor& logp_BL, const Tensor& logp_ref_BL, double beta,
                                                 double label_smoothing, int64_t loss_type) {
  const torch::stable::accelerator::DeviceGuard guard(logp_BL.get_device_index());
  const Forward f(logp_BL, logp_ref_BL, beta, label_smoothing, loss_type);
  const Tensor scratch = new_empty(f.logp, {kDpoMeans, f.logp.size(0) / 2}, ScalarType::Double);
  with_wide(f.logp.scalar_type(), [&](auto zero) {
    check_launch(dpo_forward_cuda(f.pointers<decltype(zero)>(), mutable_data<double>(scratch),
                                  current_stream(f.logp.get_device_index())));
  });
  return {f.loss, f.stats, f.slope};
}
#endif

}  // namespace varfast
