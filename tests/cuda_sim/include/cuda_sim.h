// Owns: the CUDA C++ that kernels are written in, for g++: keywords, built-in variables, intrinsics, typed launches.
// Force-included before every kernel file (g++ -x c++ -include cuda_sim.h); the README says how to write kernels for
// it. Must not know: how the runtime schedules threads or checks accesses.
#pragma once

#define CUDA_SIM 1

// The checker sees loads and stores through g++'s thread sanitizer, which misses "*p = f()" for a class type unless f
// is inlined. The address sanitizer sees all, and compiles in half the time without.
#ifdef __SANITIZE_ADDRESS__
#define __global__
#else
#define __global__ __attribute__((flatten))
#endif
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
// At block scope thread_local implies static; the scheduler swaps the image when it switches to another block.
#define __shared__ thread_local
#define __cluster_dims__(...)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_sim/services.h"

// NVIDIA's headers define these for a host compiler.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

// The scheduler sets these at every switch of fibers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// A static shared array with a guard page of its own: RNNFAST_SHARED(float, tile, [16][17]).
#define RNNFAST_SHARED(T, name, ...)          \
  static const char cuda_sim_tag_##name = 0;  \
  typedef T cuda_sim_type_##name __VA_ARGS__; \
  cuda_sim_type_##name& name =                \
      *static_cast<cuda_sim_type_##name*>(cuda_sim::static_shared(&cuda_sim_tag_##name, sizeof(cuda_sim_type_##name)))

// ------------------------------------------------------------------------------------------------ barriers
inline void __syncthreads(CUDA_SIM_CALLER) { cuda_sim::block_barrier(file, line); }
inline int __syncthreads_count(int predicate, CUDA_SIM_CALLER) {
  return cuda_sim::block_vote(cuda_sim::Vote::count, predicate, file, line);
}
inline int __syncthreads_and(int predicate, CUDA_SIM_CALLER) {
  return cuda_sim::block_vote(cuda_sim::Vote::all, predicate, file, line);
}
inline int __syncthreads_or(int predicate, CUDA_SIM_CALLER) {
  return cuda_sim::block_vote(cuda_sim::Vote::any, predicate, file, line);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_SIM_CALLER) {
  cuda_sim::warp_collective(mask, [](cuda_sim::Lane*, uint32_t, uint32_t) {}, {}, true, file, line);
}
inline void __threadfence() { cuda_sim::fence(); }
inline void __threadfence_block() { cuda_sim::fence(); }
inline void __threadfence_system() { cuda_sim::fence(); }
inline void __nanosleep(unsigned) { cuda_sim::yield(); }

// ------------------------------------------------------------------------------------------------ warps
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_SIM_CALLER) {
  return cuda_sim::shuffle<cuda_sim::Shuffle::index>(mask, value, source, width, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SIM_CALLER) {
  return cuda_sim::shuffle<cuda_sim::Shuffle::up>(mask, value, static_cast<int>(delta), width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SIM_CALLER) {
  return cuda_sim::shuffle<cuda_sim::Shuffle::down>(mask, value, static_cast<int>(delta), width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_SIM_CALLER) {
  return cuda_sim::shuffle<cuda_sim::Shuffle::exclusive_or>(mask, value, lane_mask, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_SIM_CALLER) {
  unsigned result = 0;
  const auto ballot = [](cuda_sim::Lane* lanes, uint32_t mask, uint32_t present) CUDA_SIM_UNCHECKED {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask & present & 1u << lane) && lanes[lane].argument) votes |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (mask & present & 1u << lane) *static_cast<unsigned*>(lanes[lane].out) = votes;
    }
  };
  cuda_sim::warp_collective(mask, ballot, {nullptr, &result, predicate != 0, 32}, false, file, line);
  return result;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_SIM_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_SIM_CALLER) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

// ------------------------------------------------------------------------------------------------ atomics
#define CUDA_SIM_ATOMIC(name, expression)                                                                \
  template <class T>                                                                                     \
  T name(T* address, std::common_type_t<T> value) {                                                      \
    return cuda_sim::atomic(                                                                             \
        address, [&](T old) { return static_cast<T>(expression); }, cuda_sim::kRead | cuda_sim::kWrite); \
  }
CUDA_SIM_ATOMIC(atomicAdd, old + value)
CUDA_SIM_ATOMIC(atomicSub, old - value)
CUDA_SIM_ATOMIC(atomicExch, value)
CUDA_SIM_ATOMIC(atomicMax, old > value ? old : value)
CUDA_SIM_ATOMIC(atomicMin, old < value ? old : value)
CUDA_SIM_ATOMIC(atomicOr, old | value)
CUDA_SIM_ATOMIC(atomicAnd, old& value)
CUDA_SIM_ATOMIC(atomicXor, old ^ value)
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return cuda_sim::atomic(
      address, [&](T old) { return old == compare ? value : old; }, cuda_sim::kRead | cuda_sim::kWrite);
}

// ------------------------------------------------------------------------------------------------ loads, stores, math
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
namespace cuda_sim {
inline float power_of_two(float x) { return exp2f(x); }
}  // namespace cuda_sim
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
// NVIDIA's headers have these for the device only. The product is exact in double, which leaves one rounding.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

// ------------------------------------------------------------------------------------------------ launches
namespace cuda_sim {
inline Launch launch_of(const cudaLaunchConfig_t* config) {
  Launch launch;
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      launch.cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    }
  }
  return launch;
}
}  // namespace cuda_sim
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  return cuda_sim::launch(cuda_sim::launch_of(config), kernel, std::forward<A>(arguments)...);
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes = 0,
                             cudaStream_t = nullptr) {
  const cuda_sim::Launch launch{grid, block, {1, 1, 1}, shared_bytes, false, nullptr};
  return cuda_sim::launch_pointers(launch, kernel, arguments, std::index_sequence_for<P...>{});
}
template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                                        size_t shared_bytes = 0, cudaStream_t = nullptr) {
  const cuda_sim::Launch launch{grid, block, {1, 1, 1}, shared_bytes, true, nullptr};
  return cuda_sim::launch_pointers(launch, kernel, arguments, std::index_sequence_for<P...>{});
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  constexpr int kMostSharedBytes = 232448;  // of a block, sm_90
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > kMostSharedBytes) return cudaErrorInvalidValue;
    cuda_sim::set_max_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && value) {
    cuda_sim::allow_large_clusters(reinterpret_cast<const void*>(kernel));
  }
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  *attributes = {};
  attributes->ptxVersion = cuda_sim::code_version();
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads,
                                                          size_t shared_bytes) {
  *blocks = cuda_sim::resident_blocks(threads, shared_bytes);
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...), const cudaLaunchConfig_t* config) {
  cuda_sim::Launch launch = cuda_sim::launch_of(config);
  launch.kernel = reinterpret_cast<const void*>(kernel);
  return cuda_sim::active_clusters(clusters, launch);
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* source, size_t bytes, size_t offset = 0) {
  memcpy(reinterpret_cast<char*>(&symbol) + offset, source, bytes);
  return cudaSuccess;
}
