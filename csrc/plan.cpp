#include "plan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "cell/cells.h"
#include "spread.h"
#include "tiles.h"

namespace rnnfast::plan {
namespace {

template <class... Parts>
std::string text(const Parts&... parts) {
  const auto one = [](const auto& part) -> std::string {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return part;
    }
  };
  return (one(parts) + ...);
}

// ------------------------------------------------------------------------------------------------ persistent engines
constexpr int kCapability = 80;  // mma.sync of bfloat16 and TF32, cp.async
constexpr int64_t kRegisters = 65536;

// What no persistent engine runs.
std::string against_persistence(const Problem& problem, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (device.capability < kCapability)
    return text("it needs sm_", kCapability, ", the device is sm_", device.capability);
  if (device.registers < kRegisters) {
    return text("it needs ", kRegisters, " registers a multiprocessor, the device has ", device.registers);
  }
  if (problem.steps == 0 || problem.batch == 0) return "there is nothing to compute";
  if (problem.dtype == Dtype::f64) return "it has no float64";
  if (problem.projection) return "it has no projections (proj_size)";
  if (!cell_info(problem.cell).persistent) return "it has no kernels for this cell";
  if (problem.noise) return "it has no recurrent dropout or zoneout";
  if (problem.layer_norm) return "it has no layer normalisation";
  if (problem.steps >= kMost || problem.batch >= kMost) return "it counts steps and rows in 32 bits";
  return "";
}

Candidate consider_persistent_cta(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  const int gates = cell_info(problem.cell).gates, operand_bytes = static_cast<int>(size_of(problem.dtype));
  const bool tensor_cores = problem.dtype != Dtype::f32 || problem.tf32;
  cuda::CtaShape shape = cuda::cta_shape(gates, operand_bytes, tensor_cores, /*wide=*/false, problem.backward);
  if (!cuda::fits_cta_shape(problem.hidden_size, shape) && cuda::has_wide_cta_shape(gates, operand_bytes)) {
    shape = cuda::cta_shape(gates, operand_bytes, tensor_cores, /*wide=*/true, problem.backward);
  }
  if (!cuda::fits_cta_shape(problem.hidden_size, shape)) {
    return {text("a block holds ", shape.most_warps * cuda::kTileUnits,
                 " hidden units of this cell and dtype, the layer has ", problem.hidden_size),
            {}};
  }
  const int H = static_cast<int>(problem.hidden_size);
  Tile tile;
  tile.shared_bytes = cuda::cta_shared_bytes(H, gates, operand_bytes, shape, problem.backward);
  if (tile.shared_bytes > device.shared_bytes) {
    return {
        text("a block needs ", tile.shared_bytes, " bytes of shared memory, the device gives ", device.shared_bytes),
        {}};
  }
  tile.units = H;
  tile.rows = cuda::kTileRows;
  tile.threads = cuda::warps_of(H) * cuda::kWarpLanes;
  tile.blocks = static_cast<int>((problem.batch + cuda::kTileRows - 1) / cuda::kTileRows) * problem.directions;
  return {"", tile};
}

// ---------------------------------------------------------------------------------------------- spread over blocks
// What an engine that spreads W_hh over blocks may use.
struct SpreadLimits {
  int least_blocks, team_blocks;  // blocks that exchange the state, at least and at most
  cuda::ExchangeShared exchange;
  int64_t most_waves;                  // 1: all teams run at once; more: teams may wait for others to end
  bool scatters = false;               // backward may scatter sums
  int64_t step_clocks = 0;             // of a step that moves nothing; with one wave the same for every spread
  int64_t received_bytes_a_clock = 0;  // 0: that takes no longer with one spread than with another
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A team with few rows for each of its blocks leaves the GPU to others; many waves of them are slower than products
// over all rows at once.
constexpr int64_t kMostWaves = 4;
// A step of a cluster takes this long, however little it moves: products, a barrier, the cell and the push wait for
// each other. It is the floor that the engine is designed for, 0.35 us, at 2 GHz; to be calibrated on hardware.
constexpr int64_t kClusterStepClocks = 700;
constexpr int64_t kSharedBytesAClock = 128;  // of a multiprocessor
// Of a multiprocessor, from others: the throughput that "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture
// via Microbenchmarking" (2024) gives for clusters of two; to be calibrated as well.
constexpr int64_t kClusterBytesAClock = 13;

// The blocks that one multiprocessor holds, by registers and shared memory; at least one. A thread may have the
// registers that the kernels' launch bounds leave it, and these run out before the places for threads and blocks do.
int64_t blocks_of_a_multiprocessor(int threads, int64_t shared_bytes, const Device& device) {
  constexpr int64_t kRegistersOfAThread = kRegisters / (cuda::kSpreadMostWarps * cuda::kWarpLanes);
  constexpr int64_t kReservedBytes = 1024;  // of shared memory, for each block, by the system
  const int64_t blocks = std::min(device.registers / (kRegistersOfAThread * threads),
                                  (device.shared_bytes + kReservedBytes) / (shared_bytes + kReservedBytes));
  return std::max<int64_t>(blocks, 1);
}

// A spread, as a block sees it.
struct SpreadBlock {
  cuda::TeamSizes sizes;
  int64_t shared_bytes;
  int64_t moved_bytes;     // of a step, into and out of shared memory
  int64_t received_bytes;  // of a step, from other blocks
};

int64_t from_others(size_t bytes, int blocks) { return static_cast<int64_t>(bytes) * (blocks - 1) / blocks; }

SpreadBlock block_of(const Problem& problem, const cuda::Spread& spread, const SpreadLimits& limits) {
  const int gates = cell_info(problem.cell).gates, operand_bytes = static_cast<int>(size_of(problem.dtype));
  const int H = static_cast<int>(problem.hidden_size);
  const bool tensor_cores = problem.dtype != Dtype::f32 || problem.tf32;
  if (problem.backward && limits.scatters && cuda::scatters(gates, operand_bytes)) {
    const cuda::ScatterSizes sizes(spread, H, problem.batch, gates, operand_bytes, tensor_cores);
    const int group = cuda::scatter_group(tensor_cores);
    const int64_t moved = spread.row_tiles * static_cast<int64_t>(sizes.warps * sizes.weight_bytes) +
                          sizes.warps * divide_up(sizes.tiles, group) * static_cast<int64_t>(sizes.operand_bytes) +
                          2 * static_cast<int64_t>(sizes.received_bytes);
    return {sizes, static_cast<int64_t>(sizes.shared_bytes(limits.exchange)), moved,
            from_others(sizes.received_bytes, sizes.blocks)};
  }
  const cuda::SpreadSizes sizes(spread, H, problem.batch, gates, problem.backward, operand_bytes, tensor_cores);
  const int64_t moved = spread.row_tiles * static_cast<int64_t>(sizes.warps * sizes.weight_bytes) +
                        static_cast<int64_t>(sizes.sent_bytes) +
                        spread.unit_tiles * static_cast<int64_t>(sizes.vector_bytes) +
                        2 * static_cast<int64_t>(sizes.partial_bytes);
  return {sizes, static_cast<int64_t>(sizes.shared_bytes(limits.exchange)), moved,
          from_others(sizes.sent_bytes, sizes.blocks)};
}

// Tries every spread, and takes the one with the shortest step over all waves: its fixed part, what the blocks of a
// multiprocessor move through shared memory, which is weights that registers do not hold, vectors as products read
// them, sums, and what they receive from others. Of equals, the one with fewer waves. teams_alone(blocks) are the teams
// of so many blocks that run at once where each block has a multiprocessor to itself.
template <class TeamsAlone>
Candidate consider_spread(const Problem& problem, const Device& device, const SpreadLimits& limits,
                          const TeamsAlone& teams_alone) {
  const int64_t most_units = static_cast<int64_t>(limits.team_blocks) * cuda::kTileUnits * cuda::kSpreadMostWarps;
  if (problem.hidden_size > most_units) {
    return {text("its blocks hold ", most_units, " hidden units at most, the layer has ", problem.hidden_size), {}};
  }
  if (problem.hidden_size <= static_cast<int64_t>(limits.least_blocks - 1) * cuda::kTileUnits) {
    return {text("it divides the hidden units among ", limits.least_blocks, " blocks at least, of ", cuda::kTileUnits,
                 " each, the layer has ", problem.hidden_size),
            {}};
  }
  Tile best;
  std::pair<int64_t, int64_t> least;  // cost, in bytes that would pass in that time; waves
  int64_t least_bytes = 0;
  bool any_resident = false;
  for (int units = 1; units <= cuda::kSpreadMostWarps; ++units) {
    for (int splits = 1; units * splits <= cuda::kSpreadMostWarps; ++splits) {
      for (int rows = 1; rows <= splits; ++rows) {
        const cuda::Spread spread = {units, rows, splits};
        const SpreadBlock block = block_of(problem, spread, limits);
        const cuda::TeamSizes& sizes = block.sizes;
        const int64_t teams = static_cast<int64_t>(sizes.teams) * problem.directions;
        if (sizes.blocks < limits.least_blocks || sizes.blocks > limits.team_blocks) continue;
        const int64_t alone = teams_alone(sizes.blocks);
        if (alone == 0) continue;
        const int threads = sizes.warps * cuda::kWarpLanes;
        const int64_t shared_bytes = block.shared_bytes;
        // Blocks that all have to run at once, or wait for ever, do not count on room beside another.
        const int64_t room = limits.most_waves == 1 ? 1 : blocks_of_a_multiprocessor(threads, shared_bytes, device);
        const int64_t waves = divide_up(teams, alone * room);
        if (waves > limits.most_waves) continue;
        any_resident = true;
        if (least_bytes == 0 || shared_bytes < least_bytes) least_bytes = shared_bytes;
        if (shared_bytes > device.shared_bytes) continue;
        int64_t moved = block.moved_bytes;
        if (limits.received_bytes_a_clock != 0) {
          moved += block.received_bytes * kSharedBytesAClock / limits.received_bytes_a_clock;
        }
        const int64_t neighbours = divide_up(std::min(teams, alone * room), alone);  // blocks of one multiprocessor
        const std::pair cost(waves * (limits.step_clocks * kSharedBytesAClock + neighbours * moved), waves);
        if (best.blocks != 0 && cost >= least) continue;
        least = cost;
        best.blocks = static_cast<int>(sizes.blocks * teams);
        best.threads = threads;
        best.units = units * cuda::kTileUnits;
        best.rows = rows * cuda::kTileRows;
        best.shared_bytes = shared_bytes;
        best.spread = spread;
      }
    }
  }
  if (best.blocks != 0) return {"", best};
  if (any_resident) {
    return {text("a block needs ", least_bytes, " bytes of shared memory, the device gives ", device.shared_bytes), {}};
  }
  const std::string room = limits.most_waves > 1
                               ? text("the clusters that run at once have in ", limits.most_waves, " waves")
                               : text(limits.team_blocks, " blocks that run at once have");
  return {text(problem.batch, " rows of ", problem.hidden_size, " hidden units in ", problem.directions,
               problem.directions == 1 ? " direction" : " directions", " are more than ", room),
          {}};
}

Candidate consider_persistent_cluster(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  int most_blocks = cuda::kMostClusterBlocks;
  while (most_blocks > 0 && device.clusters[most_blocks - 1] == 0) --most_blocks;
  if (most_blocks < cuda::kClusterLeastBlocks) {
    return {text("it needs clusters of blocks (sm_90 and later, and code made for that), the device is sm_",
                 device.capability),
            {}};
  }
  return consider_spread(problem, device,
                         {cuda::kClusterLeastBlocks, most_blocks, cuda::kClusterShared, kMostWaves, /*scatters=*/true,
                          kClusterStepClocks, kClusterBytesAClock},
                         [&](int blocks) -> int64_t { return device.clusters[blocks - 1]; });
}

Candidate consider_persistent_grid(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  if (!device.cooperative) return {"the device has no cooperative launches", {}};
  return consider_spread(problem, device,
                         {cuda::kGridLeastBlocks, device.multiprocessors, cuda::kGridShared, /*most_waves=*/1},
                         [&](int blocks) -> int64_t { return device.multiprocessors / blocks; });
}

}  // namespace

Candidate consider(Engine engine, const Problem& problem, const Device& device) {
  switch (engine) {
    case Engine::persistent_cta:
      return consider_persistent_cta(problem, device);
    case Engine::persistent_cluster:
      return consider_persistent_cluster(problem, device);
    case Engine::persistent_grid:
      return consider_persistent_grid(problem, device);
    case Engine::stepwise:
      break;  // any GPU, any layer
  }
  return {};
}

Plan make_plan(const Problem& problem, const Device& device) {
  Plan plan;
  bool chosen = false;
  for (int i = 0; i < kEngines; ++i) {
    const auto engine = static_cast<Engine>(i);
    if (chosen) {
      plan.against[i] = text(kEngineNames[static_cast<int>(plan.engine)], " can run it");
      continue;
    }
    const Candidate candidate = consider(engine, problem, device);
    plan.against[i] = candidate.reason;
    if (!candidate.reason.empty()) continue;
    chosen = true;
    plan.engine = engine;
    plan.tile = candidate.tile;
  }
  return plan;
}

}  // namespace rnnfast::plan
