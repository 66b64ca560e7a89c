// Owns: a team of threads that runs one function together, and the barrier between its steps.
// Must not know: layers, tensors.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnfast::cpu {

inline void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A step lasts a few microseconds, so waiting threads spin; one that waits unusually long (more threads than cores, or
// a preempted partner) gives its core away.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
      if (++spins < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 1 << 12;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Calls f(rank, size) on up to `threads` threads at once; size is what the runtime gave.
template <class F>
void run_team(int threads, const F& f) {
  if (threads <= 1 || omp_in_parallel()) {
    f(0, 1);
    return;
  }
  // No num_threads clause: changing the size from call to call makes the runtime rebuild its pool. The runtime's own
  // limit is torch's number of threads.
#pragma omp parallel
  {
    const int size = omp_get_num_threads() < threads ? omp_get_num_threads() : threads;
    const int rank = omp_get_thread_num();
    if (rank < size) f(rank, size);
  }
}

// The part of `count` items that falls to `rank` of `size`.
struct Share {
  int64_t begin = 0, end = 0;
  Share() = default;
  Share(int64_t count, int rank, int size) : begin(count * rank / size), end(count * (rank + 1) / size) {}
};

}  // namespace rnnfast::cpu
