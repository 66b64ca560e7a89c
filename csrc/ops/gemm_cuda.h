// Owns: the matrix product that the CUDA engines ask for, on cuBLAS.
// Must not know: layers.
#pragma once

#include "params.h"

namespace rnnfast::ops {

// On the current stream, with torch's settings (TF32 among them). run throws where cuBLAS fails, as torch does.
cuda::Gemm cublas_gemm();

}  // namespace rnnfast::ops
