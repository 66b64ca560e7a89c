"""First and second derivatives of every cell and form of input, against finite differences in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_inputs import CELLS, SAMPLES, Sample, each_backend, each_cell, flatten, tensors_of
from torch import Tensor, nn

import rnnfast
from rnnfast import ops

SMALL = {"steps": 3, "batch": 2, "input_size": 2, "hidden_size": 3}

FORMS = [
    *(
        Sample(cell, directions=directions, form=form, reset=reset, **SMALL)
        for cell in CELLS
        for directions, form, reset in [
            (2, "padded", False),
            (2, "padded", True),
            (1, "padded", True),
            (2, "packed", True),
            (2, "lengths", True),
        ]
    ),
    *(Sample(cell, bias=False, **SMALL) for cell in CELLS),
    Sample("lstm", proj_size=2, directions=2, **SMALL),
    Sample("lstm", proj_size=2, form="packed", reset=True, bias=False, **SMALL),
]
each_form = pytest.mark.parametrize("sample", FORMS, ids=lambda sample: sample.name)


def as_function(sample: Sample, device: str, backend: str) -> tuple[Any, list[Tensor]]:
    """The layer as a function of its floating tensors alone, and these."""
    arguments, options = sample.arguments(device=device, grad=True)
    states = sample.states

    def call(input: Tensor, *rest: Tensor) -> list[Tensor]:
        h0, c0 = rest[0], rest[1] if states == 2 else None
        results = ops.layer(sample.cell, input, h0, c0, list(rest[states:]), **options, backend=backend)
        return list(results[: 2 * states])  # c_n and c are empty for a cell with one state

    return call, tensors_of(arguments)


@each_form
@each_backend
def test_gradcheck(sample: Sample, device: str, backend: str) -> None:
    call, tensors = as_function(sample, device, backend)
    assert len(call(*tensors)) == 2 * sample.states
    assert torch.autograd.gradcheck(call, tensors)


@each_form
@each_backend
def test_gradgradcheck(sample: Sample, device: str, backend: str) -> None:
    call, tensors = as_function(sample, device, backend)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@each_cell
@each_backend
def test_every_part_alone(cell: str, device: str, backend: str) -> None:
    """The gradient of each result alone, by each argument alone, is its part of the whole."""
    sample = Sample(cell, directions=2, form="packed", reset=True, **SMALL)
    call, tensors = as_function(sample, device, backend)
    for index in range(len(call(*tensors))):
        loss = call(*tensors)[index].square().sum()
        whole = torch.autograd.grad(loss, tensors)
        for which, expected in enumerate(whole):
            alone = [tensor.detach().requires_grad_(at == which) for at, tensor in enumerate(tensors)]
            (got,) = torch.autograd.grad(call(*alone)[index].square().sum(), alone[which])
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.steps > 0 and s.batch > 0], ids=lambda s: s.name)
def test_gradients_equal_the_reference(sample: Sample, device: str) -> None:
    """First and second derivatives of the operators against the reference's, on all samples."""
    results = []
    for backend in ("auto", "reference"):
        call, tensors = as_function(replace(sample), device, backend)
        generator = torch.Generator().manual_seed(4)
        outputs = call(*tensors)
        loss = sum(
            (part.cpu() * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in outputs
        )
        first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum(gradient.square().sum() for gradient in first), tensors, allow_unused=True, materialize_grads=True
        )
        results.append([*outputs, *first, *second])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@each_backend
def test_gradient_penalty(name: str, backend: str) -> None:
    """A penalty on the input's gradient trains the weights as torch.nn's does (on the CPU, where torch.nn can)."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    theirs = getattr(nn, name)(3, 4, **options)
    ours = getattr(rnnfast, name)(3, 4, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    data = torch.randn(5, 2, 3, dtype=torch.float64)
    gradients = []
    for module in (ours, theirs):
        input = data.clone().requires_grad_()
        loss = sum(part.square().sum() for part in flatten(module(input)))
        (by_input,) = torch.autograd.grad(loss, input, create_graph=True)
        penalty = (by_input.norm() - 1).square()
        gradients.append(torch.autograd.grad(penalty, [input, *module.parameters()]))
    torch.testing.assert_close(*gradients)
