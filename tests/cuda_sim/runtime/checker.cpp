// Owns: the checks of every access of a kernel: races by vector clocks, uninitialised reads, bounds, host pointers.
// It is a run-time library of our own for the hooks of g++ -fsanitize=thread: kernel files are compiled with that flag,
// this file and the link without it.
// Must not know: kernels, how the scheduler chooses.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <set>

#include "state.h"

namespace cuda_sim {
namespace {

// ------------------------------------------------------------------------------------------------ shadow memory
// For each 4-byte word of the arena: its last few accesses, and which of its bytes are allocated and initialised.
struct Access {
  static constexpr int kTimeShift = 20, kLaunchShift = 44, kBytesShift = 56;
  static constexpr uint64_t kWrite = 1ull << 60, kAtomic = 1ull << 61, kValid = 1ull << 62;
  static constexpr uint64_t kThreadMask = 0xfffff, kTimeMask = 0xffffff, kLaunchMask = 0xfff;
  uint64_t bits = 0;

  uint32_t thread() const { return bits & kThreadMask; }
  uint32_t time() const { return bits >> kTimeShift & kTimeMask; }
  uint64_t launch() const { return bits >> kLaunchShift & kLaunchMask; }
  unsigned bytes() const { return bits >> kBytesShift & 15; }
  bool write() const { return bits & kWrite; }
  bool atomic() const { return bits & kAtomic; }
  bool valid() const { return bits & kValid; }
};

constexpr int kAccesses = 4;
struct Cell {
  Access accesses[kAccesses];
  uint32_t code[kAccesses];  // where in the image the access stands
};

constexpr uint8_t kAllocated = 1, kInitialised = 16;  // of the word's first byte; the others' lie above
Cell* cells;
uint8_t* states;

template <class T>
T* map_zeros(size_t count) {
  return static_cast<T*>(
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void map_shadow() {
  if (cells) return;
  cells = map_zeros<Cell>(g.arena_bytes / 4);
  states = map_zeros<uint8_t>(g.arena_bytes / 4);
}

bool in_arena(const void* address) {
  return g.arena && static_cast<size_t>(static_cast<const char*>(address) - g.arena) < g.arena_bytes;
}
bool in_plain_shared(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - g.plain_shared) < g.plain_shared_bytes;
}
// The shadow of a __shared__ variable is that of its place in the running block's image.
const char* shadowed(const void* address) {
  const char* p = static_cast<const char*>(address);
  return g.current && in_plain_shared(p) ? g.current->block->plain_shared + (p - g.plain_shared) : p;
}

void change_states(const void* where, size_t bytes, int set, int clear) {
  if (!g.check) return;
  const char* address = shadowed(where);
  if (!in_arena(address)) return;
  map_shadow();
  const size_t first = address - g.arena;
  for (size_t i = first; i < first + bytes; ++i) {
    uint8_t& state = states[i / 4];
    state = (state | set << i % 4) & ~(clear << i % 4);
  }
}

// ------------------------------------------------------------------------------------------------ reports
std::set<std::pair<uint32_t, uint32_t>> reported;

const Dl_info& image() {
  static const Dl_info info = [] {
    Dl_info found{};
    dladdr(reinterpret_cast<void*>(&map_shadow), &found);
    return found;
  }();
  return info;
}

uint32_t code_offset(const void* return_address) {
  return static_cast<const char*>(return_address) - static_cast<const char*>(image().dli_fbase) - 1;
}

std::string source_line(uint32_t code) {
  char command[600], line[400];
  snprintf(command, sizeof command, "addr2line -Cse %s 0x%x 2>/dev/null", image().dli_fname, code);
  std::string text = "?";
  if (FILE* pipe = popen(command, "r")) {
    if (fgets(line, sizeof line, pipe)) text = line;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

std::string describe_access(Access access, uint32_t code) {
  const uint32_t threads = g.launch.block.x * g.launch.block.y * g.launch.block.z;
  return std::string(access.atomic() ? "atomic " : "") + (access.write() ? "write" : "read") + " by block " +
         std::to_string(access.thread() / threads) + " thread " + std::to_string(access.thread() % threads) + " at " +
         source_line(code);
}

void report_race(Access before, uint32_t before_code, Access now, uint32_t code, const char* address) {
  ++g.races;
  if (!reported.insert(std::minmax(before_code, code)).second && g.races > 1) return;
  const std::string message = "RACE: " + describe_access(now, code) + "  and  " + describe_access(before, before_code) +
                              "  (" + describe(address) + ")";
  if (g.message.empty()) g.message = message;
  constexpr size_t kMost = 8;
  if (reported.size() <= kMost) {
    fprintf(stderr, "[cuda_sim] seed %llu: %s\n", static_cast<unsigned long long>(g.seed), message.c_str());
  }
}

// ------------------------------------------------------------------------------------------------ races
// One access to one word, against those remembered of it. The new access replaces one that can tell no more: of another
// launch, its own thread's weaker one, or one that happened before it; else a random one.
void check_word(size_t word, unsigned bytes, bool write, bool atomic, uint32_t code) {
  Thread* thread = g.current;
  const char* address = g.arena + word * 4;
  uint8_t& state = states[word];
  if ((state & bytes) != bytes) {
    fail(cudaErrorIllegalAddress, "%s outside an allocation at %s: %s", write ? "write" : "read",
         source_line(code).c_str(), describe(address).c_str());
  }
  if (!write && (state >> 4 & bytes) != bytes) {
    fail(cudaErrorIllegalAddress, "read of uninitialised memory at %s: %s", source_line(code).c_str(),
         describe(address).c_str());
  }
  if (write) state |= bytes << 4;

  const uint64_t launch = g.launch_count & Access::kLaunchMask;
  const uint32_t* known = thread->known ? thread->known->data() : nullptr;
  const Access now{thread->grid_index | (thread->time & Access::kTimeMask) << Access::kTimeShift |
                   launch << Access::kLaunchShift | static_cast<uint64_t>(bytes) << Access::kBytesShift |
                   (write ? Access::kWrite : 0) | (atomic ? Access::kAtomic : 0) | Access::kValid};
  Cell& cell = cells[word];
  int slot = -1;
  for (int k = 0; k < kAccesses; ++k) {
    const Access before = cell.accesses[k];
    if (!before.valid() || before.launch() != launch) {
      slot = k;
      continue;
    }
    const bool covered = (before.bytes() & ~bytes) == 0 && (write || !before.write());
    if (before.thread() == thread->grid_index) {
      if (covered && (!atomic || before.atomic())) slot = k;
    } else if (known && known[before.thread()] >= before.time()) {
      if (covered) slot = k;
    } else if ((before.bytes() & bytes) && (write || before.write()) && !(atomic && before.atomic())) {
      report_race(before, cell.code[k], now, code, address);
      slot = k;
    }
  }
  if (slot < 0) slot = random_bits() % kAccesses;
  cell.accesses[slot] = now;
  cell.code[slot] = code;
}

// ------------------------------------------------------------------------------------------------ vector clocks
void join(Clock& into, const Clock& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  auto joined = std::make_shared<std::vector<uint32_t>>(*into);
  for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*from)[i]);
  into = joined;
}

// Adds what a thread knows at one of its times.
void add(ClockSum& sum, const Clock& thread_knows, uint32_t thread, uint32_t time) {
  const auto* known = thread_knows.get();
  if (!sum.clock) {
    sum.clock =
        known ? std::make_shared<std::vector<uint32_t>>(*known) : std::make_shared<std::vector<uint32_t>>(g.threads);
    sum.last = known;
  } else if (known && known != sum.last) {
    for (size_t i = 0; i < known->size(); ++i) (*sum.clock)[i] = std::max((*sum.clock)[i], (*known)[i]);
    sum.last = known;
  }
  uint32_t& own = (*sum.clock)[thread];
  own = std::max(own, time);
}

// What a thread learns that reads from an atomic variable with acquire.
struct AtomicVariable {
  uintptr_t address;
  ClockSum released;
};
std::vector<AtomicVariable> atomic_variables;

ClockSum& released_by(const void* address) {
  const auto key = reinterpret_cast<uintptr_t>(address);
  for (AtomicVariable& variable : atomic_variables) {
    if (variable.address == key) return variable.released;
  }
  atomic_variables.push_back({key, {}});
  return atomic_variables.back().released;
}

}  // namespace

void mark_allocated(const void* address, size_t bytes) { change_states(address, bytes, kAllocated, kInitialised); }
void mark_freed(const void* address, size_t bytes) { change_states(address, bytes, 0, kAllocated | kInitialised); }
void mark_initialised(const void* address, size_t bytes, bool initialised) {
  change_states(address, bytes, initialised ? kInitialised : 0, initialised ? 0 : kInitialised);
}
void red_zone(const void* address, size_t bytes) { mark_freed(address, bytes); }

bool is_initialised(const void* where, size_t bytes) {
  if (!g.check || !in_arena(where)) return true;
  const size_t first = static_cast<const char*>(where) - g.arena;
  for (size_t i = first; i < first + bytes; ++i) {
    if (!(states[i / 4] & kInitialised << i % 4)) return false;
  }
  return true;
}

void check_launch() {
  atomic_variables.clear();
  if (g.check) map_shadow();
}

void check_access(const void* where, size_t bytes, bool write, bool atomic, void* caller) {
  const Thread* thread = g.current;
  if (!g.check || !thread || !g.in_kernel || !bytes) return;
  const char* p = static_cast<const char*>(where);
  if (static_cast<size_t>(p - thread->stack) < kStackBytes) return;
  const uint32_t code = code_offset(caller);
  const char* address = shadowed(where);
  if (!in_arena(address)) {
    const bool parameter = static_cast<size_t>(p - static_cast<const char*>(g.arguments)) < g.arguments_bytes;
    Dl_info variable{};
    if (parameter || dladdr(where, &variable)) return;  // __constant__ and __device__ variables lie in the program
    fail(cudaErrorIllegalAddress, "kernel %s host memory %p at %s", write ? "writes" : "reads", where,
         source_line(code).c_str());
  }
  const size_t first = address - g.arena, end = first + bytes;
  for (size_t at = first; at < end;) {
    const unsigned in_word = at % 4;
    const size_t count = std::min<size_t>(4 - in_word, end - at);
    check_word(at / 4, ((1u << count) - 1) << in_word, write, atomic, code);
    at += count;
  }
  if (--g.until_preempt <= 0) {
    g.until_preempt = 1 + random_bits() % (2 * g.preempt_every);
    preempt();
  }
}

void release(Thread* thread, ClockSum& sum) {
  if (!g.check) return;
  add(sum, thread->known, thread->grid_index, thread->time++);
}

void release_as_of(const StoreInFlight& store, ClockSum& sum) {
  if (!g.check) return;
  add(sum, store.known, store.thread, store.time);
}

void acquire(Thread* thread, const Clock& clock) {
  if (!g.check || !clock || thread->known == clock) return;
  const bool dominates = !thread->known || std::equal(clock->begin(), clock->end(), thread->known->begin(),
                                                      [](uint32_t a, uint32_t b) { return a >= b; });
  if (dominates) {
    thread->known = clock;
  } else {
    join(thread->known, clock);
  }
}

void check_atomic(const void* address, size_t bytes, int flags, void* caller) {
  if (!g.check) return;
  Thread* thread = g.current;
  check_access(address, bytes, flags & kWrite, true, caller);
  ClockSum& variable = released_by(address);
  if (flags & kRead) {
    if (flags & kAcquire) {
      acquire(thread, variable.clock);
    } else {
      join(thread->fence_pending.clock, variable.clock);  // a fence after a relaxed read acquires
    }
  }
  if (flags & kWrite) {
    Clock released = flags & kRead ? variable.clock : nullptr;  // read-modify-write goes on with the release sequence
    if (flags & kRelease) {
      ClockSum own;
      release(thread, own);
      join(released, own.clock);
    } else {
      join(released, thread->fence_released.clock);
    }
    variable.clock = released;
    variable.last = nullptr;
  }
}

void check_fence(Thread* thread) {
  if (!g.check || !thread) return;
  acquire(thread, thread->fence_pending.clock);
  ClockSum own;
  release(thread, own);
  thread->fence_released = own;
}

}  // namespace cuda_sim

// ------------------------------------------------------------------------------------------------ hooks
using namespace cuda_sim;

namespace {

void plain(void* address, size_t bytes, bool write, void* caller) {
  check_access(address, bytes, write, false, caller);
}

// A volatile access is a relaxed atomic one, and a loop may spin on it.
void relaxed(void* address, size_t bytes, bool write, void* caller) {
  if (!g.current) return;
  if (!write) yield();
  check_atomic(address, bytes, write ? kWrite : kRead, caller);
}

}  // namespace

#define CALLER __builtin_return_address(0)
#define HOOKS(n)                                                          \
  void __tsan_read##n(void* p) { plain(p, n, false, CALLER); }            \
  void __tsan_write##n(void* p) { plain(p, n, true, CALLER); }            \
  void __tsan_unaligned_read##n(void* p) { plain(p, n, false, CALLER); }  \
  void __tsan_unaligned_write##n(void* p) { plain(p, n, true, CALLER); }  \
  void __tsan_volatile_read##n(void* p) { relaxed(p, n, false, CALLER); } \
  void __tsan_volatile_write##n(void* p) { relaxed(p, n, true, CALLER); }

extern "C" {
void __tsan_init() { instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, long n) { plain(p, n, false, CALLER); }
void __tsan_write_range(void* p, long n) { plain(p, n, true, CALLER); }
void __tsan_vptr_update(void** p, void* value) { *p = value; }
}
