// Owns: a persistent LSTM forward with four ways of handing h from step to step, and mistakes to plant in it. It shows
// that the simulator runs what persistent kernels are made of, and finds what goes wrong in them. Not used by rnnfast.
//
//     i, f, o = sigmoid, g = tanh of the four sums of gx + U h;  c = f c + i g;  h = o tanh(c)
//
// A block owns kUnits hidden units, all four gates of each, for the whole batch; c stays in a register.
// usage: lstm VARIANT MISTAKE SEEDS STEPS    prints how many of the seeds gave an error or a wrong result
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device_ptx.h"

namespace cg = cooperative_groups;
namespace device = rnnfast::cuda::device;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kHidden = 64, kBatch = 8, kBlocks = 4, kThreads = 128;
constexpr int kUnits = kHidden / kBlocks, kRows = 4 * kUnits;
constexpr int kWeightStride = kHidden + 1, kHalfStride = kHidden + 8;  // padded against bank conflicts
static_assert(kUnits * kBatch == kThreads, "a thread updates one unit of one row");

enum class Variant { grid_sync, flags, cluster, mma };
constexpr const char* kVariants[] = {"grid_sync", "flags", "cluster", "mma"};

enum class Mistake {
  none,
  no_block_barrier,
  off_by_one_shared_read,
  no_grid_barrier,
  no_cp_async_wait,
  divergent_barrier,
  uninitialised_state,
  shuffle_after_exit,
  exit_while_peers_write,
  single_buffer,
  off_by_one_global_write,
  swapped_fragments,
  no_release,
};
constexpr const char* kMistakes[] = {"none",
                                     "no_block_barrier",
                                     "off_by_one_shared_read",
                                     "no_grid_barrier",
                                     "no_cp_async_wait",
                                     "divergent_barrier",
                                     "uninitialised_state",
                                     "shuffle_after_exit",
                                     "exit_while_peers_write",
                                     "single_buffer",
                                     "off_by_one_global_write",
                                     "swapped_fragments",
                                     "no_release"};

struct Parameters {
  const float *gx, *u, *h0, *c0;  // [T, B, 4H], [4H, H], [B, H], [B, H]
  const __half* u_half;           // [4H, H]
  float *output, *c_n;            // [T, B, H], [B, H]
  float* h;                       // [2, B, H]: step t reads t % 2
  __half* h_half;                 // [2, B, H]
  unsigned* arrivals;
  int steps;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// Row r of a block's weights is gate r / kUnits of its unit r % kUnits.
__device__ __forceinline__ int global_row(int r) {
  return r / kUnits * kHidden + static_cast<int>(blockIdx.x) * kUnits + r % kUnits;
}

struct Shared {
  float *u, *h, *gates;
  size_t bytes;
  __host__ __device__ Shared(char* base, int h_buffers) {
    device::SharedLayout layout(base);
    u = layout.take<float>(kRows * kWeightStride);
    h = layout.take<float>(h_buffers * kBatch * kHidden);
    gates = layout.take<float>(kRows * kBatch);
    bytes = layout.bytes();
  }
};

__device__ __forceinline__ void load_weights(const Parameters& p, const Shared& shared) {
  for (int i = threadIdx.x; i < kRows * kHidden; i += kThreads) {
    const int r = i / kHidden, k = i % kHidden;
    shared.u[r * kWeightStride + k] = p.u[global_row(r) * kHidden + k];
  }
}

// The sums of this block's gates; four lanes share a dot product.
template <Mistake mistake>
__device__ __forceinline__ void compute_gates(const Parameters& p, const Shared& shared, const float* h, int t) {
  const int lane = threadIdx.x % 4;
  for (int i = threadIdx.x / 4; i < kRows * kBatch; i += kThreads / 4) {
    const int r = i % kRows, b = i / kRows;
    float sum = 0;
    for (int k = lane; k < kHidden; k += 4) {
      const int column = mistake == Mistake::off_by_one_shared_read ? k + 1 : k;
      sum += shared.u[r * kWeightStride + k] * h[b * kHidden + column];
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane == 0) {
      shared.gates[r * kBatch + b] = sum + p.gx[(static_cast<size_t>(t) * kBatch + b) * 4 * kHidden + global_row(r)];
    }
  }
}

__device__ __forceinline__ float update(const float* gates, int unit, int b, float& c) {
  const auto gate = [&](int g) { return gates[(g * kUnits + unit) * kBatch + b]; };
  c = sigmoid(gate(1)) * c + sigmoid(gate(0)) * tanhf(gate(2));
  return sigmoid(gate(3)) * tanhf(c);
}

// A grid barrier of flags in global memory, as persistent kernels use instead of grid.sync().
template <Mistake mistake>
__device__ __forceinline__ void flag_barrier(unsigned* arrivals, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (mistake == Mistake::no_release) {
      atomicAdd(arrivals, 1u);
    } else {
      device::add_release(arrivals, 1u);
    }
    while (device::load_acquire(arrivals) < target) __nanosleep(20);
  }
  __syncthreads();
}

// h through global memory.
template <Variant variant, Mistake mistake>
__global__ void __launch_bounds__(kThreads) grid_kernel(Parameters p) {
  const Shared shared(device::dynamic_shared(), 1);
  const int thread = threadIdx.x, unit = thread % kUnits, b = thread / kUnits;
  const int state = b * kHidden + blockIdx.x * kUnits + unit;
  const auto barrier = [&](int count) {
    if (variant == Variant::grid_sync) {
      cg::this_grid().sync();
    } else {
      flag_barrier<mistake>(p.arrivals, count * gridDim.x);
    }
  };
  load_weights(p, shared);
  float c = p.c0[state], h = p.h0[state];
  p.h[state] = h;
  barrier(1);
  for (int t = 0; t < p.steps; ++t) {
    const bool single = mistake == Mistake::single_buffer;
    const float* from = p.h + (single ? 0 : t % 2) * kBatch * kHidden;
    float* to = p.h + (single ? 0 : (t + 1) % 2) * kBatch * kHidden;
    for (int i = thread; i < kBatch * kHidden; i += kThreads) shared.h[i] = __ldcg(from + i);
    if (mistake != Mistake::divergent_barrier || thread < 96) __syncthreads();
    compute_gates<mistake>(p, shared, shared.h, t);
    if (mistake != Mistake::no_block_barrier) __syncthreads();
    h = update(shared.gates, unit, b, c);
    const int shift = mistake == Mistake::off_by_one_global_write ? 1 : 0;
    p.output[static_cast<size_t>(t) * kBatch * kHidden + state + shift] = h;
    __stcg(to + state, h);
    if (mistake != Mistake::no_grid_barrier) {
      barrier(t + 2);
    } else {
      __syncthreads();
    }
    if (mistake == Mistake::shuffle_after_exit && t == p.steps - 1 && thread % 32 >= 16) return;
  }
  if (mistake == Mistake::shuffle_after_exit) c += 0 * __shfl_xor_sync(kAllLanes, c, 16);
  p.c_n[state] = c;
}

// h through the shared memory of the blocks of a cluster: every block writes its units to all.
template <Mistake mistake>
__global__ void __launch_bounds__(kThreads) cluster_kernel(Parameters p) {
  const Shared shared(device::dynamic_shared(), 2);
  const auto cluster = cg::this_cluster();
  const int thread = threadIdx.x, unit = thread % kUnits, b = thread / kUnits;
  const int state = b * kHidden + cluster.block_rank() * kUnits + unit;
  load_weights(p, shared);
  if (mistake != Mistake::uninitialised_state) {
    for (int i = thread; i < kBatch * kHidden; i += kThreads) shared.h[i] = p.h0[i];
  }
  float c = p.c0[state];
  cluster.sync();
  for (int t = 0; t < p.steps; ++t) {
    compute_gates<mistake>(p, shared, shared.h + t % 2 * kBatch * kHidden, t);
    __syncthreads();
    const float h = update(shared.gates, unit, b, c);
    p.output[static_cast<size_t>(t) * kBatch * kHidden + state] = h;
    for (int i = 0; i < kBlocks; ++i) {
      const int rank = (i + cluster.block_rank()) % kBlocks;
      cluster.map_shared_rank(shared.h, rank)[(t + 1) % 2 * kBatch * kHidden + state] = h;
    }
    if (mistake == Mistake::no_grid_barrier) {
      __syncthreads();
    } else if (mistake != Mistake::exit_while_peers_write || t + 1 < p.steps) {
      cluster.sync();
    }
  }
  p.c_n[state] = c;
}

// 16-bit weights in registers as fragments of the matrix instruction; gx is fetched a step ahead.
template <Mistake mistake>
__global__ void __launch_bounds__(kThreads) mma_kernel(Parameters p) {
  RNNFAST_SHARED(__half, shared_h, [kBatch * kHalfStride]);
  RNNFAST_SHARED(float, gates, [kRows * kBatch]);
  RNNFAST_SHARED(float, shared_gx, [2][kBatch * kRows]);
  auto* const u = reinterpret_cast<__half*>(device::dynamic_shared());
  const auto grid = cg::this_grid();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, unit = thread % kUnits, b = thread / kUnits;
  const int state = b * kHidden + blockIdx.x * kUnits + unit;

  for (int i = thread; i < kRows * kHidden / 8; i += kThreads) {
    const int r = i / (kHidden / 8), k = i % (kHidden / 8) * 8;
    device::cp_async_16(u + r * kHalfStride + k, p.u_half + global_row(r) * kHidden + k);
  }
  device::cp_async_commit();
  const auto fetch = [&](int t) {
    const int row = thread / 16, gate = thread / 4 % 4, part = thread % 4 * 4;
    const size_t from = (static_cast<size_t>(t) * kBatch + row) * 4 * kHidden + global_row(gate * kUnits) + part;
    device::cp_async_16(&shared_gx[t % 2][row * kRows + gate * kUnits + part], p.gx + from);
    device::cp_async_commit();
  };
  fetch(0);
  float c = p.c0[state];
  p.h_half[state] = __float2half(p.h0[state]);
  device::cp_async_wait<1>();
  __syncthreads();
  uint32_t a[kHidden / 16][4];
  for (int k = 0; k < kHidden / 16; ++k) {
    device::ldmatrix_x4(a[k], u + (warp * 16 + lane % 16) * kHalfStride + k * 16 + lane / 16 * 8);
  }
  grid.sync();

  for (int t = 0; t < p.steps; ++t) {
    const auto* from = reinterpret_cast<const __half2*>(p.h_half + t % 2 * kBatch * kHidden);
    __half* to = p.h_half + (t + 1) % 2 * kBatch * kHidden;
    for (int i = thread; i < kBatch * kHidden / 2; i += kThreads) {
      const int row = i / (kHidden / 2), pair = i % (kHidden / 2);
      *reinterpret_cast<__half2*>(&shared_h[row * kHalfStride + pair * 2]) = from[i];
    }
    if (t + 1 < p.steps) fetch(t + 1);
    __syncthreads();
    float sums[4] = {};
    for (int k = 0; k < kHidden / 16; ++k) {
      const __half* column = shared_h + lane / 4 * kHalfStride + k * 16 + lane % 4 * 2;
      const uint32_t fragment[2] = {*reinterpret_cast<const uint32_t*>(column),
                                    *reinterpret_cast<const uint32_t*>(column + 8)};
      if (mistake == Mistake::swapped_fragments) {
        const uint32_t swapped[4] = {a[k][0], a[k][2], a[k][1], a[k][3]};
        device::mma_m16n8k16<false>(sums, swapped, fragment, sums);
      } else {
        device::mma_m16n8k16<false>(sums, a[k], fragment, sums);
      }
    }
    for (int i = 0; i < 4; ++i) {
      gates[(warp * 16 + lane / 4 + (i >= 2 ? 8 : 0)) * kBatch + lane % 4 * 2 + i % 2] = sums[i];
    }
    if (mistake != Mistake::no_cp_async_wait) {
      if (t + 1 < p.steps) {
        device::cp_async_wait<1>();
      } else {
        device::cp_async_wait<0>();
      }
    }
    if (mistake != Mistake::no_block_barrier) __syncthreads();
    float gate[4];
    for (int k = 0; k < 4; ++k) {
      gate[k] = gates[(k * kUnits + unit) * kBatch + b] + shared_gx[t % 2][b * kRows + k * kUnits + unit];
    }
    c = sigmoid(gate[1]) * c + sigmoid(gate[0]) * tanhf(gate[2]);
    const float h = sigmoid(gate[3]) * tanhf(c);
    p.output[static_cast<size_t>(t) * kBatch * kHidden + state] = h;
    to[state] = __float2half(h);
    if (mistake != Mistake::no_grid_barrier) {
      grid.sync();
    } else {
      __syncthreads();
    }
  }
  device::cp_async_wait<0>();
  p.c_n[state] = c;
}

// ------------------------------------------------------------------------------------------------ host
template <class... P>
cudaError_t launch(void (*kernel)(P...), size_t shared_bytes, int cluster, const Parameters& parameters) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchAttribute attribute{};
  if (cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
}

template <Mistake mistake>
cudaError_t run(Variant variant, const Parameters& p) {
  switch (variant) {
    case Variant::grid_sync:
      return launch(grid_kernel<Variant::grid_sync, mistake>, Shared(nullptr, 1).bytes, 0, p);
    case Variant::flags:
      return launch(grid_kernel<Variant::flags, mistake>, Shared(nullptr, 1).bytes, 0, p);
    case Variant::cluster:
      return launch(cluster_kernel<mistake>, Shared(nullptr, 2).bytes, kBlocks, p);
    default:
      return launch(mma_kernel<mistake>, kRows * kHalfStride * sizeof(__half), 0, p);
  }
}

cudaError_t run(Variant variant, Mistake mistake, const Parameters& p) {
  switch (mistake) {
#define MISTAKE(name) \
  case Mistake::name: \
    return run<Mistake::name>(variant, p);
    MISTAKE(no_block_barrier)
    MISTAKE(off_by_one_shared_read)
    MISTAKE(no_grid_barrier)
    MISTAKE(no_cp_async_wait)
    MISTAKE(divergent_barrier)
    MISTAKE(uninitialised_state)
    MISTAKE(shuffle_after_exit)
    MISTAKE(exit_while_peers_write)
    MISTAKE(single_buffer)
    MISTAKE(off_by_one_global_write)
    MISTAKE(swapped_fragments)
    MISTAKE(no_release)
#undef MISTAKE
    default:
      return run<Mistake::none>(variant, p);
  }
}

struct Data {
  int steps;
  std::vector<float> gx, u, h0, c0;

  explicit Data(int steps)
      : steps(steps),
        gx(steps * kBatch * 4 * kHidden),
        u(4 * kHidden * kHidden),
        h0(kBatch * kHidden),
        c0(kBatch * kHidden) {
    unsigned state = 12345;
    const auto fill = [&](std::vector<float>& values, float scale) {
      for (float& value : values) {
        state = state * 1664525u + 1013904223u;
        value = ((state >> 8) / 8388608.0f - 1.0f) * scale;
      }
    };
    fill(gx, 1);
    fill(u, 0.3f);
    fill(h0, 1);
    fill(c0, 1);
  }

  // In double; with `half`, on weights and states rounded to 16 bits.
  void reference(bool half, std::vector<float>& output, std::vector<float>& c) const {
    const auto rounded = [&](float x) -> double { return half ? __half2float(__float2half(x)) : x; };
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    std::vector<float> h = h0, next(h0.size());
    std::vector<double> gate(4 * kHidden);
    c = c0;
    output.resize(steps * h0.size());
    for (int t = 0; t < steps; ++t) {
      for (int b = 0; b < kBatch; ++b) {
        for (int r = 0; r < 4 * kHidden; ++r) {
          gate[r] = gx[(t * kBatch + b) * 4 * kHidden + r];
          for (int k = 0; k < kHidden; ++k) gate[r] += rounded(u[r * kHidden + k]) * rounded(h[b * kHidden + k]);
        }
        for (int unit = 0; unit < kHidden; ++unit) {
          const int i = b * kHidden + unit;
          c[i] = sigmoid(gate[kHidden + unit]) * c[i] + sigmoid(gate[unit]) * std::tanh(gate[2 * kHidden + unit]);
          next[i] = sigmoid(gate[3 * kHidden + unit]) * std::tanh(c[i]);
        }
      }
      h = next;
      std::copy(h.begin(), h.end(), output.begin() + t * h0.size());
    }
  }
};

template <class T>
T* allocate(size_t count) {
  T* data;
  if (cudaMalloc(&data, count * sizeof(T)) != cudaSuccess) abort();
  return data;
}
template <class T>
T* upload(const std::vector<T>& values) {
  T* data = allocate<T>(values.size());
  cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return data;
}
bool differs(const float* data, const std::vector<float>& expected, float bound) {
  std::vector<float> values(expected.size());
  cudaMemcpy(values.data(), data, values.size() * sizeof(float), cudaMemcpyDeviceToHost);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(std::fabs(values[i] - expected[i]) <= bound)) return true;  // NaN too
  }
  return false;
}

template <size_t kCount>
int find(const char* const (&names)[kCount], const char* name) {
  for (size_t i = 0; i < kCount; ++i) {
    if (!strcmp(names[i], name)) return static_cast<int>(i);
  }
  fprintf(stderr, "unknown: %s\n", name);
  exit(2);
}

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: lstm VARIANT MISTAKE SEEDS STEPS\n");
    return 2;
  }
  const auto variant = static_cast<Variant>(find(kVariants, argv[1]));
  const auto mistake = static_cast<Mistake>(find(kMistakes, argv[2]));
  const int seeds = atoi(argv[3]);
  const Data data(atoi(argv[4]));
  std::vector<float> output, c;
  data.reference(variant == Variant::mma, output, c);
  const float bound = variant == Variant::mma ? 5e-3f : 2e-5f;
  std::vector<__half> u_half(data.u.size());
  for (size_t i = 0; i < u_half.size(); ++i) u_half[i] = __float2half(data.u[i]);

  Parameters p{};
  p.gx = upload(data.gx);
  p.u = upload(data.u);
  p.h0 = upload(data.h0);
  p.c0 = upload(data.c0);
  p.u_half = upload(u_half);
  p.steps = data.steps;
  int flagged = 0;
  for (int seed = 1; seed <= seeds; ++seed) {
#ifdef CUDA_SIM
    cuda_sim::set_seed(seed);
#endif
    p.output = allocate<float>(output.size());
    p.c_n = allocate<float>(c.size());
    p.h = allocate<float>(2 * c.size());
    p.h_half = allocate<__half>(2 * c.size());
    p.arrivals = upload(std::vector<unsigned>(1));
    const cudaError_t error = run(variant, mistake, p);
    flagged += error != cudaSuccess || differs(p.output, output, bound) || differs(p.c_n, c, bound);
    for (void* pointer : {static_cast<void*>(p.output), static_cast<void*>(p.c_n), static_cast<void*>(p.h),
                          static_cast<void*>(p.h_half), static_cast<void*>(p.arrivals)}) {
      cudaFree(pointer);
    }
  }
  printf("%d of %d\n", flagged, seeds);
}
