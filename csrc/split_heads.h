// What ops.cpp asks of split_heads_cpu.cpp: plain pointers, no tensors.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace varfast {

// An array (B, H, L, D) with unit stride in D.
template <typename T>
struct Heads {
  T* data;
  int64_t image, head, row;  // strides

  T* at(int64_t b, int64_t h, int64_t l) const { return data + b * image + h * head + l * row; }
};

// D, VAR's: a constant, so that a head is held in registers.
constexpr int64_t kHeadDim = 64;

struct HeadSizes {
  int64_t num_images, num_tokens, num_heads;
};

// Tokens of one image that a thread takes at a time, and how many such tiles an image has.
constexpr int64_t kTile = 16;
inline int64_t head_tiles(const HeadSizes& sizes) { return (sizes.num_tokens + kTile - 1) / kTile; }

// product (B, L, 3 H D) + bias (3 H D, or null) -> q, k, v; q and k normalised where `normalise` says so. inverse_q and
// inverse_k, (B, H, L):
// 1 / max(norm, eps), not written where null.
template <typename T>
struct SplitForward {
  const T* product;
  const Wide<T>* bias;
  Heads<T> q, k, v;
  Wide<T>* inverse_q;
  Wide<T>* inverse_k;
  HeadSizes sizes;
  bool normalise;
};

// Gradients of q, k, v -> of the product. q, k, contiguous, and the inverse norms are what the forward pass returned.
// partial (tiles, 3 H D), or null: sums of d_product over the tokens of each tile, before it is rounded.
template <typename T>
struct SplitBackward {
  Heads<const T> d_q, d_k, d_v;
  const T* q;
  const T* k;
  const Wide<T>* inverse_q;
  const Wide<T>* inverse_k;
  T* d_product;
  Wide<T>* partial;
  HeadSizes sizes;
  bool normalise;
};

template <typename T>
void split_heads_cpu(const SplitForward<T>& forward);
template <typename T>
void split_heads_backward_cpu(const SplitBackward<T>& backward);

}  // namespace varfast
