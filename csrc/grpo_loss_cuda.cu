// The GRPO token loss on CUDA devices: one forward and one backward kernel, no host synchronisation, no float atomics.
// With one ratio for each image, another kernel runs before the forward kernel and reads logp and logp_old once more: 8
// bytes per token.
//
// Bytes per token in float32, with one advantage for each image: the forward pass reads logp, logp_old and logp_ref and
// writes the gradient for an upstream gradient of 1 (16 bytes); the backward pass reads and rewrites it (8 bytes). That
// is 24 bytes, 8.4 MB for 512 x 680 tokens, 2 us at 4.3 TB/s. A backward pass that recomputes the gradient would read
// three arrays instead of one: 28 bytes, and the exponentials would be computed twice. One advantage for each token
// adds 4 bytes. Advantages may have any strides, so they are loaded one at a time; if they are contiguous, a thread's
// four lie in one 16-byte word, and the last three come from the L1 cache.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "grpo_loss.h"

namespace varfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Limits how many partial sums the last block adds up. 4 blocks of 256 threads fit on an SM at up to 64 registers, so
// an H200 runs half of these blocks at once; 512 x 680 tokens need 340 blocks, which is one wave.
constexpr int kMaxBlocks = 1024;
constexpr int kSums = 6;

// Tokens per load: 128 bits of float32. Float64 is only for tests; two at a time would need more than 64 registers.
template <typename T>
constexpr int kVector = sizeof(T) == 4 ? 4 : 1;

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// The grid depends only on the number of tokens, so the order of all additions is the same on every device.
template <typename T>
int num_blocks(int64_t count) {
  const int64_t per_block = kThreads * kVector<T>;
  const int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ GrpoSums<double> add_shuffled(GrpoSums<double> sums, int offset) {
  GrpoSums<double> other;
  other.loss = __shfl_down_sync(~0u, sums.loss, offset);
  other.kl = __shfl_down_sync(~0u, sums.kl, offset);
  other.clipped = __shfl_down_sync(~0u, sums.clipped, offset);
  other.ratio = __shfl_down_sync(~0u, sums.ratio, offset);
  other.gap = __shfl_down_sync(~0u, sums.gap, offset);
  other.gap_max = __shfl_down_sync(~0u, sums.gap_max, offset);
  sums.add(other);
  return sums;
}

// Adds up the sums of a block's threads; its first thread returns the total.
__device__ GrpoSums<double> reduce_block(GrpoSums<double> sums) {
  __shared__ GrpoSums<double> of_warp[kWarps];
  // Loops are not unrolled, here and below: the kernel runs for microseconds, and fetching more instructions would
  // count.
#pragma unroll 1
  for (int offset = 16; offset; offset /= 2) sums = add_shuffled(sums, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) sums.add(of_warp[warp]);
  }
  __syncthreads();  // after this, of_warp may be reused
  return sums;
}

// exp(mean over an image's tokens of logp - logp_old): one block for each image, summed in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads) image_ratio_kernel(GrpoForward<T> f) {
  __shared__ double of_warp[kWarps];
  const int64_t first = int64_t(blockIdx.x) * f.num_tokens;
  double sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < f.num_tokens; i += kThreads) sum += f.logp[first + i] - f.logp_old[first + i];
#pragma unroll 1
  for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warp[warp];
  f.image_ratio[blockIdx.x] = std::exp(T(sum / double(f.num_tokens)));
}

// A ticket is a counter of the finished blocks of one launch. Two launches that may run at the same time must not share
// a ticket. Launches on one stream never run at the same time, nor do replays of one captured launch. So each stream
// and each captured launch has its own ticket. Every device has 4096, all 0 when the module is loaded.
constexpr unsigned kTickets = 4096;
__device__ unsigned tickets[kTickets];

// scratch: kSums arrays of gridDim.x, with one value for each block, then room for a ticket, which is used if
// ticket_index is kTickets. The ticket is 0 before and after the launch.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(GrpoForward<T> f, double* scratch, unsigned ticket_index) {
  const unsigned length = static_cast<unsigned>(f.num_tokens);
  const unsigned count = static_cast<unsigned>(f.num_images) * length;
  const T scale = T(f.one_token);
  GrpoSums<double> sums;
  // 64 bits: the last increment may exceed 2^32.
  for (uint64_t first = (uint64_t(blockIdx.x) * kThreads + threadIdx.x) * N; first < count;
       first += uint64_t(gridDim.x) * kThreads * N) {
    const unsigned start = static_cast<unsigned>(first);
    const bool whole = count - start >= N;
    Vector<T, N> logp, old, ref{}, grad;
    if (whole) {
      logp = *reinterpret_cast<const Vector<T, N>*>(f.logp + start);
      old = *reinterpret_cast<const Vector<T, N>*>(f.logp_old + start);
      if (f.settings.has_reference) ref = *reinterpret_cast<const Vector<T, N>*>(f.logp_ref + start);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (start + i < count) {
          logp.at[i] = f.logp[start + i];
          old.at[i] = f.logp_old[start + i];
          if (f.settings.has_reference) ref.at[i] = f.logp_ref[start + i];
        }
      }
    }
    unsigned image = start / length, position = start % length;
    const int64_t stride = f.advantages.token_stride;
    const T* advantage = f.advantages.of_image(image) + position * stride;
    // Sum four tokens in T, then convert the sums. An H200's SM does 16 conversions per clock, so converting all 5
    // values of every token would cost 0.4 us.
    GrpoSums<T> few;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (whole || start + i < count) {
        const GrpoToken<T> token =
            grpo_token(logp.at[i], old.at[i], ref.at[i], *advantage, f.ratio_of(image), f.settings);
        grad.at[i] = token.grad * scale;
        few.add(token);
        advantage += stride;
        if (++position == length) position = 0, advantage = f.advantages.of_image(++image);
      }
    }
    sums.add(few);
    if (whole) {
      *reinterpret_cast<Vector<T, N>*>(f.grad + start) = grad;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (start + i < count) f.grad[start + i] = grad.at[i];
      }
    }
  }

  // The block that increments the ticket last adds up what all blocks wrote, always in the order of the blocks.
  sums = reduce_block(sums);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    const double values[kSums] = {sums.loss, sums.kl, sums.clipped, sums.ratio, sums.gap, sums.gap_max};
#pragma unroll
    for (int i = 0; i < kSums; ++i) scratch[i * gridDim.x + blockIdx.x] = values[i];
    __threadfence();
    unsigned* const ticket =
        ticket_index < kTickets ? tickets + ticket_index : reinterpret_cast<unsigned*>(scratch + kSums * gridDim.x);
    // atomicInc wraps to 0 after gridDim.x - 1, so the ticket is ready for the next launch.
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  GrpoSums<double> total;
#pragma unroll 1
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    GrpoSums<double> other;
    other.loss = __ldcg(scratch + block);  // from L2: this SM's L1 may have stale values
    other.kl = __ldcg(scratch + gridDim.x + block);
    other.clipped = __ldcg(scratch + 2 * gridDim.x + block);
    other.ratio = __ldcg(scratch + 3 * gridDim.x + block);
    other.gap = __ldcg(scratch + 4 * gridDim.x + block);
    other.gap_max = __ldcg(scratch + 5 * gridDim.x + block);
    total.add(other);
  }
  total = reduce_block(total);
  if (threadIdx.x == 0) total.write(f.one_token, f.loss, f.stats);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ grad, const T* __restrict__ upstream, T* __restrict__ out, int64_t count) {
  const int64_t start = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const T scale = *upstream;
  if (start + N <= count) {
    Vector<T, N> values = *reinterpret_cast<const Vector<T, N>*>(grad + start);
#pragma unroll
    for (int i = 0; i < N; ++i) values.at[i] *= scale;
    *reinterpret_cast<Vector<T, N>*>(out + start) = values;
  } else {
#pragma unroll 1
    for (int64_t i = start; i < count; ++i) out[i] = grad[i] * scale;
  }
}

// Index of the launch's ticket, or kTickets if none is left: then the launch clears and uses one in its scratch memory.
unsigned find_ticket(int device, cudaStream_t stream, bool captured) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, unsigned> of_stream;
  static unsigned used = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!captured) {
    const auto found = of_stream.find({device, stream});
    if (found != of_stream.end()) return found->second;
  }
  if (used == kTickets) return kTickets;
  if (!captured) of_stream[{device, stream}] = used;
  return used++;
}

template <typename... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

int64_t grpo_cuda_scratch(int64_t count) {
  // Enough for the number of blocks of any type, and one more value for a ticket.
  return kSums * num_blocks<double>(count) + 1;
}

template <typename T>
const char* grpo_forward_cuda(const GrpoForward<T>& f, double* scratch, int device, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t count = f.num_images * f.num_tokens;
  const int blocks = num_blocks<T>(count);
  cudaStreamCaptureStatus capture;
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return message(error);
  const unsigned ticket = find_ticket(device, stream, capture != cudaStreamCaptureStatusNone);
  if (ticket == kTickets) {
    error = cudaMemsetAsync(scratch + kSums * blocks, 0, sizeof(unsigned), stream);
    if (error != cudaSuccess) return message(error);
  }
  if (f.settings.sequence_ratio) {
    image_ratio_kernel<T><<<static_cast<unsigned>(f.num_images), kThreads, 0, stream>>>(f);
    error = cudaGetLastError();
    if (error != cudaSuccess) return message(error);
  }
  if (aligned(f.logp, f.logp_old, f.logp_ref, f.grad)) {
    forward_kernel<T, kVector<T>><<<blocks, kThreads, 0, stream>>>(f, scratch, ticket);
  } else {
    forward_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(f, scratch, ticket);
  }
  return message(cudaGetLastError());
}

template <typename T>
const char* grpo_backward_cuda(const T* grad, const T* upstream, T* out, int64_t count, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const auto blocks = [=](int n) { return static_cast<unsigned>((count + kThreads * n - 1) / (kThreads * n)); };
  if (aligned(grad, out)) {
    constexpr int N = kVector<T>;
    backward_kernel<T, N><<<blocks(N), kThreads, 0, stream>>>(grad, upstream, out, count);
  } else {
    backward_kernel<T, 1><<<blocks(1), kThreads, 0, stream>>>(grad, upstream, out, count);
  }
  return message(cudaGetLastError());
}

int cuda_version() { return CUDART_VERSION; }

template const char* grpo_forward_cuda(const GrpoForward<float>&, double*, int, void*);
template const char* grpo_forward_cuda(const GrpoForward<double>&, double*, int, void*);
template const char* grpo_backward_cuda(const float*, const float*, float*, int64_t, void*);
template const char* grpo_backward_cuda(const double*, const double*, double*, int64_t, void*);

}  // namespace varfast
