// Owns: the matrix product that the CUDA engines ask for, on cuBLAS with torch's handle: its stream, its workspace, its
// TF32 switch. Torch's own wrappers (at::cuda::blas) are not exported from its library.
// Must not know: layers.
#include "gemm_cuda.h"

#include <ATen/cuda/CUDAContext.h>

namespace rnnfast::ops {
namespace {

template <class acc_t>
void multiply(void* handle, const cuda::GemmArguments& g, cudaDataType_t operands, cudaDataType_t sums,
              cublasComputeType_t compute) {
  if (g.m == 0 || g.n == 0) return;
  const acc_t one = 1, beta = g.accumulate ? 1 : 0;
  // cuBLAS is column-major: it sees the transposes of our matrices, and c^T = op(b)^T a^T.
  const cublasStatus_t status = cublasGemmEx_64(
      static_cast<cublasHandle_t>(handle), g.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, g.n, g.m, g.k, &one,
      g.b, operands, g.ldb, g.a, operands, g.lda, &beta, g.c, sums, g.ldc, compute, CUBLAS_GEMM_DEFAULT);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "rnnfast: cuBLAS refuses a product of [", g.m, ", ", g.k, "] and [", g.k,
              ", ", g.n, "]: ", cublasGetStatusString(status));
}

}  // namespace

int CublasGemm::run(void* self, const cuda::GemmArguments& arguments) {
  void*& handle = static_cast<CublasGemm*>(self)->handle_;
  if (handle == nullptr) handle = at::cuda::getCurrentCUDABlasHandle();
  switch (arguments.dtype) {
    case Dtype::f64:
      multiply<double>(handle, arguments, CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F);
      break;
    case Dtype::f32:
      multiply<float>(handle, arguments, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F);
      break;
    case Dtype::bf16:
      multiply<float>(handle, arguments, CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F);
      break;
    case Dtype::f16:
      multiply<float>(handle, arguments, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F);
      break;
  }
  return 0;
}

}  // namespace rnnfast::ops
