"""Owns: the promise that no memory beside a caller's tensors is touched, whatever the sizes and the instruction set.

The tensors lie against pages that nobody may read or write. An access to those ends the process, so the tests start
processes of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_inputs import Sample
from torch import Tensor

from rnnfast import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Below, at and above a vector, odd and even; few rows, whose weights are read where they lie, and many; one pass of the
# weight gradients and two.
SIZES: tuple[dict[str, int], ...] = (
    {"steps": 3, "batch": 2, "input_size": 1, "hidden_size": 1},
    {"steps": 2, "batch": 3, "input_size": 17, "hidden_size": 3},
    {"steps": 3, "batch": 2, "input_size": 7, "hidden_size": 19, "proj_size": 5},
    {"steps": 1, "batch": 1, "input_size": 50, "hidden_size": 130},
    {"steps": 2, "batch": 5, "input_size": 16, "hidden_size": 32},
    {"steps": 40, "batch": 9, "input_size": 5, "hidden_size": 35},
)
FORMS: tuple[dict[str, Any], ...] = (
    {"form": "padded"},
    {"form": "packed", "directions": 2, "reset": True},
    {"form": "lengths", "directions": 2, "reset": True},
)
SAMPLES = [
    Sample(cell, **sizes, **form)
    for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh")
    for sizes in SIZES
    for form in FORMS
    if cell == "lstm" or "proj_size" not in sizes
]


def protect(address: int) -> None:
    no_access = 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), no_access):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor: Tensor | None, at_start: bool = False) -> Tensor | None:
    """A copy that ends, or starts, where a page without access starts, or ends."""
    if tensor is None or tensor.numel() == 0:
        return tensor
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inside = -(-size // page) * page
    pages = mmap.mmap(-1, page + inside + page)
    offset = page if at_start else page + inside - size
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    copy.copy_(tensor)
    base = copy.data_ptr() - offset
    protect(base)
    protect(base + page + inside)
    return copy


NORMALISED = [replace(sample, layer_norm=True) for sample in SAMPLES if reference.CELLS[sample.cell].layer_norm]


def run(sample: Sample, dtype: torch.dtype, save: int, place: Callable[[Any], Any]) -> list[Tensor]:
    """What forward and backward give, with every tensor they read where `place` puts it."""
    (cell, input, h0, c0, weights), options = sample.arguments(dtype)
    layer = [place(input), place(h0), place(c0), [place(weight) for weight in weights]]
    layer += [place(options[name]) for name in ("batch_sizes", "lengths", "reset")]
    norm = {"layer_norm": sample.layer_norm}
    output, h_n, c_n, c, saved = getattr(torch.ops.rnnfast, cell)(*layer, save, **norm)
    results = [output, h_n, c_n, c]
    grads = [place(torch.ones_like(result)) if result.numel() else None for result in results]
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward")
    *grad_inputs, grad_weights = backward(*grads, *layer, place(output), place(c), place(saved), [True] * 4, **norm)
    return [*results, *grad_inputs, *grad_weights]


def check_all() -> None:
    """On every instruction set, for every sample, dtype and choice of what to save: the bits are those of tensors that
    lie anywhere."""
    torch.set_num_threads(1)
    for instruction_set in ops.extension.instruction_sets():
        ops.extension.set_instruction_set(instruction_set)
        for sample in [*SAMPLES, *NORMALISED]:
            for dtype in DTYPES:
                # Printed first: the last line says what ended the process.
                print(instruction_set, sample.name, dtype, flush=True)
                for save, at_start in ((1, False), (2, False), (2, True)):
                    wanted = run(sample, dtype, save, lambda tensor: tensor)
                    results = run(sample, dtype, save, lambda tensor, at_start=at_start: guarded(tensor, at_start))
                    for result, expected in zip(results, wanted, strict=True):
                        assert torch.equal(result, expected)


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    directory = Path(__file__).parent
    return subprocess.run([sys.executable, *arguments], cwd=directory, capture_output=True, text=True, check=False)


@pytest.mark.skipif(ops.extension is None, reason="without the extension no memory access is ours")
def test_nothing_beside_a_tensor_is_touched() -> None:
    done = in_a_process(__file__)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize(("at_start", "offset"), [(False, 20), (True, -1)])
def test_an_access_beside_a_guarded_tensor_ends_the_process(at_start: bool, offset: int) -> None:
    tensor = f"test_guard_pages.guarded(torch.ones(5), {at_start})"
    code = f"import ctypes, torch, test_guard_pages; x = {tensor}; ctypes.string_at(x.data_ptr() + {offset}, 1)"
    assert in_a_process("-c", code).returncode == -signal.SIGSEGV


if __name__ == "__main__":
    check_all()
