// Stands in for the toolkit's header of this name, as far as torch's headers need it to be parsed. Nothing links to it.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstdint>

typedef struct cublasContext* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS = 0 } cublasStatus_t;
typedef enum { CUBLAS_POINTER_MODE_HOST = 0 } cublasPointerMode_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70 } cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
typedef enum { CUBLAS_FILL_MODE_LOWER = 0 } cublasFillMode_t;
typedef enum { CUBLAS_DIAG_NON_UNIT = 0 } cublasDiagType_t;
typedef enum { CUBLAS_SIDE_LEFT = 0 } cublasSideMode_t;

extern "C" cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t* mode);
extern "C" cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode);
extern "C" const char* cublasGetStatusString(cublasStatus_t status);
extern "C" cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                                          cudaDataType a_type, int64_t lda, const void* b, cudaDataType b_type,
                                          int64_t ldb, const void* beta, void* c, cudaDataType c_type, int64_t ldc,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algorithm);
