"""Owns: ``python -m rnnfast``, which prints the configuration and tests every cell in seconds. Must not know: engines.

Every cell runs in float32, in both directions, forward and backward, on the CPU and, where there are a GPU and kernels
for it, on CUDA. The errors are the largest ones against rnnfast.reference in float64, as a part of the largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional, ops, reference, show_config

T, B, I, H, D = 20, 5, 18, 35, 2
TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the configuration and the self-test; return 1 if a cell fails, and 0 otherwise."""
    argparse.ArgumentParser(
        prog="python -m rnnfast", description="Print what is installed and in use, and test every cell in seconds."
    ).parse_args(arguments)
    print(show_config())
    print(f"\n{'device':<8}{'cell':<18}{'forward':>10}{'backward':>10}")
    torch.set_float32_matmul_precision("highest")
    failed = False
    for device in ["cpu", "cuda"] if torch.cuda.is_available() and not ops.missing_kernels("cuda") else ["cpu"]:
        for cell in reference.CELLS:
            forward, backward = errors(cell, device)
            passed = forward <= TOLERANCE and backward <= TOLERANCE
            failed |= not passed
            print(f"{device:<8}{cell:<18}{forward:>10.1e}{backward:>10.1e}  {'ok' if passed else 'FAILED'}")
    if ops.extension is None:
        print("\nNo kernel was tested: without the extension this was the reference path, in float32 and in float64.")
    return int(failed)


def errors(cell: str, device: str) -> tuple[float, float]:
    """The errors of one cell's results and of its gradients."""
    generator = torch.Generator().manual_seed(0)
    form = reference.CELLS[cell]
    rows = form.gates * H
    shapes = [(T, B, I), *[(rows, I), (rows,) if form.diagonal else (rows, H), (rows,), (rows,)] * D]
    leaves = [torch.randn(shape, generator=generator).mul(0.3).to(device) for shape in shapes]
    expected = results(cell, [leaf.double() for leaf in leaves], "reference")
    actual = results(cell, leaves, None)
    forward, backward = (max(map(relative_error, *pair)) for pair in zip(actual, expected, strict=True))
    return forward, backward


def results(cell: str, leaves: list[Tensor], backend: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """The output and the final states, and the gradients of all leaves."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    input, *weights = leaves
    output, states = functional.recurrent(cell, input, None, [weights], bidirectional=True, backend=backend)[:2]
    outputs = [output, *(states if isinstance(states, tuple) else (states,))]
    # Every element has another weight in the loss, and both dtypes have the same.
    loss = sum((tensor * torch.linspace(-1, 1, tensor.numel()).to(tensor).view_as(tensor)).sum() for tensor in outputs)
    return [tensor.detach() for tensor in outputs], list(torch.autograd.grad(loss, leaves))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))  # max() would let a NaN through


if __name__ == "__main__":
    raise SystemExit(main())
