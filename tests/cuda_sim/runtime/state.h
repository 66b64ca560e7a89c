// Owns: the simulator's state: threads, warps, blocks, clusters, the launch; and what its files call of each other.
// Must not know: kernels. Compiled without the thread sanitizer, like all of this directory.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_sim.h"

namespace cuda_sim {

// A vector clock, one entry a thread of the grid; shared until it changes. Null: nothing is known yet.
using Clock = std::shared_ptr<std::vector<uint32_t>>;

// A clock that collects those of the threads that arrive at a barrier.
struct ClockSum {
  Clock clock;
  const void* last = nullptr;  // what was added last: threads that met before share a clock, added once
};

struct Block;
struct Warp;
struct Cluster;

enum class State : uint8_t { ready, running, at_block, at_cluster, at_mbarrier, at_grid, at_warp, exited };

struct AsyncCopy {
  void* shared;
  const void* global;
  size_t bytes, source_bytes;
  int group;
  bool done;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  uint32_t grid_index = 0, block_index = 0, priority = 0;
  uint8_t lane = 0;
  State state = State::ready;
  const char* file = "";  // where it waits, or waited last
  int line = 0;
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
  unsigned cluster_token = 0;  // of its last arrival at the cluster's barrier
  bool cluster_arrived = false;
  bool relaxed = false;  // its next acquire or release orders nothing
  // The checker's: its own time, what it knows of the others', what a fence released and what one would acquire.
  uint32_t time = 1;
  Clock known;
  ClockSum fence_released, fence_pending;
};

struct WarpOperation {
  uint32_t mask, arrived;
  WarpFunction function;
  Lane lanes[32];
  const char* file;
  int line;
  ClockSum sum;
};

struct Warp {
  Thread* threads[32] = {};
  uint32_t existing = 0, exited = 0;                       // lanes
  std::vector<std::unique_ptr<WarpOperation>> operations;  // waiting for lanes; one for each mask
};

struct Barrier {
  std::vector<Thread*> waiting;
  ClockSum sum;
};

// An mbarrier of some block's shared memory.
struct MemoryBarrier {
  unsigned arrivals = 0, pending = 0;  // of a phase, and those that it still waits for
  int64_t bytes = 0;  // expected and not there yet; below zero where they came before they were expected
  unsigned phase = 0;
  Barrier barrier;
  Clock completed;  // of the last phase
};

// A store that has not landed yet, and what its thread knew when it issued it.
struct StoreInFlight {
  char* place;
  char value[16];
  size_t bytes;
  const uint64_t* barrier;
  uint32_t thread, time;
  Clock known;
};

struct Votes {
  int count, all, any;
};

struct Block {
  Cluster* cluster = nullptr;
  uint3 index{};
  uint32_t grid_index = 0, rank = 0, alive = 0;
  Barrier barrier;
  Votes votes{}, result{};
  char* dynamic_shared = nullptr;
  size_t dynamic_shared_bytes = 0;
  char* plain_shared = nullptr;  // the image of the __shared__ variables while another block runs
  struct Array {
    const void* tag;
    char* data;
    size_t bytes;
  };
  std::vector<Array> arrays;  // RNNFAST_SHARED
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t alive = 0, arrived = 0, phase = 0;
  Barrier barrier;
  Clock completed;  // of the last phase
};

// How pick() chooses among the threads that can run; the seed chooses the policy.
enum class Policy { uniform, block_priority, warp_priority, thread_priority, newest_first, oldest_first };
constexpr int kPolicies = 6;

struct Global {
  // The order of execution.
  uint64_t seed = 1, random_state = 0x9E3779B97F4A7C15ull;
  Policy policy = Policy::uniform;
  std::vector<Thread*> ready, spinning;
  uint64_t idle_yields = 0;     // since anything but spinning happened
  uint32_t preempt_every = 64;  // accesses, on average, in the checked build; also CUDA_SIM_PREEMPT
  int64_t until_preempt = 0;

  // The launch.
  Launch launch;
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  size_t arguments_bytes = 0;
  uint32_t launch_count = 0, threads = 0, threads_alive = 0;
  std::vector<std::unique_ptr<Cluster>> resident;
  Barrier grid_barrier;
  std::map<const uint64_t*, MemoryBarrier> memory_barriers;
  std::vector<StoreInFlight> in_flight;
  Thread* current = nullptr;
  void* scheduler_stack_pointer = nullptr;
  bool in_kernel = false;
  uint64_t switches = 0;

  int mutated_site = -1;

  // What went wrong.
  bool failed = false;
  cudaError_t error = cudaSuccess;
  std::string message;
  uint32_t races = 0;

  // Memory. The arena holds all device memory; nothing in it is used twice.
  bool check = false;  // kernels were compiled for the checker
  char* arena = nullptr;
  size_t arena_bytes = size_t{16} << 30, arena_used = 0;
  char* plain_shared = nullptr;  // where the __shared__ variables of the running block lie
  size_t plain_shared_bytes = 0;
};
extern Global g;
extern bool instrumented;  // set by constructors of kernel files that were compiled for the checker

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 65536;

inline uint64_t random_bits() {  // xorshift64*
  uint64_t x = g.random_state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  g.random_state = x;
  return x * 2685821657736338717ull;
}

// scheduler.cpp
void initialise();
std::string name_of(const Thread* thread);
void make_ready(Thread* thread);
void wait_in(State state, const char* file, int line);  // gives up the CPU until make_ready
void preempt();                                         // gives up the CPU, stays ready
std::string deadlock_report();
void record_failure(cudaError_t error, const std::string& message);
[[noreturn]] void abandon_kernel();  // from a signal handler

// synchronisation.cpp
void check_exit(Thread* thread);  // nobody may wait for it
void recycle_warp_operations();
void land_store();  // one of those in flight

// memory.cpp
char* arena_allocate(size_t bytes);  // null where the arena is full
bool arena_free(char* address);
void protect_shared(Block* block, bool accessible);
void switch_plain_shared(Block* block);  // null: the host's
void find_plain_shared();
std::string describe(const void* address);

// checker.cpp: happens-before, initialisation and bounds; all do nothing in an unchecked build
void check_launch();
void mark_allocated(const void* address, size_t bytes);
void mark_freed(const void* address, size_t bytes);
void mark_initialised(const void* address, size_t bytes, bool initialised);
bool is_initialised(const void* address, size_t bytes);
void check_access(const void* address, size_t bytes, bool write, bool atomic, void* caller);
void check_atomic(const void* address, size_t bytes, int flags, void* caller);
void check_fence(Thread* thread);
void release(Thread* thread, ClockSum& sum);
void release_as_of(const StoreInFlight& store, ClockSum& sum);
void acquire(Thread* thread, const Clock& clock);

}  // namespace cuda_sim
