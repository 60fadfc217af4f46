// What ops.cpp asks of attention_cpu.cpp: plain pointers, no torch.
#pragma once

#include <cstdint>

#include "split_heads.h"

namespace varfast {

// B images of H heads; queries come in groups (scales): group g ends at query ends[g] and sees the keys before
// visible[g]. T: float, or uint16_t for the bits of a bfloat16.
struct AttentionSizes {
  int64_t num_images, num_heads, num_queries, num_keys, num_groups;
  const int64_t* ends;
  const int64_t* visible;
};

// out (B, H, L, D) contiguous; log_sum (B, H, L) of the exponentials, or null: not wanted.
template <typename T>
struct AttentionForward {
  Heads<const T> q, k, v;
  const float* logit_scale;  // (H,)
  T* out;
  float* log_sum;
  AttentionSizes sizes;
};

// As many keys as queries. d_q, d_k, d_v (B, H, L, D) contiguous; d_logit_scale (B, H).
template <typename T>
struct AttentionBackward {
  Heads<const T> q, k, v, d_out;
  const float* logit_scale;
  const T* out;
  const float* log_sum;
  T* d_q;
  T* d_k;
  T* d_v;
  float* d_logit_scale;
  AttentionSizes sizes;
};

template <typename T>
void attention_cpu(const AttentionForward<T>& forward);
template <typename T>
void attention_backward_cpu(const AttentionBackward<T>& backward);

}  // namespace varfast
