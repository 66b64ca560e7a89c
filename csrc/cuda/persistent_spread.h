// Owns: the border between the engines that spread W_hh over blocks and their kernels, which are compiled apart, one
// file for each engine and storage type; the choice among those. Must not know: the kernels.
#pragma once

#include "arithmetic.cuh"
#include "backward_preparation.cuh"
#include "cell/cells.h"
#include "launch.cuh"
#include "params.h"
#include "pointwise.cuh"
#include "recurrent_tile.cuh"
#include "spread.h"

namespace rnnfast::cuda {

// What crosses the launch beside the layer.
struct SpreadShape {
  Spread spread;
  SpreadSizes sizes;
};

template <class Math>
SpreadShape spread_shape(const Spread& spread, int64_t hidden_size, int64_t batch, int gates, bool backward) {
  return {spread, SpreadSizes(spread, static_cast<int>(hidden_size), batch, gates, backward,
                              sizeof(typename Math::Operand), kOnTensorCores<Math>)};
}

struct ScatterShape {
  Spread spread;
  ScatterSizes sizes;
};

template <class Math>
ScatterShape scatter_shape(const Spread& spread, int64_t hidden_size, int64_t batch, int gates) {
  return {spread, ScatterSizes(spread, static_cast<int>(hidden_size), batch, gates, sizeof(typename Math::Operand),
                               kOnTensorCores<Math>)};
}

// For every cell. The workspace is what is left of it.
template <class scalar_t, class Math, class Exchange>
int spread_forward(const LayerForward& layer, const Context& context, Workspace& workspace);
template <class scalar_t, class Math, class Exchange>
int spread_backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const DeviceSequence& sequence,
                    const Context& context, Workspace& workspace);

// The launchers of an engine, by how its blocks exchange numbers. To the host an exchange is
//   Exchange::kLeastBlocks                             of a team
//   Exchange::Buffers(directions, shape, workspace)    with the kernel's `arguments` and prepare(stream)
//   Exchange::launch(kernel, launch shape, stream, arguments...)
//   Exchange::Scatter                                  how sums go (persistent_scatter.cuh), or void
template <template <class> class Exchange>
class SpreadEngine {
 public:
  static size_t forward_workspace_bytes(const LayerForward& layer) {
    Workspace workspace(nullptr);
    workspace.take<int64_t>(offsets_count(layer.sequence));
    take_buffers(layer, /*backward=*/false, workspace);
    return workspace.bytes();
  }
  static size_t backward_workspace_bytes(const LayerBackward& layer) {
    Workspace workspace(nullptr);
    const BackwardPreparation preparation(layer, workspace);
    take_buffers(layer, /*backward=*/true, workspace);
    return workspace.bytes();
  }

  static int forward(const LayerForward& layer, const Context& context) {
    Workspace workspace(context.workspace);
    return choose_arithmetic(layer.dtype, layer.tf32, [&](auto scalar, auto math) {
      using Math = typename decltype(math)::type;
      using Exchange_ = Exchange<typename Math::Operand>;
      return spread_forward<typename decltype(scalar)::type, Math, Exchange_>(layer, context, workspace);
    });
  }
  static int backward(const LayerBackward& given, const BackwardProducts (&products)[2], const Context& context) {
    Workspace workspace(context.workspace);
    const BackwardPreparation preparation(given, workspace);
    LayerBackward layer = given;
    DeviceSequence sequence;
    RNNFAST_RETURN_IF_ERROR(preparation.run(layer, products, context, sequence));
    return choose_arithmetic(layer.dtype, layer.tf32, [&](auto scalar, auto math) {
      using Math = typename decltype(math)::type;
      using Exchange_ = Exchange<typename Math::Operand>;
      return spread_backward<typename decltype(scalar)::type, Math, Exchange_>(layer, products, sequence, context,
                                                                               workspace);
    });
  }

 private:
  template <class Layer>
  static void take_buffers(const Layer& layer, bool backward, Workspace& workspace) {
    const auto take = [&](auto math) {
      using Math = typename decltype(math)::type;
      const SpreadShape shape = spread_shape<Math>(layer.spread, layer.hidden_size, layer.sequence.batch,
                                                   cell_info(layer.cell).gates, backward);
      typename Exchange<typename Math::Operand>::Buffers(layer.directions, shape, workspace);
    };
    size_of(layer.dtype) == 2 ? take(Type<TensorCore<__half>>()) : take(Type<TensorCoreTf32>());
  }
};

}  // namespace rnnfast::cuda
