"""Accuracy in every dtype: the error against a float64 run is at most twice torch.nn's own in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_inputs import each_backend, each_layer, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


def pair(name: str, dtype: torch.dtype, device: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours with the same weights."""
    # cuDNN asks this setting, which conftest.py puts back, whether bfloat16 may use tensor cores.
    torch.backends.cudnn.allow_tf32 = dtype == torch.bfloat16
    backend = options.pop("backend", None)
    theirs = getattr(nn, name)(24, 40, device=device, dtype=dtype, **options)
    ours = getattr(rnnfast, name)(24, 40, device=device, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: nn.Module, input: Tensor, packed: bool) -> list[Tensor]:
    """Output, states, and the gradients of their sums by the input and every parameter."""
    input = input.detach().requires_grad_()
    rows = pack_padded_sequence(input, torch.tensor([30, 21, 20, 3, 1])) if packed else input
    results = flatten(module(rows))
    generator = torch.Generator().manual_seed(2)
    loss = sum((part * torch.randn(part.shape, generator=generator).to(part)).sum() for part in results)
    return [*results, *torch.autograd.grad(loss, [input, *module.parameters()])]


def check_errors(got: list[Tensor], theirs: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """The root mean square error of each tensor, with the rounding of the result itself allowed for."""
    for index, (ours_part, theirs_part, exact_part) in enumerate(zip(got, theirs, exact, strict=True)):
        ours_error, theirs_error = (
            (part.double() - exact_part).square().mean().sqrt().item() for part in (ours_part, theirs_part)
        )
        rounding = torch.finfo(dtype).eps * exact_part.square().mean().sqrt().item()
        assert ours_error <= 2 * theirs_error + rounding, f"tensor {index}"


@each_layer
@each_dtype
@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_error(name: str, dtype: torch.dtype, backend: str, device: str, packed: bool) -> None:
    theirs, ours = pair(name, dtype, device, bidirectional=True, num_layers=2, backend=backend)
    input = torch.randn(30, 5, 24, device=device).to(dtype)
    got, expected = run(ours, input, packed), run(theirs, input, packed)
    assert {part.dtype for part in got} == {dtype}
    check_errors(got, expected, run(theirs.double(), input.double(), packed), dtype)


@each_dtype
@each_backend
def test_error_with_projection(dtype: torch.dtype, backend: str, device: str) -> None:
    theirs, ours = pair("LSTM", dtype, device, proj_size=16, backend=backend)
    input = torch.randn(30, 5, 24, device=device).to(dtype)
    got, expected = run(ours, input, False), run(theirs, input, False)
    check_errors(got, expected, run(theirs.double(), input.double(), False), dtype)


@each_dtype
@each_backend
def test_error_of_sigmoid(dtype: torch.dtype, backend: str, device: str) -> None:
    """torch.nn has no sigmoid network: its tanh network, as deep and wide, is the measure."""
    theirs = nn.RNN(24, 40, device=device, dtype=dtype)
    ours = rnnfast.RNN(24, 40, nonlinearity="sigmoid", device=device, dtype=dtype, backend=backend)
    input = torch.randn(30, 5, 24, device=device).to(dtype)
    got, measure = run(ours, input, False), run(theirs, input, False)
    exact, exact_measure = (run(module.double(), input.double(), False) for module in (ours, theirs))
    for part, exact_part, other, exact_other in zip(got, exact, measure, exact_measure, strict=True):
        error, other_error = (
            ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
            for a, b in ((part, exact_part), (other, exact_other))
        )
        assert error <= 2 * other_error + torch.finfo(dtype).eps


@each_dtype
@each_backend
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_error_of_cells(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    theirs, ours = pair(name, dtype, device, backend=backend)
    input = torch.randn(9, 24, device=device).to(dtype)

    def run_cell(cell: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        results = flatten(cell(x, cell(x)))
        return [*results, *torch.autograd.grad(sum(part.square().sum() for part in results), [x, *cell.parameters()])]

    got, expected = run_cell(ours, input), run_cell(theirs, input)
    assert {part.dtype for part in got} == {dtype}
    check_errors(got, expected, run_cell(theirs.double(), input.double()), dtype)


@each_layer
@each_backend
def test_autocast(name: str, backend: str, device: str) -> None:
    """Under autocast a layer has torch.nn's dtypes, with at most its error.

    The CPU's autocast does not list GRU, LSTMCell and GRUCell, whose states keep their dtype. CUDA's runs cuDNN's
    layers in float16, whatever it was asked for.
    """
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    theirs, ours = pair(name, torch.float32, device, num_layers=2, bidirectional=True, backend=backend)
    input = torch.randn(30, 5, 24, device=device)
    with torch.autocast(device, dtype):
        got, expected = run(ours, input, False), run(theirs, input, False)
    assert [part.dtype for part in got] == [part.dtype for part in expected]
    check_errors(got, expected, run(theirs.double(), input.double(), False), dtype)


@each_backend
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_cells(name: str, state: torch.dtype | None, backend: str, device: str) -> None:
    theirs, ours = pair(name, torch.float32, device, backend=backend)
    input = torch.randn(9, 24, device=device)
    hx = None if state is None else torch.zeros(9, theirs.hidden_size, device=device, dtype=state)
    if name == "LSTMCell" and hx is not None:
        hx = (hx, hx)
    with torch.autocast(device, torch.bfloat16):
        got, expected = flatten(ours(input, hx)), flatten(theirs(input, hx))
    assert [part.dtype for part in got] == [part.dtype for part in expected]
    check_errors(got, expected, flatten(theirs.double()(input.double())), torch.bfloat16)


@each_layer
@each_backend
def test_autocast_takes_mixed_dtypes(name: str, backend: str, device: str) -> None:
    """A bfloat16 input, as the layer before under autocast gives it, and float32 states."""
    _, ours = pair(name, torch.float32, device, backend=backend)
    hx = torch.zeros(1, 5, 40, device=device)
    state = (hx, hx) if name == "LSTM" else hx
    input = torch.randn(6, 5, 24, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = flatten(ours(input.bfloat16(), state))
        expected = flatten(ours(input, state))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@each_layer
@each_backend
def test_autocast_leaves_float64(name: str, backend: str, device: str) -> None:
    _, ours = pair(name, torch.float64, device, backend=backend)
    input = torch.randn(6, 5, 24, device=device, dtype=torch.float64)
    expected = flatten(ours(input))
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(flatten(ours(input)), expected, rtol=0, atol=0)


@each_layer
@each_backend
def test_large_values(name: str, backend: str, device: str) -> None:
    """Gates that saturate give finite results and gradients, in float16 too."""
    for dtype in DTYPES:
        module = getattr(rnnfast, name)(2, 3, device=device, dtype=dtype, backend=backend)
        for scale in (1e4, -1e4):
            input = torch.full((4, 2, 2), scale, device=device, dtype=dtype, requires_grad=True)
            results = flatten(module(input))
            gradients = torch.autograd.grad(sum(part.sum() for part in results), [input, *module.parameters()])
            assert all(part.isfinite().all() for part in (*results, *gradients))
