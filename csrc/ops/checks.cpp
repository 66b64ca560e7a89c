#include "checks.h"

#include <cmath>
#include <initializer_list>

namespace rnnfast::ops {
namespace {

// The sizes with their names, "[D, B, P] = [1, 4, 16]", as messages show what an argument takes.
struct Shape {
  const char* names;
  std::initializer_list<int64_t> sizes;
};

void check_shape(const CellInfo& cell, const char* argument, const Tensor& tensor, const Shape& takes) {
  const at::IntArrayRef sizes(takes.sizes.begin(), takes.sizes.size());
  TORCH_CHECK(tensor.sizes() == sizes, "rnnfast.", cell.name, ": ", argument, " has shape ", tensor.sizes(),
              ", it takes ", takes.names, " = ", sizes);
}

void check_like(const CellInfo& cell, const char* argument, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "rnnfast.", cell.name, ": ", argument, " has dtype ",
              tensor.scalar_type(), ", it takes the input's, ", input.scalar_type());
  TORCH_CHECK(tensor.device() == input.device(), "rnnfast.", cell.name, ": ", argument, " is on ", tensor.device(),
              ", it takes the input's device, ", input.device());
}

void check_dtype(const CellInfo& cell, const char* argument, const Tensor& tensor, at::ScalarType takes) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == takes, "rnnfast.", cell.name, ": ", argument, " has dtype ",
                    tensor.scalar_type(), ", it takes ", takes);
}

Dtype layer_dtype(const CellInfo& cell, const Tensor& input) {
  switch (input.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "rnnfast.", cell.name, ": input has dtype ", input.scalar_type(),
                        ", it takes Double, Float, BFloat16 or Half");
  }
}

// Which weights there are, and the sizes they tell.
void read_weights(Geometry& g, const LayerArguments& a) {
  const int64_t count = static_cast<int64_t>(a.weights.size());
  g.layer_norm = a.layer_norm;
  TORCH_CHECK_VALUE(!g.layer_norm || g.info.layer_norm, "rnnfast.", g.info.name,
                    ": layer_norm is True, the cell takes False");
  const int64_t norms = g.norms_per_direction(), each = count / g.directions - norms;
  TORCH_CHECK(count % g.directions == 0 && each >= 2 && each <= 5, "rnnfast.", g.info.name, ": weights has ", count,
              " tensors for ", g.directions, " direction(s), it takes ", 2 + norms, " to ", 5 + norms,
              " a direction: w_ih, w_hh, then b_ih and b_hh or neither, then w_hr with a projection",
              norms == 0   ? ""
              : norms == 2 ? ", then norm_ih and norm_hh"
                           : ", then norm_ih, norm_hh, norm_c and norm_bias_c");
  g.biases = each >= 4;
  g.projection = each % 2 == 1;
  TORCH_CHECK(!g.projection || (g.info.states == 2 && !g.info.diagonal), "rnnfast.", g.info.name, ": weights has ",
              each, " tensors a direction, but a projection is for cells with two states",
              g.info.diagonal ? " and a matrix w_hh" : "");
  const char* columns = g.info.diagonal ? "" : ", P";
  TORCH_CHECK(a.weights[0].dim() == 2 && a.weights[1].dim() == (g.info.diagonal ? 1 : 2) &&
                  a.weights[0].size(0) % g.info.gates == 0,
              "rnnfast.", g.info.name, ": w_ih has shape ", a.weights[0].sizes(), " and w_hh ", a.weights[1].sizes(),
              ", they take [", g.info.gates, "*H, I] and [", g.info.gates, "*H", columns, "]");
  g.input_size = a.weights[0].size(1);
  g.hidden_size = a.weights[0].size(0) / g.info.gates;
  g.output_size = g.projection ? a.weights[1].size(1) : g.hidden_size;
  TORCH_CHECK(!g.projection || (g.output_size > 0 && g.hidden_size > 0), "rnnfast.", g.info.name, ": w_hh has shape ",
              a.weights[1].sizes(), ", with a projection it takes [", g.info.gates, "*H, P] with H > 0 and P > 0");
}

void check_weights(const Geometry& g, const LayerArguments& a) {
  const int64_t gates = g.info.gates * g.hidden_size;
  const auto check = [&](const char* argument, const Tensor* weight, const Shape& takes) {
    if (weight == nullptr) return;
    check_shape(g.info, argument, *weight, takes);
    check_like(g.info, argument, *weight, a.input);
  };
  for (int64_t d = 0; d < g.directions; ++d) {
    const WeightView w(g, a.weights.data(), d);
    check("w_ih", w.w_ih, {"[G*H, I]", {gates, g.input_size}});
    g.info.diagonal ? check("w_hh", w.w_hh, {"[G*H]", {gates}})
                    : check("w_hh", w.w_hh, {"[G*H, P]", {gates, g.output_size}});
    check("b_ih", w.b_ih, {"[G*H]", {gates}});
    check("b_hh", w.b_hh, {"[G*H]", {gates}});
    check("w_hr", w.w_hr, {"[P, H]", {g.output_size, g.hidden_size}});
    check("norm_ih", w.norm_ih, {"[G*H]", {gates}});
    check("norm_hh", w.norm_hh, {"[G*H]", {gates}});
    check("norm_c", w.norm_c, {"[H]", {g.hidden_size}});
    check("norm_bias_c", w.norm_bias_c, {"[H]", {g.hidden_size}});
  }
}

void check_sequence(const Geometry& g, const LayerArguments& a) {
  TORCH_CHECK(!(a.lengths && g.packed), "rnnfast.", g.info.name,
              ": lengths and batch_sizes are both given, it takes one of them at most");
  if (g.packed) {
    check_dtype(g.info, "batch_sizes", *a.batch_sizes, at::kLong);
    TORCH_CHECK(a.batch_sizes->dim() == 1 && a.batch_sizes->device().is_cpu(), "rnnfast.", g.info.name,
                ": batch_sizes has shape ", a.batch_sizes->sizes(), " on ", a.batch_sizes->device(),
                ", it takes [T] on cpu");
  }
  if (a.lengths) {
    check_dtype(g.info, "lengths", *a.lengths, at::kLong);
    check_shape(g.info, "lengths", *a.lengths, {"[B]", {g.batch}});
  }
  if (a.reset) {
    check_dtype(g.info, "reset", *a.reset, at::kBool);
    TORCH_CHECK(a.reset->device() == a.input.device(), "rnnfast.", g.info.name, ": reset is on ", a.reset->device(),
                ", it takes the input's device, ", a.input.device());
    if (g.packed) {
      check_shape(g.info, "reset", *a.reset, {"[N]", {g.rows}});
    } else {
      check_shape(g.info, "reset", *a.reset, {"[T, B]", {g.steps, g.batch}});
    }
  }
}

}  // namespace

Geometry check_layer(CellKind cell, const LayerArguments& a) {
  Geometry g;
  g.cell = cell;
  g.info = cell_info(cell);
  g.dtype = layer_dtype(g.info, a.input);
  g.packed = a.batch_sizes.has_value();

  TORCH_CHECK(a.input.dim() == (g.packed ? 2 : 3), "rnnfast.", g.info.name, ": input has shape ", a.input.sizes(),
              ", it takes ", g.packed ? "[N, I] with batch_sizes" : "[T, B, I]");
  TORCH_CHECK(a.h0.dim() == 3 && (a.h0.size(0) == 1 || a.h0.size(0) == 2), "rnnfast.", g.info.name, ": h0 has shape ",
              a.h0.sizes(), ", it takes [D, B, P] with one or two directions");
  g.directions = a.h0.size(0);
  read_weights(g, a);

  g.steps = g.packed ? a.batch_sizes->numel() : a.input.size(0);
  g.batch = g.packed ? a.h0.size(1) : a.input.size(1);
  g.rows = g.packed ? a.input.size(0) : g.steps * g.batch;
  TORCH_CHECK(a.input.size(-1) == g.input_size, "rnnfast.", g.info.name, ": input has ", a.input.size(-1),
              " features, the weights take I = ", g.input_size);

  check_weights(g, a);
  check_like(g.info, "h0", a.h0, a.input);
  check_shape(g.info, "h0", a.h0, {"[D, B, P]", {g.directions, g.batch, g.output_size}});
  TORCH_CHECK(
      a.c0.has_value() == (g.info.states == 2), "rnnfast.", g.info.name, ": c0 is ",
      a.c0 ? "given, the cell has one state and takes None" : "None, the cell has two states and takes [D, B, H]");
  if (a.c0) {
    check_like(g.info, "c0", *a.c0, a.input);
    check_shape(g.info, "c0", *a.c0, {"[D, B, H]", {g.directions, g.batch, g.hidden_size}});
  }
  check_sequence(g, a);
  return g;
}

void check_batch_sizes(const Geometry& g, const Tensor& batch_sizes) {
  const Tensor contiguous = batch_sizes.contiguous();
  const int64_t* sizes = contiguous.const_data_ptr<int64_t>();
  int64_t above = g.batch, rows = 0;
  for (int64_t t = 0; t < g.steps; ++t) {
    TORCH_CHECK_VALUE(sizes[t] >= 0 && sizes[t] <= above, "rnnfast.", g.info.name, ": batch_sizes has ", sizes[t],
                      " after ", above, ", it takes values that decrease from at most B = ", g.batch, " to at least 0");
    above = sizes[t];
    rows += sizes[t];
  }
  TORCH_CHECK_VALUE(rows == g.rows, "rnnfast.", g.info.name, ": batch_sizes add up to ", rows,
                    ", the packed input has N = ", g.rows, " rows");
}

void check_lengths(const Geometry& g, const Tensor& lengths) {
  const Tensor contiguous = lengths.contiguous();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < g.batch; ++b) {
    TORCH_CHECK(values[b] >= 0 && values[b] <= g.steps, "rnnfast.", g.info.name, ": lengths[", b, "] is ", values[b],
                ", it takes 0 to T = ", g.steps);
  }
}

Save check_save(CellKind cell, int64_t save) {
  TORCH_CHECK_VALUE(save >= 0 && save <= 2, "rnnfast.", cell_info(cell).name, ": save is ", save,
                    ", it takes 0 (nothing), 1 (states) or 2 (gates)");
  return static_cast<Save>(save);
}

Noise check_noise(const Geometry& g, const Tensor& input, const OptionalTensor& seed, at::ArrayRef<double> noise) {
  if (seed) {
    check_dtype(g.info, "seed", *seed, at::kLong);
    check_shape(g.info, "seed", *seed, {"[B]", {g.batch}});
    TORCH_CHECK(seed->device() == input.device(), "rnnfast.", g.info.name, ": seed is on ", seed->device(),
                ", it takes the input's device, ", input.device());
  }
  Noise result;
  if (noise.empty()) return result;
  TORCH_CHECK_VALUE(noise.size() == 3 || noise.size() == 4, "rnnfast.", g.info.name, ": noise has ", noise.size(),
                    " values, it takes none, or the probabilities of recurrent dropout and of zoneout of h and c, and "
                    "perhaps the first unit");
  for (const double p : noise.slice(0, 3))
    TORCH_CHECK_VALUE(p >= 0 && p < 1, "rnnfast.", g.info.name, ": noise has ", p,
                      ", it takes probabilities from 0 to below 1");
  TORCH_CHECK_VALUE(noise[2] == 0 || g.info.states == 2, "rnnfast.", g.info.name, ": noise has ", noise[2],
                    " for c, the cell has one state and takes 0");
  TORCH_CHECK(seed || noise[0] == 0, "rnnfast.", g.info.name, ": seed is None, recurrent dropout takes [B] int64");
  result.recurrent_dropout = noise[0];
  result.zoneout_h = noise[1];
  result.zoneout_c = noise[2];
  if (noise.size() == 4) {
    constexpr double kUnits = 4294967296;  // as many as philox.h counts
    TORCH_CHECK_VALUE(noise[3] >= 0 && noise[3] < kUnits && noise[3] == std::floor(noise[3]), "rnnfast.", g.info.name,
                      ": noise has ", noise[3], " as the first unit, it takes an integer from 0 to below 2^32");
    result.first_unit = static_cast<int64_t>(noise[3]);
  }
  return result;
}

void check_steps(const Geometry& g, const char* argument, const Tensor& tensor, const Tensor& input, int64_t features) {
  check_like(g.info, argument, tensor, input);
  const int64_t width = g.directions * features;
  if (g.packed) {
    check_shape(g.info, argument, tensor, {"[N, D*features]", {g.rows, width}});
  } else {
    check_shape(g.info, argument, tensor, {"[T, B, D*features]", {g.steps, g.batch, width}});
  }
}

void check_gradients(const Geometry& g, const LayerArguments& a, const OptionalTensor& grad_output,
                     const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                     const Tensor& output, const Tensor& c, const Tensor& saved) {
  const bool two_states = g.info.states == 2;
  check_steps(g, "output", output, a.input, g.output_size);
  if (grad_output) check_steps(g, "grad_output", *grad_output, a.input, g.output_size);
  if (grad_h_n) {
    check_like(g.info, "grad_h_n", *grad_h_n, a.input);
    check_shape(g.info, "grad_h_n", *grad_h_n, {"[D, B, P]", {g.directions, g.batch, g.output_size}});
  }
  if (two_states) {
    check_steps(g, "c (forward with save = 0 leaves none)", c, a.input, g.hidden_size);
    if (grad_c) check_steps(g, "grad_c", *grad_c, a.input, g.hidden_size);
    if (grad_c_n) {
      check_like(g.info, "grad_c_n", *grad_c_n, a.input);
      check_shape(g.info, "grad_c_n", *grad_c_n, {"[D, B, H]", {g.directions, g.batch, g.hidden_size}});
    }
  }
  if (saved.numel() > 0) {
    check_like(g.info, "saved", saved, a.input);
    const char* names = g.layer_norm ? "[D, N, S*H + numbers behind all rows]" : "[D, N, S*H]";
    check_shape(g.info, "saved", saved, {names, {g.directions, g.rows, g.saved_elements_a_row()}});
    TORCH_CHECK(saved.is_contiguous(), "rnnfast.", g.info.name, ": saved is not contiguous");
  }
}

}  // namespace rnnfast::ops
