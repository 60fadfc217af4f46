// For functions that g++ compiles for the CPU and nvcc for both.
#pragma once

#ifdef __CUDACC__
#define VARFAST_INLINE __host__ __device__ __forceinline__
#else
#define VARFAST_INLINE inline
#endif
