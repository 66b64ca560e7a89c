// Owns: barriers of blocks, clusters and grids, mbarriers, operations of a warp, atomics, asynchronous copies and
// stores. Must not know: how the scheduler chooses, how accesses are checked.
#include <algorithm>
#include <cstdlib>

#include "state.h"

namespace cuda_sim {
namespace {

std::vector<std::unique_ptr<WarpOperation>> free_operations;

void release_waiting(Barrier& barrier, const Clock& clock) {
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  barrier.sum = ClockSum{};
  g.idle_yields = 0;
  for (Thread* thread : waiting) {
    acquire(thread, clock);
    make_ready(thread);
  }
}

bool take_relaxed(Thread* thread) { return std::exchange(thread->relaxed, false); }

void complete_cluster_phase(Cluster* cluster) {
  if (cluster->arrived == 0 || cluster->arrived < cluster->alive) return;
  cluster->arrived = 0;
  ++cluster->phase;
  cluster->completed = cluster->barrier.sum.clock;
  release_waiting(cluster->barrier, nullptr);  // what they learn, they learn when they run
}

bool within(const void* address, size_t bytes, const char* start, size_t size) {
  const char* p = static_cast<const char*>(address);
  return start && p >= start && p + bytes <= start + size;
}

bool in_shared(const Block& block, const void* address, size_t bytes) {
  bool found = within(address, bytes, block.dynamic_shared, block.dynamic_shared_bytes);
  for (const Block::Array& array : block.arrays) found = found || within(address, bytes, array.data, array.bytes);
  return found;
}

bool all_lanes_arrived(const Warp& warp, const WarpOperation& operation) {
  return (operation.arrived | (operation.mask & warp.exited)) == (operation.mask & warp.existing);
}

void complete_warp_operations(Warp* warp) {
  auto& pending = warp->operations;
  for (size_t i = 0; i < pending.size();) {
    if (!all_lanes_arrived(*warp, *pending[i])) {
      ++i;
      continue;
    }
    std::unique_ptr<WarpOperation> operation = std::move(pending[i]);
    pending[i] = std::move(pending.back());
    pending.pop_back();
    g.idle_yields = 0;
    operation->function(operation->lanes, operation->mask, operation->arrived);
    for (int lane = 0; lane < 32; ++lane) {
      if (!(operation->arrived & 1u << lane)) continue;
      if (operation->sum.clock) acquire(warp->threads[lane], operation->sum.clock);
      if (warp->threads[lane] != g.current) make_ready(warp->threads[lane]);
    }
    operation->sum = ClockSum{};
    free_operations.push_back(std::move(operation));
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ barriers
void block_barrier(const char* file, int line) { block_vote(Vote::count, false, file, line); }

int block_vote(Vote vote, bool predicate, const char* file, int line) {
  Thread* thread = g.current;
  if (!thread) {
    fprintf(stderr, "[cuda_sim] a barrier was called on the host\n");
    abort();
  }
  Block* block = thread->block;
  Barrier& barrier = block->barrier;
  if (block->alive != block->threads.size()) {
    fail(cudaErrorLaunchFailure, "barrier at %s:%d reached after %zu thread(s) of the block exited", file, line,
         block->threads.size() - block->alive);
  }
  if (barrier.waiting.empty()) {
    block->votes = {0, 1, 0};
  } else if (const Thread* other = barrier.waiting[0]; other->line != line || strcmp(other->file, file)) {
    fail(cudaErrorLaunchFailure, "divergent barrier: this thread is at %s:%d, %s waits at %s:%d", file, line,
         name_of(other).c_str(), other->file, other->line);
  }
  block->votes.count += predicate;
  block->votes.all &= predicate;
  block->votes.any |= predicate;
  release(thread, barrier.sum);
  if (barrier.waiting.size() + 1 == block->alive) {
    block->result = block->votes;
    const Clock clock = barrier.sum.clock;
    acquire(thread, clock);
    release_waiting(barrier, clock);
    thread->file = file;
    thread->line = line;
    preempt();
  } else {
    barrier.waiting.push_back(thread);
    wait_in(State::at_block, file, line);
  }
  const Votes& result = block->result;
  return vote == Vote::count ? result.count : vote == Vote::all ? result.all : result.any;
}

void grid_barrier(const char* file, int line) {
  Thread* thread = g.current;
  Barrier& barrier = g.grid_barrier;
  if (!g.launch.cooperative) fail(cudaErrorLaunchFailure, "grid.sync() without a cooperative launch");
  if (g.threads_alive != g.threads) {
    fail(cudaErrorLaunchFailure, "grid.sync() at %s:%d after %u thread(s) exited", file, line,
         g.threads - g.threads_alive);
  }
  release(thread, barrier.sum);
  if (barrier.waiting.size() + 1 == g.threads) {
    const Clock clock = barrier.sum.clock;
    acquire(thread, clock);
    release_waiting(barrier, clock);
    preempt();
  } else {
    barrier.waiting.push_back(thread);
    wait_in(State::at_grid, file, line);
  }
}

unsigned cluster_arrive(const char* file, int line) {
  Thread* thread = g.current;
  Cluster* cluster = thread->block->cluster;
  const unsigned phase = cluster->phase;
  if (thread->cluster_arrived) {
    fail(cudaErrorLaunchFailure, "cluster barrier at %s:%d: the thread arrived already, and has not waited", file,
         line);
  }
  thread->cluster_arrived = true;
  thread->cluster_token = phase;
  thread->file = file;
  thread->line = line;
  if (!take_relaxed(thread)) release(thread, cluster->barrier.sum);
  ++cluster->arrived;
  complete_cluster_phase(cluster);
  return phase;
}

void cluster_wait(const char* file, int line) { cluster_wait(g.current->cluster_token, file, line); }

void cluster_wait(unsigned phase, const char* file, int line) {
  Thread* thread = g.current;
  Cluster* cluster = thread->block->cluster;
  if (!thread->cluster_arrived) {
    fail(cudaErrorLaunchFailure, "cluster barrier at %s:%d: the thread waits, and has not arrived", file, line);
  }
  thread->cluster_arrived = false;
  const bool relaxed = take_relaxed(thread);
  if (cluster->phase == phase) {
    cluster->barrier.waiting.push_back(thread);
    wait_in(State::at_cluster, file, line);
  } else {
    preempt();
  }
  if (!relaxed) acquire(thread, cluster->completed);
}

void check_exit(Thread* thread) {
  const auto in_flight = [](const AsyncCopy& copy) { return !copy.done; };
  if (std::any_of(thread->copies.begin(), thread->copies.end(), in_flight)) {
    fail(cudaErrorLaunchFailure, "thread exits with a cp.async still in flight");
  }
  const Block& block = *thread->block;
  const auto into_block = [&](const StoreInFlight& store) { return in_shared(block, store.place, store.bytes); };
  if (block.alive == 0 && std::any_of(g.in_flight.begin(), g.in_flight.end(), into_block)) {
    fail(cudaErrorLaunchFailure, "the block exits with an st.async to it still in flight");
  }
  const struct {
    const Barrier& barrier;
    const char* name;
  } barriers[] = {{thread->block->barrier, "a barrier of its block"}, {g.grid_barrier, "grid.sync()"}};
  for (const auto& [barrier, name] : barriers) {
    if (barrier.waiting.empty()) continue;
    const Thread* waiting = barrier.waiting[0];
    fail(cudaErrorLaunchFailure, "thread exits while %zu thread(s) wait in %s at %s:%d", barrier.waiting.size(), name,
         waiting->file, waiting->line);
  }
  complete_cluster_phase(thread->block->cluster);
  complete_warp_operations(thread->warp);
}

// ------------------------------------------------------------------------------------------------ warps
void warp_collective(uint32_t mask, WarpFunction function, Lane lane, bool orders_memory, const char* file, int line) {
  Thread* thread = g.current;
  Warp* warp = thread->warp;
  thread->file = file;
  thread->line = line;
  if (!(mask & 1u << thread->lane)) {
    fail(cudaErrorLaunchFailure, "warp operation at %s:%d: the calling lane %d is not in the mask %08x", file, line,
         thread->lane, mask);
  }
  // Operations with different masks may wait at once; masks that truly disagree end as a deadlock.
  WarpOperation* operation = nullptr;
  for (const auto& pending : warp->operations) {
    if (pending->mask == mask) operation = pending.get();
  }
  if (!operation) {
    if (free_operations.empty()) free_operations.push_back(std::make_unique<WarpOperation>());
    warp->operations.push_back(std::move(free_operations.back()));
    free_operations.pop_back();
    operation = warp->operations.back().get();
    operation->mask = mask;
    operation->arrived = 0;
    operation->function = function;
    operation->file = file;
    operation->line = line;
  } else if (operation->function != function || operation->line != line) {
    fail(cudaErrorLaunchFailure, "divergent warp operation: lane %d at %s:%d, others at %s:%d", thread->lane, file,
         line, operation->file, operation->line);
  }
  operation->arrived |= 1u << thread->lane;
  operation->lanes[thread->lane] = lane;
  if (orders_memory) release(thread, operation->sum);
  if (all_lanes_arrived(*warp, *operation)) {
    complete_warp_operations(warp);
  } else {
    wait_in(State::at_warp, file, line);
  }
}

// A failed kernel leaves operations half done; their clocks belong to its threads.
void recycle_warp_operations() {
  for (const auto& operation : free_operations) operation->sum = ClockSum{};
}

// ------------------------------------------------------------------------------------------------ atomics
void mutate(int site) { g.mutated_site = site; }
bool mutated(int site) { return g.mutated_site == site; }
void relax(int site) {
  if (g.current && mutated(site)) g.current->relaxed = true;
}

void atomic_hook(const void* address, size_t bytes, int flags) {
  if (!g.current) return;
  if (take_relaxed(g.current)) flags &= ~(kAcquire | kRelease);
  if (flags & kWrite) {
    g.idle_yields = 0;
    if (random_bits() % 4 == 0) preempt();
  } else {
    yield();  // a loop that waits for another thread polls through here
  }
  check_atomic(address, bytes, flags, __builtin_return_address(0));
}

void atomic_done(const void* address, size_t bytes, int flags) {
  if (g.current && (flags & kWrite)) mark_initialised(address, bytes, true);
}

void fence() { check_fence(g.current); }

// ------------------------------------------------------------------------------------------------ mbarrier, st.async
// The bytes of a store arrive at a random time before the phase that counts them ends; until then the destination holds
// NaN.
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase can count

MemoryBarrier& memory_barrier(const uint64_t* address) {
  const auto found = g.memory_barriers.find(address);
  if (found == g.memory_barriers.end()) {
    fail(cudaErrorLaunchFailure, "an mbarrier that was not initialised: %s", describe(address).c_str());
  }
  return found->second;
}

void count_bytes(MemoryBarrier& barrier, int64_t expected) {
  barrier.bytes += expected;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
    fail(cudaErrorLaunchFailure, "an mbarrier counts %lld bytes, it can count %lld",
         static_cast<long long>(barrier.bytes), static_cast<long long>(kMostBytes));
  }
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.completed = barrier.barrier.sum.clock;
  release_waiting(barrier.barrier, nullptr);  // what they learn, they learn when they run
}

void land(const StoreInFlight& store) {
  memcpy(store.place, store.value, store.bytes);
  mark_initialised(store.place, store.bytes, true);
  MemoryBarrier& barrier = memory_barrier(store.barrier);
  release_as_of(store, barrier.barrier.sum);
  count_bytes(barrier, -static_cast<int64_t>(store.bytes));
}

}  // namespace

void mbarrier_init(uint64_t* address, unsigned arrivals) {
  if (!in_shared(*g.current->block, address, sizeof *address)) {
    fail(cudaErrorIllegalAddress, "mbarrier.init: not in this block's shared memory: %s", describe(address).c_str());
  }
  check_access(address, sizeof *address, true, false, __builtin_return_address(0));
  MemoryBarrier& barrier = g.memory_barriers[address] = MemoryBarrier{};
  barrier.arrivals = barrier.pending = arrivals;
}

void mbarrier_arrive_expect(uint64_t* address, unsigned bytes) {
  check_access(address, sizeof *address, true, true, __builtin_return_address(0));
  MemoryBarrier& barrier = memory_barrier(address);
  if (barrier.pending == 0) {
    fail(cudaErrorLaunchFailure, "an mbarrier has more arrivals in a phase than it was initialised for");
  }
  --barrier.pending;
  count_bytes(barrier, bytes);
  preempt();
}

void mbarrier_wait(uint64_t* address, unsigned parity, const char* file, int line) {
  Thread* thread = g.current;
  const bool relaxed = take_relaxed(thread);
  if (!in_shared(*thread->block, address, sizeof *address)) {
    fail(cudaErrorIllegalAddress, "a wait for an mbarrier of another block");
  }
  check_access(address, sizeof *address, false, true, __builtin_return_address(0));
  MemoryBarrier& barrier = memory_barrier(address);
  if (barrier.phase % 2 != parity) {
    preempt();
  } else {
    do {
      barrier.barrier.waiting.push_back(thread);
      wait_in(State::at_mbarrier, file, line);
    } while (barrier.phase % 2 == parity);
  }
  if (!relaxed) acquire(thread, barrier.completed);
}

void store_async(void* shared, const void* value, size_t bytes, uint64_t* barrier) {
  Thread* thread = g.current;
  if (thread->block->cluster->blocks.size() < 2) {
    fail(cudaErrorLaunchFailure, "st.async in a cluster of one block");
  }
  if (reinterpret_cast<uintptr_t>(shared) % bytes) {
    fail(cudaErrorMisalignedAddress, "st.async of %zu bytes: misaligned pointer", bytes);
  }
  void* caller = __builtin_return_address(0);
  check_access(barrier, sizeof *barrier, true, true, caller);
  check_access(shared, bytes, true, false, caller);
  StoreInFlight store{
      static_cast<char*>(shared), {}, bytes, barrier, thread->grid_index, thread->time++, thread->known};
  memcpy(store.value, value, bytes);
  memset(shared, 0xFF, bytes);
  mark_initialised(shared, bytes, false);
  g.in_flight.push_back(store);
  if (random_bits() % 4 == 0) preempt();
}

void land_store() {
  std::swap(g.in_flight[random_bits() % g.in_flight.size()], g.in_flight.back());
  const StoreInFlight store = std::move(g.in_flight.back());
  g.in_flight.pop_back();
  land(store);
}

// ------------------------------------------------------------------------------------------------ cp.async
// The bytes arrive at a random time between the issue and the wait; until then the destination holds NaN.
namespace {

void complete_copy(AsyncCopy& copy) {
  memcpy(copy.shared, copy.global, copy.source_bytes);
  memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.done = true;
  mark_initialised(copy.shared, copy.bytes, true);
}

}  // namespace

void cp_async(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  Thread* thread = g.current;
  const Block* block = thread->block;
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes) {
    fail(cudaErrorMisalignedAddress, "cp.async of %zu bytes: misaligned pointer", bytes);
  }
  const bool plain = within(shared, bytes, g.plain_shared, g.plain_shared_bytes);
  if (!plain && !in_shared(*block, shared, bytes)) {
    fail(cudaErrorIllegalAddress, "cp.async: the destination is not in this block's shared memory: %s",
         describe(shared).c_str());
  }
  void* caller = __builtin_return_address(0);
  check_access(global, source_bytes, false, false, caller);
  check_access(shared, bytes, true, false, caller);
  AsyncCopy copy{shared, global, bytes, source_bytes, thread->copy_group, false};
  if (random_bits() % 4 == 0 && !plain) {
    complete_copy(copy);
  } else {
    memset(shared, 0xFF, bytes);
    mark_initialised(shared, bytes, false);
  }
  thread->copies.push_back(copy);
}

void cp_async_commit() { ++g.current->copy_group; }

void cp_async_wait(int pending_groups) {
  Thread* thread = g.current;
  auto& copies = thread->copies;
  const auto complete = [&](AsyncCopy& copy) {
    if (copy.group >= thread->copy_group - pending_groups) return false;
    if (!copy.done) complete_copy(copy);
    return true;
  };
  copies.erase(std::remove_if(copies.begin(), copies.end(), complete), copies.end());
}

}  // namespace cuda_sim
