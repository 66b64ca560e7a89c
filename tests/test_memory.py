"""Memory does not grow with the number of calls."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from sample_inputs import flatten

import rnnfast

WINDOWS, WINDOW = 5, 2_000  # 10,000 calls


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def calls(module: torch.nn.Module, count: int, device: str) -> None:
    """Calls of varying T, half of them trained through."""
    for index in range(count):
        input = torch.ones(1 + index * 7 % 16, 2, 3, device=device, requires_grad=True)
        if index % 2:
            with torch.no_grad():
                module(input)
        else:
            sum(part.sum() for part in flatten(module(input))).backward()
            module.zero_grad()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_calls_of_varying_length(name: str, device: str) -> None:
    """A leak of 50 bytes or a twentieth of an object a call is seen."""
    torch.set_num_threads(1)
    module = getattr(rnnfast, name)(3, 4, device=device)
    calls(module, WINDOW, device)
    growth, objects, on_device = [], [], []
    for _ in range(WINDOWS):
        gc.collect()
        before = resident_bytes(), len(gc.get_objects()), torch.cuda.memory_allocated() if device == "cuda" else 0
        calls(module, WINDOW, device)
        gc.collect()
        growth.append(resident_bytes() - before[0])
        objects.append(len(gc.get_objects()) - before[1])
        on_device.append(torch.cuda.memory_allocated() - before[2] if device == "cuda" else 0)
    # The allocator may settle in one window or another; a leak shows in all of them.
    assert min(growth) < 100_000  # 50 bytes a call
    assert min(objects) < 100
    assert min(on_device) <= 0
