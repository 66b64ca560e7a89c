"""RNNCell, LSTMCell and GRUCell against torch.nn's, and with what torch.nn's have not against the layers."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from sample_inputs import each_backend, flatten
from torch import nn

import rnnfast

each_cell = pytest.mark.parametrize(
    ("name", "options"),
    [("RNNCell", {"nonlinearity": "tanh"}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})],
    ids=["RNNCell tanh", "RNNCell relu", "LSTMCell", "GRUCell"],
)


@each_cell
@each_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given_hx", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (0,)], ids=["unbatched", "1 row", "3 rows", "0 rows"])
def test_parity(
    name: str, options: dict[str, Any], device: str, backend: str, bias: bool, given_hx: bool, rows: tuple[int, ...]
) -> None:
    settings = {"bias": bias, "device": device, "dtype": torch.float64, **options}
    theirs, ours = getattr(nn, name)(4, 5, **settings), getattr(rnnfast, name)(4, 5, backend=backend, **settings)
    ours.load_state_dict(theirs.state_dict())
    leaves = [torch.randn(*rows, size, device=device, dtype=torch.float64, requires_grad=True) for size in (4, 5, 5)]
    input, h, c = leaves
    hx = None if not given_hx else (h, c) if name == "LSTMCell" else h
    results = []
    for cell in (theirs, ours):
        output = cell(input, hx)
        assert type(output) is (tuple if name == "LSTMCell" else torch.Tensor)
        loss = sum(part.square().sum() + part.sum() for part in flatten(output))
        gradients = torch.autograd.grad(loss, [*leaves, *cell.parameters()], materialize_grads=True)
        results.append([*flatten(output), *gradients])
    torch.testing.assert_close(results[1], results[0])


@each_cell
def test_torch_interface(name: str, options: dict[str, Any]) -> None:
    cells = []
    for namespace in (nn, rnnfast):
        torch.manual_seed(5)
        cells.append(getattr(namespace, name)(4, 5, **options))
    theirs, ours = cells
    assert isinstance(ours, nn.RNNCellBase)
    assert repr(ours) == repr(theirs)
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert ours.bias_ih is not None
    assert getattr(rnnfast, name)(4, 5, bias=False).bias_ih is None


@each_backend
@pytest.mark.parametrize(
    ("nonlinearity", "function"),
    [("sigmoid", torch.sigmoid), ("identity", lambda x: x), ("leaky_relu", torch.nn.functional.leaky_relu)],
)
def test_nonlinearities_of_our_own(device: str, backend: str, nonlinearity: str, function: Any) -> None:
    cell = rnnfast.RNNCell(4, 5, nonlinearity=nonlinearity, backend=backend, device=device, dtype=torch.float64)
    input, hx = (torch.randn(3, size, device=device, dtype=torch.float64) for size in (4, 5))
    gates = input @ cell.weight_ih.T + cell.bias_ih + hx @ cell.weight_hh.T + cell.bias_hh
    torch.testing.assert_close(cell(input, hx), function(gates))
    assert repr(cell) == f"RNNCell(4, 5, nonlinearity={nonlinearity}, backend={backend})"


@each_cell
@each_backend
def test_steps_of_a_cell_are_the_layer(name: str, options: dict[str, Any], device: str, backend: str) -> None:
    cell = getattr(rnnfast, name)(4, 5, backend=backend, device=device, dtype=torch.float64, **options)
    layer = getattr(rnnfast, name.removesuffix("Cell"))(
        4, 5, backend=backend, device=device, dtype=torch.float64, **options
    )
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input = torch.randn(6, 3, 4, device=device, dtype=torch.float64)
    output, final = layer(input)
    state = None
    for t in range(6):
        state = cell(input[t], state)
        torch.testing.assert_close(flatten(state)[0], output[t])
    torch.testing.assert_close(flatten(state), [part[0] for part in flatten(final)])


# ------------------------------------------------------------------------------- layer normalisation and zoneout
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("RNNCell", {"nonlinearity": name, "layer_norm": True}) for name in rnnfast.functional.NONLINEARITIES),
    ("LSTMCell", {"layer_norm": True}),
    ("GRUCell", {"layer_norm": True}),
    ("RNNCell", {"zoneout": 0.3}),
    ("LSTMCell", {"zoneout": 0.3}),
    ("LSTMCell", {"zoneout": (0.3, 0.2), "layer_norm": True}),
    ("GRUCell", {"zoneout": 0.3, "layer_norm": True}),
    ("GRUCell", {"zoneout": 0.3, "reset_after": False}),
]
each_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[" ".join([name, *map(str, options.items())]) for name, options in VARIANTS]
)


def cell_and_layer(name: str, options: dict[str, Any], **more: Any) -> tuple[nn.Module, nn.Module]:
    """Both with the same weights, whose norms are not those they start with: the layer's are loaded into the cell."""
    options = {"dtype": torch.float64, **options, **more}
    cell, layer = (getattr(rnnfast, kind)(4, 5, **options) for kind in (name, name.removesuffix("Cell")))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    cell.load_state_dict({key.removesuffix("_l0"): weight for key, weight in layer.state_dict().items()})
    return cell, layer


def steps_of(cell: nn.Module, input: torch.Tensor, state: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """The cell's h of every step, and its last state."""
    outputs = []
    for x in input:
        state = cell(x, state, **options)
        outputs.append(flatten(state)[0])
    return torch.stack(outputs), state


@each_variant
@each_backend
@pytest.mark.parametrize("bias", [True, False])
def test_a_variant_step_by_step_is_the_layer_in_evaluation(
    name: str, options: dict[str, Any], device: str, backend: str, bias: bool
) -> None:
    """Outputs, last states and all gradients. 1e-10 is what sums in another order leave in float64 behind six steps."""
    cell, layer = (module.eval() for module in cell_and_layer(name, options, bias=bias, device=device, backend=backend))
    input, h, c = (torch.randn(*shape, device=device, dtype=torch.float64) for shape in ((6, 3, 4), (3, 5), (3, 5)))
    results = []
    for module, run, state in ((cell, steps_of, (h, c)), (layer, layer.__class__.__call__, (h[None], c[None]))):
        output, final = run(module, input, state if name == "LSTMCell" else state[0])
        final = [part.view(3, 5) for part in flatten(final)]
        loss = output.square().sum() + sum(part.sum() for part in final)
        results.append([output, *final, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@each_variant
def test_a_variant_s_one_step_is_the_layer_s_in_training(name: str, options: dict[str, Any], device: str) -> None:
    """The same bits, with the masks that a generator gives; an unbatched row has those of its batch.
    1e-12: the product of one row may sum in another order, which in float64 leaves a few 1e-16."""
    cell, layer = cell_and_layer(name, options, device=device)
    x, h = (torch.randn(3, size, device=device, dtype=torch.float64) for size in (4, 5))
    hx = (h, h + 1) if name == "LSTMCell" else h
    stacked = tuple(part[None] for part in flatten(hx))
    expected = layer(x[None], stacked if name == "LSTMCell" else stacked[0], generator=generator(device))[1]
    got = cell(x, hx, generator=generator(device))
    assert all(map(torch.equal, flatten(got), [part[0] for part in flatten(expected)]))
    first = tuple(part[0] for part in flatten(hx))
    alone = cell(x[0], first if name == "LSTMCell" else first[0], generator=generator(device))
    torch.testing.assert_close(flatten(alone), [part[0] for part in flatten(got)], rtol=1e-12, atol=1e-12)


def generator(device: str, seed: int = 5) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_zoneout_keeps_units_at_random(name: str, device: str) -> None:
    """As many as chance allows, within five deviations; at every call, and for h and c, others."""
    rows, units, of_h, of_c = 60, 50, 0.3, 0.6
    zoneout = (of_h, of_c) if name == "LSTMCell" else of_h
    cell = getattr(rnnfast, name)(3, units, zoneout=zoneout, device=device)
    x, h = torch.randn(rows, 3, device=device), torch.randn(rows, units, device=device)
    hx = (h, h + 1) if name == "LSTMCell" else h

    def kept() -> list[torch.Tensor]:
        return [new == old for new, old in zip(flatten(cell(x, hx)), flatten(hx), strict=True)]

    first, second = kept(), kept()
    for once, again, p in zip(first, second, (of_h, of_c), strict=False):
        agree = p**2 + (1 - p) ** 2
        for observed, expected in ((once, p), (again, p), (once == again, agree)):
            deviation = math.sqrt(expected * (1 - expected) / observed.numel())
            assert abs(observed.double().mean().item() - expected) < 5 * deviation
    if name == "LSTMCell":
        together = (first[0] & first[1]).double().mean().item()
        assert abs(together - of_h * of_c) < 5 * math.sqrt(of_h * of_c / first[0].numel())
    state = torch.get_rng_state()
    cell.eval()(x, hx)
    cell.train()(x, hx, generator=generator(device))
    assert torch.equal(torch.get_rng_state(), state)


@each_variant
def test_derivatives_of_a_variant(name: str, options: dict[str, Any], device: str) -> None:
    cell, _ = cell_and_layer(name, options, device=device)
    parameters = dict(cell.named_parameters())
    x, h, c = (torch.randn(2, size, device=device, dtype=torch.float64, requires_grad=True) for size in (4, 5, 5))

    def call(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *weights: torch.Tensor) -> Any:
        hx = (h, c) if name == "LSTMCell" else h + 0 * c
        given = dict(zip(parameters, weights, strict=True))
        return torch.func.functional_call(cell, given, (x, hx), {"generator": generator(device)})

    leaves = (x, h, c, *parameters.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@each_variant
def test_a_variant_as_a_module(name: str, options: dict[str, Any]) -> None:
    """Names and initial values of parameters, its text, copies, and torch.nn, which has none."""
    torch.manual_seed(5)
    cell = getattr(rnnfast, name)(4, 5, **options)
    torch.manual_seed(5)
    plain = getattr(nn, name)(4, 5)
    gates = plain.weight_ih.shape[0]
    wanted = plain.state_dict()
    if "layer_norm" in options:
        wanted |= {"norm_weight_ih": torch.ones(gates), "norm_weight_hh": torch.ones(gates)}
        if name == "LSTMCell":
            wanted |= {"norm_weight_c": torch.ones(5), "norm_bias_c": torch.zeros(5)}
    assert list(cell.state_dict()) == list(wanted)
    torch.testing.assert_close(dict(cell.state_dict()), dict(wanted), rtol=0, atol=0)
    torch.manual_seed(5)
    for parameter in cell.parameters():
        nn.init.constant_(parameter, 0.5)
    cell.reset_parameters()
    torch.testing.assert_close(dict(cell.state_dict()), dict(wanted), rtol=0, atol=0)
    for option, value in options.items():
        assert f", {option}={value}" in repr(cell) or value == "tanh"  # which torch.nn does not show either
    x = torch.randn(3, 4)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        results = [flatten(one(x, generator=generator("cpu"))) for one in (cell, other)]
        assert all(map(torch.equal, *results))
    with pytest.raises(ValueError, match=r"model: expected layers that torch\.nn has, got 0 with "):
        rnnfast.to_torch(nn.Sequential(cell))


@each_cell
def test_a_cell_of_an_older_state(name: str, options: dict[str, Any]) -> None:
    cell = getattr(rnnfast, name)(4, 5, **options)
    state = {key: value for key, value in vars(cell).items() if key not in ("zoneout", "layer_norm", "_names")}
    old = type(cell).__new__(type(cell))
    old.__setstate__(state)
    x = torch.randn(3, 4)
    assert all(map(torch.equal, flatten(old(x)), flatten(cell(x))))
    assert type(rnnfast.to_torch(old)) is getattr(nn, name)
    assert not {"zoneout", "layer_norm", "_names"} & vars(old).keys()


@pytest.mark.parametrize(("name", "options"), [VARIANTS[0], VARIANTS[-3]], ids=["RNNCell", "LSTMCell"])
def test_a_variant_compiled(name: str, options: dict[str, Any], device: str) -> None:
    cell = getattr(rnnfast, name)(4, 5, device=device, **options)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4):
        x, results = torch.randn(rows, 4, device=device), []
        for module in (cell, compiled):
            torch.manual_seed(1)
            results.append(flatten(module(x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("RNNCell", {"zoneout": 1.0}, ValueError, r"zoneout: expected a probability below 1, got 1\.0"),
        (
            "GRUCell",
            {"zoneout": (0.1, 0.2)},
            ValueError,
            r"zoneout: expected a probability below 1, got \(0\.1, 0\.2\)",
        ),
        (
            "LSTMCell",
            {"zoneout": (0.1,)},
            ValueError,
            "zoneout: expected a probability below 1 or two, of h and c, got",
        ),
        (
            "LSTMCell",
            {"zoneout": "half"},
            ValueError,
            "zoneout: expected a probability below 1 or two, of h and c, got",
        ),
        ("LSTMCell", {"layer_norm": 1}, TypeError, "layer_norm: expected a bool, got 1"),
        (
            "GRUCell",
            {"layer_norm": True, "reset_after": False},
            ValueError,
            "layer_norm: expected False with the cell gru_reset_before, got True",
        ),
        ("GRUCell", {"reset_after": 1}, TypeError, "reset_after: expected a bool, got 1"),
        ("LSTMCell", {"recurrent_dropout": 0.5}, TypeError, "recurrent_dropout"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(rnnfast, name)(4, 5, **options)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_without_units(name: str) -> None:
    """torch.nn has it, too."""
    state = flatten(getattr(rnnfast, name)(3, 0)(torch.randn(2, 3)))
    assert [part.shape for part in state] == [
        part.shape for part in flatten(getattr(torch.nn, name)(3, 0)(torch.randn(2, 3)))
    ]


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
def test_recurrent_dropout_by_hand(name: str, device: str) -> None:
    """What the documentation of the cells says to do. 1e-12: float64's rounding over six steps of five units; another
    mask would show far above."""
    cell, layer = cell_and_layer(name, {}, device=device)
    layer.recurrent_dropout = 0.5
    input = torch.randn(6, 3, 4, device=device, dtype=torch.float64)
    seed = torch.randint(2**63 - 1, (3,), generator=generator(device), device=device)
    mask = rnnfast.reference.Noise(0.5).masks(seed, False, 6, 5, 5, torch.float64).dropout
    h, c = torch.zeros(2, 3, 5, device=device, dtype=torch.float64)
    outputs = []
    for x in input:
        if name == "LSTMCell":
            h, c = cell(x, (mask * h, c))
        else:
            h = cell(x, mask * h)
        outputs.append(h)
    expected = layer(input, generator=generator(device))[0]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-12, atol=1e-12)
