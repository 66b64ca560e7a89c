// Owns: what the backward of every CUDA engine does before its loop, over all steps at once:
//
//     h_prev = the state that every step's product read     the weight gradients want it, and persistent engines' cells
//     saved  = cell's forward of igates, h_prev W_hh^T      where forward kept the states alone: a GEMM and a kernel
//                                                           for every chunk of rows; of a diagonal cell the kernel
//
// Must not know: equations (csrc/cell has them), loops over time.
#pragma once

#include "device_sequence.cuh"
#include "pointwise.cuh"

namespace rnnfast::cuda {

// Lays its buffers out in the workspace when it is made, and fills them when it is run.
class BackwardPreparation {
 public:
  BackwardPreparation(const LayerBackward& layer, Workspace& workspace);

  // Enqueues the work, describes the sequence to kernels, and points the layer's `saved` to the recomputed values.
  // These may lie where the gradients of the gates go: kernels read a unit's before they write its gradients.
  int run(LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
          DeviceSequence& sequence) const;

 private:
  int64_t* offsets_ = nullptr;  // [T + 1]: packed
  int64_t chunk_ = 0;           // rows whose gates are recomputed at a time
  void* hgates_ = nullptr;      // [chunk, G*H] in the accumulation type; null for a diagonal cell
  void* saved_[2] = {};         // compact [N, S*H], where they cannot lie in grad_igates
};

}  // namespace rnnfast::cuda
