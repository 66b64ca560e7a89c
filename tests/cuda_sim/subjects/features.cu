// Owns: one small kernel for each thing the simulator models, and one for each mistake it is to find. Prints, for each
// case, its name, the error, and how many results are wrong. It runs on a GPU too, where a mistake may go unnoticed.
// usage: features [CASE]    without a case: the names
// Must not know: rnnfast.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "device_ptx.h"

namespace cg = cooperative_groups;
namespace device = rnnfast::cuda::device;

constexpr unsigned kAllLanes = 0xffffffffu;
__constant__ float factors[4];

// ------------------------------------------------------------------------------------------------ features
// Plain __shared__, shuffles, __constant__, an atomic, more blocks than are resident at once.
__global__ void sum_kernel(const float* in, float* out, int count) {
  __shared__ float partial[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) sum += in[i] * factors[1];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kAllLanes, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kAllLanes, sum, delta);
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

// Two-dimensional blocks and a padded shared tile.
__global__ void transpose_kernel(const float* in, float* out, int n) {
  RNNFAST_SHARED(float, tile, [16][17]);
  const int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
  tile[threadIdx.y][threadIdx.x] = in[y * n + x];
  cg::this_thread_block().sync();
  out[(blockIdx.x * 16 + threadIdx.y) * n + blockIdx.y * 16 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}

__global__ void tile_of_warp_kernel(int* out) {
  const auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int sum = threadIdx.x;
  for (int delta = 4; delta > 0; delta /= 2) sum += tile.shfl_xor(sum, delta);
  out[threadIdx.x] = sum + (__ballot_sync(kAllLanes, threadIdx.x & 1) == 0xaaaaaaaau);
}

__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {  // b is stored by columns
  const int group = threadIdx.x / 4, first = threadIdx.x % 4 * 2;
  const auto pair = [](const __nv_bfloat16* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const uint32_t a_fragment[4] = {pair(a + group * 16 + first), pair(a + (group + 8) * 16 + first),
                                  pair(a + group * 16 + first + 8), pair(a + (group + 8) * 16 + first + 8)};
  const uint32_t b_fragment[2] = {pair(b + group * 16 + first), pair(b + group * 16 + first + 8)};
  float sums[4] = {};
  device::mma_m16n8k16<true>(sums, a_fragment, b_fragment, sums);
  for (int i = 0; i < 4; ++i) c[(group + (i >= 2 ? 8 : 0)) * 8 + first + i % 2] = sums[i];
}

// Every block of a cluster pushes its rank into the shared memory of all, with the two halves of the cluster's barrier
// before, and an mbarrier for each of the turns behind. Each turn begins with the last block's numbers.
enum class Push {
  correct,
  no_arrive,
  arrive_twice,
  no_wait,
  wrong_parity,
  expect_less,
  no_last_wait,
  exit_at_once,
  not_initialised,
  no_barrier
};
template <Push kind>
__global__ void cluster_push_kernel(unsigned* out) {
  if constexpr (!device::kHasClusters) return;
  constexpr unsigned kTurns = 5;
  const unsigned rank = blockIdx.x % gridDim.x, count = gridDim.x, lane = threadIdx.x;
  device::SharedLayout layout(device::dynamic_shared());
  uint64_t* const mbarriers = layout.take<uint64_t>(2);
  uint4* const received = layout.take<uint4>(2 * count);
  if (lane < 2 && kind != Push::not_initialised) device::mbarrier_init(mbarriers + lane);
  if (kind != Push::no_barrier) {
    device::cluster_arrive_release();  // a block that has not begun has no shared memory
    device::cluster_wait_acquire();
  }
  unsigned number = rank;
  for (unsigned turn = 0; turn < kTurns; ++turn) {
    uint64_t* const mbarrier = mbarriers + turn % 2;
    uint4* const vector = received + turn % 2 * count;
    if (lane < count) {
      device::RemoteShared<uint4>(vector + rank, lane)
          .store_async(0, make_uint4(0, 0, 0, number), device::RemoteShared<uint64_t>(mbarrier, lane));
    }
    const unsigned bytes = (count - (kind == Push::expect_less)) * sizeof(uint4);
    if (lane == 0 && kind != Push::no_arrive) device::mbarrier_arrive_expect(mbarrier, bytes);
    if (lane == 0 && kind == Push::arrive_twice) device::mbarrier_arrive_expect(mbarrier, 0);
    if (kind == Push::exit_at_once || (kind == Push::no_last_wait && turn + 1 == kTurns)) return;
    if (kind != Push::no_wait) {
      device::mbarrier_wait_acquire(mbarrier, (turn / 2 + (kind == Push::wrong_parity)) % 2);
    }
    number = lane < count ? vector[(lane + 1) % count].w : 0;
    number = __shfl_sync(kAllLanes, number, (rank + count - 1) % count);  // of this block, as it came back
    __syncwarp();  // whoever receives the next turn may write where this one was read
  }
  if (lane < count) out[rank * count + lane] = received[(kTurns - 1) % 2 * count + lane].w;
}

template <bool kSynchronises>
__global__ void reverse_warp_kernel(float* out) {
  RNNFAST_SHARED(float, values, [32]);
  values[threadIdx.x] = threadIdx.x;
  if (kSynchronises) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

// ------------------------------------------------------------------------------------------------ mistakes
__global__ void misaligned_kernel(const float* in, float* out) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(in + 1)->x;
}
__global__ void local_bounds_kernel(float* out, int index) {
  float values[4] = {1, 2, 3, 4};
  volatile int hidden = index;
  out[threadIdx.x] = values[hidden];
}
__global__ void same_value_kernel(float* out) { out[0] = 1; }
__global__ void read_kernel(const float* in, float* out) { out[threadIdx.x] = *in; }
__global__ void write_kernel(float* out, int index) { out[index] = 1; }
__global__ void grid_barrier_kernel(float* out) {
  cg::this_grid().sync();
  out[0] = 1;
}
__global__ void masks_kernel(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(lane < 16 ? kAllLanes : 0xffff0000u, lane, 20);
}
__global__ void volatile_spin_kernel(volatile int* flag, int* out) {
  if (threadIdx.x == 0) {
    *flag = 1;
  } else {
    while (*flag == 0) {
    }
    out[threadIdx.x] = 1;
  }
}
__global__ void own_barrier_kernel(unsigned* arrived) {
  if (threadIdx.x != 0) return;
  device::add_release(arrived, 1);
  while (device::load_acquire(arrived) < gridDim.x) __nanosleep(10);
}
__global__ void lock_step_kernel(int* values) { values[threadIdx.x] = values[(threadIdx.x + 1) % 32] + 1; }
__global__ void barrier_count_kernel(float* out, int count) {
  for (int i = 0; i < count + (threadIdx.x == 0); ++i) __syncthreads();
  out[threadIdx.x] = 1;
}

// ------------------------------------------------------------------------------------------------ host
struct Shape {
  dim3 grid = 1, block = 32;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned cluster = 0;
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Shape& shape, A... arguments) {
  cudaLaunchAttribute attribute{};
  if (shape.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative || shape.cluster;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
}

template <class T>
struct DeviceArray {
  T* data = nullptr;
  explicit DeviceArray(const std::vector<T>& values) {
    if (cudaMalloc(&data, values.size() * sizeof(T)) != cudaSuccess) abort();
    cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  std::vector<T> fetch(size_t count) const {
    std::vector<T> values(count);
    cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }
};

struct Outcome {
  cudaError_t error;
  int wrong = 0;
};

template <Push kind>
Outcome push(unsigned blocks, bool allow_large = true) {
  if (allow_large) cudaFuncSetAttribute(cluster_push_kernel<kind>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  const DeviceArray<unsigned> out(std::vector<unsigned>(blocks * blocks));
  const cudaError_t error = launch(cluster_push_kernel<kind>, {blocks, 32, 1024, false, blocks}, out.data);
  int wrong = 0;
  const std::vector<unsigned> result = out.fetch(blocks * blocks);
  for (unsigned i = 0; i < blocks * blocks; ++i) wrong += result[i] != i % blocks;
  return {error, wrong};
}

int main(int argc, char** argv) {
  std::vector<float> values(65536);
  for (size_t i = 0; i < values.size(); ++i) values[i] = (i * 37 % 101) * 0.01f;
  const DeviceArray<float> in(values), out(std::vector<float>(65536));
  const DeviceArray<int> integers(std::vector<int>(1024));
  const float constants[4] = {1, 2, 3, 4};
  cudaMemcpyToSymbol(factors, constants, sizeof constants);
  const float* const input = in.data;

  const struct {
    const char* name;
    std::function<Outcome()> run;
  } cases[] = {
      {"sum",
       [&]() -> Outcome {
         const cudaError_t error = launch(sum_kernel, {300, 256}, input, out.data, 65536);
         double expected = 0;
         for (float value : values) expected += 2 * value;
         return {error, std::fabs(out.fetch(1)[0] - expected) > 1e-4 * expected};
       }},
      {"transpose",
       [&]() -> Outcome {
         const int n = 128;
         const cudaError_t error = launch(transpose_kernel, {dim3(8, 8), dim3(16, 16)}, input, out.data, n);
         const std::vector<float> result = out.fetch(n * n);
         int wrong = 0;
         for (int i = 0; i < n * n; ++i) wrong += result[i % n * n + i / n] != values[i];
         return {error, wrong};
       }},
      {"tile_of_warp",
       [&]() -> Outcome {
         const cudaError_t error = launch(tile_of_warp_kernel, {}, integers.data);
         return {error, integers.fetch(32)[9] != 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 1};
       }},
      {"mma",
       [&]() -> Outcome {
         std::vector<__nv_bfloat16> a(256), b(128);
         for (int i = 0; i < 256; ++i) a[i] = __float2bfloat16(i % 7 - 3);
         for (int i = 0; i < 128; ++i) b[i] = __float2bfloat16(i % 5 - 2);
         const DeviceArray<__nv_bfloat16> device_a(a), device_b(b);
         const cudaError_t error = launch(mma_kernel, {}, static_cast<const __nv_bfloat16*>(device_a.data),
                                          static_cast<const __nv_bfloat16*>(device_b.data), out.data);
         const std::vector<float> c = out.fetch(128);
         int wrong = 0;
         for (int m = 0; m < 16; ++m) {
           for (int n = 0; n < 8; ++n) {
             float sum = 0;
             for (int k = 0; k < 16; ++k) sum += ((m * 16 + k) % 7 - 3) * ((n * 16 + k) % 5 - 2);
             wrong += c[m * 8 + n] != sum;
           }
         }
         return {error, wrong};
       }},
      {"cluster_push", []() { return push<Push::correct>(16); }},
      {"BAD_push_in_a_cluster_of_one", []() { return push<Push::correct>(1); }},
      {"BAD_push_without_arrival", []() { return push<Push::no_arrive>(4); }},
      {"BAD_push_with_two_arrivals", []() { return push<Push::arrive_twice>(4); }},
      {"BAD_push_without_wait", []() { return push<Push::no_wait>(4); }},
      {"BAD_push_and_wait_for_another_turn", []() { return push<Push::wrong_parity>(4); }},
      {"BAD_push_expects_less", []() { return push<Push::expect_less>(4); }},
      {"BAD_push_to_a_block_that_left", []() { return push<Push::exit_at_once>(4); }},
      {"BAD_push_to_a_block_that_leaves", []() { return push<Push::no_last_wait>(4); }},
      {"BAD_push_to_no_barrier", []() { return push<Push::not_initialised>(4); }},
      {"BAD_push_before_all_have_begun", []() { return push<Push::no_barrier>(4); }},
      {"BAD_large_cluster_without_attribute", []() { return push<Push::correct>(16, false); }},
      {"warp_barrier", [&]() -> Outcome { return {launch(reverse_warp_kernel<true>, {}, out.data)}; }},
      {"BAD_no_warp_barrier",
       [&]() -> Outcome {
         const cudaError_t error = launch(reverse_warp_kernel<false>, {}, out.data);
         const std::vector<float> result = out.fetch(32);
         int wrong = 0;
         for (int i = 0; i < 32; ++i) wrong += !(result[i] == 31 - i);
         return {error, wrong};
       }},
      {"BAD_lock_step", [&]() -> Outcome { return {launch(lock_step_kernel, {}, integers.data)}; }},
      {"BAD_same_value", [&]() -> Outcome { return {launch(same_value_kernel, {}, out.data)}; }},
      {"BAD_host_pointer",
       [&]() -> Outcome {
         const std::vector<float> host(4, 1.0f);
         return {launch(read_kernel, {}, host.data(), out.data)};
       }},
      {"BAD_use_after_free",
       [&]() -> Outcome {
         const DeviceArray<float> freed(std::vector<float>(16));
         cudaFree(freed.data);
         return {launch(read_kernel, {}, static_cast<const float*>(freed.data), out.data)};
       }},
      {"BAD_uninitialised",
       [&]() -> Outcome {
         float* fresh;
         cudaMalloc(&fresh, 64);
         const cudaError_t error = launch(read_kernel, {}, static_cast<const float*>(fresh), out.data);
         return {error, std::isnan(out.fetch(1)[0])};
       }},
      {"BAD_past_the_end",
       [&]() -> Outcome {
         const DeviceArray<float> four(std::vector<float>(4));
         return {launch(write_kernel, {1, 1}, four.data, 4)};
       }},
      {"BAD_grid_barrier_in_plain_launch",
       [&]() -> Outcome { return {launch(grid_barrier_kernel, {2, 32}, out.data)}; }},
      {"BAD_shared_memory_without_attribute",
       [&]() -> Outcome { return {launch(read_kernel, {1, 32, 65536}, input, out.data)}; }},
      {"BAD_cooperative_grid_too_large",
       [&]() -> Outcome { return {launch(grid_barrier_kernel, {5000, 256, 0, true}, out.data)}; }},
      {"BAD_empty_grid", [&]() -> Outcome { return {launch(read_kernel, {dim3(1, 0), 32}, input, out.data)}; }},
      {"BAD_masks_disagree", [&]() -> Outcome { return {launch(masks_kernel, {}, integers.data)}; }},
      {"BAD_barrier_counts_differ", [&]() -> Outcome { return {launch(barrier_count_kernel, {1, 64}, out.data, 3)}; }},
      {"BAD_own_barrier_in_plain_launch",
       [&]() -> Outcome {
         const DeviceArray<unsigned> arrived(std::vector<unsigned>(1));
         return {launch(own_barrier_kernel, {64, 32}, arrived.data)};
       }},
      {"BAD_volatile_spin",
       [&]() -> Outcome {
         const DeviceArray<int> flags(std::vector<int>(64));
         return {launch(volatile_spin_kernel, {}, static_cast<volatile int*>(flags.data), flags.data + 32)};
       }},
      {"BAD_misaligned", [&]() -> Outcome { return {launch(misaligned_kernel, {1, 1}, input, out.data)}; }},
      {"BAD_local_bounds", [&]() -> Outcome { return {launch(local_bounds_kernel, {1, 1}, out.data, 5)}; }},
  };

  for (const auto& [name, run] : cases) {
    if (argc == 1) {
      printf("%s\n", name);
    } else if (!strcmp(name, argv[1])) {
      const Outcome outcome = run();
      printf("error %d wrong %d\n", outcome.error, outcome.wrong);
    }
  }
}
