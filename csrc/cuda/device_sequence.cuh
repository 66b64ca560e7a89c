// Owns: time and rows as the persistent kernels see them, in 32 bits; offsets into memory have 64. A kernel that runs
// all steps cannot read the host's batch_sizes, so these lie on the device, as offsets. Must not know: cells, states.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace rnnfast::cuda {

struct DeviceSequence {
  int steps = 0;                     // T
  int batch = 0;                     // B
  const int64_t* offsets = nullptr;  // [T + 1], packed: the rows before each step; null: padded
  const int64_t* lengths = nullptr;  // [B], padded; null: every row has T steps
  const bool* reset = nullptr;       // [N]

  // The steps of slot j; 0 for one beyond the batch.
  __device__ __forceinline__ int length(int slot) const {
    if (slot >= batch) return 0;
    if (offsets == nullptr) {
      if (lengths == nullptr) return steps;
      const int64_t length = lengths[slot];
      return length < 0 ? 0 : length > steps ? steps : static_cast<int>(length);
    }
    // Batch sizes decrease: a row lives at the steps that have more rows than it has predecessors.
    int low = 0, high = steps;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (offsets[middle + 1] - offsets[middle] > slot) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Whether a row lives at a step; there are none outside of 0 .. T - 1.
  __device__ __forceinline__ bool lives(int step, int slot) const {
    if (step < 0 || step >= steps) return false;
    return offsets != nullptr ? slot < offsets[step + 1] - offsets[step] : lengths == nullptr || step < lengths[slot];
  }

  // The step of a row of compact buffers; the slot is what is left.
  __device__ __forceinline__ int step_of(int64_t row) const {
    if (offsets == nullptr) return static_cast<int>(row / batch);
    int low = 0, high = steps;  // offsets[low] <= row < offsets[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (offsets[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  // The row of step t, slot j, in compact buffers and in packed tensors.
  __device__ __forceinline__ int64_t row(int step, int slot) const {
    return (offsets != nullptr ? offsets[step] : static_cast<int64_t>(step) * batch) + slot;
  }

  // Where a step lies in DeviceRows: padded, steps before it; packed, rows.
  __device__ __forceinline__ int64_t place(int step) const { return offsets != nullptr ? offsets[step] : step; }
};

// The rows of a tensor over time. Strides count elements: stride_t from place to place, stride_b from slot to slot.
template <class scalar_t>
struct DeviceRows {
  scalar_t* data = nullptr;
  int64_t stride_t = 0, stride_b = 0;

  DeviceRows() = default;
  __host__ __device__ DeviceRows(scalar_t* data, int64_t stride_t, int64_t stride_b)
      : data(data), stride_t(stride_t), stride_b(stride_b) {}
  DeviceRows(const Rows& rows, const Sequence& sequence)
      : DeviceRows(static_cast<scalar_t*>(rows.data), sequence.packed ? rows.stride_b : rows.stride_t, rows.stride_b) {}

  __device__ __forceinline__ scalar_t* at(const DeviceSequence& sequence, int step, int slot) const {
    return data + sequence.place(step) * stride_t + slot * stride_b;
  }
};

// What device_sequence wants of the workspace: the offsets of a packed input.
inline int64_t offsets_count(const Sequence& sequence) { return sequence.packed ? sequence.steps + 1 : 0; }

// Describes a sequence to kernels. The offsets travel as kernel parameters, which needs neither pinned memory nor a
// wait, and which a CUDA graph keeps.
cudaError_t device_sequence(const Sequence& sequence, int64_t* offsets, cudaStream_t stream, DeviceSequence& result);

}  // namespace rnnfast::cuda
