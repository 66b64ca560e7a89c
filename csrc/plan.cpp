#include "plan.h"

#include <limits>

#include "cell/cells.h"
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
  if (problem.dtype == Dtype::f64) return "it has no float64";
  if (problem.projection) return "it has no projections (proj_size)";
  if (problem.steps >= kMost || problem.batch >= kMost) return "it counts steps and rows in 32 bits";
  return "";
}

Candidate consider_persistent_cta(const Problem& problem, const Device& device) {
  if (const std::string reason = against_persistence(problem, device); !reason.empty()) return {reason, {}};
  const int gates = cell_info(problem.cell).gates, operand_bytes = static_cast<int>(size_of(problem.dtype));
  const bool tensor_cores = problem.dtype != Dtype::f32 || problem.tf32;
  cuda::CtaShape shape = cuda::cta_shape(gates, operand_bytes, tensor_cores, /*wide=*/false);
  if (!cuda::fits_cta_shape(problem.hidden_size, shape) && cuda::has_wide_cta_shape(gates, operand_bytes)) {
    shape = cuda::cta_shape(gates, operand_bytes, tensor_cores, /*wide=*/true);
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

}  // namespace

Candidate consider(Engine engine, const Problem& problem, const Device& device) {
  switch (engine) {
    case Engine::persistent_cta:
      return consider_persistent_cta(problem, device);
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
