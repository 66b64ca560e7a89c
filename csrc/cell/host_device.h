// Owns: the one macro that lets an equation compile for the CPU and the GPU.
// Must not know: anything else.
#pragma once

// Keyed on __CUDACC__, not on __CUDA_ARCH__: nvcc's host pass must see the same declarations as its device pass.
#if defined(__CUDACC__)
#define RNNFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RNNFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
