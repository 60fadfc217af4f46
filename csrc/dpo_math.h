// The DPO loss of one pair of images. g++ and nvcc compile this same code; it uses nothing of torch.
//
// The specification is kernels/reference.py, dpo_loss. All arithmetic is in double: there are only a few numbers for
// each pair, and an error in the margin would be one in the gradient of every token.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace varfast {

// In the order of LOSS_TYPES of kernels/dpo_loss.py.
enum DpoLossType { kSigmoid, kHinge, kIpo };

struct DpoSettings {
  double beta, label_smoothing;
  int64_t loss_type;
};

// Sums over the tokens of one image.
struct DpoRow {
  double logp;
  double gain;  // logp - logp_ref
};

// What is averaged over the pairs: the loss, then the statistics in the order of DPO_STATS.
constexpr int kDpoMeans = 7;
constexpr int kDpoStats = kDpoMeans - 1;

struct DpoPair {
  double means[kDpoMeans];
  double slope;  // d loss of this pair / d logp of a token of the chosen image; the rejected one has the negative
};

// max(-z, 0) + log(1 + exp(-|z|)) = -log sigma(z), and its derivative in z, -sigma(-z). NaN is kept.
VARFAST_INLINE void minus_log_sigmoid(double z, double& value, double& slope) {
  const double shrunk = std::exp(-std::fabs(z));
  value = std::log1p(shrunk) + (z < 0 ? -z : 0.0);
  slope = -(z >= 0 ? shrunk : 1.0) / (1.0 + shrunk);
}

VARFAST_INLINE DpoPair dpo_pair(const DpoRow& chosen, const DpoRow& rejected, int64_t num_tokens,
                                const DpoSettings& settings) {
  // IPO's log-probability of an image is the mean over its tokens.
  const double weight = settings.loss_type == kIpo ? 1.0 / double(num_tokens) : 1.0;
  const double reward_chosen = settings.beta * (weight * chosen.gain);
  const double reward_rejected = settings.beta * (weight * rejected.gain);
  const double margin = reward_chosen - reward_rejected;
  double loss, slope;  // slope: d loss / d margin
  if (settings.loss_type == kSigmoid) {
    minus_log_sigmoid(margin, loss, slope);
    // -log sigma(-z) = -log sigma(z) + z. Without smoothing nothing is added: 0 * inf would be NaN.
    if (settings.label_smoothing > 0) loss += settings.label_smoothing * margin, slope += settings.label_smoothing;
  } else if (settings.loss_type == kHinge) {
    const bool flat = margin >= 1.0;  // false for NaN, which the loss keeps
    loss = flat ? 0.0 : 1.0 - margin;
    slope = flat ? 0.0 : -1.0;
  } else {
    const double gap = margin / settings.beta - 0.5 / settings.beta;
    loss = gap * gap;
    slope = 2.0 * gap / settings.beta;
  }
  return {{loss, reward_chosen, reward_rejected, margin, margin > 0 ? 1.0 : 0.0, weight * chosen.logp,
           weight * rejected.logp},
          slope * settings.beta * weight};
}

// (B, L) of any strides, in elements.
template <typename T>
struct DpoRows {
  const T* data;
  int64_t image_stride, token_stride;

  VARFAST_INLINE double at(int64_t image, int64_t token) const {
    return double(data[image * image_stride + token * token_stride]);
  }
};

// Pairs of two adjacent images of L tokens, the chosen one first. P and L are at least 1.
template <typename T>
struct DpoForward {
  DpoRows<T> logp, logp_ref;
  T* loss;   // ()
  T* stats;  // (6,)
  T* slope;  // (2 P,) d loss / d logp of every token of an image
  int64_t num_pairs, num_tokens;
  DpoSettings settings;

  // Token of an image, added to the image's sums. The difference is exact: float32 numbers are subtracted in double.
  VARFAST_INLINE void add(int64_t image, int64_t token, DpoRow& row) const {
    const double policy = logp.at(image, token);
    row.logp += policy;
    row.gain += policy - logp_ref.at(image, token);
  }

  VARFAST_INLINE DpoPair pair(int64_t index, const DpoRow& chosen, const DpoRow& rejected) const {
    const DpoPair found = dpo_pair(chosen, rejected, num_tokens, settings);
    const double token_slope = found.slope / double(num_pairs);
    slope[2 * index] = T(token_slope);
    slope[2 * index + 1] = T(-token_slope);
    return found;
  }

  // sums: over the pairs.
  VARFAST_INLINE void write(const double* sums) const {
    *loss = T(sums[0] / double(num_pairs));
    for (int i = 0; i < kDpoStats; ++i) stats[i] = T(sums[i + 1] / double(num_pairs));
  }
};

// Launches on the stream and returns without waiting: null, or CUDA's error message. scratch: (kDpoMeans, P).
template <typename T>
const char* dpo_forward_cuda(const DpoForward<T>& forward, double* scratch, void* stream);

}  // namespace varfast
