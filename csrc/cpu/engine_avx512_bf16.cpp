// Owns: the CPU engine compiled for avx512_bf16.

#if defined(__x86_64__)

// Everything from the standard library comes before the target pragma: an inline function compiled for this instruction
// set here could otherwise be the copy that the linker keeps for the whole program.
#include "engine_headers.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2")
#endif

#define RNNFAST_ISA avx512_bf16
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_HAS_AVX512
#define RNNFAST_HAS_AVX512_BF16
#ifndef RNNFAST_OWN_CELL  // which has no other engine
#define RNNFAST_BF16_ONLY
#endif
#include "engine_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
