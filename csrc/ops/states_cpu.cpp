#include "states_cpu.h"

#include <ATen/Functions.h>

#include <algorithm>

namespace rnnfast::ops {
namespace {

template <class Scalar>
void copy_previous_states(const Geometry& g, const Sequence& s, const Tensor& output, const Tensor& h0, int64_t d,
                          Scalar* to) {
  const int64_t P = g.output_size;
  const bool reverse = d == 1;
  const Rows rows = rows_of(g, output, d * P);
  const Scalar *every = static_cast<const Scalar*>(rows.data), *initial = static_cast<const Scalar*>(block(h0, d));
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t slot = 0; slot < s.batch_size(t); ++slot) {
      const int64_t before = reverse ? t + 1 : t - 1;
      const bool has_previous = reverse ? before < s.steps && slot < s.batch_size(before) : t > 0;
      // The later of the two steps carries the flag of the boundary between them.
      if (s.reset && (!reverse || has_previous) && s.reset[s.tensor_row(reverse ? before : t, slot)]) continue;
      const Scalar* from = nullptr;
      if (has_previous) {
        from = every + rows.at(s, before, slot);
      } else if (initial) {
        from = initial + s.batch_row(slot) * P;
      }
      if (from) std::copy(from, from + P, to + s.tensor_row(t, slot) * P);
    }
}

}  // namespace

Tensor previous_states(const Geometry& g, const Sequence& s, const Tensor& output, const Tensor& h0, int64_t d) {
  const Tensor result = at::zeros({g.rows, g.output_size}, output.options());
  if (g.dtype == Dtype::f64) {
    copy_previous_states(g, s, output, h0, d, result.data_ptr<double>());
  } else {
    copy_previous_states(g, s, output, h0, d, result.data_ptr<float>());
  }
  return result;
}

}  // namespace rnnfast::ops
