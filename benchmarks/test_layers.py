"""A few shapes under pytest-benchmark, torch.nn and rnnfast in the same run: `pytest benchmarks`.

For the whole grid, with both sides in turns, see run.py.
"""

import pytest
import torch
from measure import TOLERANCES, Case, Side, compare
from shapes import BY_NAME, CELLS

import rnnfast


@pytest.mark.parametrize("library", [torch.nn, rnnfast], ids=["torch.nn", "rnnfast"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", ["vad", "char_lm", "b32_t50_h64", "b32_t100_h256", "news"])
def test_layer(benchmark, shape, cell, training, library):
    case = Case(BY_NAME[shape], cell, training, torch.float32, "cpu", torch.get_num_threads())
    benchmark.group = f"{shape} {cell} {'training' if training else 'forward'}"
    side = Side(library, case, case.dtype, case.shape.steps)
    result = benchmark(side.run)
    compare(Side(torch.nn, case, case.dtype, case.shape.steps).run(), result, TOLERANCES[case.dtype])
