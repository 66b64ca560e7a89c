"""Owns: what every test starts from: the seed, the threads, the devices that are here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rnnfast import ops, show_config

# A slow machine is no failure, and a failure is to be seen again.
settings.register_profile("rnnfast", deadline=None, derandomize=True)
settings.load_profile("rnnfast")

# A cell of one's own takes 40 seconds to compile: what one run has compiled is there for the next.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parents[1] / "build" / "own_cells"))

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and not ops.missing_kernels("cuda") else ["cpu"]


def pytest_report_header() -> list[str]:
    return [*show_config().splitlines(), f"tested on: {', '.join(DEVICES)}"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--configurations", type=int, default=300, metavar="N", help="random configurations to test (default: 300)"
    )
    parser.addoption("--long", action="store_true", help="also what takes minutes and packages of its own")


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that is here and has kernels: a test that takes it runs on all of them."""
    return str(request.param)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seed, whatever ran before it, and leaves the settings of torch as they were."""
    torch.manual_seed(0)
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cudnn_tf32 = torch.backends.cudnn.allow_tf32
    instruction_set = None if ops.extension is None else ops.extension.instruction_set()
    torch.backends.cudnn.allow_tf32 = False  # torch.nn's float32 layers on CUDA are compared with, at full precision
    yield
    if instruction_set is not None:
        ops.extension.set_instruction_set(instruction_set)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
