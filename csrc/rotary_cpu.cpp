// Split into heads with rotary position embeddings, and attention of one token against a cache, on the CPU; specified
// by kernels/reference_nexttoken.py.
#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace varfast {

namespace {

// Fewest numbers that justify another thread.
constexpr int64_t kGrain = 1 << 14;
// Weighted values of this many places are summed in one chain. Short chains have less rounding than one long chain.
constexpr int64_t kPlaces = 64;

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Rotates one head of one token. table: cosine and sine of each pair, or null for a copy. sign: -1 rotates back.
template <typename T>
VARFAST_ALWAYS_INLINE void turn_of(const T* __restrict__ x, const float* __restrict__ table, int64_t dim, bool halves,
                                   float sign, T* __restrict__ y) {
  if (!table) {
    std::memcpy(y, x, dim * sizeof(T));
  } else if (halves) {
    for (int64_t j = 0; j < dim / 2; ++j) {
      const float a = load(x[j]), b = load(x[dim / 2 + j]), cos = table[2 * j], sin = sign * table[2 * j + 1];
      store(a * cos - b * sin, y[j]);
      store(b * cos + a * sin, y[dim / 2 + j]);
    }
  } else {
    for (int64_t j = 0; j < dim / 2; ++j) {
      const float a = load(x[2 * j]), b = load(x[2 * j + 1]), cos = table[2 * j], sin = sign * table[2 * j + 1];
      store(a * cos - b * sin, y[2 * j]);
      store(b * cos + a * sin, y[2 * j + 1]);
    }
  }
}

// Sizes for attention of the query heads that share one key head (the rows of q) to `count` places of that key head.
struct DecodeSizes {
  int64_t rows, count, dim, k_row, v_row;
  float scale;
};

template <typename T>
VARFAST_ALWAYS_INLINE void decode_of(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                     const DecodeSizes& n, float* __restrict__ scratch, T* __restrict__ out) {
  const int64_t wide = padded(n.dim), places = padded(n.count);
  float* wide_q = scratch;                    // (rows, wide), 0 after dim
  float* row = wide_q + n.rows * wide;        // (wide)
  float* sums = row + wide;                   // (rows, 2, wide)
  float* weights = sums + 2 * n.rows * wide;  // (rows, places)
  std::fill_n(scratch, (3 * n.rows + 1) * wide, 0.0f);
  for (int64_t r = 0; r < n.rows; ++r) {
    for (int64_t d = 0; d < n.dim; ++d) wide_q[r * wide + d] = load(q[r * n.dim + d]) * n.scale;
  }
  for (int64_t j = 0; j < n.count; ++j) {
    for (int64_t d = 0; d < n.dim; ++d) row[d] = load(k[j * n.k_row + d]);
    for (int64_t r = 0; r < n.rows; ++r) weights[r * places + j] = dot(wide_q + r * wide, row, wide);
  }
  for (int64_t r = 0; r < n.rows; ++r) {
    float* __restrict__ weight = weights + r * places;
    float most = weight[0];
    for (int64_t j = 1; j < n.count; ++j) most = weight[j] > most ? weight[j] : most;
    for (int64_t j = n.count; j < places; ++j) weight[j] = 0.0f;
    const float not_a_number = 0.0f * sum_of(weight, places);  // NaN if the row has NaN or inf, else 0
    for (int64_t j = 0; j < n.count; ++j) weight[j] = exp_minus_size(weight[j] - most);
    const float share = 1.0f / sum_of(weight, places) + not_a_number;
    for (int64_t j = 0; j < n.count; ++j) weight[j] *= share;
  }
  for (int64_t j = 0; j < n.count; ++j) {
    for (int64_t d = 0; d < n.dim; ++d) row[d] = load(v[j * n.v_row + d]);
    const bool full = (j + 1) % kPlaces == 0 || j + 1 == n.count;
    for (int64_t r = 0; r < n.rows; ++r) {
      float *__restrict__ chain = sums + 2 * r * wide, *__restrict__ total = chain + wide;
      const float weight = weights[r * places + j];
      for (int64_t d = 0; d < wide; ++d) chain[d] += weight * row[d];
      if (!full) continue;
      for (int64_t d = 0; d < wide; ++d) total[d] += chain[d], chain[d] = 0.0f;
    }
  }
  for (int64_t r = 0; r < n.rows; ++r) {
    for (int64_t d = 0; d < n.dim; ++d) store(sums[(2 * r + 1) * wide + d], out[r * n.dim + d]);
  }
}

int64_t decode_scratch(const DecodeSizes& n) {
  return (3 * n.rows + 1) * padded(n.dim) + n.rows * padded(n.count);
}

}  // namespace

// These are not templates, because g++ clones only ordinary functions for several instruction sets.
#define VARFAST_ROTARY(T)                                                                                             \
  VARFAST_CLONES void turn(const T* x, const float* table, int64_t dim, bool halves, float sign, T* y) {              \
    turn_of<T>(x, table, dim, halves, sign, y);                                                                       \
  }                                                                                                                   \
  VARFAST_CLONES void decode(const T* q, const T* k, const T* v, const DecodeSizes& sizes, float* scratch, T* out) {  \
    decode_of<T>(q, k, v, sizes, scratch, out);                                                                       \
  }
VARFAST_ROTARY(float)
VARFAST_ROTARY(uint16_t)
#undef VARFAST_ROTARY

// ---------------------------------------------------------------------------------------------------------------------
// The ops: check the arguments and allocate the results

namespace {

struct RotarySizes {
  int64_t num_images, num_tokens, query_heads, key_heads, dim;

  int64_t heads() const { return query_heads + 2 * key_heads; }
};

RotarySizes rotary_sizes(int64_t images, int64_t tokens, int64_t width, int64_t query_heads, int64_t key_heads) {
  const int64_t heads = query_heads + 2 * key_heads;
  STD_TORCH_CHECK(query_heads > 0 && key_heads > 0 && width % heads == 0, "want a product (..., (H + 2 G) D)");
  return {images, tokens, query_heads, key_heads, width / heads};
}

MaybeTensor rotary_table(const MaybeTensor& rotary, int64_t places, int64_t dim) {
  if (!rotary) return rotary;
  STD_TORCH_CHECK(rotary->dim() == 3 && rotary->size(0) == places && 2 * rotary->size(1) == dim &&
                      rotary->size(2) == 2 && rotary->scalar_type() == ScalarType::Float,
                  "rotary: want (places, D / 2, 2) float32");
  return torch::stable::contiguous(*rotary);
}

void check_heads(const Tensor& x, int64_t images, int64_t num_heads, int64_t rows, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == images && x.size(1) == num_heads && x.size(2) == rows &&
                      x.size(3) == dim && (x.stride(3) == 1 || x.numel() == 0) && x.scalar_type() == dtype,
                  "want heads of the sizes and dtype of the product, with unit stride in D");
}

const int64_t* positions(const Tensor& position, int64_t images, int64_t places) {
  STD_TORCH_CHECK(position.dim() == 1 && position.size(0) == images && position.scalar_type() == ScalarType::Long,
                  "position_B: want int64, one an image");
  const int64_t* at = data<int64_t>(position);
  for (int64_t b = 0; b < images; ++b) STD_TORCH_CHECK(at[b] >= 0 && at[b] < places, "position_B: outside the cache");
  return at;
}

// Copies between the qkv layer's output (B, L, X) and heads. position: that of each image's only token, or null to use
// the index of the token.
template <typename T, bool kBackward>
void rotate(T* product, const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const float* table,
            const int64_t* position, const RotarySizes& n, bool halves) {
  const int64_t width = n.heads() * n.dim;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  parallel_for(n.num_images * n.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / n.num_tokens, row = token % n.num_tokens, place = position ? position[b] : row;
      for (int64_t h = 0; h < n.heads(); ++h) {
        const int64_t key = h - n.query_heads, value = key - n.key_heads;
        T* at = key < 0 ? q.at(b, h, row) : value < 0 ? k.at(b, key, place) : v.at(b, value, place);
        T* in_product = product + token * width + h * n.dim;
        const float* turned = table && value < 0 ? table + place * n.dim : nullptr;
        kBackward ? turn(at, turned, n.dim, halves, -1.0f, in_product)
                  : turn(in_product, turned, n.dim, halves, 1.0f, at);
      }
    }
  });
}

// Pointer to a tensor that is only read, for a function whose arguments are read or written depending on the direction.
template <typename T>
T* readable(const Tensor& x) {
  return const_cast<T*>(data<T>(x));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rotary_cpp(const Tensor& qkv_BLX, const MaybeTensor& rotary_LP2, int64_t num_heads,
                                              int64_t num_kv_heads, bool halves) {
  STD_TORCH_CHECK(qkv_BLX.dim() == 3, "want a product (B, L, (H + 2 G) D)");
  const Tensor x = torch::stable::contiguous(qkv_BLX);
  const RotarySizes n = rotary_sizes(x.size(0), x.size(1), x.size(2), num_heads, num_kv_heads);
  const MaybeTensor rotary = rotary_table(rotary_LP2, n.num_tokens, n.dim);
  const auto empty = [&](int64_t count) {
    return new_empty(x, {n.num_images, count, n.num_tokens, n.dim}, x.scalar_type());
  };
  const Tensor q = empty(num_heads), k = empty(num_kv_heads), v = empty(num_kv_heads);
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    rotate<T, false>(readable<T>(x), heads(q, mutable_data<T>(q)), heads(k, mutable_data<T>(k)),
                     heads(v, mutable_data<T>(v)), data<float>(rotary), nullptr, n, halves);
  });
  return {q, k, v};
}

Tensor rotary_backward_cpp(const Tensor& d_q_BHLD, const Tensor& d_k_BGLD, const Tensor& d_v_BGLD,
                           const MaybeTensor& rotary_LP2, bool halves) {
  STD_TORCH_CHECK(d_q_BHLD.dim() == 4 && d_k_BGLD.dim() == 4 && d_v_BGLD.dim() == 4, "want gradients (B, H, L, D)");
  const Tensor q = unit_stride(d_q_BHLD), k = unit_stride(d_k_BGLD), v = unit_stride(d_v_BGLD);
  const RotarySizes n{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3)};
  check_heads(k, n.num_images, n.key_heads, n.num_tokens, n.dim, q.scalar_type());
  check_heads(v, n.num_images, n.key_heads, n.num_tokens, n.dim, q.scalar_type());
  const MaybeTensor rotary = rotary_table(rotary_LP2, n.num_tokens, n.dim);
  const Tensor out = new_empty(q, {n.num_images, n.num_tokens, n.heads() * n.dim}, q.scalar_type());
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    rotate<T, true>(mutable_data<T>(out), heads(q, readable<T>(q)), heads(k, readable<T>(k)), heads(v, readable<T>(v)),
                    data<float>(rotary), nullptr, n, halves);
  });
  return out;
}

Tensor rotary_into_cpp(const Tensor& qkv_BX, const MaybeTensor& rotary_NP2, const Tensor& position_B, int64_t num_heads,
                       bool halves, Tensor k_cache_BGND, Tensor v_cache_BGND) {
  STD_TORCH_CHECK(qkv_BX.dim() == 2 && k_cache_BGND.dim() == 4, "want a product (B, (H + 2 G) D) and caches (B, G, N, D)");
  const Tensor x = torch::stable::contiguous(qkv_BX), position = torch::stable::contiguous(position_B);
  const int64_t places = k_cache_BGND.size(2);
  const RotarySizes n = rotary_sizes(x.size(0), 1, x.size(1), num_heads, k_cache_BGND.size(1));
  check_heads(k_cache_BGND, n.num_images, n.key_heads, places, n.dim, x.scalar_type());
  check_heads(v_cache_BGND, n.num_images, n.key_heads, places, n.dim, x.scalar_type());
  const MaybeTensor rotary = rotary_table(rotary_NP2, places, n.dim);
  const int64_t* at = positions(position, n.num_images, places);
  const Tensor q = new_empty(x, {n.num_images, num_heads, n.dim}, x.scalar_type());
  with_bits(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Heads<T> q_heads{mutable_data<T>(q), num_heads * n.dim, n.dim, n.dim};
    rotate<T, false>(readable<T>(x), q_heads, heads(k_cache_BGND, mutable_data<T>(k_cache_BGND)),
                     heads(v_cache_BGND, mutable_data<T>(v_cache_BGND)), data<float>(rotary), at, n, halves);
  });
  return q;
}

Tensor decode_attention_cpp(const Tensor& q_BHD, const Tensor& k_cache_BGND, const Tensor& v_cache_BGND,
                            const Tensor& position_B, double scale) {
  STD_TORCH_CHECK(q_BHD.dim() == 3 && k_cache_BGND.dim() == 4, "want q (B, H, D) and caches (B, G, N, D)");
  const Tensor q = torch::stable::contiguous(q_BHD), k = unit_stride(k_cache_BGND), v = unit_stride(v_cache_BGND),
               position = torch::stable::contiguous(position_B);
  const int64_t images = q.size(0), num_heads = q.size(1), dim = q.size(2), key_heads = k.size(1), places = k.size(2);
  STD_TORCH_CHECK(key_heads > 0 && num_heads % key_heads == 0, "want H a multiple of G");
  check_heads(k, images, key_heads, places, dim, q.scalar_type());
  check_heads(v, images, key_heads, places, dim, q.scalar_type());
  const int64_t* at = positions(position, images, places);
  const int64_t rows = num_heads / key_heads;
  const Tensor out = torch::stable::empty_like(q);
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Heads<const T> k_heads = heads(k, data<T>(k)), v_heads = heads(v, data<T>(v));
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, places * dim));
    parallel_for(images * key_heads, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(decode_scratch({rows, places, dim, 0, 0, 0.0f}));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / key_heads, g = i % key_heads, first = (b * num_heads + g * rows) * dim;
        const DecodeSizes sizes{rows, at[b] + 1, dim, k_heads.row, v_heads.row, float(scale)};
        decode(data<T>(q) + first, k_heads.at(b, g, 0), v_heads.at(b, g, 0), sizes, scratch.data(),
               mutable_data<T>(out) + first);
      }
    });
  });
  return out;
}

}  // namespace varfast
