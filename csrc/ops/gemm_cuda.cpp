// Owns: the matrix product that the CUDA engines ask for, on cuBLAS through torch.
// Must not know: layers.
#include "gemm_cuda.h"

#include <ATen/cuda/CUDABlas.h>

namespace rnnfast::ops {
namespace {

// cuBLAS is column-major: it sees the transposes of our matrices, and c^T = op(b)^T a^T.
template <class scalar_t, class acc_t>
void multiply(const cuda::GemmArguments& g) {
  at::cuda::blas::gemm<scalar_t, acc_t>(g.transpose_b ? 't' : 'n', 'n', g.n, g.m, g.k, 1,
                                        static_cast<const scalar_t*>(g.b), g.ldb, static_cast<const scalar_t*>(g.a),
                                        g.lda, g.accumulate ? 1 : 0, static_cast<acc_t*>(g.c), g.ldc);
}

int run(void*, const cuda::GemmArguments& arguments) {
  switch (arguments.dtype) {
    case Dtype::f64:
      multiply<double, double>(arguments);
      break;
    case Dtype::f32:
      multiply<float, float>(arguments);
      break;
    case Dtype::bf16:
      multiply<at::BFloat16, float>(arguments);
      break;
    case Dtype::f16:
      multiply<at::Half, float>(arguments);
      break;
  }
  return 0;
}

}  // namespace

cuda::Gemm cublas_gemm() { return {&run, nullptr}; }

}  // namespace rnnfast::ops
