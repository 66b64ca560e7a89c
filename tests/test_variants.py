"""What torch.nn's layers lack inside the recurrence: dropout of W_hh, heads, the initial bias of the forget gate."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from sample_inputs import flatten
from torch import Tensor, nn

import rnnfast
from rnnfast import functional, reference

each_layer = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
I, H, T, B = 5, 8, 6, 3


def make(name: str, **options: Any) -> nn.Module:
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **options}
    return getattr(rnnfast, name)(I, H, **options)


def hidden_weights(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("weight_hh")]


# ------------------------------------------------------------------------------------------------ weight dropout
@each_layer
@pytest.mark.parametrize("generated", [False, True])
def test_weight_dropout_is_a_mask_on_w_hh(name: str, generated: bool, device: str) -> None:
    """The same at every step, another for each layer and direction, drawn in their order: outputs and gradients."""
    module = make(name, weight_dropout=0.4, device=device)
    plain = make(name, device=device)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(5) if generated else None
    torch.manual_seed(5)
    got = module(input, generator=generator)[0]
    grads = torch.autograd.grad(got.square().sum(), list(module.parameters()))

    generator = torch.Generator(device).manual_seed(5) if generated else None
    torch.manual_seed(5)
    masks = {}
    for key in hidden_weights(plain):
        weight = getattr(plain, key)
        ones = torch.ones_like(weight)
        if generator is None:
            masks[key] = nn.functional.dropout(ones, 0.4)
        else:
            masks[key] = ones.bernoulli_(0.6, generator=generator) / 0.6
        with torch.no_grad():
            weight.mul_(masks[key])
    expected = plain(input)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
    for (key, _), grad, wanted in zip(module.named_parameters(), grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted * masks.get(key, 1.0), rtol=1e-10, atol=1e-10)


@each_layer
def test_weight_dropout_is_off_in_eval(name: str, device: str) -> None:
    module, plain = make(name, weight_dropout=0.4, device=device), make(name, device=device)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(input)[0], plain(input)[0])
    module.train()
    assert not torch.equal(module(input)[0], plain(input)[0])


@each_layer
def test_a_generator_leaves_torch_s_own_alone(name: str, device: str) -> None:
    module = make(name, weight_dropout=0.4, device=device)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    generator = torch.Generator(device)
    state = torch.get_rng_state()
    results = [flatten(module(input, generator=generator.manual_seed(seed))) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("generated", [False, True])
def test_statistics_of_the_mask(probability: float, generated: bool) -> None:
    """Kept elements are scaled by 1 / (1 - p), and as many are dropped as chance allows, within five deviations."""
    module = rnnfast.RNN(1, 200, weight_dropout=probability, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_hh_l0.fill_(1e-3)
    generator = torch.Generator().manual_seed(0) if generated else None
    h0 = torch.eye(200, dtype=torch.float64).unsqueeze(0)  # row b of the output is tanh of W_hh's column b
    with torch.no_grad():
        output = module(torch.zeros(1, 200, 1, dtype=torch.float64), h0, generator=generator)[0][0]
    kept = output != 0
    deviation = math.sqrt(probability * (1 - probability) / output.numel())
    assert abs(kept.double().mean().item() - (1 - probability)) < 5 * deviation
    torch.testing.assert_close(output[kept].atanh(), torch.full_like(output[kept], 1e-3 / (1 - probability)))


@each_layer
def test_weight_dropout_has_derivatives_of_every_order(name: str, device: str) -> None:
    module = getattr(rnnfast, name)(2, 2, weight_dropout=0.5, dtype=torch.float64, device=device)
    input = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(input: Tensor, w_hh: Tensor) -> Tensor:
        generator = torch.Generator(device).manual_seed(3)
        return torch.func.functional_call(module, {"weight_hh_l0": w_hh}, (input,), {"generator": generator})[0]

    assert torch.autograd.gradcheck(run, (input, module.weight_hh_l0))
    assert torch.autograd.gradgradcheck(run, (input, module.weight_hh_l0))


@each_layer
def test_weight_dropout_with_lengths_resets_and_recompute(name: str, device: str) -> None:
    """Equal to the reference formula with the same mask."""
    lengths, reset = torch.tensor([T, 2, 0], device=device), torch.rand(T, B, device=device) < 0.3
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    results = []
    for backend in (None, "reference"):
        torch.manual_seed(1)
        module = make(name, weight_dropout=0.3, recompute=True, backend=backend, device=device)
        output = module(input, lengths=lengths, reset=reset)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    torch.testing.assert_close(results[0], results[1])


@each_layer
@pytest.mark.parametrize("probability", [-0.1, 1.5, True, "half"])
def test_bad_weight_dropout(name: str, probability: Any) -> None:
    with pytest.raises(ValueError, match=f"weight_dropout: expected a probability from 0 to 1, got {probability!r}"):
        getattr(rnnfast, name)(2, 3, weight_dropout=probability)


def test_everything_dropped() -> None:
    module = rnnfast.GRU(2, 3, weight_dropout=1.0)
    input = torch.randn(1, 2, 2)
    for generator in (None, torch.Generator()):
        h0 = torch.randn(1, 2, 3)
        expected = nn.GRU(2, 3)
        expected.load_state_dict({**module.state_dict(), "weight_hh_l0": torch.zeros(9, 3)})
        torch.testing.assert_close(module(input, h0, generator=generator)[0], expected(input, h0)[0])


@each_layer
def test_torch_nn_has_no_weight_dropout(name: str) -> None:
    module = nn.Sequential(make(name, weight_dropout=0.25))
    assert "weight_dropout=0.25" in repr(module)
    with pytest.raises(ValueError, match=r"model: expected layers that torch.nn has, got 0 with weight_dropout=0\.25"):
        rnnfast.to_torch(module)
    module[0].weight_dropout = 0.0
    assert type(rnnfast.to_torch(module)[0]) is getattr(nn, name)


# --------------------------------------------------------------------------------------------------- forget bias
def test_forget_bias() -> None:
    """It is all that differs from torch.nn's initial values, and reset_parameters sets it again."""
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=3)
    torch.manual_seed(0)
    ours = rnnfast.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=3, forget_bias=1.5)
    for _ in range(2):
        for (key, expected), value in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            wanted = expected.detach().clone()
            if key.startswith("bias"):
                wanted[H : 2 * H] = 1.5 if key.startswith("bias_ih") else 0.0
            assert torch.equal(value, wanted)
        for module in (theirs, ours):
            torch.manual_seed(1)
            module.reset_parameters()
    assert "forget_bias=1.5" in repr(ours)
    assert type(rnnfast.to_torch(ours)) is nn.LSTM
    assert rnnfast.convert(ours).forget_bias is None


def test_bad_forget_bias() -> None:
    for bad in ("1", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"forget_bias: expected a finite number or None, got {bad!r}"):
            rnnfast.LSTM(2, 3, forget_bias=bad)
    with pytest.raises(ValueError, match=r"forget_bias: expected None without bias, got 1\.0"):
        rnnfast.LSTM(2, 3, bias=False, forget_bias=1.0)


# ------------------------------------------------------------------------------------------------ heads
def share(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """Let heads with so many units together share a call."""
    monkeypatch.setattr(functional, "WHOLE_UNITS", units)
    monkeypatch.setattr(functional, "SHARED_UNITS", units)


def without_heads(module: nn.Module, **options: Any) -> nn.Module:
    """The same layers with all of each W_hh, zero but for its diagonal blocks."""
    options |= {} if getattr(module, "reset_after", True) else {"reset_after": False}
    plain = make(type(module).__name__, **options)
    for key, weight in module.state_dict().items():
        if key.startswith("weight_hh"):
            blocks = weight.unflatten(0, (-1, module.num_heads, H // module.num_heads))
            weight = torch.stack([torch.block_diag(*gate) for gate in blocks]).flatten(0, 1)
        plain.state_dict()[key].copy_(weight)
    return plain


@each_layer
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize(("num_heads", "together"), [(2, 1), (2, 2), (8, 1), (8, 4)])
def test_heads_are_blocks_of_w_hh(
    name: str, form: str, num_heads: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, all states and every gradient, whether heads share calls or not; the gradient of a block is that of the
    block in the whole matrix."""
    share(monkeypatch, together * H // num_heads)
    module = make(name, num_heads=num_heads)
    plain = without_heads(module)
    lengths, reset = torch.tensor([4, 6, 0]), torch.rand(T, B) < 0.3
    options: dict[str, Any] = {"reset": reset, "return_states": True}
    input: Any = torch.randn(T, B, I, dtype=torch.float64)
    if form == "lengths":
        options["lengths"] = lengths
    elif form == "packed":
        packed = nn.utils.rnn.pack_padded_sequence(input, lengths.clamp_min(1), enforce_sorted=False)
        input, options["reset"] = packed, torch.rand(len(packed.data)) < 0.3
    state = torch.randn(4, B, H, dtype=torch.float64)
    hx = (state, state + 1) if name == "LSTM" else state

    def run(layers: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        results = flatten(layers(input, hx, **options))
        weights = dict(layers.named_parameters())
        loss = sum((result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum() for result in results)
        return results, dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    (got, grads), (expected, expected_grads) = run(module), run(plain)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        wanted = expected_grads[key]
        if key.startswith("weight_hh"):
            size = H // num_heads
            blocks = wanted.unflatten(0, (-1, num_heads, size)).unflatten(-1, (num_heads, size))
            wanted = torch.stack([blocks[:, head, :, head] for head in range(num_heads)], 1).flatten(0, 2)
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("cell", "hidden_size", "num_heads", "expected"),
    [
        ("lstm", 8, 4, 4),
        ("gru_reset_before", 128, 2, 2),
        ("rnn_sigmoid", 120, 15, 15),
        ("gru", 136, 2, 1),
        ("gru", 136, 4, 1),
        ("rnn_tanh", 256, 8, 2),
        ("rnn_tanh", 256, 256, 64),
        ("lstm", 144, 12, 4),  # five heads of 12 units would do, but do not divide 12
        ("lstm", 1024, 2, 1),
        ("rnn_relu", 8, 2, 1),
        ("rnn_identity", 8, 2, 1),
        ("rnn_leaky_relu", 8, 2, 1),
    ],
)
def test_heads_that_share_a_call(cell: str, hidden_size: int, num_heads: int, expected: int) -> None:
    assert functional.heads_a_call(cell, hidden_size, num_heads) == expected


@pytest.mark.parametrize("cell", [cell for cell, form in reference.CELLS.items() if not form.diagonal])
def test_a_bounded_cell_is_bounded(cell: str) -> None:
    """However large the gates are, |h| is at most 1."""
    form = reference.CELLS[cell]
    h0 = torch.zeros(1, 40, H)
    c0 = h0 if form.states == 2 else None
    weights = [1e9 * torch.randn(form.gates * H, size) for size in (I, H)]
    output = reference.layer(cell, torch.randn(T, 40, I), h0, c0, weights)[0]
    assert bool((output.abs() <= 1).all()) == form.bounded


def test_a_head_that_overflows_leaves_the_others_alone() -> None:
    """0 * inf is nan, so such heads do not share a call."""
    module = rnnfast.RNN(I, H, nonlinearity="identity", num_heads=2)
    with torch.no_grad():
        module.weight_hh_l0[: H // 2] = 1e30
    first, second = module(torch.randn(T, B, I))[0].chunk(2, -1)
    assert not first.isfinite().all()
    assert second.isfinite().all()


@each_layer
@pytest.mark.parametrize(
    "option",
    [{"weight_dropout": 0.5}, {"recurrent_dropout": 0.5}, {"zoneout": 0.3}, {"recurrent_dropout": 0.3, "zoneout": 0.5}],
    ids=" ".join,
)
@pytest.mark.parametrize("training", [False, True])
def test_masks_do_not_depend_on_who_shares_a_call(
    name: str, option: dict[str, float], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads alone, in pairs and all together give the same bits. What comes out is the plain layer's with the same
    blocks and masks. Sums in another order, of gradients too, leave less than 1e-10 in float64; another mask would show
    far above."""
    module = make(name, num_heads=4, **option).train(training)
    input = torch.randn(T, B, I, dtype=torch.float64)
    results, grads = [], []
    for units in (1, H // 2, 64):
        share(monkeypatch, units)
        output, state = module(input, generator=torch.Generator().manual_seed(1))
        results.append([output, *flatten(state)])
        grads.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
    for result, grad in zip(results[1:], grads[1:], strict=True):
        assert all(map(torch.equal, result, results[0]))
        torch.testing.assert_close(grad, grads[0], rtol=1e-10, atol=1e-10)
    if "weight_dropout" not in option:  # whose masks have the shape of W_hh
        plain = without_heads(module, **option).train(training)
        expected = plain(input, generator=torch.Generator().manual_seed(1))[0]
        torch.testing.assert_close(results[0][0], expected, rtol=1e-12, atol=1e-12)


def test_one_head_is_the_plain_layer() -> None:
    torch.manual_seed(3)
    plain = make("GRU")
    torch.manual_seed(3)
    module = make("GRU", num_heads=1)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert "num_heads" not in repr(module)
    input = torch.randn(T, B, I, dtype=torch.float64)
    assert torch.equal(module(input)[0], plain(input)[0])


def test_heads_start_as_torch_s_layers_of_the_whole_size() -> None:
    module = rnnfast.LSTM(4, 100, num_heads=4)
    assert module.weight_hh_l0.shape == (400, 25)
    assert 0.09 < module.weight_hh_l0.abs().max() < 0.1  # 1 / sqrt(hidden_size)
    module.reset_parameters()
    assert 0.09 < module.weight_hh_l0.abs().max() < 0.1
    assert "num_heads=4" in repr(module)


def test_heads_have_masks_of_their_own() -> None:
    """With equal weights and states in both heads, masks alone tell them apart."""
    module = rnnfast.RNN(2, 8, num_heads=2, recurrent_dropout=0.5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
    input = torch.ones(T, 16, 2, dtype=torch.float64)
    first, second = module(input)[0].unflatten(-1, (2, 4)).unbind(-2)
    assert not torch.equal(first, second)
    first, second = module.eval()(input)[0].unflatten(-1, (2, 4)).unbind(-2)
    assert torch.equal(first, second)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
def test_heads_in_every_dtype(
    name: str, dtype: torch.dtype, narrow: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero changes no sum: with autocast and without, a head that shares a call has the bits that it has alone."""
    module = make(name, num_heads=4, num_layers=1, dtype=dtype)
    input = torch.randn(T, B, I, dtype=dtype)
    results = []
    for units in (1, 64):
        share(monkeypatch, units)
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            output = module(input)[0]
        results.append([output, *torch.autograd.grad(output.float().square().sum(), list(module.parameters()))])
    for alone, shared in zip(*results, strict=True):
        torch.testing.assert_close(alone, shared, rtol=0, atol=0)


@each_layer
def test_derivatives_of_heads_that_share_a_call(name: str, device: str) -> None:
    """Second and forward-mode ones, and per-sample gradients, equal those of the formula with the matrix as a whole.

    1e-10 is float64's rounding in sums of some hundred products, in another order; a wrong term is larger by far.
    """
    module = getattr(rnnfast, name)(2, 4, num_heads=2, dtype=torch.float64, device=device)
    parameters = {key: weight.detach() for key, weight in module.named_parameters()}
    input = torch.randn(4, 2, 2, dtype=torch.float64, device=device)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].sin().sum()

    def by_hand(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = weights.values()
        gates = w_hh.shape[0] // 4
        whole = torch.stack([torch.block_diag(*gate) for gate in w_hh.view(gates, 2, 2, 2)]).view(-1, 4)
        h0 = x.new_zeros(1, x.shape[1], 4)
        layer = [w_ih, whole, b_ih, b_hh]
        output = reference.layer(module.mode.lower(), x, h0, h0 if name == "LSTM" else None, layer)[0]
        return output.sin().sum()

    def derivatives(function: Any) -> list[Any]:
        return [
            torch.func.hessian(function)(parameters, input),
            torch.func.jvp(function, (parameters, input), (parameters, input)),
            torch.vmap(torch.func.grad(function), (None, 1))(parameters, input.unsqueeze(2)),
        ]

    torch.testing.assert_close(derivatives(loss), derivatives(by_hand), rtol=1e-10, atol=1e-10)
    w_hh = parameters["weight_hh_l0"].clone().requires_grad_()
    input.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: loss({**parameters, "weight_hh_l0": w}, x), (input, w_hh))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of hidden_size = 8, got 3"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 2.0}, TypeError, "num_heads"),
        ({"num_heads": 2, "proj_size": 2}, ValueError, "num_heads: expected 1 with a projection, got 2"),
    ],
)
def test_bad_heads(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnnfast.LSTM(I, H, **options)


def test_torch_has_no_heads() -> None:
    with pytest.raises(ValueError, match="num_heads=2"):
        rnnfast.to_torch(nn.Sequential(rnnfast.GRU(I, H, num_heads=2)))


def test_heads_of_a_gru_with_the_reset_gate_before_the_product() -> None:
    module = make("GRU", num_heads=2, reset_after=False)
    input = torch.randn(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(module(input)[0], without_heads(module)(input)[0], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ reset_after
def step_by_hand(module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    """The first layer's step of a GRU with the reset gate before the product, from its parameters."""
    w, u, a, b = (parameter.chunk(3) for parameter in list(module.parameters())[:4])
    r, z = (torch.sigmoid(x @ w[g].T + a[g] + h @ u[g].T + b[g]) for g in range(2))
    return (1 - z) * torch.tanh(x @ w[2].T + a[2] + (r * h) @ u[2].T + b[2]) + z * h


def test_reset_before_the_product(device: str) -> None:
    """Outputs and gradients of the parameters equal the loop's; the parameters themselves are torch.nn.GRU's."""
    torch.manual_seed(0)
    theirs = nn.GRU(I, H, dtype=torch.float64)
    torch.manual_seed(0)
    module = rnnfast.GRU(I, H, dtype=torch.float64, reset_after=False)
    torch.testing.assert_close(module.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    module = module.to(device)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    output, h_n = module(input)
    h, steps = input.new_zeros(B, H), []
    for x in input:
        h = step_by_hand(module, x, h)
        steps.append(h)
    expected = torch.stack(steps)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h_n[0], h, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(o.square().sum(), list(module.parameters())) for o in (output, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(output, theirs.to(device)(input)[0])


def test_a_cell_with_the_reset_gate_before_the_product(device: str) -> None:
    cell = rnnfast.GRUCell(I, H, reset_after=False, dtype=torch.float64, device=device)
    x, h = torch.randn(B, I, dtype=torch.float64, device=device), torch.randn(B, H, dtype=torch.float64, device=device)
    torch.testing.assert_close(cell(x, h), step_by_hand(cell, x, h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cell(x[0], h[0]), cell(x, h)[0])
    assert "reset_after=False" in repr(cell)
    with pytest.raises(ValueError, match="reset_after=False"):
        rnnfast.to_torch(cell)


def test_torch_has_no_reset_gate_before_the_product() -> None:
    module = nn.Sequential(make("GRU", reset_after=False))
    assert "reset_after=False" in repr(module)
    assert "reset_after" not in repr(make("GRU"))
    with pytest.raises(ValueError, match=r"model: expected layers that torch.nn has, got 0 with reset_after=False"):
        rnnfast.to_torch(module)
    assert copy.deepcopy(module)[0].reset_after is False
    assert pickle.loads(pickle.dumps(module))[0].reset_after is False
    assert rnnfast.convert(nn.GRU(I, H)).reset_after
    assert type(rnnfast.to_torch(make("GRU"))) is nn.GRU
    with pytest.raises(TypeError, match="reset_after: expected a bool, got 'before'"):
        rnnfast.GRU(I, H, reset_after="before")
    with pytest.raises(TypeError, match="reset_after: expected a bool, got 'before'"):
        rnnfast.GRUCell(I, H, reset_after="before")


def test_derivatives_with_the_reset_gate_before_the_product(device: str) -> None:
    """Second and forward-mode ones, samples apart and batched: what has no kernel of its own equals the formula."""
    module = rnnfast.GRU(2, 3, reset_after=False, dtype=torch.float64, device=device)
    parameters = dict(module.named_parameters())
    input = torch.randn(4, 2, 2, dtype=torch.float64, device=device)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].sin().sum()

    def derivatives() -> list[Any]:
        samples = input.unbind(1)
        results: list[Any] = [
            torch.func.hessian(loss, 1)(parameters, input),
            torch.func.jvp(loss, (parameters, input), (parameters, input)),
            torch.vmap(torch.func.grad(loss), (None, 1))(parameters, input.unsqueeze(2)),
            [torch.func.grad(loss)(parameters, x.unsqueeze(1)) for x in samples],
        ]
        leaf = input.clone().requires_grad_()
        output = module(leaf)[0]
        directions = torch.eye(output.numel(), dtype=torch.float64, device=device).view(-1, *output.shape)
        inputs = (leaf, *parameters.values())
        results.append(torch.autograd.grad(output, inputs, directions, is_grads_batched=True))
        return results

    got = derivatives()
    module.backend = "reference"
    torch.testing.assert_close(got, derivatives(), rtol=1e-10, atol=1e-10)
