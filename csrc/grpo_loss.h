// What grpo_loss.cpp passes to the CPU and the CUDA kernels: pointers and numbers, without any type of torch.
#pragma once

#include <cstdint>

#include "grpo_math.h"

namespace varfast {

// (B, L) of any strides, in elements; token_stride is 0 if one number is used for a whole image.
template <typename T>
struct Advantages {
  const T* data;
  int64_t image_stride, token_stride;

  // Address of an image's first token; the next tokens follow at a distance of token_stride.
  VARFAST_INLINE const T* of_image(int64_t image) const { return data + image * image_stride; }
};

// B images of L tokens. All arrays but the advantages are contiguous. B and L are at least 1.
template <typename T>
struct GrpoForward {
  const T* logp;        // (B, L)
  const T* logp_old;    // (B, L)
  const T* logp_ref;    // (B, L), not read where settings.has_reference is false
  Advantages<T> advantages;
  T* image_ratio;       // (B,) scratch where settings.sequence_ratio is true, else null
  T* grad;              // (B, L) d loss / d logp
  T* loss;              // ()
  T* stats;             // (5,)
  int64_t num_images;
  int64_t num_tokens;  // L
  double one_token;    // 1 / (B L): the weight of a token in the means
  GrpoSettings<T> settings;

  VARFAST_INLINE T ratio_of(int64_t image) const { return settings.sequence_ratio ? image_ratio[image] : T(0); }
};

template <typename T>
void grpo_forward_cpu(const GrpoForward<T>& forward);

// out = grad * upstream[0]
template <typename T>
void grpo_backward_cpu(const T* grad, const T* upstream, T* out, int64_t count);

// Doubles of scratch memory on the device that grpo_forward_cuda needs.
int64_t grpo_cuda_scratch(int64_t count);

// Both launch on the stream and return without waiting: null, or CUDA's error message.
template <typename T>
const char* grpo_forward_cuda(const GrpoForward<T>& forward, double* scratch, int device, void* stream);
template <typename T>
const char* grpo_backward_cuda(const T* grad, const T* upstream, T* out, int64_t count, void* stream);

// Version of the CUDA toolkit, 13000 for 13.0.
int cuda_version();

}  // namespace varfast
