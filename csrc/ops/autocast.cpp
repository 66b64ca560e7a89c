// Owns: the operators under autocast: floating arguments are cast to autocast's dtype, as torch.nn's layers cast
// theirs. Must not know: how an operator runs.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "signatures.h"

namespace rnnfast::ops {
namespace {

template <CellKind kind, at::DeviceType device>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                      int64_t save) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& tensor) { return at::autocast::cached_cast(dtype, tensor, device); };
  return forward_operator<kind>().call(cast(input), cast(h0), cast(c0), cast(weights), batch_sizes, lengths, reset,
                                       save);
}

}  // namespace

#define RNNFAST_AUTOCAST_CPU(name, Type) m.impl(#name, &forward<CellKind::name, at::kCPU>);
#define RNNFAST_AUTOCAST_CUDA(name, Type) m.impl(#name, &forward<CellKind::name, at::kCUDA>);
TORCH_LIBRARY_IMPL(rnnfast, AutocastCPU,
                   m){RNNFAST_FOR_EACH_CELL(RNNFAST_AUTOCAST_CPU)} TORCH_LIBRARY_IMPL(rnnfast, AutocastCUDA, m) {
  RNNFAST_FOR_EACH_CELL(RNNFAST_AUTOCAST_CUDA)
}
#undef RNNFAST_AUTOCAST_CPU
#undef RNNFAST_AUTOCAST_CUDA

}  // namespace rnnfast::ops
