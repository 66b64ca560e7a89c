// Stands in for the header that a CUDA build of torch generates, so that its other CUDA headers can be parsed.
#pragma once

#define C10_CUDA_BUILD_SHARED_LIBS
