// Owns: the choice of instruction set, once per process or by name.
// Must not know: how an engine works.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>

#include "engine.h"

namespace rnnfast::cpu {
namespace {

// From the best to the one that always runs.
const EngineTable* const kEngines[] = {
#if defined(__x86_64__)
    &avx512_bf16::kEngine,
    &avx512::kEngine,
    &avx2::kEngine,
#endif
    &generic::kEngine,
};

bool runs_here(const char* name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(name, "avx2")) return avx2;
  if (!strcmp(name, "avx512")) return avx512;
  if (!strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !strcmp(name, "generic");
}

const EngineTable* best() {
  for (const EngineTable* engine : kEngines)
    if (runs_here(engine->name)) return engine;
  return &generic::kEngine;
}

std::atomic<const EngineTable*>& current() {
  static std::atomic<const EngineTable*> engine{best()};
  return engine;
}

}  // namespace

const EngineTable& engine(Dtype dtype) {
  const EngineTable* in_use = current().load(std::memory_order_relaxed);
#if defined(__x86_64__)
  if (in_use == &avx512_bf16::kEngine && dtype != Dtype::bf16) return avx512::kEngine;
#endif
  return *in_use;
}

const char* instruction_set() { return current().load(std::memory_order_relaxed)->name; }

bool has_instruction_set(const char* name) {
  return std::any_of(std::begin(kEngines), std::end(kEngines),
                     [&](const EngineTable* engine) { return !strcmp(engine->name, name) && runs_here(name); });
}

bool set_instruction_set(const char* name) {
  for (const EngineTable* candidate : kEngines)
    if (!strcmp(candidate->name, name) && runs_here(name)) {
      current().store(candidate, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace rnnfast::cpu
