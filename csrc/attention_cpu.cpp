// Attention under VAR's scale mask on the CPU; specified by kernels/reference.py. A thread processes one head of one
// image, a block of queries of one scale at a time, so that masked logits are never computed. Arithmetic in float32.
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // about vectors as arguments: no effect, all such calls are inlined

namespace varfast {

// B images of H heads. The queries form groups (scales): group g ends before query ends[g] and sees the keys before
// visible[g]. T: float, or uint16_t for the bits of a bfloat16.
struct AttentionSizes {
  int64_t num_images, num_heads, num_queries, num_keys, num_groups;
  const int64_t* ends;
  const int64_t* visible;
};

// out (B, H, L, D) contiguous; log_sum (B, H, L), the log of each row's sum of exponentials, or null if not needed.
template <typename T>
struct AttentionForward {
  Heads<const T> q, k, v;
  const float* logit_scale;  // (H,)
  T* out;
  float* log_sum;
  AttentionSizes sizes;
};

// There are as many keys as queries. d_q, d_k, d_v (B, H, L, D) contiguous; d_logit_scale (B, H).
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

namespace {

// Queries processed at a time. Their logits over 680 keys, 130 KB, stay in the L2 cache.
constexpr int64_t kQueries = 48;
constexpr int64_t kPanel = 16;
constexpr int64_t kPanelsOfHead = kHeadDim / kPanel;

// A vector of 8 numbers. Used with AVX-512 too, which has 32 registers of this size: enough for a tile of 6 x 16 and
// its operands.
typedef float Eight __attribute__((vector_size(32)));
typedef float EightAnywhere __attribute__((vector_size(32), aligned(4), may_alias));

VARFAST_ALWAYS_INLINE Eight eight(const float* x) { return *reinterpret_cast<const EightAnywhere*>(x); }
VARFAST_ALWAYS_INLINE void put(float* x, Eight value) { *reinterpret_cast<EightAnywhere*>(x) = value; }

int64_t padded(int64_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

// A matrix whose columns are read 16 at a time: column 16 p + j of row k is at data[p * panel + k * row + j].
struct Panels {
  const float* data;
  int64_t panel, row;
};

// c = a b, or c += a b with `add`, for kRows x 16 numbers of `depth` products each; a(r, k) = a[r * a_row + k * a_k].
// The products are summed before they are added to c, which has less rounding than adding them to c one by one.
template <int kRows>
VARFAST_ALWAYS_INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c,
                                int64_t c_row, int64_t depth, bool add) {
  Eight left[kRows], right[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    left[r] = right[r] = Eight{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Eight b_left = eight(b + k * b_row), b_right = eight(b + k * b_row + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float factor = a[r * a_row + k * a_k];
      left[r] += factor * b_left;
      right[r] += factor * b_right;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    put(c + r * c_row, add ? eight(c + r * c_row) + left[r] : left[r]);
    put(c + r * c_row + 8, add ? eight(c + r * c_row + 8) + right[r] : right[r]);
  }
}

// c = a b, or c += a b: c (rows, 16 * panels), a (rows, depth), b (depth, 16 * panels).
VARFAST_ALWAYS_INLINE void product(const float* a, int64_t a_row, int64_t a_k, const Panels& b, float* c, int64_t c_row,
                                   int64_t rows, int64_t panels, int64_t depth, bool add) {
  for (int64_t p = 0; p < panels; ++p) {
    const float* b_p = b.data + p * b.panel;
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) {
      tile<6>(a + r * a_row, a_row, a_k, b_p, b.row, c + r * c_row + p * kPanel, c_row, depth, add);
    }
    for (; r + 3 <= rows; r += 3) {
      tile<3>(a + r * a_row, a_row, a_k, b_p, b.row, c + r * c_row + p * kPanel, c_row, depth, add);
    }
    for (; r < rows; ++r) {
      tile<1>(a + r * a_row, a_row, a_k, b_p, b.row, c + r * c_row + p * kPanel, c_row, depth, add);
    }
  }
}

// Copy rows of a head to float32, one after the other.
template <typename T>
VARFAST_ALWAYS_INLINE void widen(const T* x, int64_t stride, int64_t rows, float* out) {
  for (int64_t l = 0; l < rows; ++l) {
    for (int64_t d = 0; d < kHeadDim; ++d) out[l * kHeadDim + d] = load(x[l * stride + d]);
  }
}

// Copy them as panels of the transpose, (D, padded(rows)), with zeros after the last row.
template <typename T>
VARFAST_ALWAYS_INLINE void transpose(const T* x, int64_t stride, int64_t rows, float* out) {
  for (int64_t l = 0; l < padded(rows); ++l) {
    float* column = out + l / kPanel * kPanel * kHeadDim + l % kPanel;
    for (int64_t d = 0; d < kHeadDim; ++d) column[d * kPanel] = l < rows ? load(x[l * stride + d]) : 0.0f;
  }
}

template <typename T>
VARFAST_ALWAYS_INLINE void narrow(const float* x, float factor, int64_t rows, T* out) {
  for (int64_t i = 0; i < rows * kHeadDim; ++i) store(x[i] * factor, out[i]);
}

// Vectorised by hand: because of NaN, g++ does not vectorise a maximum.
VARFAST_ALWAYS_INLINE float largest(const float* x, int64_t count) {
  Eight lanes = x[0] + Eight{};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const Eight next = eight(x + j);
    lanes = next > lanes ? next : lanes;
  }
  float most = lanes[0];
  for (int lane = 1; lane < 8; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  for (; j < count; ++j) most = x[j] > most ? x[j] : most;
  return most;
}

// Calls body(first, last, keys) for each block of at most kQueries queries of one group.
template <typename F>
VARFAST_ALWAYS_INLINE void for_queries(const AttentionSizes& sizes, const F& body) {
  for (int64_t g = 0, first = 0; g < sizes.num_groups; ++g) {
    for (; first < sizes.ends[g]; first = std::min(first + kQueries, sizes.ends[g])) {
      body(first, std::min(first + kQueries, sizes.ends[g]), sizes.visible[g]);
    }
  }
}

// A thread's own buffers.
struct Scratch {
  std::vector<float> q, k, v, d_out, k_transposed, v_transposed, logits, weights, sums, d_k, d_v;
};

template <typename T>
VARFAST_ALWAYS_INLINE void forward_of(const AttentionForward<T>& f, int64_t b, int64_t h, Scratch& s) {
  const AttentionSizes& n = f.sizes;
  const float scale = f.logit_scale[h];
  const int64_t head = (b * n.num_heads + h) * n.num_queries;
  transpose(f.k.at(b, h, 0), f.k.row, n.num_keys, s.k_transposed.data());
  widen(f.v.at(b, h, 0), f.v.row, n.num_keys, s.v.data());
  for_queries(n, [&](int64_t first, int64_t last, int64_t keys) __attribute__((always_inline)) {
    const int64_t rows = last - first, width = padded(keys);
    widen(f.q.at(b, h, first), f.q.row, rows, s.q.data());
    product(s.q.data(), kHeadDim, 1, {s.k_transposed.data(), kPanel * kHeadDim, kPanel}, s.logits.data(), width, rows,
            width / kPanel, kHeadDim, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict row = s.logits.data() + i * width;
      for (int64_t j = 0; j < keys; ++j) row[j] *= scale;
      for (int64_t j = keys; j < width; ++j) row[j] = 0.0f;  // padding after the visible keys
      const float most = largest(row, keys), not_a_number = 0.0f * sum_of(row, width);  // NaN if row has NaN or inf
      for (int64_t j = 0; j < keys; ++j) row[j] = exp_minus_size(row[j] - most);
      const float sum = sum_of(row, width);
      s.sums[i] = 1.0f / sum + not_a_number;
      if (f.log_sum) f.log_sum[head + first + i] = most + std::log(sum);
    }
    product(s.logits.data(), width, 1, {s.v.data(), kPanel, kHeadDim}, s.d_out.data(), kHeadDim, rows, kPanelsOfHead,
            keys, false);
    for (int64_t i = 0; i < rows; ++i) {
      narrow(s.d_out.data() + i * kHeadDim, s.sums[i], 1, f.out + (head + first + i) * kHeadDim);
    }
  });
}

template <typename T>
VARFAST_ALWAYS_INLINE void backward_of(const AttentionBackward<T>& f, int64_t b, int64_t h, Scratch& s) {
  const AttentionSizes& n = f.sizes;
  const float scale = f.logit_scale[h];
  const int64_t head = (b * n.num_heads + h) * n.num_queries;
  const Panels k_transposed{s.k_transposed.data(), kPanel * kHeadDim, kPanel},
      v_transposed{s.v_transposed.data(), kPanel * kHeadDim, kPanel}, k{s.k.data(), kPanel, kHeadDim},
      q{s.q.data(), kPanel, kHeadDim}, d_out{s.d_out.data(), kPanel, kHeadDim};
  transpose(f.k.at(b, h, 0), f.k.row, n.num_keys, s.k_transposed.data());
  transpose(f.v.at(b, h, 0), f.v.row, n.num_keys, s.v_transposed.data());
  widen(f.k.at(b, h, 0), f.k.row, n.num_keys, s.k.data());
  std::fill(s.d_k.begin(), s.d_k.end(), 0.0f);
  std::fill(s.d_v.begin(), s.d_v.end(), 0.0f);
  double d_scale = 0.0;
  for_queries(n, [&](int64_t first, int64_t last, int64_t keys) __attribute__((always_inline)) {
    const int64_t rows = last - first, width = padded(keys), panels = width / kPanel;
    float *weights = s.weights.data(), *d_logits = s.logits.data();
    widen(f.q.at(b, h, first), f.q.row, rows, s.q.data());
    widen(f.d_out.at(b, h, first), f.d_out.row, rows, s.d_out.data());
    product(s.q.data(), kHeadDim, 1, k_transposed, weights, width, rows, panels, kHeadDim, false);
    product(s.d_out.data(), kHeadDim, 1, v_transposed, d_logits, width, rows, panels, kHeadDim, false);
    for (int64_t i = 0; i < rows; ++i) {
      const T* out = f.out + (head + first + i) * kHeadDim;
      float wide[kHeadDim];
      for (int64_t d = 0; d < kHeadDim; ++d) wide[d] = load(out[d]);
      const float along = dot(wide, s.d_out.data() + i * kHeadDim, kHeadDim), log_sum = f.log_sum[head + first + i];
      float *__restrict weight = weights + i * width, *__restrict d = d_logits + i * width;
      // exp_minus_size needs arguments <= 0: a logit exceeds the log of the sum by no more than rounding.
      for (int64_t j = 0; j < keys; ++j) weight[j] = exp_minus_size(weight[j] * scale - log_sum);
      for (int64_t j = keys; j < width; ++j) weight[j] = 0.0f;
      for (int64_t j = 0; j < width; ++j) d[j] = weight[j] * (d[j] - along);
    }
    product(weights, 1, width, d_out, s.d_v.data(), kHeadDim, keys, kPanelsOfHead, rows, true);
    product(d_logits, 1, width, q, s.d_k.data(), kHeadDim, keys, kPanelsOfHead, rows, true);
    product(d_logits, width, 1, k, s.sums.data(), kHeadDim, rows, kPanelsOfHead, keys, false);
    for (int64_t i = 0; i < rows; ++i) d_scale += dot(s.sums.data() + i * kHeadDim, s.q.data() + i * kHeadDim, kHeadDim);
    narrow(s.sums.data(), scale, rows, f.d_q + (head + first) * kHeadDim);
  });
  narrow(s.d_k.data(), scale, n.num_keys, f.d_k + head * kHeadDim);
  narrow(s.d_v.data(), 1.0f, n.num_keys, f.d_v + head * kHeadDim);
  f.d_logit_scale[b * n.num_heads + h] = float(d_scale);
}

}  // namespace

// These are not templates, because g++ clones only ordinary functions for several instruction sets.
VARFAST_CLONES void forward_head(const AttentionForward<float>& f, int64_t b, int64_t h, Scratch& s) {
  forward_of(f, b, h, s);
}
VARFAST_CLONES void forward_head(const AttentionForward<uint16_t>& f, int64_t b, int64_t h, Scratch& s) {
  forward_of(f, b, h, s);
}
VARFAST_CLONES void backward_head(const AttentionBackward<float>& f, int64_t b, int64_t h, Scratch& s) {
  backward_of(f, b, h, s);
}
VARFAST_CLONES void backward_head(const AttentionBackward<uint16_t>& f, int64_t b, int64_t h, Scratch& s) {
  backward_of(f, b, h, s);
}

template <typename T>
void attention_cpu(const AttentionForward<T>& f) {
  const AttentionSizes& n = f.sizes;
  const int64_t keys = n.num_keys * kHeadDim, keys_transposed = padded(n.num_keys) * kHeadDim;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, n.num_queries * n.num_keys));
  parallel_for(n.num_images * n.num_heads, grain, [&](int64_t begin, int64_t end) {
    Scratch s;
    s.q.resize(kQueries * kHeadDim), s.d_out.resize(kQueries * kHeadDim), s.sums.resize(kQueries);
    s.v.resize(keys), s.k_transposed.resize(keys_transposed), s.logits.resize(kQueries * padded(n.num_keys));
    for (int64_t i = begin; i < end; ++i) forward_head(f, i / n.num_heads, i % n.num_heads, s);
  });
}

template <typename T>
void attention_backward_cpu(const AttentionBackward<T>& f) {
  const AttentionSizes& n = f.sizes;
  const int64_t keys = n.num_keys * kHeadDim, keys_transposed = padded(n.num_keys) * kHeadDim;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, n.num_queries * n.num_keys));
  parallel_for(n.num_images * n.num_heads, grain, [&](int64_t begin, int64_t end) {
    Scratch s;
    s.q.resize(kQueries * kHeadDim), s.d_out.resize(kQueries * kHeadDim), s.sums.resize(kQueries * kHeadDim);
    s.k.resize(keys), s.k_transposed.resize(keys_transposed), s.v_transposed.resize(keys_transposed);
    s.d_k.resize(keys), s.d_v.resize(keys);
    s.logits.resize(kQueries * padded(n.num_keys)), s.weights.resize(s.logits.size());
    for (int64_t i = begin; i < end; ++i) backward_head(f, i / n.num_heads, i % n.num_heads, s);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The op: checks the arguments and allocates the results

namespace {

AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale) {
  for (const Tensor* x : {&q, &k, &v}) {
    STD_TORCH_CHECK(x->dim() == 4 && x->size(3) == kHeadDim && x->size(0) == q.size(0) && x->size(1) == q.size(1) &&
                        x->scalar_type() == q.scalar_type(),
                    "want q, k, v (B, H, L, 64) of one dtype");
  }
  STD_TORCH_CHECK(k.size(2) == v.size(2) && k.size(2) > 0, "want as many keys as values");
  STD_TORCH_CHECK(logit_scale.dim() == 1 && logit_scale.size(0) == q.size(1) &&
                      logit_scale.scalar_type() == ScalarType::Float,
                  "logit_scale_H: want one float32 a head");
  return {q.size(0), q.size(1), q.size(2), k.size(2), 1, nullptr, nullptr};
}

// Every query sees the keys of its own scale and of earlier scales.
AttentionSizes masked(AttentionSizes sizes, const Tensor& ends) {
  STD_TORCH_CHECK(ends.dim() == 1 && ends.size(0) > 0 && ends.scalar_type() == ScalarType::Long,
                  "scale_ends: want int64 (S,)");
  const int64_t* at = data<int64_t>(ends);
  for (int64_t g = 0; g < ends.size(0); ++g) {
    STD_TORCH_CHECK(at[g] > (g ? at[g - 1] : 0), "scale_ends: want every scale to end after the one before it");
  }
  STD_TORCH_CHECK(at[ends.size(0) - 1] == sizes.num_queries && sizes.num_queries == sizes.num_keys,
                  "scale_ends: want the last to be the number of queries and of keys");
  sizes.num_groups = ends.size(0), sizes.ends = sizes.visible = at;
  return sizes;
}

Tensor attention_out(const Tensor& q) {
  return new_empty(q, {q.size(0), q.size(1), q.size(2), kHeadDim}, q.scalar_type());
}

void attend(const Tensor& q_BHLD, const Tensor& k_BHLD, const Tensor& v_BHLD, const Tensor& logit_scale,
            const AttentionSizes& sizes, const Tensor& out, float* log_sum) {
  const Tensor q = unit_stride(q_BHLD), k = unit_stride(k_BHLD), v = unit_stride(v_BHLD);
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attention_cpu(AttentionForward<T>{heads(q, data<T>(q)), heads(k, data<T>(k)), heads(v, data<T>(v)),
                                      data<float>(logit_scale), mutable_data<T>(out), log_sum, sizes});
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale_H,
                                         const Tensor& scale_ends_S) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H), ends = torch::stable::contiguous(scale_ends_S);
  const AttentionSizes sizes = masked(attention_sizes(q, k, v, scale), ends);
  const Tensor out = attention_out(q), log_sum = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  attend(q, k, v, scale, sizes, out, mutable_data<float>(log_sum));
  return {out, log_sum};
}

Tensor cached_attention_cpp(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& logit_scale_H,
                            int64_t num_keys) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H);
  AttentionSizes sizes = attention_sizes(q, k_cache, v_cache, scale);
  STD_TORCH_CHECK(num_keys > 0 && num_keys <= sizes.num_keys, "num_keys: want a number within the cache");
  sizes.num_keys = num_keys, sizes.ends = &sizes.num_queries, sizes.visible = &num_keys;
  const Tensor out = attention_out(q);
  attend(q, k_cache, v_cache, scale, sizes, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpp(const Tensor& d_out_BHLD, const Tensor& q_BHLD,
                                                                  const Tensor& k_BHLD, const Tensor& v_BHLD,
                                                                  const Tensor& out_BHLD, const Tensor& log_sum_BHL,
                                                                  const Tensor& logit_scale_H,
                                                                  const Tensor& scale_ends_S) {
  const Tensor scale = torch::stable::contiguous(logit_scale_H), ends = torch::stable::contiguous(scale_ends_S),
               q = unit_stride(q_BHLD), k = unit_stride(k_BHLD), v = unit_stride(v_BHLD),
               d_out = unit_stride(d_out_BHLD), out = torch::stable::contiguous(out_BHLD),
               log_sum = torch::stable::contiguous(log_sum_BHL);
  const AttentionSizes sizes = masked(attention_sizes(q, k, v, scale), ends);
  for (const Tensor* x : {&d_out, &out}) {
    STD_TORCH_CHECK(x->dim() == 4 && x->numel() == q.numel() && x->size(2) == q.size(2) && x->size(1) == q.size(1) &&
                        x->scalar_type() == q.scalar_type(),
                    "want the output and its gradient of the shape and dtype of q");
  }
  STD_TORCH_CHECK(log_sum.numel() * kHeadDim == q.numel() && log_sum.scalar_type() == ScalarType::Float,
                  "log_sum_BHL: want what the forward pass returned");
  const Tensor d_q = attention_out(q), d_k = attention_out(q), d_v = attention_out(q),
               d_scale = new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  with_bits(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attention_backward_cpu(AttentionBackward<T>{heads(q, data<T>(q)), heads(k, data<T>(k)), heads(v, data<T>(v)),
                                                heads(d_out, data<T>(d_out)), data<float>(scale), data<T>(out),
                                                data<float>(log_sum), mutable_data<T>(d_q), mutable_data<T>(d_k),
                                                mutable_data<T>(d_v), mutable_data<float>(d_scale), sizes});
  });
  return {d_q, d_k, d_v, d_scale};
}

}  // namespace varfast
