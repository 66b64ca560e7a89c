// Owns: the choice of instruction set, once per process or by name.
// Must not know: how an engine works.

#include <atomic>
#include <cstring>

#include "engine.h"

namespace rnnfast::cpu {
namespace {

// From the best to the one that always runs.
const Engine* const kEngines[] = {
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

const Engine* best() {
  for (const Engine* engine : kEngines)
    if (runs_here(engine->name)) return engine;
  return &generic::kEngine;
}

std::atomic<const Engine*>& current() {
  static std::atomic<const Engine*> engine{best()};
  return engine;
}

const Engine& engine() { return *current().load(std::memory_order_relaxed); }

}  // namespace

const char* instruction_set() { return engine().name; }

bool set_instruction_set(const char* name) {
  for (const Engine* candidate : kEngines)
    if (!strcmp(candidate->name, name) && runs_here(name)) {
      current().store(candidate, std::memory_order_relaxed);
      return true;
    }
  return false;
}

size_t forward_workspace_bytes(const LayerForward& layer, int threads) {
  return engine().forward_workspace_bytes(layer, threads);
}
void forward(const LayerForward& layer, void* workspace, int threads) { engine().forward(layer, workspace, threads); }
size_t backward_workspace_bytes(const LayerBackward& layer, int threads) {
  return engine().backward_workspace_bytes(layer, threads);
}
void backward(const LayerBackward& layer, void* workspace, int threads) {
  engine().backward(layer, workspace, threads);
}

}  // namespace rnnfast::cpu
