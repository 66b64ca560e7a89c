"""The transforms of torch.func over a layer: each equals the loop, and none runs the reference formula, step by step,
where there is a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import CELLS, TANGENT_CELLS, Sample, each_cell, tensors_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import ops, reference

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no operators")

SMALL = {"steps": 3, "batch": 2, "input_size": 2, "hidden_size": 3}
FORMS = [
    Sample(cell, **SMALL, directions=2, form=form, reset=True)
    for cell in CELLS
    for form in ("padded", "packed", "lengths")
    if cell in ("lstm", "gru") or form == "lengths"
] + [
    Sample("lstm", **SMALL),
    Sample("gru", **SMALL, bias=False),
    Sample("rnn_tanh", **SMALL),
    Sample("lstm", **SMALL, proj_size=2, directions=2),
]
each_form = pytest.mark.parametrize("sample", FORMS, ids=lambda sample: sample.name)
Run = Callable[..., tuple[Tensor, ...]]


def as_function(run: Run, sample: Sample, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A loss of all the layer's results as a function of its floating tensors, and these."""
    arguments, options = sample.arguments(device=device)
    if run is ops.layer:
        options["save"] = 2  # without anything kept there is no c, which the loss reads
    states = 1 + sample.states

    def function(input: Tensor, h0: Tensor, *rest: Tensor) -> Tensor:
        c0, weights = (rest[0], rest[1:]) if states == 3 else (None, rest)
        results = run(sample.cell, input, h0, c0, list(weights), **options)
        return sum((index + 1) * result.sin().sum() for index, result in enumerate(results[: 2 * states - 2]))

    return function, tensors_of(arguments)


def like(tensors: list[Tensor], seed: int, *leading: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*leading, *t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "grad": lambda f, x: grad(f, argnums=tuple(range(len(x))))(*x),
    "vjp": lambda f, x: vjp(f, *x)[1](torch.ones((), dtype=torch.float64, device=x[0].device)),
    "jvp": lambda f, x: jvp(f, tuple(x), tuple(like(x, 1))),
    "jvp of the input": lambda f, x: jvp(lambda y: f(y, *x[1:]), (x[0],), (like(x, 1)[0],)),
    "jacrev": lambda f, x: jacrev(lambda y: torch.stack([f(y, *x[1:]), f(2 * y, *x[1:])]))(x[0]),
    "jacfwd": lambda f, x: jacfwd(lambda w: torch.stack([f(*x[:-1], w), f(*x[:-1], 2 * w)]))(x[-1]),
    "hessian of the input": lambda f, x: hessian(lambda y: f(y, *x[1:]))(x[0]),
    "hessian of a weight": lambda f, x: hessian(lambda w: f(*x[:-1], w))(x[-1]),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(lambda y: f(y, *x[1:])))(x[0]),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(lambda y: f(y, *x[1:])))(x[0]),
    "grad of grad": lambda f, x: grad(lambda *y: sum(g.sin().sum() for g in grad(f, tuple(range(len(y))))(*y)))(*x),
    "jvp of grad": lambda f, x: jvp(lambda *y: grad(f, tuple(range(len(y))))(*y), tuple(x), tuple(like(x, 1))),
    "grad of jvp": lambda f, x: grad(lambda *y: jvp(f, y, tuple(like(x, 1)))[1])(*x),
    "vmap over inputs": lambda f, x: vmap(lambda y: f(y, *x[1:]))(like(x, 2, 3)[0]),
    "vmap over inputs and states": lambda f, x: vmap(lambda *y: f(*y, *x[2:]), (0, 1))(
        like(x, 2, 3)[0], like(x, 3, 3)[1].movedim(0, 1)
    ),
    "vmap over weights": lambda f, x: vmap(lambda *y: f(*x[:-4], *y))(*like(x, 2, 3)[-4:]),
    "vmap over all": lambda f, x: vmap(f)(*like(x, 2, 3)),
    "vmap over vmap": lambda f, x: vmap(vmap(lambda y: f(y, *x[1:]), 1), 2)(
        like(x, 2, 2, 3)[0].permute(2, 1, 0, *range(3, x[0].dim() + 2))
    ),
    "per-sample gradients": lambda f, x: vmap(
        lambda y: grad(lambda *z: f(y, *z), argnums=tuple(range(len(x) - 1)))(*x[1:])
    )(like(x, 2, 3)[0]),
    "per-sample gradients of pairs": lambda f, x: vmap(
        vmap(lambda y: grad(lambda *z: f(y, *z), argnums=tuple(range(len(x) - 1)))(*x[1:]))
    )(like(x, 2, 2, 3)[0]),
    "ensemble's gradients": lambda f, x: vmap(grad(f, argnums=(0, len(x) - 1)), (None,) + (0,) * (len(x) - 1))(
        x[0], *like(x, 2, 3)[1:]
    ),
    "vmap over jvp": lambda f, x: vmap(lambda t: jvp(f, tuple(x), tuple(t))[1])(like(x, 2, 3)),
    "vmap over grad of grad": lambda f, x: vmap(grad(lambda w, y: grad(f)(y, *x[1:-1], w).sin().sum()), (None, 0))(
        x[-1], like(x, 2, 3)[0]
    ),
    "grad of vmap over grad": lambda f, x: grad(
        lambda w: vmap(grad(lambda w, y: f(y, *x[1:-1], w)), (None, 0))(w, like(x, 2, 3)[0]).sin().sum()
    )(x[-1]),
}
WITHOUT_KERNEL = ("jacfwd of jacfwd",)  # forward mode of forward mode


@pytest.mark.parametrize("name", TRANSFORMS)
@each_form
def test_equals_the_reference(sample: Sample, name: str, device: str) -> None:
    actual, expected = (TRANSFORMS[name](*as_function(run, sample, device)) for run in (ops.layer, reference.layer))
    assert_close(actual, expected)


@pytest.mark.parametrize("modes", [*map("".join, itertools.product("JR", repeat=3)), "JJJJ", "JRJJ", "RJJJ"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_higher_derivatives_equal_the_reference(cell: str, modes: str) -> None:
    """J is forward mode, R reverse mode, the outermost first; all along one direction."""

    def derivative(run: Run) -> Tensor:
        function, (x, *others) = as_function(run, Sample(cell, **SMALL), "cpu")
        (along,) = like([x], 1)
        modes_of: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
            "J": lambda f: lambda y: jvp(f, (y,), (along,))[1],
            "R": lambda f: lambda y: (grad(f)(y) * along).sum(),
        }
        derived: Callable[[Tensor], Tensor] = lambda y: function(y, *others)  # noqa: E731
        for mode in reversed(modes):
            derived = modes_of[mode](derived)
        return derived(x)

    assert_close(derivative(ops.layer), derivative(reference.layer))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in WITHOUT_KERNEL])
@pytest.mark.parametrize("cell", TANGENT_CELLS)
def test_no_formula_where_there_is_a_kernel(cell: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference formula ran")

    monkeypatch.setattr(reference, "layer", refuse)
    function, tensors = as_function(ops.layer, Sample(cell, **SMALL, directions=2), "cpu")
    with torch.no_grad() if name.startswith("vmap over inputs") else torch.enable_grad():
        TRANSFORMS[name](function, tensors)


@pytest.mark.parametrize(
    "name", ["grad", "jvp", "jvp of grad", "hessian of the input", "vmap over inputs", "per-sample gradients"]
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_gradients_outside_of_a_transform(cell: str, name: str, device: str) -> None:
    """The tensors require gradients where no transform is active: those pass through it."""

    def gradients(run: Run) -> tuple[Tensor, ...]:
        function, tensors = as_function(run, Sample(cell, **SMALL, form="lengths", reset=True), device)
        for tensor in tensors:
            tensor.requires_grad_()
        results = torch.utils._pytree.tree_leaves(TRANSFORMS[name](function, tensors))
        return torch.autograd.grad(sum(result.sin().sum() for result in results), tensors, materialize_grads=True)

    assert_close(gradients(ops.layer), gradients(reference.layer))


class Operators(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rnnfast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vmap over inputs", ["lstm"]),
        ("vmap over vmap", ["lstm"]),
        ("vmap over weights", ["lstm"] * 3),
        ("per-sample gradients", ["lstm", "lstm_grouped_backward"]),
        ("per-sample gradients of pairs", ["lstm", "lstm_grouped_backward"]),
        ("hessian of the input", ["lstm", "lstm_jvp", "lstm_backward", "lstm_backward_jvp"]),
    ],
)
def test_calls_of_operators(name: str, expected: list[str]) -> None:
    function, tensors = as_function(ops.layer, Sample("lstm", **SMALL, form="lengths"), "cpu")
    with Operators() as operators:
        TRANSFORMS[name](function, tensors)
    assert operators.seen == expected


def test_forward_mode_calls_one_kernel_though_parameters_require_gradients() -> None:
    """The formula would take some dozen operators a step, for a derivative that nobody asked for."""
    layer, input = rnnfast.LSTM(3, 4), torch.randn(5, 2, 3)
    with forward_ad.dual_level(), Operators() as operators:
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(input, torch.ones_like(input)))[0]).tangent
    assert operators.seen == ["lstm", "lstm_jvp"]
    with Operators() as operators:
        torch.autograd.grad(tangent.square().sum(), list(layer.parameters()))
    assert operators.seen == ["lstm_backward_jvp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_takes_what_the_first_kept(dtype: torch.dtype) -> None:
    layer, input = rnnfast.LSTM(3, 4, dtype=dtype), torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    output, _ = layer(input)
    with Operators() as operators:
        (gradient,) = torch.autograd.grad(output.sum(), input, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), list(layer.parameters()), materialize_grads=True)
    first = "lstm_backward_with_states" if dtype == torch.float32 else "lstm_backward"  # 16 bits would round them
    assert operators.seen == [first, "lstm_backward_jvp"]


@pytest.mark.parametrize("mask", [[True] * 4, [True, False, False, False]], ids=["all gradients", "that of the input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", TANGENT_CELLS)
def test_backward_with_states_is_differentiated_as_backward(cell: str, dtype: torch.dtype, mask: list[bool]) -> None:
    (_, *tensors), options = Sample(cell).arguments(dtype, grad=True)
    batch_sizes, lengths, reset = options["batch_sizes"], options["lengths"], options["reset"]
    layer = (*tensors, batch_sizes, lengths, reset)
    kept = getattr(torch.ops.rnnfast, cell)(*layer, 2)
    grads = [torch.ones_like(result) if result.requires_grad else None for result in kept[:4]]
    arguments = (*grads, *layer, kept[0], kept[3], kept[4], mask)

    def second(name: str) -> tuple[Tensor, ...]:
        grad_input, *_, grad_weights = getattr(torch.ops.rnnfast, f"{cell}_{name}")(*arguments)[:4]
        loss = grad_input.square().sum() + sum(gradient.sin().sum() for gradient in grad_weights)
        return torch.autograd.grad(loss, tensors_of([cell, *tensors]), materialize_grads=True)

    assert_close(second("backward_with_states"), second("backward"))


def test_a_graph_of_a_gradient_is_trained() -> None:
    """As one of forces, which are gradients by the input."""
    layer, input = rnnfast.GRU(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def force(input: Tensor, *parameters: Tensor) -> Tensor:
        input = input.detach().requires_grad_()
        output, _ = functional_call(layer, dict(zip(names, parameters, strict=True)), (input,))
        return torch.autograd.grad(output.sum(), input, create_graph=True)[0]

    graph = make_fx(force)(input, *layer.parameters())
    both = [
        torch.autograd.grad(run(input, *layer.parameters()).square().sum(), layer.weight_hh_l0)
        for run in (graph, force, torch.compile(graph, backend="aot_eager"))
    ]
    assert_close(both[0], both[1])
    assert_close(both[2], both[1])


@each_form
def test_per_sample_gradients_equal_the_loop(sample: Sample, device: str) -> None:
    function, tensors = as_function(ops.layer, sample, device)
    inputs = torch.stack([tensors[0] + shift for shift in range(4)])
    argnums = tuple(range(1, len(tensors)))
    together = vmap(grad(function, argnums=argnums), (0,) + (None,) * len(argnums))(inputs, *tensors[1:])
    for index, input in enumerate(inputs):
        alone = torch.autograd.grad(function(input, *[tensor.requires_grad_() for tensor in tensors[1:]]), tensors[1:])
        assert_close(tuple(part[index] for part in together), alone)


@pytest.mark.parametrize("part", ["lengths", "reset"])
def test_vmap_over_lengths_and_resets(part: str) -> None:
    (cell, input, h0, c0, weights), options = Sample("lstm", form="lengths", reset=True, directions=2).arguments()
    other = {"lengths": torch.tensor([5, 0, 2]), "reset": ~options["reset"]}
    stacked = torch.stack([options[part], other[part]])
    together = vmap(lambda value: ops.layer(cell, input, h0, c0, weights, **{**options, part: value}, save=1))(stacked)
    for index, value in enumerate(stacked):
        alone = reference.layer(cell, input, h0, c0, weights, **{**options, part: value})
        assert_close(tuple(result[index] for result in together), alone)


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap_over_what_samples_kept_by_themselves(cell: str, save: int) -> None:
    """The operators of derivatives, called with what a forward of each sample kept, of lengths of its own."""
    (_, input, h0, c0, weights), options = Sample(cell, form="lengths").arguments()
    each_lengths = torch.stack([options["lengths"], torch.tensor([5, 0, 2])])
    operator = partial(getattr, torch.ops.rnnfast)
    kept = [operator(cell)(input, h0, c0, weights, None, lengths, None, save) for lengths in each_lengths]
    output, _, _, c, saved = (torch.stack(parts) for parts in zip(*kept, strict=True))

    def derivatives(lengths: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        layer = (input, h0, c0, weights, None, lengths, None, *kept)
        grads, ones = (torch.ones_like(kept[0]), None, None, None), (torch.ones_like(input), None, None, [])
        first = operator(f"{cell}_backward")(*grads, *layer, [True, True, False, False])
        tangents = operator(f"{cell}_jvp")(*ones, *layer)
        second = operator(f"{cell}_backward_jvp")(*[None] * 4, *ones, *grads, *layer, [True, True, False, False])
        return *first[:2], *tangents[:2], *second[:2], *second[4:6]

    together = vmap(derivatives)(each_lengths, output, c, saved)
    for index, lengths in enumerate(each_lengths):
        alone = derivatives(lengths, output[index], c[index], saved[index])
        assert_close(tuple(part[index] for part in together), alone)


@each_form
def test_vectorized_jacobian(sample: Sample, device: str) -> None:
    """autograd's own vmap over gradients, with the graph recorded outside."""
    arguments, options = sample.arguments(device=device)
    cell, input, h0, c0, weights = arguments

    def jacobian(run: Run, vectorize: bool, strategy: str = "reverse-mode") -> Any:
        return torch.autograd.functional.jacobian(
            lambda x, w: run(cell, x, h0, c0, [w, *weights[1:]], **options)[0],
            (input, weights[0]),
            vectorize=vectorize,
            strategy=strategy,
        )

    expected = jacobian(reference.layer, False)
    assert_close(jacobian(ops.layer, False), expected)
    assert_close(jacobian(ops.layer, True), expected)
    assert_close(jacobian(ops.layer, True, "forward-mode"), expected)


@each_form
def test_vectorized_jacobian_by_the_input_alone(sample: Sample, device: str) -> None:
    """The tangents of the results are not summed with others, and have the layout in which the operator leaves them."""
    (cell, input, *rest), options = sample.arguments(device=device)

    def jacobian(run: Run, **how: Any) -> Any:
        return torch.autograd.functional.jacobian(lambda x: run(cell, x, *rest, **options)[0], input, **how)

    assert_close(
        jacobian(ops.layer, vectorize=True, strategy="forward-mode"), jacobian(reference.layer, strategy="reverse-mode")
    )


@pytest.mark.parametrize("save", [0, 1, 2])
@each_cell
def test_vmap_keeps_what_the_call_asks_for(cell: str, save: int) -> None:
    """As the loop does: with gradients more than nothing."""
    (cell, input, *rest), options = Sample(cell, **SMALL).arguments()
    inputs = torch.stack([input, -input])
    for wanted in (False, True):
        inputs.requires_grad_(wanted)
        together = vmap(lambda x: ops.layer(cell, x, *rest, save=save, **options))(inputs)
        loop = [ops.layer(cell, x, *rest, save=save, **options) for x in inputs]
        assert_close(together, tuple(torch.stack(parts) for parts in zip(*loop, strict=True)))


@each_form
def test_batched_gradients(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device, grad=True)
    output = ops.layer(*arguments, **options)[0]
    grads = torch.randn(3, *output.shape, dtype=output.dtype, device=device)
    tensors = tensors_of(arguments)
    together = torch.autograd.grad(output, tensors, grads, is_grads_batched=True, retain_graph=True)
    for index, gradient in enumerate(grads):
        alone = torch.autograd.grad(output, tensors, gradient, retain_graph=True)
        assert_close(tuple(part[index] for part in together), alone)


@each_form
def test_forward_mode_of_every_argument(sample: Sample, device: str) -> None:
    """Forward mode, forward mode over backward, and backward over forward mode, against torch.func on the reference."""
    function, tensors = as_function(ops.layer, sample, device)
    expected, _ = as_function(reference.layer, sample, device)
    tangents = like(tensors, 1)
    argnums = tuple(range(len(tensors)))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        loss = function(*duals)
        value, tangent = forward_ad.unpack_dual(loss)
        over_backward = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss, duals, create_graph=True)]
        over_forward = torch.autograd.grad(tangent, leaves)
    assert_close((value, tangent), jvp(expected, tuple(tensors), tuple(tangents)))
    second = jvp(grad(expected, argnums), tuple(tensors), tuple(tangents))[1]
    assert_close(tuple(over_backward), second)
    assert_close(over_forward, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_cell
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    """Tangents and per-sample gradients in every dtype, against float64.

    Without a nonlinearity the states grow until rounding moves their sine: there the formula's error is the measure.
    """
    sample = Sample(cell, steps=6, batch=2, input_size=16, hidden_size=16, directions=2)
    for name in ("jvp", "jvp of grad", "per-sample gradients"):
        function, tensors = as_function(ops.layer, sample, "cpu")
        formula, _ = as_function(reference.layer, sample, "cpu")
        rounded = [tensor.to(dtype) for tensor in tensors]
        exact = torch.utils._pytree.tree_leaves(TRANSFORMS[name](function, [tensor.double() for tensor in rounded]))
        errors = []
        for run in (function, formula):
            actual = torch.utils._pytree.tree_leaves(TRANSFORMS[name](run, rounded))
            assert {tensor.dtype for tensor in actual} == {dtype}
            errors.append(torch.cat([(a.double() - b).flatten() for a, b in zip(actual, exact, strict=True)]).norm())
        allowed = 8 * torch.finfo(dtype).eps * torch.cat([tensor.flatten() for tensor in exact]).norm()
        assert errors[0] <= (max(allowed, 2 * errors[1]) if cell == "rnn_identity" else allowed)


@pytest.mark.parametrize(
    ("name", "options"), [("LSTM", {}), ("GRU", {"bidirectional": True}), ("RNN", {"bias": False})]
)
def test_an_ensemble_of_modules(name: str, options: dict[str, Any]) -> None:
    modules = [getattr(rnnfast, name)(3, 4, num_layers=2, dtype=torch.float64, **options) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    together = vmap(lambda p, b: functional_call(modules[0], (p, b), (input,))[0])(parameters, buffers)
    assert_close(together, torch.stack([module(input)[0] for module in modules]))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_per_sample_gradients_of_a_module(name: str) -> None:
    """As differential privacy wants them: of a batch-first model, a sample a row."""
    model = nn.Sequential(getattr(rnnfast, name)(3, 4, batch_first=True, dtype=torch.float64))
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(model, parameters, (input.unsqueeze(0),))[0].square().sum()

    inputs = torch.randn(6, 5, 3, dtype=torch.float64)
    together = vmap(grad(loss), (None, 0))(parameters, inputs)
    for index, input in enumerate(inputs):
        assert_close({key: value[index] for key, value in together.items()}, grad(loss)(parameters, input))


def test_every_operator_has_a_transform() -> None:
    """A direct call of an operator goes the same way."""
    for cell, suffix in itertools.product(CELLS, ("", "_backward", "_grouped_backward", "_jvp", "_backward_jvp")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"rnnfast::{cell}{suffix}", "FuncTorchDynamicLayerFrontMode"
        )


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_autocast_ends_where_derivatives_begin(cell: str, device: str) -> None:
    """Second derivatives of a float32 layer are float32's, whatever is on when they are taken."""
    arguments, options = Sample(cell, directions=2).arguments(torch.float32, device, grad=True)
    leaves = [arguments[1], *arguments[4]]

    def penalty(autocast: bool) -> tuple[Tensor, ...]:
        output = ops.layer(*arguments, **options)[0]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            (gradient,) = torch.autograd.grad(output.square().sum(), arguments[1], create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), leaves)

    torch.testing.assert_close(penalty(True), penalty(False), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_gradient_penalty_under_autocast(name: str, device: str) -> None:
    """Finite, and within bfloat16's error of float32's."""
    module = getattr(rnnfast, name)(4, 8, device=device)
    input = torch.randn(5, 2, 4, device=device, requires_grad=True)

    def penalty(autocast: bool) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = module(input)[0].float()
            (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
            return list(torch.autograd.grad((gradient.norm() - 1).square(), list(module.parameters())))

    for got, expected in zip(penalty(True), penalty(False), strict=True):
        assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_transforms_under_autocast(name: str, device: str) -> None:
    """grad, jvp and per-sample gradients are autograd's: autocast's dtype inside, float32 outside."""
    module = getattr(rnnfast, name)(4, 8, device=device)
    input, tangent = torch.randn(2, 5, 2, 4, device=device)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].float().square().sum()

    with torch.autocast(device, torch.bfloat16):
        leaf = input.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert_close(grad(loss)(input), expected)
        assert_close(vmap(grad(lambda row: loss(row.unsqueeze(1))), in_dims=1, out_dims=1)(input), expected)
        along = jvp(loss, (input,), (tangent,))[1]
    # Two sums of bfloat16 numbers in another order, whose terms cancel.
    assert torch.isclose(along, (expected * tangent).sum(), rtol=0.05)


def test_vmap_over_lengths_of_a_module(device: str) -> None:
    module = rnnfast.GRU(4, 8, device=device)
    input = torch.randn(5, 2, 4, device=device)
    lengths = torch.tensor([[4, 1], [2, 0]], device=device)
    together = vmap(lambda row: module(input, lengths=row)[0])(lengths)
    assert_close(together, torch.stack([module(input, lengths=row)[0] for row in lengths]))


@pytest.mark.parametrize(
    ("make", "options"),
    [(rnnfast.GRU, {}), (rnnfast.LSTM, {}), (rnnfast.LSTM, {"proj_size": 3}), (rnnfast.GRU, {"reset_after": False})],
    ids=["gru", "lstm", "lstm-projection", "gru-reset-before"],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_derivatives_of_samples_with_lengths_of_their_own(
    make: type[rnnfast.GRU | rnnfast.LSTM], options: dict[str, Any], requires_grad: bool, device: str
) -> None:
    """Whatever forward keeps of all samples together has to serve a call for each, which some of these take."""
    module = make(4, 6, num_layers=2, device=device, dtype=torch.float64, **options)
    weights = dict(module.requires_grad_(requires_grad).named_parameters())
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}
    inputs = torch.randn(3, 5, 2, 4, device=device, dtype=torch.float64)
    lengths = torch.tensor([[5, 2], [1, 4], [3, 3]], device=device)

    def loss(weights: dict[str, Tensor], input: Tensor, lengths: Tensor) -> Any:
        output, _ = functional_call(module, weights, (input,), {"lengths": lengths})
        return output.pow(3).sum()

    def gradient(input: Tensor, lengths: Tensor) -> Any:
        return grad(loss)(weights, input, lengths)

    def tangent(input: Tensor, lengths: Tensor) -> Any:
        return jvp(lambda w: grad(loss)(w, input, lengths), (weights,), (tangents,))[1]

    def second(input: Tensor, lengths: Tensor) -> Any:
        return jacrev(jacrev(lambda x: loss(weights, x, lengths)))(input)

    for derivative in (gradient, tangent, second):
        alone = [derivative(input, length) for input, length in zip(inputs, lengths, strict=True)]
        stacked = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *alone)
        assert_close(vmap(derivative)(inputs, lengths), stacked)
