// Owns: which CUDA engine runs a layer, with which tile, and what speaks against the others. A pure function of the
// layer's shape and of a device's properties.
// Must not know: torch, CUDA headers, whether there is a device.
#pragma once

#include <array>
#include <string>

#include "params.h"

namespace rnnfast::plan {

// In order of preference: the nearer h stays to its weights, the sooner a step ends.
enum class Engine : int { persistent_cta, persistent_cluster, persistent_grid, stepwise };
constexpr int kEngines = 4;
constexpr const char* kEngineNames[kEngines] = {"persistent_cta", "persistent_cluster", "persistent_grid", "stepwise"};

struct Device {
  int capability = 0;  // 90 is sm_90
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of a block, at most
  int64_t registers = 0;     // of a multiprocessor, 32 bits each
  bool cooperative = false;  // launches whose blocks are all resident
  // Of 1, 2, .. blocks: how many run at once, each block with a multiprocessor to itself; 0: a size not offered. Fewer
  // than multiprocessors / blocks, for those of a cluster lie in one part of the GPU.
  std::array<int, cuda::kMostClusterBlocks> clusters = {};
};

// One call of a layer, forward or backward. The letters are those of params.h.
struct Problem {
  CellKind cell{};
  Dtype dtype{};
  bool tf32 = false;
  int64_t steps = 0, batch = 0, hidden_size = 0;  // T, B, H
  bool projection = false;
  int directions = 1;
  bool backward = false;
  bool noise = false;  // recurrent dropout or zoneout
  bool layer_norm = false;
};

// How an engine divides a layer; stepwise does not.
struct Tile {
  int blocks = 0, threads = 0;  // of a launch; of a block
  int units = 0, rows = 0;      // hidden units of a block; batch rows of the blocks that share a state
  int64_t shared_bytes = 0;     // dynamic shared memory of a block
  cuda::Spread spread;          // persistent_cluster and persistent_grid
};

// What an engine says of a problem: why it cannot run it, or else how it would.
struct Candidate {
  std::string reason;  // empty: it can
  Tile tile;
};
Candidate consider(Engine engine, const Problem& problem, const Device& device);

struct Plan {
  Engine engine{};
  Tile tile;
  std::array<std::string, kEngines> against;  // why not; empty for the engine itself
};
// The first engine that can run it. stepwise always can.
Plan make_plan(const Problem& problem, const Device& device);

}  // namespace rnnfast::plan
