// Owns: the matrix product of csrc/ops/gemm_cuda.h on host tensors.
// Must not know: layers.
#include <ATen/Functions.h>

#include "gemm_cuda.h"

namespace rnnfast::ops {

int CublasGemm::run(void*, const cuda::GemmArguments& g) {
  constexpr at::ScalarType kTypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};  // in the order of Dtype
  const at::ScalarType type = kTypes[static_cast<int>(g.dtype)];
  const at::ScalarType acc = type == at::kDouble ? at::kDouble : at::kFloat;
  const auto matrix = [](const void* data, int64_t rows, int64_t columns, int64_t stride, at::ScalarType dtype) {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1}, at::TensorOptions().dtype(dtype));
  };
  const at::Tensor a = matrix(g.a, g.m, g.k, g.lda, type).to(acc);
  const at::Tensor b = (g.transpose_b ? matrix(g.b, g.n, g.k, g.ldb, type).t() : matrix(g.b, g.k, g.n, g.ldb, type));
  at::Tensor c = matrix(g.c, g.m, g.n, g.ldc, acc);
  const at::Tensor product = at::mm(a, b.to(acc));
  g.accumulate ? c.add_(product) : c.copy_(product);
  return 0;
}

}  // namespace rnnfast::ops
