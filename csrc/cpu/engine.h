// Owns: the table of entry points that every instruction set provides.
// Must not know: how they work.
#pragma once

#include "../params.h"

namespace rnnfast::cpu {

struct Engine {
  const char* name;
  size_t (*forward_workspace_bytes)(const LayerForward&, int threads);
  void (*forward)(const LayerForward&, void* workspace, int threads);
  size_t (*backward_workspace_bytes)(const LayerBackward&, int threads);
  void (*backward)(const LayerBackward&, void* workspace, int threads);
};

namespace generic {
extern const Engine kEngine;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Engine kEngine;
}
namespace avx512 {
extern const Engine kEngine;
}
namespace avx512_bf16 {
extern const Engine kEngine;
}
#endif

}  // namespace rnnfast::cpu
