// Owns: the matrix product that the CUDA engines ask for, on cuBLAS.
// Must not know: layers.
#pragma once

#include "params.h"

namespace rnnfast::ops {

// The products of one call of an engine. Torch's handle is got at the first of them, for many a persistent engine's
// call has none, and then kept, for getting it takes a lock and sets it up again: its stream is the one that is current
// then, its settings (TF32 among them) are torch's then, as long as nothing else uses cuBLAS on this thread.
class CublasGemm {
 public:
  CublasGemm() = default;
  CublasGemm(const CublasGemm&) = delete;
  CublasGemm& operator=(const CublasGemm&) = delete;

  // As long as this object lives. Its run throws where cuBLAS fails, as torch does.
  cuda::Gemm gemm() { return {&run, this}; }

 private:
  static int run(void* self, const cuda::GemmArguments& arguments);

  void* handle_ = nullptr;  // cublasHandle_t
};

}  // namespace rnnfast::ops
