#include "plan.h"

#include <limits>

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
  int team_blocks;  // blocks that exchange the state
  int all_blocks;   // blocks of a launch that run at once; one fills a multiprocessor's registers
  int copies;       // of the exchanged vectors in shared memory
  bool waves;       // whether teams may wait for others to end
};

// A team with few rows for each of its blocks leaves the GPU to others; many waves of them are slower than products
// over all rows at once.
constexpr int64_t kMostWaves = 4;

// Tries every spread, and takes the one that moves the least through a block's shared memory in a step, over all waves:
// weights that registers do not hold, the vectors as products read them, sums.
Candidate consider_spread(const Problem& problem, const Device& device, const SpreadLimits& limits) {
  const int64_t most_units = static_cast<int64_t>(limits.team_blocks) * cuda::kTileUnits * cuda::kSpreadMostWarps;
  if (problem.hidden_size > most_units) {
    return {text("its blocks hold ", most_units, " hidden units at most, the layer has ", problem.hidden_size), {}};
  }
  const int gates = cell_info(problem.cell).gates, operand_bytes = static_cast<int>(size_of(problem.dtype));
  const int H = static_cast<int>(problem.hidden_size);
  const bool tensor_cores = problem.dtype != Dtype::f32 || problem.tf32;
  Tile best;
  int64_t least_cost = 0, least_bytes = 0;
  bool any_resident = false;
  for (int units = 1; units <= cuda::kSpreadMostWarps; ++units) {
    for (int splits = 1; units * splits <= cuda::kSpreadMostWarps; ++splits) {
      for (int rows = 1; rows <= splits; ++rows) {
        const cuda::Spread spread = {units, rows, splits};
        const cuda::SpreadSizes sizes(spread, H, problem.batch, gates, problem.backward, operand_bytes, tensor_cores);
        const int64_t teams = static_cast<int64_t>(sizes.teams) * problem.directions;
        const int64_t teams_at_once = limits.all_blocks / sizes.blocks;
        if (sizes.blocks > limits.team_blocks || teams_at_once == 0) continue;
        const int64_t waves = (teams + teams_at_once - 1) / teams_at_once;
        if (waves > (limits.waves ? kMostWaves : 1)) continue;
        any_resident = true;
        const auto shared_bytes = static_cast<int64_t>(sizes.shared_bytes(limits.copies));
        if (least_bytes == 0 || shared_bytes < least_bytes) least_bytes = shared_bytes;
        if (shared_bytes > device.shared_bytes) continue;
        const int64_t moved = rows * static_cast<int64_t>(sizes.warps * sizes.weight_bytes) +
                              units * static_cast<int64_t>(sizes.vector_bytes) +
                              2 * static_cast<int64_t>(sizes.partial_bytes);
        if (best.blocks != 0 && waves * moved >= least_cost) continue;
        least_cost = waves * moved;
        best.blocks = static_cast<int>(sizes.blocks * teams);
        best.threads = sizes.warps * cuda::kWarpLanes;
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
  const std::string room = limits.waves ? text(kMostWaves, " times ", limits.team_blocks, "-block clusters have")
                                        : text(limits.all_blocks, " blocks that run at once have");
  return {text(problem.batch, " rows of ", problem.hidden_size, " hidden units in ", problem.directions,
               problem.directions == 1 ? " direction" : " directions", " are more than ", room),
          {}};
}

Candidate consider_persistent_cluster(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  constexpr int kMostBlocks = 16;
  if (!device.clusters) {
    return {text("it needs clusters of ", kMostBlocks, " blocks (sm_90, sm_100), the device is sm_", device.capability),
            {}};
  }
  return consider_spread(problem, device, {kMostBlocks, device.multiprocessors, cuda::kClusterCopies, /*waves=*/true});
}

Candidate consider_persistent_grid(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  if (!device.cooperative) return {"the device has no cooperative launches", {}};
  return consider_spread(problem, device,
                         {device.multiprocessors, device.multiprocessors, cuda::kGridCopies, /*waves=*/false});
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
