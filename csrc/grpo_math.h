// The GRPO loss of one token, and the sums over tokens. g++ and nvcc compile this same code; it uses nothing of torch.
//
// loss = kl_beta kl - min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = exp(logp - logp_old) of the token, or exp of
// the mean over its image; kl = k3 = exp(q) - q - 1 with q = logp_ref - logp, or that times the token's ratio. The
// specification is kernels/reference.py, grpo_token_loss.
#pragma once

#include <cmath>

#include "host_device.h"

namespace varfast {

// Settings that are the same for every token.
template <typename T>
struct GrpoSettings {
  T low;      // 1 - eps
  T high;     // 1 + eps
  T kl_beta;
  bool has_reference;  // false: no KL term
  bool sequence_ratio;  // one ratio for each image
  bool unbiased_kl;     // k3 is multiplied by the token's ratio
};

template <typename T>
struct GrpoToken {
  T loss;
  T kl;       // k3
  T clipped;  // 1 where the clip cuts the gradient off, else 0
  T ratio;    // the ratio before clipping: of the token, or of its image
  T gap;      // |exp(logp - logp_old) - 1|
  T grad;     // d loss / d logp
};

// k3(q) = exp(q) - q - 1 and its derivative exp(q) - 1.
//
// For |q| < 0.1 k3 is computed as a power series: in float32 the difference has a relative error of 1e-6 at 0.1 and of
// 1e-2 at 1e-5. The first omitted term is at most 2 * 0.1^8 / 10! = 6e-15 of the sum. The derivative then needs no
// exponential.
template <typename T>
VARFAST_INLINE void k3(T q, T& value, T& slope) {
  if (std::fabs(q) < T(0.1)) {
    T series = T(1.0 / 362880);
    series = series * q + T(1.0 / 40320);
    series = series * q + T(1.0 / 5040);
    series = series * q + T(1.0 / 720);
    series = series * q + T(1.0 / 120);
    series = series * q + T(1.0 / 24);
    series = series * q + T(1.0 / 6);
    series = series * q + T(0.5);
    value = q * q * series;
    slope = q + value;
  } else {
    slope = std::expm1(q);
    value = slope - q;
  }
}

// The full gradient passes where the ratio is within the bounds of the clip, both included (the gradient of torch.clamp
// passes at its bounds in torch 2.11 and no longer in 2.15), and where the unclipped product is the smaller one. Half
// of it passes where the ratio is outside and rounding makes the two products equal, as for torch.minimum. None passes
// where the clipped product is the smaller one, even if the ratio overflows, where autograd would compute 0 * inf.
//
// The image's ratio is differentiated as if it were the token's (GSPO-token, arXiv:2507.18071, eq. 14). So a token's
// gradient depends on this token alone, and with one advantage for each image it equals the gradient of the mean.
//
// d (ratio k3) / d logp = ratio (k3 - slope) = -ratio q.
template <typename T>
VARFAST_INLINE GrpoToken<T> grpo_token(T logp, T logp_old, T logp_ref, T advantage, T image_ratio,
                                       const GrpoSettings<T>& settings) {
  GrpoToken<T> token;
  const T token_ratio = std::exp(logp - logp_old);
  token.ratio = settings.sequence_ratio ? image_ratio : token_ratio;
  token.gap = std::fabs(token_ratio - T(1));
  const bool above = token.ratio > settings.high, below = token.ratio < settings.low;
  const T gain = token.ratio * advantage;
  const T clipped_gain = (above ? settings.high : below ? settings.low : token.ratio) * advantage;
  token.clipped = (above && advantage > T(0)) || (below && advantage < T(0)) ? T(1) : T(0);
  // Written so that NaN in either operand is kept: comparisons with NaN are false.
  const T surrogate = clipped_gain < gain ? clipped_gain : gain;
  T surrogate_grad = clipped_gain < gain ? T(0) : gain;
  if ((above || below) && clipped_gain == gain) surrogate_grad *= T(0.5);
  T kl_slope = T(0);
  token.kl = T(0);
  if (settings.has_reference) k3(logp_ref - logp, token.kl, kl_slope);
  T kl = token.kl;
  if (settings.has_reference && settings.unbiased_kl) {
    kl *= token_ratio;
    kl_slope = token_ratio * (logp_ref - logp);
  }
  token.loss = settings.kl_beta * kl - surrogate;
  token.grad = -settings.kl_beta * kl_slope - surrogate_grad;
  return token;
}

// The larger of two numbers, or NaN if either is NaN, as in torch.max.
template <typename T>
VARFAST_INLINE T max_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

// The sums behind the means of the loss and the statistics, and one maximum. Gaps are >= 0, so the maximum starts at 0.
template <typename T>
struct GrpoSums {
  T loss = 0, kl = 0, clipped = 0, ratio = 0, gap = 0, gap_max = 0;

  VARFAST_INLINE void add(const GrpoToken<T>& token) {
    loss += token.loss;
    kl += token.kl;
    clipped += token.clipped;
    ratio += token.ratio;
    gap += token.gap;
    gap_max = max_or_nan(gap_max, token.gap);
  }

  template <typename S>
  VARFAST_INLINE void add(const GrpoSums<S>& other) {
    loss += other.loss;
    kl += other.kl;
    clipped += other.clipped;
    ratio += other.ratio;
    gap += other.gap;
    gap_max = max_or_nan(gap_max, T(other.gap_max));
  }

  // All images have the same number of tokens, so the mean over images of the mean over tokens is the mean over all
  // tokens; one_token is 1 / (B L).
  template <typename S>
  VARFAST_INLINE void write(double one_token, S* mean_loss, S* stats) const {
    *mean_loss = S(loss * one_token);
    stats[0] = S(kl * one_token);
    stats[1] = S(clipped * one_token);
    stats[2] = S(ratio * one_token);
    stats[3] = S(gap * one_token);
    stats[4] = S(gap_max);
  }
};

}  // namespace varfast
