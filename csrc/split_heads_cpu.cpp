// The split of the qkv product into normalised heads on the CPU, as kernels/reference.py, split_heads, specifies it.
#include "split_heads.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace varfast {
namespace {

constexpr double kEps = 1e-12;
// Numbers of the product that are worth a thread of their own.
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

// d x of y = x / max(|x|, eps): the part of d y along y is lost, but where the norm was raised to eps.
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

// What a thread works on: one head of the tokens first ... last - 1 of an image. A head's tokens follow each other on
// one side, and the heads of a token on the other: tiles have runs on both.
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

// Of q, k and v, part 0, 1 and 2; y and inverse (null: not wanted) are the part's.
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

template void split_heads_cpu(const SplitForward<float>&);
template void split_heads_cpu(const SplitForward<double>&);
template void split_heads_cpu(const SplitForward<BFloat16>&);
template void split_heads_backward_cpu(const SplitBackward<float>&);
template void split_heads_backward_cpu(const SplitBackward<double>&);
template void split_heads_backward_cpu(const SplitBackward<BFloat16>&);

}  // namespace varfast
