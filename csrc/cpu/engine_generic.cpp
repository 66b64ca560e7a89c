// Owns: the CPU engine compiled for generic.

// Everything from the standard library comes before the target pragma: an inline function compiled for this instruction
// set here could otherwise be the copy that the linker keeps for the whole program.
#include "engine_headers.h"

#define RNNFAST_ISA generic
#define RNNFAST_VECTOR_BYTES 16
#include "engine_body.h"
