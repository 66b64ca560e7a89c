// Owns: the services that the simulator's runtime offers to device code and to the host stand-ins in cuda_sim.h.
// Must not know: how threads are scheduled or accesses checked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// Code of the simulator itself that is compiled together with kernels: its accesses are not the kernel's.
#define CUDA_SIM_UNCHECKED __attribute__((no_sanitize("thread")))
// Default arguments that name the caller, so that reports can.
#define CUDA_SIM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_sim {

// ------------------------------------------------------------------------------------------------ launches
struct Launch {
  dim3 grid, block, cluster{1, 1, 1};
  size_t shared_bytes = 0;
  bool cooperative = false;
  const void* kernel = nullptr;
};

// Runs call(arguments) once for every thread of the grid; arguments may be read by the kernel as parameters.
cudaError_t run(const Launch& launch, void (*call)(void*), void* arguments, size_t arguments_bytes);
void set_max_dynamic_shared(const void* kernel, int bytes);
void allow_large_clusters(const void* kernel);  // up to 16 blocks
// The device is that of sm_90; registers do not limit what is resident.
constexpr int kMultiprocessors = 132;
int resident_blocks(size_t threads, size_t shared_bytes);  // on one multiprocessor
// How many clusters of a launch run at once. The blocks of one lie in one of the device's parts, of 16 multiprocessors.
cudaError_t active_clusters(int* clusters, const Launch& launch);
// For which architecture the kernels count as compiled, 90 at first: a device runs code of older ones.
void set_code_version(int version);
int code_version();

// Which of the possible orders of execution the next launches take; also the environment's CUDA_SIM_SEED.
void set_seed(uint64_t seed);
// The report of the last failure; empty where there was none.
const char* last_message();

// A host stand-in for a device library (a matrix product, say) calls this before it reads or writes device memory.
cudaError_t host_access(const void* address, size_t bytes, bool write);

// Ends the running kernel with an error and a report.
[[noreturn]] void fail(cudaError_t error, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ------------------------------------------------------------------------------------------------ synchronisation
enum class Vote { count, all, any };
void block_barrier(CUDA_SIM_CALLER);
int block_vote(Vote vote, bool predicate, CUDA_SIM_CALLER);
void grid_barrier(CUDA_SIM_CALLER);
unsigned cluster_arrive(CUDA_SIM_CALLER);  // the token that cluster_wait takes
void cluster_wait(unsigned token, CUDA_SIM_CALLER);
void cluster_wait(CUDA_SIM_CALLER);  // for the arrival of this thread before it

// One lane's part in an operation of its whole warp.
struct Lane {
  const void* in = nullptr;
  void* out = nullptr;
  int argument = 0;
  int width = 32;
};
// What the last lane to arrive does for all: lanes in `mask` take part, those in `present` have arrived (others
// exited).
using WarpFunction = void (*)(Lane* lanes, uint32_t mask, uint32_t present);
void warp_collective(uint32_t mask, WarpFunction function, Lane lane, bool orders_memory, CUDA_SIM_CALLER);

// Atomics: hook before, done after the plain operation.
enum AtomicFlags { kRelaxed = 0, kAcquire = 1, kRelease = 2, kRead = 4, kWrite = 8 };
void atomic_hook(const void* address, size_t bytes, int flags);
void atomic_done(const void* address, size_t bytes, int flags);
void fence();
void yield();  // a spin loop's pause

void cp_async(void* shared, const void* global, size_t bytes, size_t source_bytes);  // the rest is filled with zeros
void cp_async_commit();
void cp_async_wait(int pending_groups);

// An mbarrier, eight bytes of shared memory: a phase ends when all its arrivals are there, and with them as many bytes
// as they said to expect. Phases are waited for by their parity. Stores to a block of the cluster may land at any time,
// and count at a barrier of that block when they have.
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity, CUDA_SIM_CALLER);
void store_async(void* shared, const void* value, size_t bytes, uint64_t* barrier);

// mutate.py numbers the places of kernels that synchronise, and switches one of them off.
void mutate(int site);   // which; -1: none
bool mutated(int site);  // whether it is this one
void relax(int site);    // if it is this one, the thread's next acquire or release orders nothing

// ------------------------------------------------------------------------------------------------ identity, memory
unsigned cluster_rank(), cluster_size();
unsigned block_linear(), thread_linear(), lane_index();
void* dynamic_shared();
void* static_shared(const void* tag, size_t bytes);  // the block's array that belongs to the tag
void* map_rank(const void* address, unsigned rank);  // the same place in the shared memory of a block of the cluster
void red_zone(const void* address, size_t bytes);    // nobody may touch these bytes of shared memory

// ------------------------------------------------------------------------------------------------ templates
template <class... P, class... A>
cudaError_t launch(Launch launch, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {static_cast<P>(std::forward<A>(arguments))...}};
  launch.kernel = reinterpret_cast<const void*>(kernel);
  const auto invoke = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); };
  return run(launch, invoke, &call, sizeof call);
}

// Arguments as an array of pointers, as cudaLaunchCooperativeKernel takes them.
template <class... P, size_t... I>
cudaError_t launch_pointers(const Launch& how, void (*kernel)(P...), void** pointers, std::index_sequence<I...>) {
  return launch(how, kernel, *static_cast<std::decay_t<P>*>(pointers[I])...);
}

enum class Shuffle { index, up, down, exclusive_or };

template <Shuffle kind, class T>
CUDA_SIM_UNCHECKED void shuffle_lanes(Lane* lanes, uint32_t mask, uint32_t present) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask & present & 1u << lane)) continue;
    const int width = lanes[lane].width, argument = lanes[lane].argument, base = lane & ~(width - 1);
    int source = lane;
    if (kind == Shuffle::index) source = base + (argument & (width - 1));
    if (kind == Shuffle::up && lane - argument >= base) source = lane - argument;
    if (kind == Shuffle::down && lane + argument < base + width) source = lane + argument;
    if (kind == Shuffle::exclusive_or && (lane ^ argument) < base + width) source = lane ^ argument;
    if (!(mask & present & 1u << source)) {
      fail(cudaErrorLaunchFailure, "shuffle: lane %d reads lane %d, which is not there (mask %08x)", lane, source,
           mask);
    }
    memcpy(lanes[lane].out, lanes[source].in, sizeof(T));
  }
}

template <Shuffle kind, class T>
T shuffle(uint32_t mask, T value, int argument, int width, CUDA_SIM_CALLER) {
  T result = value;
  warp_collective(mask, shuffle_lanes<kind, T>, Lane{&value, &result, argument, width}, false, file, line);
  return result;
}

// Read, modify, write. All CUDA threads share one OS thread, so that the plain operation is atomic.
template <class T, class Function>
CUDA_SIM_UNCHECKED T atomic(T* address, Function function, int flags) {
  atomic_hook(address, sizeof(T), flags);
  const T before = *address, after = function(before);
  if (flags & kWrite) *const_cast<volatile T*>(address) = after;
  atomic_done(address, sizeof(T), flags);
  return before;
}

}  // namespace cuda_sim
