// Owns: all that crosses from the operators to the engines: plain structs of sizes, strides and pointers, and the
// prototypes of the engines' launchers.
// Must not know: torch, CUDA headers, equations.
//
// Sizes: T steps, B rows of the batch, I input features, H hidden units, P outputs a direction (H, or proj_size),
// D directions (1 or 2), G = gates of the cell, S = saved values of the cell, or with layer normalisation 2 G: W_ih x,
// then W_hh h, for all units (on the CPU both normalised). N rows over all steps.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cell/cell_list.h"
#include "spread.h"

namespace rnnfast {

enum class Dtype : int { f64, f32, bf16, f16 };

inline size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// What forward leaves for backward.
enum class Save : int {
  nothing = 0,  // inference
  states = 1,   // the states only; backward recomputes the gates with one GEMM over all steps
  gates = 2,    // the states and the cell's saved values
};

// Numbers of each row, of the type of sums, that `saved` has room for with layer normalisation, behind the S*H of all
// rows. The CPU engine keeps there by what the two halves of the gates were scaled.
constexpr int kNormNumbers = 2;

// Time, described once for every engine. A step t has batch_size(t) living rows, slots 0 .. batch_size(t) - 1.
//
//   padded   every row lives for all T steps (or for its length); step t, row b is row (t, b) of the tensors
//   packed   batch_sizes[t] decreases; step t, slot j is row offsets[t] + j of the tensors (PackedSequence)
//
// Engines' own buffers ("compact") hold living rows only: step t, slot j is row offsets[t] + j, N rows in all.
struct Sequence {
  int64_t steps = 0;  // T
  int64_t batch = 0;  // B
  int64_t rows = 0;   // N: B * T when padded, the sum of batch_sizes otherwise
  bool packed = false;

  // Host arrays, all null for plain padded input. With padded lengths (CPU engine) they describe the rows sorted by
  // decreasing length, and batch_index maps a slot to its row in the batch.
  const int64_t* batch_sizes = nullptr;  // [T]
  const int64_t* offsets = nullptr;      // [T] sum of batch_sizes before t
  const int64_t* batch_index = nullptr;  // [B] slot -> row b; null: the identity

  // Device arrays (CUDA engines): never read by the host.
  const int64_t* lengths = nullptr;  // [B]; null: every row has T steps

  // Where set, the forward direction's state before step t is zero. The backward direction crosses the same boundary
  // when it goes from step t to step t - 1, so there the state before step t - 1 is zero.
  const bool* reset = nullptr;  // [T, B], contiguous; packed: [N]

  int64_t batch_size(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  int64_t batch_row(int64_t slot) const { return batch_index ? batch_index[slot] : slot; }
  // Of step t, slot j: the row of the tensors, counted over all steps.
  int64_t tensor_row(int64_t t, int64_t slot) const { return packed ? offsets[t] + slot : t * batch + batch_row(slot); }
};

// The rows of a tensor over time. The features of a row are contiguous; strides count elements.
struct Rows {
  void* data = nullptr;
  int64_t stride_t = 0;  // step to step; unused when packed
  int64_t stride_b = 0;  // row to row

  // The first element of step t, slot j, as an offset from data.
  int64_t at(const Sequence& s, int64_t t, int64_t slot) const {
    return s.packed ? (s.offsets[t] + slot) * stride_b : t * stride_t + s.batch_row(slot) * stride_b;
  }
};

// One direction of a layer. Matrices are row-major and contiguous, in the layer's dtype.
struct DirectionWeights {
  const void* w_ih = nullptr;  // [G*H, I]
  const void* w_hh = nullptr;  // [G*H, P]; [G*H] for a diagonal cell
  const void* b_ih = nullptr;  // [G*H] or null
  const void* b_hh = nullptr;  // [G*H] or null
  const void* w_hr = nullptr;  // [P, H] or null: LSTM with a projection
  // With layer normalisation (cell/layer_norm.h), and the last two for cells with two states.
  const void* norm_ih = nullptr;      // [G*H]
  const void* norm_hh = nullptr;      // [G*H]
  const void* norm_c = nullptr;       // [H]
  const void* norm_bias_c = nullptr;  // [H]
};

// What changes at random inside the recurrence, drawn by philox.h for each row from its seed. h~ and c~ are what the
// cell computes, k is 1 with the probability of zoneout and 0 otherwise:
//
//   recurrent dropout   W_hh h_(t-1) becomes W_hh (m h_(t-1)), m in {0, 1 / (1 - p)}, one a row and unit of h
//   zoneout             h_t = k h_(t-1) + (1 - k) h~_t, and c_t likewise with its own k; h_t's c is c~_t
//
// Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS 2016;
// Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations", ICLR 2017.
struct Noise {
  // [B], in the order of the tensors' rows; for CUDA engines in device memory. Null: k is its expectation, the
  // probability itself (forward alone).
  const int64_t* seeds = nullptr;
  double recurrent_dropout = 0, zoneout_h = 0, zoneout_c = 0;  // probabilities below 1
  int64_t first_unit = 0;  // the call's first unit, as the masks count them: a head's are those of the whole layer
};

struct DirectionForward {
  DirectionWeights weights;
  const void* h0 = nullptr;  // [B, P]
  const void* c0 = nullptr;  // [B, H], cells with two states
  bool reverse = false;      // from the last step to the first

  // [N, G*H] W_ih x + b_ih, or with layer normalisation W_ih x, in the layer's dtype: CUDA engines; null: the engine
  // projects.
  void* igates = nullptr;
  Rows output;            // rows of P; rows past a length are the operator's to zero
  Rows c;                 // rows of H: the cell state of every step; data null: not wanted
  void* h_n = nullptr;    // [B, P]
  void* c_n = nullptr;    // [B, H]
  void* saved = nullptr;  // compact [N, S*H]; null unless Save::gates
};

struct LayerForward {
  CellKind cell{};
  Dtype dtype{};
  int64_t input_size = 0, hidden_size = 0, output_size = 0;  // I, H, P
  int directions = 1;                                        // D
  Save save = Save::nothing;
  bool tf32 = false;  // CUDA engines: float32 products may round their factors to TF32, as cuBLAS does where it may
  Sequence sequence;
  Rows input;  // rows of I; data is only read
  DirectionForward direction[2];
  cuda::Spread spread;  // persistent_cluster and persistent_grid: as planned
  Noise noise;          // the CPU engine and stepwise
  // The CPU engine and stepwise: whether the two halves of the gates are normalised, and c where h reads it.
  bool layer_norm = false;
};

struct DirectionBackward {
  DirectionWeights weights;
  const void* h0 = nullptr;  // [B, P]
  const void* c0 = nullptr;  // [B, H]
  bool reverse = false;

  Rows output;                  // rows of P, as forward left them
  Rows c;                       // rows of H
  const void* saved = nullptr;  // compact [N, S*H]; null: recompute

  Rows grad_output;                // rows of P; data null: zero
  Rows grad_c;                     // rows of H: gradient of every step's cell state; data null: zero
  const void* grad_h_n = nullptr;  // [B, P]; null: zero
  const void* grad_c_n = nullptr;  // [B, H]; null: zero

  void* grad_h0 = nullptr;  // [B, P]
  void* grad_c0 = nullptr;  // [B, H]
  // Rows of P: the gradient of every step's state, grad_output and what later steps give; data null: not wanted. CPU
  // engine only, without a projection, noise and layer normalisation.
  Rows grad_states;

  // The loop's product. For a cell without split gates grad_hgates equals grad_igates, unless they are normalised. CPU
  // engine: null, or float32 and float64 without weight gradients.
  void* grad_igates = nullptr;  // compact [N, G*H]
  void* grad_hgates = nullptr;  // compact [N, G*H]

  // CPU engine only, but for norms and with them biases: the weight gradients, in the layer's dtype; null: not wanted.
  void* grad_w_ih = nullptr;         // [G*H, I]
  void* grad_w_hh = nullptr;         // as w_hh
  void* grad_b_ih = nullptr;         // [G*H]
  void* grad_b_hh = nullptr;         // [G*H]
  void* grad_w_hr = nullptr;         // [P, H]
  void* grad_norm_ih = nullptr;      // [G*H]
  void* grad_norm_hh = nullptr;      // [G*H]
  void* grad_norm_c = nullptr;       // [H]
  void* grad_norm_bias_c = nullptr;  // [H]
};

struct LayerBackward {
  CellKind cell{};
  Dtype dtype{};
  int64_t input_size = 0, hidden_size = 0, output_size = 0;
  int directions = 1;
  bool tf32 = false;  // CUDA engines: as in LayerForward
  Sequence sequence;
  Rows input;
  Rows grad_input;  // rows of I, the sum over directions; data null: not wanted (CPU engine only)
  DirectionBackward direction[2];
  cuda::Spread spread;  // persistent_cluster and persistent_grid: as planned
  Noise noise;          // the CPU engine and stepwise
  // The CPU engine and stepwise: whether the two halves of the gates are normalised, and c where h reads it.
  bool layer_norm = false;
};

// ---------------------------------------------------------------------------------------------------- tangents
// The derivative of a layer along a direction (a tangent of each of its arguments), and that of its backward. Only
// float32 and float64, without a projection. Where data is null, a tangent or a gradient is zero.
struct DualRows {
  Rows value, tangent;
};
struct DualPointer {
  const void *value = nullptr, *tangent = nullptr;
};

struct DirectionTangent {
  DualPointer w_ih;  // [G*H, I]
  DualPointer w_hh;  // [G*H, P]; [G*H] for a diagonal cell
  DualPointer h0;    // [B, P]
  DualPointer c0;    // [B, H]
  bool reverse = false;

  const void* saved = nullptr;  // compact [N, S*H], as forward left it
  DualRows output;              // rows of P; forward writes the tangent
  DualRows c;                   // rows of H; forward writes the tangent

  // forward: rows of G*H, the part of the gates' tangents that comes from those of weights and biases, for the CUDA
  // engine also from the input's. For a cell without split gates t_igates has both halves, and t_hgates is not used.
  Rows t_igates, t_hgates;
  Rows igates, hgates;    // forward, for a cell without a tangent of its own: the gates themselves, rows of G*H
  void* t_h_n = nullptr;  // [B, P]
  void* t_c_n = nullptr;  // [B, H]

  // backward
  Rows grad_states;                // rows of P, as backward left them (CPU engine only); data null: made again
  DualRows grad_output, grad_c;    // rows of P, rows of H
  DualPointer grad_h_n, grad_c_n;  // [B, P], [B, H]
  void* t_grad_h0 = nullptr;       // [B, P]
  void* t_grad_c0 = nullptr;       // [B, H]
  // CPU engine only. Null: not wanted, all together; those of the biases also where there are none.
  void* t_grad_w_ih = nullptr;  // [G*H, I]
  void* t_grad_w_hh = nullptr;  // as w_hh
  void* t_grad_b_ih = nullptr;  // [G*H]
  void* t_grad_b_hh = nullptr;  // [G*H]

  // backward, CUDA engine, which leaves the products over all steps to the operator: compact [N, 2, G*H], of every row
  // the gradient of the gates and then its tangent. For a cell without split gates grad_igates stands for both.
  void* grad_igates = nullptr;
  void* grad_hgates = nullptr;
};

struct LayerTangent {
  CellKind cell{};
  Dtype dtype{};
  int64_t input_size = 0, hidden_size = 0;
  int directions = 1;
  bool backward = false;  // whether backward's tangent follows that of forward
  Sequence sequence;
  DualRows input;     // rows of I (CPU engine only)
  Rows t_grad_input;  // rows of I, the sum over directions; data null: not wanted (CPU engine only)
  DirectionTangent direction[2];
};

// ---------------------------------------------------------------------------------------------------- CPU engine
// The engine allocates nothing: the caller hands it a workspace of at least the size it asks for, 64-byte aligned.
// threads is the most it may use; it uses fewer where more do not pay.
namespace cpu {

// The engine's entry points, as one instruction set has them.
struct EngineTable {
  const char* name;  // the instruction set
  size_t (*forward_workspace_bytes)(const LayerForward& layer, int threads);
  void (*forward)(const LayerForward& layer, void* workspace, int threads);
  size_t (*backward_workspace_bytes)(const LayerBackward& layer, int threads);
  void (*backward)(const LayerBackward& layer, void* workspace, int threads);
  size_t (*tangent_workspace_bytes)(const LayerTangent& layer, int threads);
  void (*tangent)(const LayerTangent& layer, void* workspace, int threads);
};

// The engine in use for a dtype, of this CPU's best instruction set unless another was forced. A call takes it once:
// another thread may change it, and instruction sets differ in the workspace they want.
const EngineTable& engine(Dtype dtype);

// Instruction sets are "generic", "avx2", "avx512" and "avx512_bf16", which is avx512 but for bfloat16.
const char* instruction_set();
bool has_instruction_set(const char* name);
// Forces one for the calls that begin later; returns false, and changes nothing, where this CPU lacks it or the name is
// unknown.
bool set_instruction_set(const char* name);

}  // namespace cpu

// ---------------------------------------------------------------------------------------------------- CUDA engines
// A launcher enqueues its kernels on a stream and returns; it allocates nothing and never waits for the device, so a
// CUDA graph can capture it. It returns 0, or the first error (a cudaError_t) of a launch or of the matrix product.
// Every pointer of a layer is to device memory; batch_sizes and offsets are read by the host; batch_index is null.
namespace cuda {

// c [m, n] = a [m, k] op(b), plus c where accumulate is set. Row-major, leading dimensions count elements. op(b) is
// b [k, n], or the transpose of b [n, k]. a and b have the given dtype, c its accumulation type: float for the 16-bit
// types, the dtype itself otherwise.
struct GemmArguments {
  Dtype dtype{};
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  bool transpose_b = false;
  void* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
};

// The matrix product, on the caller's stream: cuBLAS in the operators, a loop in the simulator.
struct Gemm {
  int (*run)(void* context, const GemmArguments& arguments) = nullptr;
  void* context = nullptr;
};

struct Context {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // as many bytes as the engine asks for, 256-byte aligned
  Gemm gemm;
};

// What backward leaves for the weight gradients, which are matrix products over all steps:
//   grad_w_hh = grad_hgates^T h_prev    grad_w_hr = grad_h^T hidden
// where for the second product's gates of a cell with two products gated stands in place of h_prev, and for a diagonal
// cell grad_w_hh is the sum over rows of grad_hgates * h_prev.
struct BackwardProducts {
  void* h_prev = nullptr;  // compact [N, P]: the state each step read; the initial one at first, zero behind a reset
  // With a projection only.
  void* grad_h = nullptr;  // compact [N, P]: gradient of the projected state
  void* hidden = nullptr;  // compact [N, H]: the state before it was projected
  // Of a cell with two products only.
  void* gated = nullptr;  // compact [N, H]: what the second product read
};

// Of rows over time the state that each step reads, over all steps at once: the neighbouring step's, the initial one
// where a row starts, zero behind a reset and past the end.
struct PreviousStates {
  Dtype dtype{};
  int64_t features = 0;  // F
  int directions = 1;
  Sequence sequence;
  struct Direction {
    bool reverse = false;
    Rows states;                    // rows of F
    const void* initial = nullptr;  // [B, F]; null: zero
    void* previous = nullptr;       // compact [N, F]
  } direction[2];
};
size_t previous_states_workspace_bytes(const Sequence& sequence);
int previous_states(const PreviousStates& states, const Context& context);

// One GEMM, but for a diagonal cell, and one pointwise kernel a step: any GPU, any size, any dtype. What the structs
// above leave open:
//   - igates is given; input and w_ih are not read, and b_ih with layer normalisation alone.
//   - Rows past a length get a zero output, c and gradient. A length below 0 counts as 0, one above T as T.
//   - For a cell without split gates grad_igates stands for grad_hgates too, and grad_hgates is not used; with layer
//     normalisation both are.
//   - In backward, where saved is null and the cell saves anything (S > 0), grad_igates holds igates on entry, from
//     which the gates are recomputed in place.
namespace stepwise {

size_t forward_workspace_bytes(const LayerForward& layer);
int forward(const LayerForward& layer, const Context& context);

size_t backward_workspace_bytes(const LayerBackward& layer);
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context);

// Along a tangent, in float32 and float64: cells with one product a step. The input and w_ih are not read, and saved is
// there if S > 0. Past a length tangents of results and gradients of gates are zero.
size_t tangent_workspace_bytes(const LayerTangent& layer);
int tangent(const LayerTangent& layer, const Context& context);

}  // namespace stepwise

// The whole recurrence of a few batch rows in one block, all steps in one launch: layers without a projection whose
// W_hh fits into one block's registers and shared memory, in float32 and the 16-bit types; plan.h says when. What the
// structs above leave open is as for stepwise, and so is what forward saves: one engine's backward reads another's.
namespace persistent_cta {

size_t forward_workspace_bytes(const LayerForward& layer);
int forward(const LayerForward& layer, const Context& context);

size_t backward_workspace_bytes(const LayerBackward& layer);
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context);

}  // namespace persistent_cta

// The recurrence spread over thread blocks, all steps in one launch: layers without a projection, in float32 and the
// 16-bit types. Blocks exchange the state through global memory, on any GPU that can hold all of them at once; a launch
// that it cannot hold is cudaErrorCooperativeLaunchTooLarge. A spread that cannot be is cudaErrorInvalidValue. Else as
// persistent_cta.
namespace persistent_grid {

size_t forward_workspace_bytes(const LayerForward& layer);
int forward(const LayerForward& layer, const Context& context);

size_t backward_workspace_bytes(const LayerBackward& layer);
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context);

}  // namespace persistent_grid

// The same, where a cluster of up to 16 thread blocks holds W_hh and exchanges the state through their shared memory:
// sm_90 and later.
namespace persistent_cluster {

// How many clusters of 1, 2, .. blocks the current device runs at once, where each block needs a multiprocessor to
// itself; 0: it does not offer the size. Asks the driver and enqueues nothing. Returns 0, or the first error (a
// cudaError_t).
int active_clusters(int (&clusters)[kMostClusterBlocks]);

size_t forward_workspace_bytes(const LayerForward& layer);
int forward(const LayerForward& layer, const Context& context);

size_t backward_workspace_bytes(const LayerBackward& layer);
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context);

}  // namespace persistent_cluster

}  // namespace cuda

}  // namespace rnnfast
