// Owns: the CUDA engines' launchers as plain C functions for Python's ctypes. Tensors come from the host, live in
// the simulator's device memory during the call, with its guard pages and checks, and go back. Must not know: what is
// computed.
#include <cstring>
#include <memory>
#include <vector>

#include "cell/cells.h"
#include "lane_number.cuh"
#include "params.h"
#include "storage.cuh"

namespace {

using namespace rnnfast;

// Device copy of a host tensor, `shift` bytes behind an aligned address. What is only written starts as NaN,
// uninitialised for the checker.
class Buffer {
 public:
  enum class Use { in, out, in_out };
  Buffer(void* host, size_t bytes, Use use, size_t shift) : host_(host), bytes_(bytes), use_(use) {
    if (!host) return;
    if (cudaMalloc(&allocation_, bytes + shift) != cudaSuccess) abort();
    device_ = static_cast<char*>(allocation_) + shift;
    if (use != Use::out) cudaMemcpy(device_, host, bytes, cudaMemcpyHostToDevice);
  }
  ~Buffer() { cudaFree(allocation_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* device() const { return device_; }
  // False where a result was not written, as far as the build can tell.
  bool fetch() const {
    if (!host_ || use_ == Use::in) return true;
    memcpy(host_, device_, bytes_);
    return cuda_sim::host_access(device_, bytes_, false) == cudaSuccess;
  }

 private:
  void *host_, *allocation_ = nullptr, *device_ = nullptr;
  size_t bytes_;
  Use use_;
};

// How many elements the tensors of a layer lie behind an aligned address.
size_t shift_in_elements = 0;

// Copies the tensors that a struct of parameters points to, and points it to the copies.
class DeviceTensors {
 public:
  void shift(size_t bytes) { shift_ = bytes; }
  void in(const void*& pointer, size_t bytes) { pointer = add(const_cast<void*>(pointer), bytes, Buffer::Use::in); }
  void in(void*& pointer, size_t bytes) { pointer = add(pointer, bytes, Buffer::Use::in); }
  void out(void*& pointer, size_t bytes) { pointer = add(pointer, bytes, Buffer::Use::out); }
  void in_out(void*& pointer, size_t bytes) { pointer = add(pointer, bytes, Buffer::Use::in_out); }

  bool fetch() const {
    bool complete = true;
    for (const auto& buffer : buffers_) complete = buffer->fetch() && complete;
    return complete;
  }

 private:
  void* add(void* host, size_t bytes, Buffer::Use use) {
    buffers_.push_back(std::make_unique<Buffer>(host, bytes, use, shift_));
    return buffers_.back()->device();
  }
  std::vector<std::unique_ptr<Buffer>> buffers_;
  size_t shift_ = 0;
};

// ------------------------------------------------------------------------------------------------ matrix product
template <class scalar_t>
cudaError_t multiply(const cuda::GemmArguments& g) {
  using acc_t = cuda::acc_type<scalar_t>;
  const auto* a = static_cast<const scalar_t*>(g.a);
  const auto* b = static_cast<const scalar_t*>(g.b);
  auto* c = static_cast<acc_t*>(g.c);
  for (int64_t row = 0; row < g.m; ++row) {
    if (cudaError_t e = cuda_sim::host_access(a + row * g.lda, g.k * sizeof(scalar_t), false); e) return e;
  }
  for (int64_t row = 0; row < (g.transpose_b ? g.n : g.k); ++row) {
    const int64_t width = g.transpose_b ? g.k : g.n;
    if (cudaError_t e = cuda_sim::host_access(b + row * g.ldb, width * sizeof(scalar_t), false); e) return e;
  }
  for (int64_t row = 0; row < g.m; ++row) {
    acc_t* out = c + row * g.ldc;
    if (g.accumulate) {
      if (cudaError_t e = cuda_sim::host_access(out, g.n * sizeof(acc_t), false); e) return e;
    }
    if (cudaError_t e = cuda_sim::host_access(out, g.n * sizeof(acc_t), true); e) return e;
    for (int64_t column = 0; column < g.n; ++column) {
      acc_t sum = 0;
      for (int64_t k = 0; k < g.k; ++k) {
        const scalar_t& factor = g.transpose_b ? b[column * g.ldb + k] : b[k * g.ldb + column];
        sum += cuda::to_acc(a[row * g.lda + k]) * cuda::to_acc(factor);
      }
      out[column] = g.accumulate ? out[column] + sum : sum;
    }
  }
  return cudaSuccess;
}

int run_gemm(void*, const cuda::GemmArguments& arguments) {
  switch (arguments.dtype) {
    case Dtype::f64:
      return multiply<double>(arguments);
    case Dtype::f32:
      return multiply<float>(arguments);
    case Dtype::bf16:
      return multiply<__nv_bfloat16>(arguments);
    default:
      return multiply<__half>(arguments);
  }
}

// ------------------------------------------------------------------------------------------------ engines
struct Engine {
  const char* name;
  size_t (*forward_workspace_bytes)(const LayerForward&);
  int (*forward)(const LayerForward&, const cuda::Context&);
  size_t (*backward_workspace_bytes)(const LayerBackward&);
  int (*backward)(const LayerBackward&, const cuda::BackwardProducts (&)[2], const cuda::Context&);
};
#define ENGINE(name)                                                                                       \
  Engine {                                                                                                 \
    #name, cuda::name::forward_workspace_bytes, cuda::name::forward, cuda::name::backward_workspace_bytes, \
        cuda::name::backward                                                                               \
  }
#ifdef RNNFAST_OWN_CELL
constexpr Engine kEngines[] = {ENGINE(stepwise)};
#else
constexpr Engine kEngines[] = {ENGINE(stepwise), ENGINE(persistent_cta), ENGINE(persistent_grid),
                               ENGINE(persistent_cluster)};
#endif
const Engine* engine = &kEngines[0];

// ------------------------------------------------------------------------------------------------ sizes
struct Sizes {
  size_t element, B, H, P, GH, SH, N, w_hh;  // in elements
  template <class Layer>
  explicit Sizes(const Layer& layer) {
    const CellInfo info = cell_info(layer.cell);
    element = size_of(layer.dtype);
    B = layer.sequence.batch, H = layer.hidden_size, P = layer.output_size, N = layer.sequence.rows;
    GH = info.gates * H, SH = (layer.layer_norm ? 2 * info.gates : info.saved) * H;
    w_hh = info.diagonal ? GH : GH * P;
  }
};

void move_sequence(DeviceTensors& tensors, Sequence& s) {
  const void *lengths = s.lengths, *reset = s.reset;
  tensors.in(lengths, s.batch * sizeof(int64_t));
  tensors.in(reset, s.rows * sizeof(bool));
  s.lengths = static_cast<const int64_t*>(lengths);
  s.reset = static_cast<const bool*>(reset);
}

template <class Layer>
void move_seeds(DeviceTensors& tensors, Layer& layer) {
  const void* seeds = layer.noise.seeds;
  tensors.in(seeds, layer.sequence.batch * sizeof(int64_t));
  layer.noise.seeds = static_cast<const int64_t*>(seeds);
}

template <class Direction>
void move_weights(DeviceTensors& tensors, const Sizes& z, Direction& d) {
  tensors.in(d.weights.w_hh, z.w_hh * z.element);
  tensors.in(d.weights.b_ih, z.GH * z.element);
  tensors.in(d.weights.b_hh, z.GH * z.element);
  tensors.in(d.weights.norm_ih, z.GH * z.element);
  tensors.in(d.weights.norm_hh, z.GH * z.element);
  tensors.in(d.weights.norm_c, z.H * z.element);
  tensors.in(d.weights.norm_bias_c, z.H * z.element);
  tensors.in(d.weights.w_hr, z.P * z.H * z.element);
  tensors.in(d.h0, z.B * z.P * z.element);
  tensors.in(d.c0, z.B * z.H * z.element);
}

// A workspace of exactly the size asked for. Its content is garbage before the call.
template <class Call>
int with_workspace(size_t bytes, const Call& call) {
  void* workspace = nullptr;
  if (cudaMalloc(&workspace, bytes) != cudaSuccess) return cudaErrorMemoryAllocation;
  cuda::Context context;
  context.workspace = workspace;
  context.gemm.run = run_gemm;
  const int error = call(context);
  cudaFree(workspace);
  return error;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT bool sim_set_engine(const char* name) {
  for (const Engine& candidate : kEngines) {
    if (strcmp(name, candidate.name) == 0) engine = &candidate;
  }
  return strcmp(name, engine->name) == 0;
}
#ifndef RNNFAST_OWN_CELL  // which has no persistent engine
EXPORT int sim_active_clusters(int (&clusters)[cuda::kMostClusterBlocks]) {
  return cuda::persistent_cluster::active_clusters(clusters);
}
#endif
EXPORT void sim_set_code_version(int version) { cuda_sim::set_code_version(version); }
EXPORT void sim_set_shift(size_t elements) { shift_in_elements = elements; }
EXPORT void sim_mutate(int site) { cuda_sim::mutate(site); }
EXPORT void sim_set_seed(uint64_t seed) { cuda_sim::set_seed(seed); }
EXPORT const char* sim_last_message() { return cuda_sim::last_message(); }

// All pointers of the layer are to host memory. Rows of both directions lie side by side, as the operators lay them
// out: direction 1's start where direction 0's end, and every row is as long as both.
EXPORT int sim_forward(const LayerForward* host) {
  LayerForward layer = *host;
  DeviceTensors tensors;
  const Sizes z(layer);
  move_sequence(tensors, layer.sequence);
  move_seeds(tensors, layer);
  tensors.shift(shift_in_elements * z.element);
  Rows output = layer.direction[0].output, c = layer.direction[0].c;
  tensors.out(output.data, z.N * layer.directions * z.P * z.element);
  tensors.out(c.data, z.N * layer.directions * z.H * z.element);
  for (int k = 0; k < layer.directions; ++k) {
    DirectionForward& d = layer.direction[k];
    move_weights(tensors, z, d);
    tensors.in(d.igates, z.N * z.GH * z.element);
    tensors.out(d.h_n, z.B * z.P * z.element);
    tensors.out(d.c_n, z.B * z.H * z.element);
    tensors.in_out(d.saved, z.N * z.SH * z.element);  // rows past a length stay as they are
    d.output.data = static_cast<char*>(output.data) + k * z.P * z.element;
    if (c.data) d.c.data = static_cast<char*>(c.data) + k * z.H * z.element;
  }
  const int error = with_workspace(engine->forward_workspace_bytes(layer),
                                   [&](const cuda::Context& c) { return engine->forward(layer, c); });
  if (error) return error;
  return tensors.fetch() ? 0 : cudaErrorUnknown;
}

EXPORT int sim_backward(const LayerBackward* host, const cuda::BackwardProducts* host_products) {
  LayerBackward layer = *host;
  cuda::BackwardProducts products[2] = {host_products[0], host_products[1]};
  DeviceTensors tensors;
  const Sizes z(layer);
  const bool recomputes = layer.direction[0].saved == nullptr;
  move_sequence(tensors, layer.sequence);
  move_seeds(tensors, layer);
  tensors.shift(shift_in_elements * z.element);
  Rows rows[] = {layer.direction[0].output, layer.direction[0].c, layer.direction[0].grad_output,
                 layer.direction[0].grad_c};
  const size_t features[] = {z.P, z.H, z.P, z.H};
  for (int i = 0; i < 4; ++i) tensors.in(rows[i].data, z.N * layer.directions * features[i] * z.element);
  for (int k = 0; k < layer.directions; ++k) {
    DirectionBackward& d = layer.direction[k];
    move_weights(tensors, z, d);
    tensors.in(d.saved, z.N * z.SH * z.element);
    tensors.in(d.grad_h_n, z.B * z.P * z.element);
    tensors.in(d.grad_c_n, z.B * z.H * z.element);
    tensors.out(d.grad_h0, z.B * z.P * z.element);
    tensors.out(d.grad_c0, z.B * z.H * z.element);
    recomputes ? tensors.in_out(d.grad_igates, z.N * z.GH * z.element)
               : tensors.out(d.grad_igates, z.N * z.GH * z.element);
    tensors.out(d.grad_hgates, z.N * z.GH * z.element);
    for (void** gradient : {&d.grad_b_ih, &d.grad_b_hh, &d.grad_norm_ih, &d.grad_norm_hh})
      tensors.out(*gradient, z.GH * z.element);
    for (void** gradient : {&d.grad_norm_c, &d.grad_norm_bias_c}) tensors.out(*gradient, z.H * z.element);
    tensors.out(products[k].h_prev, z.N * z.P * z.element);
    tensors.out(products[k].grad_h, z.N * z.P * z.element);
    tensors.out(products[k].hidden, z.N * z.H * z.element);
    tensors.out(products[k].gated, z.N * z.H * z.element);
    Rows* const of_direction[] = {&d.output, &d.c, &d.grad_output, &d.grad_c};
    for (int i = 0; i < 4; ++i) {
      of_direction[i]->data = rows[i].data ? static_cast<char*>(rows[i].data) + k * features[i] * z.element : nullptr;
    }
  }
  const int error = with_workspace(engine->backward_workspace_bytes(layer),
                                   [&](const cuda::Context& c) { return engine->backward(layer, products, c); });
  if (error) return error;
  return tensors.fetch() ? 0 : cudaErrorUnknown;
}

// Of `directions` directions side by side, as sim_forward has its rows.
EXPORT int sim_previous_states(const cuda::PreviousStates* host) {
  cuda::PreviousStates states = *host;
  DeviceTensors tensors;
  const size_t element = size_of(states.dtype), row = states.features * element, N = states.sequence.rows;
  move_sequence(tensors, states.sequence);
  tensors.shift(shift_in_elements * element);
  void* data = states.direction[0].states.data;
  tensors.in(data, N * states.directions * row);
  for (int k = 0; k < states.directions; ++k) {
    states.direction[k].states.data = static_cast<char*>(data) + k * row;
    tensors.in(states.direction[k].initial, states.sequence.batch * row);
    tensors.out(states.direction[k].previous, N * row);
  }
  const int error = with_workspace(cuda::previous_states_workspace_bytes(states.sequence),
                                   [&](const cuda::Context& c) { return cuda::previous_states(states, c); });
  if (error) return error;
  return tensors.fetch() ? 0 : cudaErrorUnknown;
}

// Along a tangent, by the stepwise engine.
EXPORT int sim_tangent(const LayerTangent* host) {
  LayerTangent layer = *host;
  DeviceTensors tensors;
  const CellInfo info = cell_info(layer.cell);
  const size_t element = size_of(layer.dtype), N = layer.sequence.rows, state = layer.hidden_size * element;
  const size_t states = layer.sequence.batch * state, gates = info.gates * state;
  const size_t w_hh = info.diagonal ? gates : gates * layer.hidden_size;
  move_sequence(tensors, layer.sequence);
  tensors.shift(shift_in_elements * element);
  const auto in = [&](DualPointer& pair, size_t bytes) {
    tensors.in(pair.value, bytes);
    tensors.in(pair.tangent, bytes);
  };
  DirectionTangent &first = layer.direction[0], &second = layer.direction[1];
  const size_t both = N * layer.directions * state;
  for (Rows* rows : {&first.output.value, &first.c.value, &first.grad_output.value, &first.grad_output.tangent,
                     &first.grad_c.value, &first.grad_c.tangent})
    tensors.in(rows->data, both);
  for (Rows* rows : {&first.output.tangent, &first.c.tangent}) tensors.out(rows->data, both);
  for (DualRows DirectionTangent::* pair :
       {&DirectionTangent::output, &DirectionTangent::c, &DirectionTangent::grad_output, &DirectionTangent::grad_c}) {
    for (Rows DualRows::* part : {&DualRows::value, &DualRows::tangent}) {
      void* const data = (first.*pair.*part).data;
      (second.*pair.*part).data = data ? static_cast<char*>(data) + state : nullptr;
    }
  }
  for (int k = 0; k < layer.directions; ++k) {
    DirectionTangent& d = layer.direction[k];
    in(d.w_hh, w_hh);
    for (DualPointer* pair : {&d.h0, &d.c0, &d.grad_h_n, &d.grad_c_n}) in(*pair, states);
    tensors.in(d.saved, N * info.saved * state);
    for (Rows* rows : {&d.t_igates, &d.t_hgates, &d.igates, &d.hgates}) tensors.in(rows->data, N * gates);
    for (void** result : {&d.t_h_n, &d.t_c_n, &d.t_grad_h0, &d.t_grad_c0}) tensors.out(*result, states);
    for (void** result : {&d.grad_igates, &d.grad_hgates}) tensors.out(*result, N * 2 * gates);
  }
  const int error = with_workspace(cuda::stepwise::tangent_workspace_bytes(layer),
                                   [&](const cuda::Context& c) { return cuda::stepwise::tangent(layer, c); });
  if (error) return error;
  return tensors.fetch() ? 0 : cudaErrorUnknown;
}

// The fast nonlinearities of csrc/cuda/lane_number.cuh, but for the hardware's approximations.
EXPORT void sim_fast_functions(const float* x, float* tanh_of_x, float* sigmoid_of_x, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    tanh_of_x[i] = cuda::FastFunctions::tanh(x[i]);
    sigmoid_of_x[i] = cuda::FastFunctions::sigmoid(x[i]);
  }
}

// So that Python can see that it declares the structs as they are.
EXPORT size_t sim_size_of_forward() { return sizeof(LayerForward); }
EXPORT size_t sim_size_of_backward() { return sizeof(LayerBackward); }
EXPORT size_t sim_size_of_products() { return sizeof(cuda::BackwardProducts); }
EXPORT size_t sim_size_of_previous() { return sizeof(cuda::PreviousStates); }
EXPORT size_t sim_size_of_tangent() { return sizeof(LayerTangent); }
EXPORT int sim_cell(const char* name) {
#define RNNFAST_CELL_NUMBER(cell, Type) \
  if (!strcmp(name, #cell)) return static_cast<int>(CellKind::cell);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CELL_NUMBER)
  return -1;
}
EXPORT int sim_saved_values(int cell) { return cell_info(static_cast<CellKind>(cell)).saved; }
EXPORT int sim_first_gates(int cell) { return cell_info(static_cast<CellKind>(cell)).first_gates; }
EXPORT bool sim_has_tangent(int cell) { return cell_info(static_cast<CellKind>(cell)).tangent; }
EXPORT int sim_splits_gates(int cell) { return cell_info(static_cast<CellKind>(cell)).split_gates; }
