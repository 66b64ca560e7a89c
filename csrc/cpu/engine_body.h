// Owns: the engine of one instruction set: the files included below, compiled for it, and the choice of cell and dtype.
//
// Included once by each engine_<isa>.cpp, after the target pragma and with RNNFAST_ISA and RNNFAST_VECTOR_BYTES
// defined.

// The equations come after the target pragma: a function compiled for another instruction set is never inlined.
#include "../cell/cells.h"
#include "../cell/dual.h"
#include "../cell/layer_norm.h"
#include "../cell/zoneout.h"
#include "../philox.h"
//
#include "simd.h"
//
#include "product.h"
//
#include "diagonal.h"
//
#include "layer.h"
//
#include "noise.h"
#include "norm.h"
#include "passes.h"
//
#include "products_over_steps.h"
//
#include "backward_workspace.h"
//
#include "backward_products.h"
//
#include "backward.h"
//
#include "forward_workspace.h"
//
#include "forward.h"
//
#include "norm_layer.h"
//
#include "tangent_workspace.h"
//
#include "tangent_products.h"
//
#include "tangent.h"

namespace rnnfast::cpu::RNNFAST_ISA {
namespace {

template <class Cell, class F>
auto with_dtype([[maybe_unused]] Dtype dtype, const F& f) {
#ifdef RNNFAST_BF16_ONLY  // dispatch.cpp hands over no other
  return f(static_cast<Cell*>(nullptr), bf16());
#else
  switch (dtype) {
    case Dtype::f64:
      return f(static_cast<Cell*>(nullptr), double());
    case Dtype::bf16:
      return f(static_cast<Cell*>(nullptr), bf16());
    case Dtype::f16:
      return f(static_cast<Cell*>(nullptr), f16());
    default:
      return f(static_cast<Cell*>(nullptr), float());
  }
#endif
}

template <class F>
auto with_types(CellKind cell, Dtype dtype, const F& f) {
  switch (cell) {
#define RNNFAST_CASE(name, Type) \
  case CellKind::name:           \
    return with_dtype<Type>(dtype, f);
    RNNFAST_FOR_EACH_CELL(RNNFAST_CASE)
#undef RNNFAST_CASE
  }
  __builtin_unreachable();
}

size_t forward_workspace_bytes(const LayerForward& layer, int threads) {
  return with_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    return Forward<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::workspace_bytes(layer, threads);
  });
}
void forward(const LayerForward& layer, void* workspace, int threads) {
  with_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    Forward<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::run(layer, workspace, threads);
  });
}
size_t backward_workspace_bytes(const LayerBackward& layer, int threads) {
  return with_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    return Backward<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::workspace_bytes(layer, threads);
  });
}
void backward(const LayerBackward& layer, void* workspace, int threads) {
  with_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    Backward<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::run(layer, workspace, threads);
  });
}

// Tangents are float32 or float64. A cell with two products has no kernels for them, and the operators say so.
#ifdef RNNFAST_BF16_ONLY
constexpr decltype(EngineTable::tangent_workspace_bytes) tangent_workspace_bytes = nullptr;
constexpr decltype(EngineTable::tangent) tangent = nullptr;
#else
template <class F>
auto with_wide_types(CellKind cell, Dtype dtype, const F& f) {
  switch (cell) {
#define RNNFAST_CASE(name, Type)                                                                                       \
  case CellKind::name:                                                                                                 \
    if constexpr (!has_two_products<Type>) {                                                                           \
      return dtype == Dtype::f64 ? f(static_cast<Type*>(nullptr), double()) : f(static_cast<Type*>(nullptr), float()); \
    }                                                                                                                  \
    break;
    RNNFAST_FOR_EACH_CELL(RNNFAST_CASE)
#undef RNNFAST_CASE
  }
  __builtin_unreachable();
}

size_t tangent_workspace_bytes(const LayerTangent& layer, int threads) {
  return with_wide_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    return Tangent<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::workspace_bytes(layer, threads);
  });
}
void tangent(const LayerTangent& layer, void* workspace, int threads) {
  with_wide_types(layer.cell, layer.dtype, [&](auto* cell, auto scalar) {
    Tangent<std::remove_pointer_t<decltype(cell)>, decltype(scalar)>::run(layer, workspace, threads);
  });
}
#endif

}  // namespace

#define RNNFAST_STRING_(x) #x
#define RNNFAST_STRING(x) RNNFAST_STRING_(x)
extern const EngineTable kEngine = {RNNFAST_STRING(RNNFAST_ISA),
                                    forward_workspace_bytes,
                                    forward,
                                    backward_workspace_bytes,
                                    backward,
                                    tangent_workspace_bytes,
                                    tangent};

}  // namespace rnnfast::cpu::RNNFAST_ISA
