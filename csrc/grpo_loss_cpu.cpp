// The GRPO token loss on the CPU.
#include <algorithm>
#include <vector>

#include "cpu.h"
#include "grpo_loss.h"

namespace varfast {
namespace {

// Tokens that are summed into one set of doubles. The number is fixed and the sums are added in order, so that the
// result does not depend on the number of threads.
constexpr int64_t kChunk = 4096;

template <typename T>
GrpoSums<double> forward_chunk(const GrpoForward<T>& f, int64_t begin, int64_t end) {
  GrpoSums<double> sums;
  const T scale = T(f.one_token);
  for (int64_t image = begin / f.num_tokens; begin < end; ++image) {
    const int64_t image_end = std::min(end, (image + 1) * f.num_tokens), stride = f.advantages.token_stride;
    const T* advantage = f.advantages.of_image(image) + (begin - image * f.num_tokens) * stride;
    const T ratio = f.ratio_of(image);
    for (; begin < image_end; ++begin, advantage += stride) {
      const T logp_ref = f.settings.has_reference ? f.logp_ref[begin] : T(0);
      const GrpoToken<T> token = grpo_token(f.logp[begin], f.logp_old[begin], logp_ref, *advantage, ratio, f.settings);
      f.grad[begin] = token.grad * scale;
      GrpoSums<T> one;
      one.add(token);
      sums.add(one);
    }
  }
  return sums;
}

// exp(mean over an image's tokens of logp - logp_old).
template <typename T>
void image_ratios(const GrpoForward<T>& f) {
  parallel_for(f.num_images, std::max(int64_t(1), kChunk / f.num_tokens), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      double sum = 0;
      for (int64_t i = image * f.num_tokens; i < (image + 1) * f.num_tokens; ++i) sum += f.logp[i] - f.logp_old[i];
      f.image_ratio[image] = std::exp(T(sum / double(f.num_tokens)));
    }
  });
}

}  // namespace

template <typename T>
void grpo_forward_cpu(const GrpoForward<T>& f) {
  if (f.settings.sequence_ratio) image_ratios(f);
  const int64_t count = f.num_images * f.num_tokens;
  std::vector<GrpoSums<double>> chunks((count + kChunk - 1) / kChunk);
  parallel_for(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      chunks[chunk] = forward_chunk(f, chunk * kChunk, std::min(count, (chunk + 1) * kChunk));
    }
  });
  GrpoSums<double> total;
  for (const GrpoSums<double>& chunk : chunks) total.add(chunk);
  total.write(f.one_token, f.loss, f.stats);
}

template <typename T>
void grpo_backward_cpu(const T* grad, const T* upstream, T* out, int64_t count) {
  const T scale = *upstream;
  parallel_for(count, 32768, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = grad[i] * scale;
  });
}

template void grpo_forward_cpu(const GrpoForward<float>&);
template void grpo_forward_cpu(const GrpoForward<double>&);
template void grpo_backward_cpu(const float*, const float*, float*, int64_t);
template void grpo_backward_cpu(const double*, const double*, double*, int64_t);

}  // namespace varfast
