// Stands in for the toolkit's header of this name, whose C++ half is for nvcc.
#pragma once

#include "cuda_sim.h"
