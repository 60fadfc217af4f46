// The DPO loss on CUDA devices: one block for each pair, then one block for the means. No host synchronisation and no
// atomics.
//
// Each number of logp and logp_ref is read once: 8 bytes per token, 0.3 MB for 64 x 576 tokens, which is 0.1 us at
// 3.3 TB/s. So the two launches are the cost, a few microseconds. The gradient is one number for each image. Loads are
// one number at a time, because the arrays may have any strides; a warp's 32 adjacent ones are one 128-byte line.
#include <cuda_runtime.h>

#include "dpo_math.h"

namespace varfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Adds up N values of a block's threads in a fixed order; its first thread has the totals.
template <int N>
__device__ void reduce_block(double (&values)[N]) {
  __shared__ double of_warp[kWarps][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (int offset = 16; offset; offset /= 2) values[i] += __shfl_down_sync(~0u, values[i], offset);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i] = values[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (int warp = 1; warp < kWarps; ++warp) values[i] += of_warp[warp][i];
  }
}

// scratch: (kDpoMeans, P).
template <typename T>
__global__ void __launch_bounds__(kThreads) pair_kernel(DpoForward<T> f, double* scratch) {
  const int64_t index = blockIdx.x;
  DpoRow chosen{0.0, 0.0}, rejected{0.0, 0.0};
#pragma unroll 4
  for (int64_t token = threadIdx.x; token < f.num_tokens; token += kThreads) {
    f.add(2 * index, token, chosen);
    f.add(2 * index + 1, token, rejected);
  }
  double sums[4] = {chosen.logp, chosen.gain, rejected.logp, rejected.gain};
  reduce_block(sums);
  if (threadIdx.x != 0) return;
  const DpoPair pair = f.pair(index, {sums[0], sums[1]}, {sums[2], sums[3]});
#pragma unroll
  for (int i = 0; i < kDpoMeans; ++i) scratch[i * f.num_pairs + index] = pair.means[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) mean_kernel(DpoForward<T> f, const double* scratch) {
  double sums[kDpoMeans] = {};
  for (int64_t index = threadIdx.x; index < f.num_pairs; index += kThreads) {
#pragma unroll
    for (int i = 0; i < kDpoMeans; ++i) sums[i] += scratch[i * f.num_pairs + index];
  }
  reduce_block(sums);
  if (threadIdx.x == 0) f.write(sums);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

template <typename T>
const char* dpo_forward_cuda(const DpoForward<T>& f, double* scratch, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  pair_kernel<T><<<static_cast<unsigned>(f.num_pairs), kThreads, 0, stream>>>(f, scratch);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return message(error);
  mean_kernel<T><<<1, kThreads, 0, stream>>>(f, scratch);
  return message(cudaGetLastError());
}

template const char* dpo_forward_cuda(const DpoForward<float>&, double*, void*);
template const char* dpo_forward_cuda(const DpoForward<double>&, double*, void*);

}  // namespace varfast
