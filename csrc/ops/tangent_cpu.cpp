// Owns: the operators <cell>_jvp and <cell>_backward_jvp on the CPU: the call of the engine.
// Must not know: equations, loops over time.
#include <torch/library.h>

#include "states_cpu.h"
#include "tangent.h"

namespace rnnfast::ops::tangent_cpu {
namespace {

class Cpu {
 public:
  static constexpr bool kProducts = true;

  Cpu(const Geometry& geometry, const LayerArguments& arguments, const LayerTensors& tensors)
      : geometry_(geometry), host_(geometry, arguments, tensors), lengths_(arguments.lengths) {}

  const Sequence& sequence() const { return host_.sequence(); }
  const OptionalTensor& lengths() const { return lengths_; }
  Tensor previous_states(const Tensor& states, const Tensor& initial, int64_t d) const {
    return ops::previous_states(geometry_, sequence(), states, initial, d);
  }
  void run(const LayerTangent& params, const TangentTensors&) const { run_engine(params); }

 private:
  const Geometry geometry_;
  const HostSequence host_;
  const OptionalTensor lengths_;
};

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CPU, m) {
#define RNNFAST_CPU(name, Type)                            \
  m.impl(#name "_jvp", &tangent_jvp<Cpu, CellKind::name>); \
  m.impl(#name "_backward_jvp", &tangent_backward_jvp<Cpu, CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CPU)
#undef RNNFAST_CPU
}

}  // namespace rnnfast::ops::tangent_cpu
