"""Programs of other people train to the same numbers with rnnfast's layers. They need packages of their own:

pip install --no-build-isolation ".[programs]" && pytest tests/test_programs.py --long
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize("name", ["recurrent_ppo", "deepar"])
def test_a_program_trains_to_the_same_numbers(name: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    torch.set_num_threads(1)
    programs = importlib.import_module("programs")
    theirs, ours = programs.both(getattr(programs, name))
    assert len(ours.numbers) == len(theirs.numbers) > 10
