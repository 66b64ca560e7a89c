// Owns: barriers of blocks, clusters and grids, operations of a warp, atomics, and asynchronous copies.
// Must not know: how the scheduler chooses, how accesses are checked.
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

// ------------------------------------------------------------------------------------------------ cp.async
// The bytes arrive at a random time between the issue and the wait; until then the destination holds NaN.
namespace {

void complete_copy(AsyncCopy& copy) {
  memcpy(copy.shared, copy.global, copy.source_bytes);
  memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.done = true;
  mark_initialised(copy.shared, copy.bytes, true);
}

bool within(const void* address, size_t bytes, const char* start, size_t size) {
  const char* p = static_cast<const char*>(address);
  return start && p >= start && p + bytes <= start + size;
}

}  // namespace

void cp_async(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  Thread* thread = g.current;
  const Block* block = thread->block;
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes) {
    fail(cudaErrorMisalignedAddress, "cp.async of %zu bytes: misaligned pointer", bytes);
  }
  const bool plain = within(shared, bytes, g.plain_shared, g.plain_shared_bytes);
  bool found = plain || within(shared, bytes, block->dynamic_shared, block->dynamic_shared_bytes);
  for (const Block::Array& array : block->arrays) found = found || within(shared, bytes, array.data, array.bytes);
  if (!found) {
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
