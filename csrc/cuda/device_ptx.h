// Owns: all inline PTX and everything else that a kernel cannot say the same way to nvcc and to the simulator in
// tests/cuda_sim. Each wrapper has two bodies, the instruction and its model; no other file asks which compiler it is.
// Must not know: kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#ifdef CUDA_SIM
#include <cuda_sim/matrix.h>
#else
// A static shared array: RNNFAST_SHARED(float, tile, [16][17]).
#define RNNFAST_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#endif

namespace rnnfast::cuda::device {

#ifndef CUDA_SIM
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// The block's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef CUDA_SIM
  return static_cast<char*>(cuda_sim::dynamic_shared());
#else
  extern __shared__ __align__(128) char rnnfast_dynamic_shared[];
  return rnnfast_dynamic_shared;
#endif
}

// Lays out dynamic shared memory. The same code sizes the launch, with a null base, and hands out the pointers; the
// simulator puts a red zone after each array.
class SharedLayout {
 public:
  __host__ __device__ explicit SharedLayout(char* base) : base_(base) {}

  template <class T>
  __host__ __device__ T* take(size_t count) {
    bytes_ = align(bytes_);
#ifdef __CUDA_ARCH__  // where the choice would hide from the compiler that the array is in shared memory
    T* array = reinterpret_cast<T*>(base_ + bytes_);
#else
    T* array = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
#endif
    bytes_ += count * sizeof(T);
#ifdef CUDA_SIM
    const size_t end = bytes_;
    bytes_ = align(bytes_) + kAlignment;
    if (base_) cuda_sim::red_zone(base_ + end, bytes_ - end);
#endif
    return array;
  }
  __host__ __device__ size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 16;
  __host__ __device__ static size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  char* base_;
  size_t bytes_ = 0;
};

// The value, of which the compiler knows nothing more. It would take a word apart where it was loaded, and so wait for
// it there.
__device__ __forceinline__ uint32_t opaque(uint32_t word) {
#ifndef CUDA_SIM
  asm("" : "+r"(word));
#endif
  return word;
}

__device__ __forceinline__ int opaque(int word) { return static_cast<int>(opaque(static_cast<uint32_t>(word))); }
// Likewise a pointer to global memory, which the compiler would compute again wherever it is used.
template <class T>
__device__ __forceinline__ T* opaque(T* pointer) {
#ifdef CUDA_SIM
  return pointer;
#else
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#endif
}

// d = a b + c on a warp's tile, 16 x 8 x 16, float accumulators; fragments as the PTX ISA lays them out.
template <bool kBfloat16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
#ifdef CUDA_SIM
  cuda_sim::mma_m16n8k16<kBfloat16>(d, a, b, c);
#else
#define RNNFAST_MMA(type)                                                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))
  if constexpr (kBfloat16) {
    RNNFAST_MMA("bf16");
  } else {
    RNNFAST_MMA("f16");
  }
#undef RNNFAST_MMA
#endif
}

// d = a b + c on a warp's tile, 16 x 8 x 8, float accumulators; a and b hold floats rounded to TF32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 const float (&c)[4]) {
#ifdef CUDA_SIM
  cuda_sim::mma_m16n8k8_tf32(d, a, b, c);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// The nearest TF32 number (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ float round_to_tf32(float x) {
#ifdef CUDA_SIM
  return cuda_sim::round_to_tf32(x);
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
#endif
}

// 2^x and 1 / x, each with the hardware's one instruction: a relative error of 2^-22, subnormal numbers taken as zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef CUDA_SIM
  return cuda_sim::power_of_two(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef CUDA_SIM
  return 1.0f / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// A word of 4 or 8 bytes from global memory, if it is wanted, and into it. Without a branch: the compiler would take
// one around several. It may move the load past stores, too, so a kernel may write there only what it computes from
// this very word.
template <class Word>
__device__ __forceinline__ void load_if(bool wanted, const Word* from, Word& to) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8, "one instruction");
#ifdef CUDA_SIM
  if (wanted) to = *from;
#else
#define RNNFAST_LOAD_IF(type, constraint)                                     \
  asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global." type " %0, [%1];}" \
      : "+" constraint(to)                                                    \
      : "l"(from), "r"(static_cast<int>(wanted)))
  if constexpr (sizeof(Word) == 4) {
    RNNFAST_LOAD_IF("b32", "r");
  } else {
    RNNFAST_LOAD_IF("b64", "l");
  }
#undef RNNFAST_LOAD_IF
#endif
}
// Of a byte, with zeros above it.
__device__ __forceinline__ void load_byte_if(bool wanted, const void* from, unsigned& to) {
#ifdef CUDA_SIM
  if (wanted) to = *static_cast<const unsigned char*>(from);
#else
  asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.u8 %0, [%1];}"
      : "+r"(to)
      : "l"(from), "r"(static_cast<int>(wanted)));
#endif
}
template <class Word>
__device__ __forceinline__ void store_if(bool wanted, Word from, Word* to) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8, "one instruction");
#ifdef CUDA_SIM
  if (wanted) *to = from;
#else
#define RNNFAST_STORE_IF(type, constraint)                                                                          \
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global." type " [%0], %1;}" ::"l"(to), constraint(from), \
               "r"(static_cast<int>(wanted))                                                                        \
               : "memory")
  if constexpr (sizeof(Word) == 4) {
    RNNFAST_STORE_IF("b32", "r");
  } else {
    RNNFAST_STORE_IF("b64", "l");
  }
#undef RNNFAST_STORE_IF
#endif
}

// x between -limit and limit; NaN stays NaN.
__device__ __forceinline__ float clamp(float x, float limit) {
#ifdef CUDA_SIM
  return x > limit ? limit : x < -limit ? -limit : x;
#else
  float result;
  asm("min.NaN.f32 %0, %1, %2;\n\tmax.NaN.f32 %0, %0, %3;" : "=&f"(result) : "f"(x), "f"(limit), "f"(-limit));
  return result;
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory; lane l points to row l % 8 of matrix l / 8, 16-byte aligned.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
#ifdef CUDA_SIM
  cuda_sim::ldmatrix<4>(registers, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Copies 16 bytes from global to shared memory in the background; both 16-byte aligned.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
#ifdef CUDA_SIM
  cuda_sim::cp_async(shared, global, 16, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#endif
}
// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_SIM
  cuda_sim::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_SIM
  cuda_sim::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// One GPU-wide flag: what was written before the release is seen after the acquire that reads it.
__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
#ifdef CUDA_SIM
  return cuda_sim::atomic(
      const_cast<unsigned*>(flag), [](unsigned value) { return value; }, cuda_sim::kRead | cuda_sim::kAcquire);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#endif
}
__device__ __forceinline__ void add_release(unsigned* flag, unsigned value) {
#ifdef CUDA_SIM
  cuda_sim::atomic(
      flag, [=](unsigned old) { return old + value; }, cuda_sim::kRead | cuda_sim::kWrite | cuda_sim::kRelease);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------ clusters, sm_90
// Blocks of a cluster see each other's shared memory. Elsewhere than on sm_90 these do not exist: kernels that use them
// are empty there.
#if defined(CUDA_SIM) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// The place that `shared` is in this block, in the block of the given rank.
template <class T>
class RemoteShared {
 public:
  __device__ __forceinline__ RemoteShared(T* shared, unsigned rank) {
#if defined(CUDA_SIM)
    place_ = shared;
    rank_ = rank;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place_) : "r"(shared_address(shared)), "r"(rank));
#endif
  }

  // Stores 16 bytes, aligned, so many elements behind the place, in the background. They count at the mbarrier, which
  // is in the same block. The cluster has two blocks at least.
  __device__ __forceinline__ void store_async(int offset, const uint4& value,
                                              const RemoteShared<uint64_t>& mbarrier) const {
    store_async_if(true, offset, value, mbarrier);
  }
  // Without a branch, as above.
  __device__ __forceinline__ void store_async_if(bool wanted, int offset, const uint4& value,
                                                 const RemoteShared<uint64_t>& mbarrier) const {
#if defined(CUDA_SIM)
    if (wanted) cuda_sim::store_async(mapped() + offset, &value, sizeof value, mbarrier.mapped());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %6, 0; "
        "@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];}" ::"r"(
            place_ + static_cast<unsigned>(offset * static_cast<int>(sizeof(T)))),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(mbarrier.place_), "r"(static_cast<int>(wanted))
        : "memory");
#endif
  }

 private:
  template <class>
  friend class RemoteShared;
#if defined(CUDA_SIM)
  // Only where it is used: the block may have ended.
  T* mapped() const { return static_cast<T*>(cuda_sim::map_rank(place_, rank_)); }

  T* place_;
  unsigned rank_;
#else
  unsigned place_;
#endif
};

// An mbarrier, of which a phase ends when one thread has said how many bytes to expect, and they are there; bytes may
// be there first. One thread initialises it, and others use it behind a barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier) {
#if defined(CUDA_SIM)
  cuda_sim::mbarrier_init(mbarrier, 1);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(mbarrier)) : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
#if defined(CUDA_SIM)
  cuda_sim::mbarrier_arrive_expect(mbarrier, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
               : "memory");
#endif
}
// Until the phase has ended whose number, from 0, is so modulo 2. Its bytes are seen behind it, and who sent them has
// read what they were made of; nothing else that it wrote need be seen. The fence is for shared memory alone: that of
// an acquire throws away the first-level cache, too.
__device__ __forceinline__ void mbarrier_wait_acquire(uint64_t* mbarrier, unsigned parity) {
#if defined(CUDA_SIM)
  cuda_sim::mbarrier_wait(mbarrier, parity);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
#define RNNFAST_WAIT "relaxed"
#define RNNFAST_ACQUIRE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define RNNFAST_WAIT "acquire"
#define RNNFAST_ACQUIRE ""
#endif
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity." RNNFAST_WAIT
                 ".cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(mbarrier)), "r"(parity)
                 : "memory");
  } while (!done);
  asm volatile(RNNFAST_ACQUIRE ::: "memory");
#undef RNNFAST_WAIT
#undef RNNFAST_ACQUIRE
#endif
}

// The two halves of the cluster's barrier, which every thread calls in turn: what threads wrote before they arrived is
// seen by all behind the wait.
__device__ __forceinline__ void cluster_arrive_release() {
#if defined(CUDA_SIM)
  cuda_sim::cluster_arrive();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait_acquire() {
#if defined(CUDA_SIM)
  cuda_sim::cluster_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

}  // namespace rnnfast::cuda::device
