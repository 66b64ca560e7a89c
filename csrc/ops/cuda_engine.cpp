#include "cuda_engine.h"

#include <c10/util/Exception.h>

#include <atomic>

#include "cell/cells.h"

namespace rnnfast::ops {
namespace {
constexpr int kPlanned = -1;
std::atomic<int> forced{kPlanned};
}  // namespace

void force_cuda_engine(std::optional<plan::Engine> engine) { forced = engine ? static_cast<int>(*engine) : kPlanned; }

plan::Plan choose_cuda_engine(const plan::Problem& problem, const plan::Device& device) {
  const int engine = forced;
  if (engine == kPlanned) return plan::make_plan(problem, device);
  plan::Plan plan;
  plan.engine = static_cast<plan::Engine>(engine);
  const plan::Candidate candidate = plan::consider(plan.engine, problem, device);
  TORCH_CHECK(candidate.reason.empty(), "rnnfast: the engine ", plan::kEngineNames[engine],
              " was forced and cannot run this ", cell_info(problem.cell).name, problem.backward ? " backward: " : ": ",
              candidate.reason);
  plan.tile = candidate.tile;
  return plan;
}

plan::Engine find_cuda_engine(const std::string& name) {
  std::string known;
  for (int i = 0; i < plan::kEngines; ++i) {
    if (name == plan::kEngineNames[i]) return static_cast<plan::Engine>(i);
    known += (i == 0 ? "" : ", ") + std::string(plan::kEngineNames[i]);
  }
  TORCH_CHECK_VALUE(false, "engine: expected one of ", known, ", got '", name, "'");
}

}  // namespace rnnfast::ops
