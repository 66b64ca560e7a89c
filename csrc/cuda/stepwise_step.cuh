// Owns: what the kernels of the stepwise engine that run cells get, one step of both directions.
// Must not know: equations, tensors, what a kernel does with it.
#pragma once

#include "stepwise.cuh"

namespace rnnfast::cuda::stepwise {

template <class scalar_t>
struct ForwardStepDirection {
  using acc_t = acc_type<scalar_t>;
  int64_t rows = 0, step = 0;  // living rows (their slots are 0 .. rows - 1)
  bool reverse = false;
  const scalar_t* igates = nullptr;  // [rows, G*H]
  const acc_t* hgates = nullptr;     // [rows, G*H]; null for a diagonal cell
  const scalar_t* w_hh = nullptr;    // [G*H]: a diagonal cell's
  const scalar_t* b_hh = nullptr;    // [G*H] or null
  scalar_t* h = nullptr;             // [B, H], the running state; null with a projection
  scalar_t* masked = nullptr;        // [B, H], the same behind recurrent dropout; null with a projection or without it
  acc_t* c = nullptr;                // [B, H], the running state of cells with two states
  scalar_t* c_n = nullptr;           // [B, H], the same in the layer's dtype
  scalar_t* output = nullptr;        // rows of H; null with a projection
  int64_t output_stride = 0;
  scalar_t* c_output = nullptr;  // rows of H or null
  int64_t c_output_stride = 0;
  scalar_t* saved = nullptr;   // [rows, S*H] or null
  scalar_t* hidden = nullptr;  // [rows, H]; null without a projection
  Border entered;
};

template <class scalar_t>
struct ForwardStep {
  int64_t hidden_size = 0;
  const int64_t* lengths = nullptr;
  DeviceNoise<acc_type<scalar_t>> noise;
  ForwardStepDirection<scalar_t> direction[2];
};

template <class scalar_t>
struct BackwardStepDirection {
  using acc_t = acc_type<scalar_t>;
  int64_t rows = 0, step = 0;
  bool reverse = false;
  const scalar_t* saved = nullptr;   // [rows, S*H]; may be grad_igates
  const scalar_t* w_hh = nullptr;    // [G*H]: a diagonal cell's
  Previous<scalar_t> h_prev;         // cells with one state
  const scalar_t* output = nullptr;  // rows of H; null with a projection
  int64_t output_stride = 0;
  const scalar_t* c = nullptr;  // rows of H: cells with two states
  int64_t c_stride = 0;
  Previous<scalar_t> c_prev;

  const scalar_t* grad_output = nullptr;  // rows of H; null: zero
  int64_t grad_output_stride = 0;
  const acc_t* grad_hidden = nullptr;       // [rows, H]: with a projection, instead of grad_output and grad_h
  const scalar_t* grad_c_output = nullptr;  // rows of H; null: zero
  int64_t grad_c_output_stride = 0;
  acc_t* grad_h = nullptr;  // [B, H], carried; null with a projection
  acc_t* grad_c = nullptr;  // [B, H], carried

  scalar_t* grad_igates = nullptr;  // [rows, G*H]
  scalar_t* grad_hgates = nullptr;  // [rows, G*H]; null: the cell does not split its gates
  scalar_t* hidden = nullptr;       // [rows, H]; null without a projection
  Border entered, left;             // on the way into this step, and from it into the next
};

template <class scalar_t>
struct BackwardStep {
  int64_t hidden_size = 0;
  const int64_t* lengths = nullptr;
  DeviceNoise<acc_type<scalar_t>> noise;
  BackwardStepDirection<scalar_t> direction[2];
};

}  // namespace rnnfast::cuda::stepwise
