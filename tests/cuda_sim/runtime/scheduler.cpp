// Owns: one fiber per CUDA thread on one OS thread, the seeded choice of who runs next, launches and their limits, and
// what ends a kernel that faults or hangs.
// Must not know: what barriers mean, how accesses are checked.
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer, and goes on where another stack stopped.
extern "C" void cuda_sim_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl cuda_sim_switch
.hidden cuda_sim_switch
.type cuda_sim_switch,@function
cuda_sim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %r8
  jmp *%r8
.size cuda_sim_switch,.-cuda_sim_switch
)");

namespace cuda_sim {

Global g;
bool instrumented;

namespace {

std::vector<char*> free_stacks;
std::map<const void*, int> max_dynamic_shared;
int version_of_code = 90;
std::set<const void*> large_clusters;
sigjmp_buf leave_kernel;

// The address sanitizer is told of every switch of stacks.
#if defined(__SANITIZE_ADDRESS__)
void* host_asan_stack;
const void* host_stack;
size_t host_stack_bytes;
void find_host_stack() {
  pthread_attr_t attributes;
  void* lowest;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &lowest, &host_stack_bytes);
  host_stack = lowest;
  pthread_attr_destroy(&attributes);
}
void leaving_for(void** save, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(save, stack, bytes); }
void arrived_from(void* saved) { __sanitizer_finish_switch_fiber(saved, nullptr, nullptr); }
void unpoison(char* stack) { ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes); }
#else
void* host_asan_stack;
const void* host_stack;
size_t host_stack_bytes;
void find_host_stack() {}
void leaving_for(void**, const void*, size_t) {}
void arrived_from(void*) {}
void unpoison(char*) {}
#endif

void to_scheduler(bool exiting) {
  Thread* thread = g.current;
  leaving_for(exiting ? nullptr : &thread->asan_stack, host_stack, host_stack_bytes);
  cuda_sim_switch(&thread->stack_pointer, g.scheduler_stack_pointer);
  arrived_from(thread->asan_stack);
}

void to_thread(Thread* thread) {
  thread->state = State::running;
  switch_plain_shared(thread->block);
  g.current = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  ++g.switches;
  leaving_for(&host_asan_stack, thread->stack, kStackBytes);
  cuda_sim_switch(&g.scheduler_stack_pointer, thread->stack_pointer);
  arrived_from(host_asan_stack);
  g.current = nullptr;
}

// ------------------------------------------------------------------------------------------------ faults and hangs
void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!g.current) {
    signal(signal_number, SIG_DFL);
    raise(signal_number);
    return;
  }
  const char* address = static_cast<char*>(info->si_addr);
  void* instruction = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  Dl_info image{};
  dladdr(instruction, &image);
  const size_t offset = static_cast<char*>(instruction) - static_cast<char*>(image.dli_fbase);
  const bool overflow = address >= g.current->stack - kPage && address < g.current->stack;
  char message[512];
  snprintf(message, sizeof message, "%s: illegal address %s (addr2line -Cfie %s 0x%zx)", name_of(g.current).c_str(),
           overflow ? "= fiber stack overflow" : describe(address).c_str(), image.dli_fname, offset);
  record_failure(cudaErrorIllegalAddress, message);
  abandon_kernel();
}

// A thread that spins on plain memory never comes back to the scheduler. The timer counts this process's CPU time,
// which other processes do not stretch.
void on_timer(int) {
  constexpr int kSeconds = 3;
  static uint64_t switches;
  static int seconds;
  if (!g.current || g.switches != switches) {
    switches = g.switches;
    seconds = 0;
  } else if (++seconds >= kSeconds) {
    record_failure(cudaErrorLaunchTimeout, name_of(g.current) +
                                               ": runs for 3 s without reaching a synchronisation (does it spin on "
                                               "plain memory?)");
    abandon_kernel();
  }
}

// The handlers are there while a kernel runs, and only then: the process may be Python with handlers of its own.
class Handlers {
 public:
  Handlers() {
    static char stack[kStackBytes];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction fault{};
    fault.sa_sigaction = on_fault;
    fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &fault, &old_segv_);
    sigaction(SIGBUS, &fault, &old_bus_);
    struct sigaction profile{};
    profile.sa_handler = on_timer;
    profile.sa_flags = SA_ONSTACK | SA_RESTART;
    sigaction(SIGPROF, &profile, &old_profile_);
    const itimerval every_second{{1, 0}, {1, 0}};
    setitimer(ITIMER_PROF, &every_second, &old_timer_);
  }
  ~Handlers() {
    setitimer(ITIMER_PROF, &old_timer_, nullptr);
    sigaction(SIGPROF, &old_profile_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  Handlers(const Handlers&) = delete;
  Handlers& operator=(const Handlers&) = delete;

 private:
  stack_t old_stack_{};
  struct sigaction old_segv_{}, old_bus_{}, old_profile_{};
  itimerval old_timer_{};
};

// ------------------------------------------------------------------------------------------------ threads and blocks
void thread_main() {
  arrived_from(g.current->asan_stack);
  g.call(g.arguments);
  Thread* thread = g.current;
  Block* block = thread->block;
  thread->state = State::exited;
  --block->alive;
  --block->cluster->alive;
  --g.threads_alive;
  thread->warp->exited |= 1u << thread->lane;
  g.idle_yields = 0;
  check_exit(thread);
  to_scheduler(true);
  __builtin_unreachable();
}

char* take_stack() {
  if (free_stacks.empty()) {
    auto* memory = static_cast<char*>(
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory, kPage, PROT_NONE);
    return memory + kPage;
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

// A stack on which cuda_sim_switch finds registers to load and thread_main to jump to.
void* prepare_stack(char* stack, unsigned index) {
  constexpr int kSavedRegisters = 6;
  // Tops at different cache lines, so that the fibers' hot frames do not fight for the same cache sets.
  auto** top = reinterpret_cast<void**>(stack + kStackBytes - index % 16 * 64);
  *--top = nullptr;  // return address of thread_main, which keeps the stack aligned
  *--top = reinterpret_cast<void*>(thread_main);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

uint32_t initial_priority(const Thread& thread) {
  uint64_t group = thread.grid_index;
  if (g.policy == Policy::block_priority) group = thread.block->grid_index;
  if (g.policy == Policy::warp_priority) group = thread.grid_index / 32;
  return (g.seed * 7919 + group + 1) * 0x9E3779B97F4A7C15ull >> 40;
}

void start_block(Block* block) {
  const dim3 size = g.launch.block;
  const unsigned count = block->threads.size();
  block->alive = count;
  block->warps.resize((count + 31) / 32);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block;
    thread.block_index = i;
    thread.grid_index = block->grid_index * count + i;
    thread.lane = i % 32;
    thread.index = uint3{i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.warp = &block->warps[i / 32];
    thread.warp->threads[thread.lane] = &thread;
    thread.warp->existing |= 1u << thread.lane;
    thread.priority = initial_priority(thread);
    thread.stack = take_stack();
    unpoison(thread.stack);
    thread.stack_pointer = prepare_stack(thread.stack, i);
    make_ready(&thread);
  }
  if (block->dynamic_shared_bytes) block->dynamic_shared = arena_allocate(block->dynamic_shared_bytes);
  if (g.plain_shared_bytes) block->plain_shared = arena_allocate(g.plain_shared_bytes);
}

void end_block(Block* block) {
  for (Thread& thread : block->threads) free_stacks.push_back(thread.stack);
  if (block->dynamic_shared) arena_free(block->dynamic_shared);
  for (const Block::Array& array : block->arrays) arena_free(array.data);
  if (block->plain_shared) {
    switch_plain_shared(nullptr);
    arena_free(block->plain_shared);
  }
}

Thread* pick() {
  auto& ready = g.ready;
  auto& spinning = g.spinning;
  if (ready.empty()) {
    ready.swap(spinning);
  } else if (!spinning.empty() && random_bits() % 16 == 0) {  // spinning threads look again from time to time
    const size_t k = random_bits() % spinning.size();
    ready.push_back(spinning[k]);
    spinning[k] = spinning.back();
    spinning.pop_back();
  }
  const size_t count = ready.size();
  size_t chosen = count - 1;
  switch (g.policy) {
    case Policy::newest_first:
      break;
    case Policy::oldest_first:
      chosen = random_bits() % ((count + 3) / 4);
      break;
    case Policy::uniform:
      chosen = random_bits() % count;
      break;
    default:  // the highest priority of a few drawn at random
      chosen = random_bits() % count;
      for (int draw = 0; draw < 6; ++draw) {
        const size_t other = random_bits() % count;
        if (ready[other]->priority > ready[chosen]->priority) chosen = other;
      }
  }
  Thread* thread = ready[chosen];
  ready[chosen] = ready.back();
  ready.pop_back();
  return thread;
}

// ------------------------------------------------------------------------------------------------ launches
cudaError_t check_limits(const Launch& launch) {
  const auto reject = [](cudaError_t error, const char* why) {
    g.message = std::string("launch rejected: ") + why;
    fprintf(stderr, "[cuda_sim] %s\n", g.message.c_str());
    return error;
  };
  constexpr size_t kDefaultSharedBytes = 49152;
  constexpr unsigned kThreadsOfBlock = 1024, kPortableCluster = 8, kLargestCluster = 16;
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  const unsigned cluster_blocks = cluster.x * cluster.y * cluster.z;
  if (threads == 0 || threads > kThreadsOfBlock || block.z > 64) {
    return reject(cudaErrorInvalidConfiguration,
                  "the block is empty, or has more than 1024 threads or a depth above 64");
  }
  if (blocks == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    return reject(cudaErrorInvalidConfiguration, "the grid is empty or too large");
  }
  const unsigned most = large_clusters.count(launch.kernel) ? kLargestCluster : kPortableCluster;
  if (cluster_blocks == 0 || cluster_blocks > most || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    return reject(cudaErrorInvalidClusterSize,
                  "the cluster does not divide the grid, or has more than 8 blocks (16 with the attribute)");
  }
  const auto limit = max_dynamic_shared.find(launch.kernel);
  if (launch.shared_bytes > (limit == max_dynamic_shared.end() ? kDefaultSharedBytes : limit->second)) {
    return reject(cudaErrorInvalidValue, "dynamic shared memory above the limit (is cudaFuncSetAttribute missing?)");
  }
  if (launch.cooperative && blocks > size_t(resident_blocks(threads, launch.shared_bytes)) * kMultiprocessors) {
    return reject(cudaErrorCooperativeLaunchTooLarge, "the blocks of the cooperative grid cannot all be resident");
  }
  return cudaSuccess;
}

std::unique_ptr<Cluster> start_cluster(unsigned index) {
  const dim3 grid = g.launch.grid, size = g.launch.cluster;
  const unsigned across = grid.x / size.x, down = grid.y / size.y;
  const unsigned x = index % across * size.x, y = index / across % down * size.y, z = index / (across * down) * size.z;
  const unsigned threads = g.launch.block.x * g.launch.block.y * g.launch.block.z;
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < size.x * size.y * size.z; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->rank = rank;
    block->index = uint3{x + rank % size.x, y + rank / size.x % size.y, z + rank / (size.x * size.y)};
    block->grid_index = block->index.x + grid.x * (block->index.y + grid.y * block->index.z);
    block->threads.resize(threads);
    block->dynamic_shared_bytes = g.launch.shared_bytes;
    start_block(block.get());
    cluster->alive += threads;
    cluster->blocks.push_back(std::move(block));
  }
  return cluster;
}

void retire(size_t position) {
  for (const auto& block : g.resident[position]->blocks) {
    protect_shared(block.get(), true);
    end_block(block.get());
  }
  g.resident[position] = std::move(g.resident.back());
  g.resident.pop_back();
}

// A block's shared memory ends with its last thread, though its cluster may live on.
void after_exit(Thread* thread) {
  if (thread->block->alive) return;
  Cluster* cluster = thread->block->cluster;
  protect_shared(thread->block, false);
  if (cluster->alive) return;
  const auto found = std::find_if(g.resident.begin(), g.resident.end(), [&](auto& c) { return c.get() == cluster; });
  retire(found - g.resident.begin());
}

void run_all_blocks() {
  const dim3 grid = g.launch.grid, size = g.launch.cluster;
  const size_t clusters = size_t{grid.x} * grid.y * grid.z / (size.x * size.y * size.z);
  std::vector<unsigned> order(clusters);
  for (size_t i = 0; i < clusters; ++i) order[i] = i;
  size_t window = clusters;
  if (!g.launch.cooperative) {  // any order, and no promise that more than one is resident
    for (size_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
    window = 1 + random_bits() % 8;
  }
  size_t next = 0;
  while (!g.failed) {
    while (next < clusters && g.resident.size() < window) g.resident.push_back(start_cluster(order[next++]));
    if (g.ready.empty() && g.spinning.empty() && g.in_flight.empty()) {
      if (!g.resident.empty()) record_failure(cudaErrorLaunchTimeout, deadlock_report());
      break;
    }
    if (!g.in_flight.empty() && (g.ready.empty() || random_bits() % 4 == 0)) {
      land_store();
      continue;
    }
    Thread* thread = pick();
    to_thread(thread);
    if (thread->state == State::exited) after_exit(thread);
  }
}

void prepare_launch(const Launch& launch, void (*call)(void*), void* arguments, size_t arguments_bytes) {
  g.launch = launch;
  g.call = call;
  g.arguments = arguments;
  g.arguments_bytes = arguments_bytes;
  ++g.launch_count;
  g.failed = false;
  g.error = cudaSuccess;
  g.message.clear();
  g.races = 0;
  g.random_state = (g.seed + 1) * 0x9E3779B97F4A7C15ull ^ 0x1234567;
  for (int i = 0; i < 4; ++i) random_bits();
  g.policy = static_cast<Policy>(g.seed % kPolicies);
  g.threads = launch.grid.x * launch.grid.y * launch.grid.z * launch.block.x * launch.block.y * launch.block.z;
  g.threads_alive = g.threads;
  g.grid_barrier = Barrier{};
  g.memory_barriers.clear();
  g.in_flight.clear();
  g.ready.clear();
  g.spinning.clear();
  g.idle_yields = 0;
  g.until_preempt = 1 + random_bits() % g.preempt_every;
  blockDim = launch.block;
  gridDim = launch.grid;
  check_launch();
}

}  // namespace

void initialise() {
  static bool done;
  if (done) return;
  done = true;
  g.check = instrumented;
  if (const char* seed = getenv("CUDA_SIM_SEED")) g.seed = strtoull(seed, nullptr, 0);
  if (const char* every = getenv("CUDA_SIM_PREEMPT")) g.preempt_every = strtoul(every, nullptr, 0);
  if (const char* site = getenv("CUDA_SIM_MUTATE")) g.mutated_site = atoi(site);
  find_plain_shared();
}

cudaError_t run(const Launch& launch, void (*call)(void*), void* arguments, size_t arguments_bytes) {
  initialise();
  if (const cudaError_t error = check_limits(launch); error != cudaSuccess) return error;
  prepare_launch(launch, call, arguments, arguments_bytes);
  find_host_stack();
  {
    const Handlers handlers;
    g.in_kernel = true;
    if (!sigsetjmp(leave_kernel, 1)) run_all_blocks();
    g.in_kernel = false;
  }
  g.current = nullptr;
  switch_plain_shared(nullptr);
  while (!g.resident.empty()) retire(g.resident.size() - 1);  // those that a failure left
  recycle_warp_operations();
  g.ready.clear();
  if (g.failed) return g.error;
  return g.races ? cudaErrorLaunchFailure : cudaSuccess;
}

void set_seed(uint64_t seed) {
  initialise();
  g.seed = seed;
}
void set_max_dynamic_shared(const void* kernel, int bytes) { max_dynamic_shared[kernel] = bytes; }
void allow_large_clusters(const void* kernel) { large_clusters.insert(kernel); }
int resident_blocks(size_t threads, size_t shared_bytes) {
  constexpr size_t kSharedBytesOfSm = 233472, kReservedSharedBytes = 1024, kThreadsOfSm = 2048, kBlocksOfSm = 32;
  return static_cast<int>(std::min({kBlocksOfSm, kThreadsOfSm / ((threads + 31) / 32 * 32),
                                    kSharedBytesOfSm / (shared_bytes + g.plain_shared_bytes + kReservedSharedBytes)}));
}
cudaError_t active_clusters(int* clusters, const Launch& launch) {
  constexpr int kMultiprocessorsOfPart = 16;
  if (const cudaError_t error = check_limits(launch); error != cudaSuccess) return error;
  const dim3 block = launch.block, cluster = launch.cluster;
  const int room = resident_blocks(size_t{block.x} * block.y * block.z, launch.shared_bytes);
  const int blocks = static_cast<int>(cluster.x * cluster.y * cluster.z);
  *clusters = kMultiprocessors / kMultiprocessorsOfPart * (kMultiprocessorsOfPart * room / blocks) +
              kMultiprocessors % kMultiprocessorsOfPart * room / blocks;
  return cudaSuccess;
}
void set_code_version(int version) { version_of_code = version; }
int code_version() { return version_of_code; }
const char* last_message() { return g.message.c_str(); }

// ------------------------------------------------------------------------------------------------ services
std::string name_of(const Thread* thread) {
  if (!thread) return "host";
  const uint3 b = thread->block->index, t = thread->index;
  char name[128];
  snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
  return name;
}

void make_ready(Thread* thread) {
  thread->state = State::ready;
  g.ready.push_back(thread);
}

void wait_in(State state, const char* file, int line) {
  g.current->state = state;
  g.current->file = file;
  g.current->line = line;
  to_scheduler(false);
}

void preempt() {
  if (!g.current) return;
  g.current->priority = random_bits() & 0xffffff;
  make_ready(g.current);
  to_scheduler(false);
}

void yield() {
  if (!g.current) return;
  if (++g.idle_yields > 200000 + uint64_t{2000} * g.threads) {
    fail(cudaErrorLaunchTimeout, "livelock: spinning without progress; %s", deadlock_report().c_str());
  }
  g.current->state = State::ready;
  g.spinning.push_back(g.current);
  to_scheduler(false);
}

std::string deadlock_report() {
  static const char* const kNames[] = {"ready",
                                       "running",
                                       "in a block barrier",
                                       "in a cluster barrier",
                                       "in mbarrier_wait",
                                       "in grid.sync()",
                                       "in a warp operation",
                                       "exited"};
  std::map<std::string, std::pair<int, std::string>> places;  // where: how many, and the first of them
  for (const auto& cluster : g.resident) {
    for (const auto& block : cluster->blocks) {
      for (const Thread& thread : block->threads) {
        std::string place = kNames[static_cast<int>(thread.state)];
        if (thread.state != State::exited)
          place += std::string(" at ") + thread.file + ":" + std::to_string(thread.line);
        auto& entry = places[place];
        if (!entry.first++) entry.second = name_of(&thread);
      }
    }
  }
  std::string report = "deadlock:";
  for (const auto& [place, entry] : places) {
    report += "\n    " + std::to_string(entry.first) + " thread(s) " + place + ", first " + entry.second;
  }
  return report;
}

void record_failure(cudaError_t error, const std::string& message) {
  if (g.failed) return;
  g.failed = true;
  g.error = error;
  g.message = message;
  fprintf(stderr, "[cuda_sim] seed %llu: %s\n", static_cast<unsigned long long>(g.seed), message.c_str());
}

void abandon_kernel() { siglongjmp(leave_kernel, 1); }

void fail(cudaError_t error, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  record_failure(error, (g.current ? name_of(g.current) + ": " : std::string()) + text);
  if (g.current) to_scheduler(true);
  abandon_kernel();
}

}  // namespace cuda_sim
