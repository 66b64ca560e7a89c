// Owns: the operators under autocast. A layer's floating arguments are cast to autocast's dtype, as torch.nn's layers
// cast theirs. Derivatives compute in the dtype of what forward kept: autocast ends where they begin.
// Must not know: how an operator runs.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <string>

#include "signatures.h"

namespace rnnfast::ops::autocast {
namespace {

template <CellKind kind, at::DeviceType device>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                      int64_t save, const OptionalTensor& seed, at::ArrayRef<double> noise, bool layer_norm) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& tensor) { return at::autocast::cached_cast(dtype, tensor, device); };
  return forward_operator(kind).call(cast(input), cast(h0), cast(c0), cast(weights), batch_sizes, lengths, reset, save,
                                     seed, noise, layer_norm);
}

void without_autocast(const c10::OperatorHandle& derivative, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  derivative.callBoxed(stack);
}

template <CellKind kind, at::DeviceType device>
void implement(torch::Library& m) {
  const std::string name = cell_info(kind).name;
  m.impl(name.c_str(), &forward<kind, device>);
  for (const char* derivative : {"_backward", "_backward_with_states", "_grouped_backward", "_jvp", "_backward_jvp"})
    m.impl((name + derivative).c_str(), torch::CppFunction::makeFromBoxedFunction<&without_autocast>());
}

template <at::DeviceType device>
void implement_all(torch::Library& m) {
#define RNNFAST_AUTOCAST(name, Type) implement<CellKind::name, device>(m);
  RNNFAST_FOR_EACH_CELL(RNNFAST_AUTOCAST)
#undef RNNFAST_AUTOCAST
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, AutocastCPU, m) { implement_all<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, AutocastCUDA, m) { implement_all<at::kCUDA>(m); }

}  // namespace rnnfast::ops::autocast
