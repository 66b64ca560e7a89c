// Owns: the operators of one cell that is compiled by itself, from the sources of the package's own: the files of
// csrc/ops in one compilation, since each would parse torch's headers anew. Its engines are compiled beside it, that of
// the CPU for one instruction set.
// Must not know: what they do.
#include "../ops/autocast.cpp"
#include "../ops/autograd.cpp"
#include "../ops/checks.cpp"
#include "../ops/grouped_cpu.cpp"
#include "../ops/layer.cpp"
#include "../ops/layer_cpu.cpp"
#include "../ops/products.cpp"
#include "../ops/schemas.cpp"
#include "../ops/states_cpu.cpp"
#include "../ops/tangent_cpu.cpp"
#ifdef RNNFAST_WITH_CUDA
#include "../ops/call_cuda.cpp"
#include "../ops/cuda_engine.cpp"
#include "../ops/device_cuda.cpp"
#include "../ops/gemm_cuda.cpp"
#include "../ops/layer_cuda.cpp"
#include "../ops/tangent_cuda.cpp"
#include "../plan.cpp"
#endif
//
#include "../cpu/engine.h"

namespace rnnfast::cpu {
const EngineTable& engine(Dtype) { return RNNFAST_OWN_ISA::kEngine; }
}  // namespace rnnfast::cpu

// What Python asks of the cell: gates, states, saved values, whether its recurrence is diagonal.
extern "C" __attribute__((visibility("default"))) void rnnfast_own_cell(int* sizes) {
  const rnnfast::CellInfo info = rnnfast::cell_info({});
  sizes[0] = info.gates;
  sizes[1] = info.states;
  sizes[2] = info.saved;
  sizes[3] = info.diagonal;
}
