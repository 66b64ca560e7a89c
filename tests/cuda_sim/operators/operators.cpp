// Owns: the CUDA operators of csrc/ops for host tensors and the simulator, under a dispatch key that torch leaves free.
// One compilation, since each would parse torch's headers anew.
// Must not know: what they do.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "call_cuda.cpp"
#include "checks.cpp"
#include "cuda_engine.cpp"
#include "device_host.cpp"
#include "gemm_host.cpp"
#include "layer.cpp"
#include "plan.cpp"
#include "products.cpp"

#define CUDA PrivateUse1
#include "layer_cuda.cpp"
#include "tangent_cuda.cpp"
