// Owns: the names of the engines, one for each instruction set.
// Must not know: how they work.
#pragma once

#include "../params.h"

namespace rnnfast::cpu {

namespace generic {
extern const EngineTable kEngine;
}
#if defined(__x86_64__)
namespace avx2 {
extern const EngineTable kEngine;
}
namespace avx512 {
extern const EngineTable kEngine;
}
namespace avx512_bf16 {
extern const EngineTable kEngine;
}
#endif

}  // namespace rnnfast::cpu
