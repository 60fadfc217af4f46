// Shared by the files of csrc/: from dtypes to C++ types, pointers to tensors, and small checks. Stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "cpu.h"
#include "ops.h"

namespace varfast {

using torch::headeronly::ScalarType;

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Calls body(T{}) with the C++ type of a dtype.
template <typename F>
void with_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "want float32, float64 or bfloat16");
  body(BFloat16{});
}

// Calls body(T{}) with the type by which a dtype's numbers are stored: float, or uint16_t for the bits of a bfloat16.
template <typename F>
void with_bits(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "want float32 or bfloat16");
  body(uint16_t{});
}

// Calls body(T{}) with the C++ type of a dtype that was checked to be float32 or float64.
template <typename F>
auto with_wide(ScalarType dtype, const F& body) {
  return dtype == ScalarType::Float ? body(float{}) : body(double{});
}

inline ScalarType wide_of(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Pointer to the elements of a tensor; the caller has checked the dtype.
template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// (C,) in the dtype of the arithmetic, or nothing.
inline MaybeTensor bias_of(const Tensor& x, const MaybeTensor& bias) {
  if (!bias) return bias;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(-1) && bias->scalar_type() == wide_of(x.scalar_type()),
                  "want a bias of one float32 a channel, or float64 for float64");
  return torch::stable::contiguous(*bias);
}

template <typename T>
const T* data(const MaybeTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

template <typename T>
T* mutable_data(const MaybeTensor& x) {
  return x ? mutable_data<T>(*x) : nullptr;
}

// An array (B, H, L, D) with unit stride in D.
template <typename T>
struct Heads {
  T* data;
  int64_t image, head, row;  // strides

  T* at(int64_t b, int64_t h, int64_t l) const { return data + b * image + h * head + l * row; }
};

// VAR's head dim D. A compile-time constant, so that a head is held in registers.
constexpr int64_t kHeadDim = 64;

template <typename T>
Heads<T> heads(const Tensor& x, T* data) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// Queries, keys or values with unit stride in D, so that rows of a head can be read.
inline Tensor unit_stride(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

}  // namespace varfast
