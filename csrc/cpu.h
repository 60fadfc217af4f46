// Shared by the CPU kernels: torch's threads, sums in a fixed order, and conversion from and to stored numbers.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

// Put before a function that has the inner loops. It is compiled for AVX-512, AVX2 and any x86-64, and one version is
// picked when the library is loaded (glibc's ifunc). Functions that it calls must be inlined into it.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define VARFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VARFAST_CLONES
#endif
#define VARFAST_ALWAYS_INLINE inline __attribute__((always_inline))

namespace varfast {

using c10::BFloat16;

// The type of the arithmetic: float32, or float64 for float64.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body(begin, end) for parts of [0, count) of at least `grain`, on torch's threads.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, call, const_cast<F*>(&body)));
}

// Sums in a fixed order: 16 parallel sums, which are then added in pairs. Written out like this because the compiler
// may not reorder a sum of floats, so it would not use vectors. count: a multiple of kLanes.
constexpr int kLanes = 16;

template <typename W>
VARFAST_ALWAYS_INLINE W fold(const W* lane) {
  W half[8], quarter[4];
  for (int j = 0; j < 8; ++j) half[j] = lane[j] + lane[j + 8];
  for (int j = 0; j < 4; ++j) quarter[j] = half[j] + half[j + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

template <typename W>
VARFAST_ALWAYS_INLINE W dot(const W* x, const W* y, int64_t count) {
  W lane[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += x[i + j] * y[i + j];
  }
  return fold(lane);
}

template <typename W>
VARFAST_ALWAYS_INLINE W sum_of(const W* x, int64_t count) {
  W lane[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += x[i + j];
  }
  return fold(lane);
}

// exp(-|x|), accurate to about 1 ulp: 2^n times the power series of exp(rest), |rest| <= ln 2 / 2. |x| is limited to
// 86. There is no comparison of floats, because g++ turns it into branches and then does not vectorise. NaN is lost.
VARFAST_ALWAYS_INLINE float exp_minus_size(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding x rounds x to an integer, which is in the low bits
  const float size = std::bit_cast<float>(
      std::min(std::bit_cast<int32_t>(x) & 0x7fffffff, std::bit_cast<int32_t>(86.0f)));
  const float shifted = kRound - size * 1.44269504f;
  const float n = shifted - kRound;
  const float rest = (-size - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts: n * first is exact
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(series) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// a if x is negative (including -0 and negative NaN), else b.
VARFAST_ALWAYS_INLINE float if_negative(float x, float a, float b) {
  const int32_t negative = std::bit_cast<int32_t>(x) >> 31;
  return std::bit_cast<float>((std::bit_cast<int32_t>(a) & negative) | (std::bit_cast<int32_t>(b) & ~negative));
}

// Conversion of stored numbers, with bfloat16 as its bits: BFloat16's own conversion has a branch for NaN, which
// prevents vectorisation.
VARFAST_ALWAYS_INLINE float load(float value) { return value; }
VARFAST_ALWAYS_INLINE float load(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

VARFAST_ALWAYS_INLINE void store(float value, float& out) { out = value; }
VARFAST_ALWAYS_INLINE void store(float value, uint16_t& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = 0u - uint32_t((bits & 0x7fffffff) > 0x7f800000);  // a mask: a branch would prevent vectorisation
  out = uint16_t((nearest_even & ~nan) | (0x7fc0 & nan));
}

// Sums over the rows of (rows, width), added in the same order for any number of threads.
template <typename W>
void column_sums_cpu(const W* x, int64_t rows, int64_t width, W* out);

}  // namespace varfast
