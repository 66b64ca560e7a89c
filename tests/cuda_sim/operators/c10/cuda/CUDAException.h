// Stands in for torch's header of this name.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(expression)                                               \
  do {                                                                           \
    const cudaError_t error_ = expression;                                       \
    TORCH_CHECK(error_ == cudaSuccess, "CUDA error ", static_cast<int>(error_)); \
  } while (false)
