"""Derivatives of the operators' derivatives: numerically, against the reference, and where arguments depend on each
other. The modules' own gradcheck is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import CELLS, Sample, each_cell, tensors_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.testing import assert_close

from rnnfast import formula, ops, reference

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no operators")

SMALL = {"steps": 3, "batch": 2, "input_size": 2, "hidden_size": 2}
SAMPLES = [
    Sample(cell, **SMALL, directions=directions, form=form, reset=reset)
    for cell in CELLS
    for directions, form, reset in (
        (1, "padded", False),
        (2, "padded", True),
        (1, "packed", True),
        (2, "packed", False),
        (2, "lengths", True),
    )
] + [
    Sample("gru", **SMALL, bias=False),
    Sample("gru", **{**SMALL, "steps": 0}),
    Sample("lstm", **{**SMALL, "batch": 0}),
]
PROJECTED = [
    Sample("lstm", **{**SMALL, "hidden_size": 3, **sizes}, proj_size=2, **options)
    for sizes, options in (
        ({}, {}),
        ({}, {"directions": 2, "reset": True, "bias": False}),
        ({}, {"form": "packed", "bias": False}),
        ({}, {"directions": 2, "form": "packed", "reset": True}),
        ({"batch": 4}, {"form": "lengths", "reset": True}),
        ({"batch": 4}, {"directions": 2, "form": "lengths"}),
        ({"steps": 1, "input_size": 1}, {"directions": 2, "reset": True}),
        ({"steps": 0}, {}),
        ({"batch": 0}, {"directions": 2}),
    )
]
SAMPLES += PROJECTED
each_small_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def _rebuilt(arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The layer's arguments with other floating tensors."""
    cell, _, _, c0, _ = arguments
    states = 2 if c0 is None else 3
    return cell, *tensors[:2], None if c0 is None else tensors[2], list(tensors[states:])


def as_function(run: Callable[..., Any], sample: Sample) -> tuple[Callable[..., Any], list[Tensor]]:
    """The layer as a function of its floating arguments alone, and those arguments."""
    arguments, options = sample.arguments(grad=True)
    c0 = arguments[3]

    def function(input: Tensor, h0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, weights = (None, rest) if c0 is None else (rest[0], rest[1:])
        results = run(sample.cell, input, h0, state, list(weights), **options)
        return tuple(result for result in results if result.requires_grad)

    return function, tensors_of(arguments)


@each_small_sample
def test_gradients_numerically(sample: Sample) -> None:
    function, arguments = as_function(ops.layer, sample)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@each_small_sample
def test_a_graph_of_the_gradient_does_not_change_it(sample: Sample) -> None:
    function, arguments = as_function(ops.layer, sample)

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        loss = sum(result.sin().sum() for result in function(*arguments))
        return torch.autograd.grad(loss, arguments, create_graph=create_graph, materialize_grads=True)

    for actual, wanted in zip(gradients(True), gradients(False), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in CELLS), ("lstm", 1)])
def test_third_derivative(cell: str, proj_size: int, device: str) -> None:
    def third(run: Callable[..., Any]) -> tuple[Tensor, ...]:
        sample = Sample(cell, **SMALL, directions=2, proj_size=proj_size)
        arguments, options = sample.arguments(device=device, grad=True)
        result = run(*arguments, **options)[0].square().sum()
        for _ in range(2):
            gradients = torch.autograd.grad(result, tensors_of(arguments), create_graph=True)
            result = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(result, tensors_of(arguments))

    for actual, wanted in zip(third(ops.layer), third(reference.layer), strict=True):
        assert_close(actual, wanted)


def second_derivative(run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Of a loss of all results, through the norms of all gradients."""
    loss = sum(result.float().sin().sum() for result in run(*arguments, **options))
    gradients = torch.autograd.grad(loss, tensors_of(arguments), create_graph=True)
    found = torch.autograd.grad(sum(g.float().square().sum() for g in gradients), tensors_of(arguments))
    return [gradient.double() for gradient in found]


@pytest.mark.parametrize("sample", PROJECTED, ids=lambda sample: sample.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projection_against_the_reference(sample: Sample, dtype: torch.dtype, device: str) -> None:
    arguments, options = sample.arguments(device=device, dtype=dtype, grad=True)
    wide, _ = sample.arguments(device=device, grad=True)
    for tensor, narrow in zip(tensors_of(wide), tensors_of(arguments), strict=True):
        tensor.data = narrow.detach().double()
    if options["reset"] is not None:
        options["reset"].view(-1)[:1] = True  # an initial state that is not read
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    actual, wanted = (
        second_derivative(ops.layer, arguments, options),
        second_derivative(reference.layer, wide, options),
    )
    scale = max((w.abs().max().item() for w in wanted if w.numel()), default=0.0)
    for one, other in zip(actual, wanted, strict=True):
        assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("sample", PROJECTED, ids=lambda sample: sample.name)
def test_a_projection_is_not_differentiated_step_by_step(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "layer", refuse)
    arguments, options = sample.arguments(grad=True)
    second_derivative(ops.layer, arguments, options)

    def output(*values: Tensor) -> Tensor:
        return ops.layer(*_rebuilt(arguments, values), **options)[0]

    primals = tuple(tensor.detach() for tensor in tensors_of(arguments))
    torch.func.jvp(output, primals, primals)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor) for tensor in primals]
        assert forward_ad.unpack_dual(output(*duals)).tangent is not None
    torch.func.jvp(torch.func.grad(lambda *values: output(*values).sum()), primals, primals)


@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_second_derivative_inside_saved_tensor_hooks(proj_size: int, layer_norm: bool) -> None:
    sample = Sample("lstm", proj_size=proj_size, layer_norm=layer_norm)
    arguments, options = sample.arguments(grad=True)
    options["layer_norm"] = layer_norm
    expected = second_derivative(ops.layer, arguments, options)
    with save_on_cpu():
        actual = second_derivative(ops.layer, arguments, options)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("cell", "proj_size"), [("lstm", 0), ("lstm", 3), ("gru_reset_before", 0)])
def test_tangents_of_a_gradient(cell: str, proj_size: int) -> None:
    """Forward mode over an operator's backward, where what has a tangent requires no gradient."""
    arguments, options = Sample(cell, directions=2, proj_size=proj_size, reset=True).arguments()
    others = [options[name] for name in ("batch_sizes", "lengths", "reset")]
    forward, backward = (getattr(torch.ops.rnnfast, cell + suffix).default for suffix in ("", "_backward"))

    incoming = forward(*arguments[1:], *others, 2)[0]

    def gradients(step: float, tangents: bool = False) -> list[Tensor]:
        moved = [p + step * p.cos() for p in tensors_of(arguments)]
        output, _, _, c, saved = forward(*_rebuilt(arguments, moved)[1:], *others, 2)
        if tangents:
            moved = [forward_ad.make_dual(p, p.cos()) for p in moved]
        layer = [*_rebuilt(arguments, moved)[1:], *others]
        *states, weights = backward(incoming, None, None, None, *layer, output, c, saved, [True] * 4)
        return [gradient for gradient in (*states, *weights) if gradient.numel()]

    with forward_ad.dual_level():
        actual = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients(0.0, tangents=True)]
    h = 1e-5
    for one, plus, minus in zip(actual, gradients(h), gradients(-h), strict=True):
        assert_close(one, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_the_formula_of_what_nobody_wants(cell: str) -> None:
    """The tangents of the results alone."""
    arguments, options = Sample(cell, proj_size=2 if cell == "lstm" else 0).arguments()
    of_layer = [*arguments[1:], *(options[name] for name in ("batch_sizes", "lengths", "reset"))]
    tangents = [arguments[1], None, None, []]
    *results, weights = formula.backward_jvp(cell, *[None] * 4, *tangents, *[None] * 4, *of_layer, [False] * 4)
    for one, other in zip(results, formula.jvp(cell, *tangents, *of_layer), strict=False):
        assert_close(one, other)
    assert weights == []
    assert not any(gradient.numel() for gradient in results[4:])


@each_cell
@pytest.mark.parametrize("save", [1, 2])
def test_second_derivative_from_what_forward_kept(cell: str, save: int, device: str) -> None:
    arguments, options = Sample(cell, directions=2, form="lengths", reset=True).arguments(device=device, grad=True)
    actual = second_derivative(partial(ops.layer, save=save), arguments, options)
    for one, other in zip(actual, second_derivative(reference.layer, arguments, options), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@each_cell
def test_arguments_that_depend_on_each_other(cell: str, device: str) -> None:
    """The input is computed from a weight, one weight serves twice, and the initial states are one tensor."""
    sample = replace(Sample(cell), input_size=5, hidden_size=5)

    def second(run: Callable[..., Any]) -> tuple[Tensor, ...]:
        arguments, options = sample.arguments(device=device, grad=True)
        _, input, h0, c0, (w, w_hh, *biases) = arguments
        both = [w, w if w_hh.dim() == 2 else w[:, 0], *biases]
        result = run(cell, input @ w[:5], h0, None if c0 is None else h0, both, **options)[0]
        (gradient,) = torch.autograd.grad(result.square().sum(), w, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [input, h0, w, *biases])

    for actual, wanted in zip(second(ops.layer), second(reference.layer), strict=True):
        assert_close(actual, wanted)


@each_cell
def test_second_derivative_of_the_outer_gradient_alone(cell: str, device: str) -> None:
    """Nothing but the incoming gradient requires one: backward is linear in it, and so is its own derivative."""
    arguments, options = Sample(cell, directions=2).arguments(device=device, grad=True)
    output = ops.layer(*arguments, **options)[0]
    incoming = torch.randn_like(output, requires_grad=True)
    gradients = torch.autograd.grad(output, tensors_of(arguments), incoming, create_graph=True)
    direction = [torch.randn_like(gradient) for gradient in gradients]
    (product,) = torch.autograd.grad(gradients, incoming, direction)

    def along(step: Tensor) -> Tensor:
        moved = [a.detach() + step * b for a, b in zip(tensors_of(arguments), direction, strict=True)]
        states = 1 + reference.CELLS[cell].states
        c0 = moved[2] if states == 3 else None
        return reference.layer(cell, moved[0], moved[1], c0, moved[states:], **options)[0]

    zero = torch.zeros((), dtype=torch.float64, device=device)
    assert_close(product, torch.autograd.functional.jvp(along, zero, torch.ones_like(zero))[1])


@each_cell
def test_a_gradient_penalty_trains(cell: str, device: str) -> None:
    arguments, options = Sample(cell).arguments(device=device, grad=True)
    loss = ops.layer(*arguments, **options)[0].square().sum()
    gradients = torch.autograd.grad(loss, tensors_of(arguments), create_graph=True)
    (loss + sum(gradient.square().sum() for gradient in gradients)).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors_of(arguments))
