// Owns: the matrix product that the CUDA engines ask for, on cuBLAS.
// Must not know: layers.
#pragma once

#include "params.h"

namespace rnnfast::ops {

// On the stream that is current when this is called, with torch's settings then (TF32 among them), as long as nothing
// else uses cuBLAS on this thread. run throws where cuBLAS fails, as torch does.
cuda::Gemm cublas_gemm();

}  // namespace rnnfast::ops
