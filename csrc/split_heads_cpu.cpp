// Splits the qkv layer's output into normalised heads on the CPU; specified by split_heads in kernels/reference.py.
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace varfast {

struct HeadSizes {
  int64_t num_images, num_tokens, num_heads;
};

// Tokens of one image that a thread processes at a time (a tile), and the number of tiles of an image.
constexpr int64_t kTile = 16;
inline int64_t head_tiles(const HeadSizes& sizes) { return (sizes.num_tokens + kTile - 1) / kTile; }

// product (B, L, 3 H D) + bias (3 H D, or null) -> q, k, v; q and k are normalised if `normalise` is set. inverse_q and
// inverse_k, (B, H, L), receive 1 / max(norm, eps) unless null.
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

// Gradients of q, k, v -> gradient of the product. q and k, contiguous, and the inverse norms come from the forward
// pass. partial (tiles, 3 H D), or null: sums of d_product over the tokens of each tile, before it is rounded.
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

namespace {

constexpr double kEps = 1e-12;
// Fewest numbers of the product that justify another thread.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
VARFAST_ALWAYS_INLINE void normalise(const T* x, const Wide<T>* bias, T* y, Wide<T>* inverse_at) {
  using W = Wide<T>;
  W row[kHeadDim];
  for (int64_t i = 0; i < kHeadDim; ++i) row[i] = W(x[i]);
  if (bias) {
    for (int64_t i = 0; i < kHeadDim; ++i) row[i] += bias[i];
  }
  const W norm = std::sqrt(dot(row, row, kHeadDim));
  const W inverse = W(1) / (norm < W(kEps) ? W(kEps) : norm);  // not max: NaN stays NaN
  for (int64_t i = 0; i < kHeadDim; ++i) row[i] *= inverse;
  for (int64_t i = 0; i < kHeadDim; ++i) y[i] = T(row[i]);
  if (inverse_at) *inverse_at = inverse;
}

// Gradient of x for y = x / max(|x|, eps): projects out the component of d y along y, except where the norm was clamped
// to eps.
template <typename T>
VARFAST_ALWAYS_INLINE void through_norm(const T* d_y, const T* y, Wide<T> inverse, T* d_x, Wide<T>* sums) {
  using W = Wide<T>;
  W d[kHeadDim], wide_y[kHeadDim];
  for (int64_t i = 0; i < kHeadDim; ++i) d[i] = W(d_y[i]);
  for (int64_t i = 0; i < kHeadDim; ++i) wide_y[i] = W(y[i]);
  const W along = inverse == W(1) / W(kEps) ? W(0) : dot(d, wide_y, kHeadDim);
  for (int64_t i = 0; i < kHeadDim; ++i) d[i] = (d[i] - wide_y[i] * along) * inverse;
  for (int64_t i = 0; i < kHeadDim; ++i) d_x[i] = T(d[i]);
  if (sums) {
    for (int64_t i = 0; i < kHeadDim; ++i) sums[i] += d[i];
  }
}

template <typename T>
VARFAST_ALWAYS_INLINE void copy(const T* x, T* y) {
  std::memcpy(y, x, kHeadDim * sizeof(T));
}

template <typename T>
VARFAST_ALWAYS_INLINE void add(const T* x, const Wide<T>* bias, T* y) {
  for (int64_t i = 0; i < kHeadDim; ++i) y[i] = T(Wide<T>(x[i]) + bias[i]);
}

// The work of a thread: one head of the tokens [first, last) of an image. In q, k and v the tokens of a head are
// contiguous; in the product, the heads of a token are. Tiles access contiguous runs in both.
struct Tile {
  int64_t b, h, first, last;
};

template <typename F>
void for_tiles(const HeadSizes& sizes, const F& body) {
  const int64_t tiles_an_image = head_tiles(sizes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kTile * 3 * sizes.num_heads * kHeadDim));
  parallel_for(sizes.num_images * tiles_an_image, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles_an_image * kTile;
      for (int64_t h = 0; h < sizes.num_heads; ++h) {
        body(Tile{i / tiles_an_image, h, first, std::min(first + kTile, sizes.num_tokens)});
      }
    }
  });
}

// Splits off one part: q, k and v are parts 0, 1 and 2. y and inverse (null if not needed) belong to that part.
template <typename T>
VARFAST_CLONES void split(const SplitForward<T>& f, const Tile& tile, int part, const Heads<T>& y, Wide<T>* inverse) {
  const auto [b, h, first, last] = tile;
  const int64_t num_heads = f.sizes.num_heads, num_tokens = f.sizes.num_tokens;
  const Wide<T>* bias = f.bias ? f.bias + (part * num_heads + h) * kHeadDim : nullptr;
  for (int64_t l = first; l < last; ++l) {
    const T* x = f.product + (((b * num_tokens + l) * 3 + part) * num_heads + h) * kHeadDim;
    if (f.normalise && part < 2) {
      normalise(x, bias, y.at(b, h, l), inverse ? inverse + (b * num_heads + h) * num_tokens + l : nullptr);
    } else if (bias) {
      add(x, bias, y.at(b, h, l));
    } else {
      copy(x, y.at(b, h, l));
    }
  }
}

template <typename T>
VARFAST_CLONES void join(const SplitBackward<T>& f, const Tile& tile, int part, const Heads<const T>& d_y, const T* y,
                         const Wide<T>* inverse) {
  const auto [b, h, first, last] = tile;
  const int64_t num_heads = f.sizes.num_heads, num_tokens = f.sizes.num_tokens;
  Wide<T>* sums = nullptr;
  if (f.partial) {
    const int64_t tile_index = b * head_tiles(f.sizes) + first / kTile;
    sums = f.partial + ((tile_index * 3 + part) * num_heads + h) * kHeadDim;
    std::fill_n(sums, kHeadDim, Wide<T>(0));
  }
  for (int64_t l = first; l < last; ++l) {
    T* d_x = f.d_product + (((b * num_tokens + l) * 3 + part) * num_heads + h) * kHeadDim;
    if (f.normalise && part < 2) {
      const int64_t flat = (b * num_heads + h) * num_tokens + l;
      through_norm(d_y.at(b, h, l), y + flat * kHeadDim, inverse[flat], d_x, sums);
    } else {
      copy(d_y.at(b, h, l), d_x);
      if (sums) {
        for (int64_t i = 0; i < kHeadDim; ++i) sums[i] += Wide<T>(d_y.at(b, h, l)[i]);
      }
    }
  }
}

}  // namespace

template <typename T>
void split_heads_cpu(const SplitForward<T>& f) {
  for_tiles(f.sizes, [&](const Tile& tile) {
    split<T>(f, tile, 0, f.q, f.inverse_q);
    split<T>(f, tile, 1, f.k, f.inverse_k);
    split<T>(f, tile, 2, f.v, nullptr);
  });
}

template <typename T>
void split_heads_backward_cpu(const SplitBackward<T>& f) {
  for_tiles(f.sizes, [&](const Tile& tile) {
    join<T>(f, tile, 0, f.d_q, f.q, f.inverse_q);
    join<T>(f, tile, 1, f.d_k, f.k, f.inverse_k);
    join<T>(f, tile, 2, f.d_v, nullptr, nullptr);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The op: checks the arguments and allocates the results

namespace {

HeadSizes head_sizes(const Tensor& product, int64_t num_heads) {
  STD_TORCH_CHECK(product.dim() == 3 && num_heads > 0 && product.size(2) == 3 * num_heads * kHeadDim,
                  "want a product (B, L, 3 * H * 64)");
  return {product.size(0), product.size(1), num_heads};
}

void check_heads(const Tensor& x, const HeadSizes& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == sizes.num_images && x.size(1) == sizes.num_heads &&
                      x.size(2) == sizes.num_tokens && x.size(3) == kHeadDim && (x.stride(3) == 1 || x.numel() == 0) &&
                      x.scalar_type() == dtype,
                  "want (B, H, L, 64) of the sizes and dtype of the product, with unit stride in D");
}

Tensor empty_heads(const Tensor& product, const HeadSizes& sizes) {
  return new_empty(product, {sizes.num_images, sizes.num_heads, sizes.num_tokens, kHeadDim}, product.scalar_type());
}

// inverse_q and inverse_k are written unless null.
void split_into(const Tensor& product, const MaybeTensor& bias_C3, const HeadSizes& sizes, bool l2_norm,
                const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* inverse_q, const Tensor* inverse_k) {
  const Tensor x = torch::stable::contiguous(product);
  const MaybeTensor bias = bias_of(x, bias_C3);
  with_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto inverse = [&](const Tensor* y) { return y ? mutable_data<Wide<T>>(*y) : nullptr; };
    split_heads_cpu(SplitForward<T>{data<T>(x), data<Wide<T>>(bias), heads(q, mutable_data<T>(q)),
                                    heads(k, mutable_data<T>(k)), heads(v, mutable_data<T>(v)), inverse(inverse_q),
                                    inverse(inverse_k), sizes, l2_norm});
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> split_heads_cpp(const Tensor& product, const MaybeTensor& bias_C3,
                                                                   int64_t num_heads, bool l2_norm) {
  const HeadSizes sizes = head_sizes(product, num_heads);
  const ScalarType wide = wide_of(product.scalar_type());
  const Tensor q = empty_heads(product, sizes), k = empty_heads(product, sizes), v = empty_heads(product, sizes);
  const auto empty_inverse = [&] {
    return l2_norm ? new_empty(product, {sizes.num_images, sizes.num_heads, sizes.num_tokens}, wide)
                   : new_empty(product, {0}, wide);
  };
  const Tensor inverse_q = empty_inverse(), inverse_k = empty_inverse();
  split_into(product, bias_C3, sizes, l2_norm, q, k, v, &inverse_q, &inverse_k);
  return {q, k, v, inverse_q, inverse_k};
}

Tensor split_heads_into_cpp(const Tensor& product, const MaybeTensor& bias_C3, int64_t num_heads, bool l2_norm,
                            Tensor k_BHlD, Tensor v_BHlD) {
  const HeadSizes sizes = head_sizes(product, num_heads);
  for (const Tensor* x : {&k_BHlD, &v_BHlD}) check_heads(*x, sizes, product.scalar_type());
  const Tensor q = empty_heads(product, sizes);
  split_into(product, bias_C3, sizes, l2_norm, q, k_BHlD, v_BHlD, nullptr, nullptr);
  return q;
}

std::tuple<Tensor, Tensor> split_heads_backward_cpp(const Tensor& d_q_BHLD, const Tensor& d_k_BHLD,
                                                    const Tensor& d_v_BHLD, const MaybeTensor& q_BHLD,
                                                    const MaybeTensor& k_BHLD,
                                                    const MaybeTensor& q_inverse_BHL,
                                                    const MaybeTensor& k_inverse_BHL, bool with_bias) {
  STD_TORCH_CHECK(d_q_BHLD.dim() == 4 && d_k_BHLD.dim() == 4 && d_v_BHLD.dim() == 4, "want gradients (B, H, L, 64)");
  const Tensor d_q = unit_stride(d_q_BHLD), d_k = unit_stride(d_k_BHLD), d_v = unit_stride(d_v_BHLD);
  const HeadSizes sizes{d_q.size(0), d_q.size(2), d_q.size(1)};
  for (const Tensor* x : {&d_q, &d_k, &d_v}) check_heads(*x, sizes, d_q.scalar_type());
  const bool normalised = q_BHLD && k_BHLD && q_inverse_BHL && k_inverse_BHL;
  // Make contiguous: a saved-tensor hook may have changed the layout. Without normalisation they are not read.
  const auto kept = [&](const MaybeTensor& x) { return normalised ? torch::stable::contiguous(*x) : d_q; };
  const Tensor q = kept(q_BHLD), k = kept(k_BHLD), q_inverse = kept(q_inverse_BHL), k_inverse = kept(k_inverse_BHL);
  for (const Tensor* x : {&q, &k}) check_heads(*x, sizes, d_q.scalar_type());
  const int64_t width = 3 * sizes.num_heads * kHeadDim;
  const Tensor out = new_empty(d_q, {sizes.num_images, sizes.num_tokens, width}, d_q.scalar_type());
  const int64_t tiles = sizes.num_images * head_tiles(sizes);
  const ScalarType wide = wide_of(d_q.scalar_type());
  const Tensor partial = new_empty(d_q, {with_bias ? tiles : 0, width}, wide),
               d_bias = new_empty(d_q, {with_bias ? width : 0}, wide);
  with_float(d_q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    split_heads_backward_cpu(SplitBackward<T>{
        heads(d_q, data<T>(d_q)), heads(d_k, data<T>(d_k)), heads(d_v, data<T>(d_v)), data<T>(q), data<T>(k),
        data<Wide<T>>(q_inverse), data<Wide<T>>(k_inverse), mutable_data<T>(out),
        with_bias ? mutable_data<Wide<T>>(partial) : nullptr, sizes, normalised});
    if (with_bias) column_sums_cpu(data<Wide<T>>(partial), tiles, width, mutable_data<Wide<T>>(d_bias));
  });
  return {out, d_bias};
}

}  // namespace varfast
