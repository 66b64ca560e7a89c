"""Recurrent dropout and zoneout: the masks themselves, and what layers make of them.

All is float64, and where tolerances stand the two sides add the same terms in another order: over a few hundred
products that is some 1e-14 of a result, more of a gradient that passes through all steps. A wrong bit of a mask is
1e-2 and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sample_inputs import TWO_STATES, Sample, each_backend, each_cell, each_layer, each_sample, flatten, tensors_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import ops, reference

I, H, T, B = 5, 8, 6, 3
OPTIONS: list[dict[str, float]] = [
    {"recurrent_dropout": 0.4},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.4, "zoneout": 0.3},
]
each_option = pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
needs_operators = pytest.mark.skipif(ops.extension is None, reason="the extension is not built: there are no operators")


def noises(cell: str) -> list[tuple[float, float, float]]:
    zoneout_c = 0.2 if cell in TWO_STATES else 0.0
    return [(0.3, 0.0, 0.0), (0.0, 0.4, zoneout_c), (0.5, 0.2, zoneout_c)]


def seeds(batch: int, device: str = "cpu", start: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(start)
    return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator).to(device)


def make(name: str, **options: Any) -> nn.Module:
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **options}
    return getattr(rnnfast, name)(I, H, **options)


def inputs(device: str = "cpu") -> Tensor:
    return torch.randn(T, B, I, device=device, dtype=torch.float64)


def generator(device: str, seed: int = 5) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# --------------------------------------------------------------------------------------------------------- the masks
def test_philox_is_philox() -> None:
    """The known answer for a counter and a key of zeros, from the authors' Random123."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in reference.philox(zero, zero, 0, zero)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_statistics_of_the_masks(probability: float) -> None:
    """As many elements as chance allows, within five deviations, over all and along every axis."""
    noise, steps, units = reference.Noise(*[probability] * 3), 30, 70
    masks = noise.masks(seeds(40), False, steps, units, units, torch.float64)
    assert masks.dropout is not None
    scale = masks.dropout.max()
    torch.testing.assert_close(scale, torch.tensor(1 / (1 - probability), dtype=torch.float64))
    assert torch.equal(masks.dropout.unique(), torch.stack([torch.zeros_like(scale), scale]))
    for mask in ((masks.dropout == 0).double().unsqueeze(0), masks.keep_h, masks.keep_c):
        assert mask is not None
        for means in (mask.mean(), mask.mean(0), mask.mean((0, 1)), mask.mean((0, 2)), mask.mean((1, 2))):
            deviation = math.sqrt(probability * (1 - probability) / (mask.numel() // means.numel()))
            exceptional = ((means - probability).abs() > 5 * deviation).double().mean()
            # Of few draws the binomial is far from normal: of a rare element's means some lie out.
            assert exceptional <= (0 if means.numel() < 100 else 0.01)


def test_masks_are_independent() -> None:
    """Two masks agree as often as chance allows: neighbours of every kind, and what is drawn for different purposes."""
    noise, many = reference.Noise(0.5, 0.5, 0.5), 64
    masks, reverse = (noise.masks(seeds(many), r, many, many, many, torch.float64) for r in (False, True))
    other = noise.masks(seeds(many, start=1), False, many, many, many, torch.float64)
    assert masks.keep_h is not None and masks.keep_c is not None and masks.dropout is not None  # noqa: PT018
    assert other.keep_h is not None and reverse.keep_h is not None and reverse.dropout is not None  # noqa: PT018
    keep = masks.keep_h
    pairs = [(keep, masks.keep_c), (keep, reverse.keep_h), (keep, other.keep_h), (masks.dropout, reverse.dropout)]
    pairs += [
        (keep.narrow(axis, lag, many - lag), keep.narrow(axis, 0, many - lag)) for axis in range(3) for lag in (1, 4)
    ]
    pairs += [(keep[0], (masks.dropout == 0).double())]
    for one, two in pairs:
        agreement = (one == two).double().mean().item()
        assert abs(agreement - 0.5) < 5 * math.sqrt(0.25 / one.numel())


def test_masks_of_a_part_of_the_units() -> None:
    whole = reference.Noise(0.5, 0.4, 0.3).masks(seeds(4), True, 5, 9, 9, torch.float64)
    for first, units in ((0, 4), (3, 6), (8, 1)):
        part = reference.Noise(0.5, 0.4, 0.3, first).masks(seeds(4), True, 5, units, units, torch.float64)
        for mask, of_whole in zip(part, whole, strict=True):
            assert mask is not None
            assert of_whole is not None
            assert torch.equal(mask, of_whole[..., first : first + units])


# ------------------------------------------------------------------------------------------------------- the layers
def loop(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], masks: reference.Masks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction, padded: the definition with masks, in the equations of torch.nn's documentation."""
    w_ih, w_hh, b_ih, b_hh, *w_hr = weights
    outputs = []
    for t in range(len(x)):
        masked = h if masks.dropout is None else h * masks.dropout
        i, g = x[t] @ w_ih.T + b_ih, (masked * w_hh if w_hh.dim() == 1 else masked @ w_hh.T) + b_hh
        new_c = None
        if cell == "lstm":
            assert c is not None
            into, forget, new, out = (i + g).chunk(4, 1)
            new_c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
            new_h = out.sigmoid() * new_c.tanh()
        elif cell == "gru_reset_before":
            (ir, iz, inew), (hr, hz, _) = i.chunk(3, 1), g.chunk(3, 1)
            z, w_hn, b_hn = (iz + hz).sigmoid(), w_hh.chunk(3)[2], b_hh.chunk(3)[2]
            new_h = (1 - z) * (inew + ((ir + hr).sigmoid() * masked) @ w_hn.T + b_hn).tanh() + z * h
        elif cell == "gru":
            (ir, iz, inew), (hr, hz, hnew) = i.chunk(3, 1), g.chunk(3, 1)
            z = (iz + hz).sigmoid()
            new_h = (1 - z) * (inew + (ir + hr).sigmoid() * hnew).tanh() + z * h
        elif cell.startswith("rnn_"):
            named = cell.removeprefix("rnn_")
            nonlinearity = torch.clone if named == "identity" else getattr(nn.functional, named)
            new_h = nonlinearity(i + g)
        else:
            new_h, *_ = reference.CELLS[cell].step(i, g, h)
        if w_hr:
            new_h = new_h @ w_hr[0].T
        h = new_h if masks.keep_h is None else torch.where(masks.keep_h[t] == 1, h, new_h)
        if c is not None:
            assert new_c is not None
            c = new_c if masks.keep_c is None else torch.where(masks.keep_c[t] == 1, c, new_c)
        outputs.append(h)
    return torch.stack(outputs), h, c


@each_backend
@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in reference.CELLS), ("lstm", 3)])
def test_against_a_loop_with_the_masks(cell: str, proj_size: int, backend: str, device: str) -> None:
    sample = Sample(cell, steps=7, proj_size=proj_size)
    for noise in noises(cell):
        results = []
        for by_loop in (False, True):
            arguments, _ = sample.arguments(device=device, grad=True)
            _, x, h0, c0, weights = arguments
            seed = seeds(sample.batch, device)
            if by_loop:
                sizes = (sample.steps, sample.output_size, sample.hidden_size)
                masks = reference.Noise(*noise).masks(seed, False, *sizes, torch.float64)
                output, h_n, c_n = loop(cell, x, h0[0], None if c0 is None else c0[0], weights, masks)
            else:
                output, h_n, c_n, _ = ops.layer(*arguments, seed=seed, noise=noise, backend=backend)
                h_n, c_n = h_n[0], c_n[0] if c0 is not None else None
            loss = output.square().sum() + h_n.sum() + (0.0 if c_n is None else c_n.sum())
            results.append(
                [output, h_n, *([] if c_n is None else [c_n]), *torch.autograd.grad(loss, tensors_of(arguments))]
            )
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


def run(layer: Callable[..., Any], sample: Sample, device: str, noise: Sequence[float], **options: Any) -> list[Tensor]:
    """Results of a layer and the gradients of their sum with fixed weights."""
    arguments, given = sample.arguments(device=device, grad=True)
    seed = seeds(sample.batch, device)
    results = [r for r in layer(*arguments, **given, seed=seed, noise=noise, **options) if r.numel()]
    loss = 0.0 * arguments[1].sum() + sum(
        (torch.linspace(-1, 1, r.numel()).to(r).view_as(r) * r).sum() for r in results
    )
    return [*results, *torch.autograd.grad(loss, tensors_of(arguments), materialize_grads=True)]


@needs_operators
@each_sample
def test_operators_against_reference(sample: Sample, device: str) -> None:
    """The same masks from the same seed: results and gradients, with the gates kept and recomputed."""
    for index, (noise, first_unit) in enumerate(zip(noises(sample.cell), ((), (37,), (2**31,)), strict=True)):
        noise = (*noise, *first_unit)
        ours = run(ops.layer, sample, device, noise, save=1 + index % 2)
        theirs = run(reference.layer, sample, device, noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@needs_operators
@each_cell
def test_masks_do_not_depend_on_who_draws(cell: str) -> None:
    """Threads that divide rows or units, and instruction sets: what is exact stays so bit for bit. 1e-12 of a tensor's
    largest element: instruction sets sum in other orders, and an element near zero is a sum of some that are not."""
    assert ops.extension is not None
    one = Sample(
        cell, steps=9, batch=4, input_size=40, hidden_size=96, directions=2, form="lengths", row_lengths=(9, 2, 9, 5)
    )
    for sample in (one, Sample(cell, steps=9, batch=1, input_size=200, hidden_size=320, directions=2)):
        for noise in noises(cell):
            results = []
            for name in ops.extension.instruction_sets():
                ops.extension.set_instruction_set(name)
                for threads in (1, 2, 4):
                    torch.set_num_threads(threads)
                    results.append(run(ops.layer, sample, "cpu", noise))
                assert all(torch.equal(a, b) for r in results[-2:] for a, b in zip(r, results[-3], strict=True))
            for result in results[1:]:
                for got, expected in zip(result, results[0], strict=True):
                    largest = max(1.0, float(expected.detach().abs().max()))
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * largest)


@each_option
@each_layer
def test_masks_do_not_depend_on_the_form(name: str, option: dict[str, float], device: str) -> None:
    """A row has its masks, padded with lengths, packed, and sorted for packing."""
    module, input, lengths = make(name, **option, device=device), inputs(device), torch.tensor([2, T, 4])
    padded, padded_state = module(input, lengths=lengths, generator=generator(device))
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    output, state = module(packed, generator=generator(device))
    output, _ = nn.utils.rnn.pad_packed_sequence(output, total_length=T)
    torch.testing.assert_close([output, *flatten(state)], [padded, *flatten(padded_state)], rtol=1e-12, atol=1e-12)
    first = make(name, **option, batch_first=True, device=device)
    first.load_state_dict(module.state_dict())
    output = first(input.transpose(0, 1), lengths=lengths, generator=generator(device))[0]
    assert torch.equal(output.transpose(0, 1), padded)


@each_option
@each_layer
def test_off_is_the_plain_layer(name: str, option: dict[str, float], device: str) -> None:
    """Zero probabilities and, but for zoneout, eval: the same bits, and no random number is drawn."""
    plain, zero = make(name, device=device), make(name, **dict.fromkeys(option, 0.0), device=device)
    module, input = make(name, **option, device=device), inputs(device)
    for other in (zero, module):
        other.load_state_dict(plain.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(zero(input)[0], plain(input)[0])
    module.eval()
    assert torch.equal(module(input)[0], plain(input)[0]) == ("zoneout" not in option)
    assert torch.equal(torch.get_rng_state(), state)
    module.train()
    assert not torch.equal(module(input)[0], plain(input)[0])


@each_backend
@each_layer
def test_zoneout_in_eval_is_the_expectation(name: str, backend: str, device: str) -> None:
    """p old + (1 - p) new at every step, with its gradient; LSTM with two probabilities."""
    zoneout = (0.3, 0.2) if name == "LSTM" else 0.3
    module = make(
        name, zoneout=zoneout, recurrent_dropout=0.5, num_layers=1, bidirectional=False, backend=backend, device=device
    )
    cell = getattr(nn, name + "Cell")(I, H, dtype=torch.float64, device=device)
    for parameter, source in zip(cell.parameters(), module.parameters(), strict=True):
        parameter.data.copy_(source)
    input = inputs(device)
    h, c = torch.zeros(2, B, H, dtype=torch.float64, device=device)
    outputs = []
    for x in input:
        if name == "LSTM":
            new_h, new_c = cell(x, (h, c))
            c = 0.2 * c + 0.8 * new_c
        else:
            new_h = cell(x, h)
        h = 0.3 * h + 0.7 * new_h
        outputs.append(h)
    expected = torch.stack(outputs)
    got = module.eval()(input)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads, wanted = (
        torch.autograd.grad(result.square().sum(), list(owner.parameters()))
        for result, owner in ((got, module), (expected, cell))
    )
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-12)


@each_option
@each_layer
def test_a_generator_leaves_torch_s_own_alone(name: str, option: dict[str, float], device: str) -> None:
    module, input = make(name, **option, device=device), inputs(device)
    state = torch.get_rng_state()
    results = [module(input, generator=generator(device, seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(3)
    first = module(input)[0]
    assert not torch.equal(module(input)[0], first)
    torch.manual_seed(3)
    assert torch.equal(module(input)[0], first)


@each_layer
def test_a_sequence_in_pieces(name: str, device: str) -> None:
    """The mask of recurrent dropout is the generator's, whatever the steps: pieces with the same one are the whole. On
    CUDA to rounding: its product over all steps is another for each number of steps.
    """
    module, input = make(name, recurrent_dropout=0.5, bidirectional=False, device=device), inputs(device)
    whole = module(input, generator=generator(device))[0]
    state, pieces = None, []
    for piece in input.split([1, 3, 2]):
        output, state = module(piece, state, generator=generator(device))
        pieces.append(output)
    exact = {} if device == "cuda" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(torch.cat(pieces), whole, **exact)


@each_layer
def test_states_of_every_step_and_recomputing(name: str, device: str) -> None:
    module = make(name, recurrent_dropout=0.3, zoneout=0.3, device=device)
    again = make(name, recurrent_dropout=0.3, zoneout=0.3, recompute=True, device=device)
    again.load_state_dict(module.state_dict())
    results = []
    for layers in (module, again):
        output, _, states = layers(inputs(device).fill_(0.5), return_states=True, generator=generator(device))
        assert torch.equal(states.h[-1], output)
        loss = output.square().sum() + sum(every.sum() for every in (*states.h, *states.c))
        results.append([output, *torch.autograd.grad(loss, list(layers.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_the_masks_of_a_module_are_those_of_its_seeds(device: str) -> None:
    """One draw a call, a number for each layer and row, and another mask for each of both directions."""
    module = make("LSTM", recurrent_dropout=0.4, zoneout=(0.1, 0.3), device=device)
    input = inputs(device)
    output = module(input, generator=generator(device))[0]
    seed = torch.randint(2**63 - 1, (2, B), generator=generator(device), device=device)
    zeros = torch.zeros(2, B, H, dtype=torch.float64, device=device)
    for index, weights in enumerate(module._layer_weights()):
        input = reference.layer("lstm", input, zeros, zeros, weights, seed=seed[index], noise=(0.4, 0.1, 0.3))[0]
    torch.testing.assert_close(output, input, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------- higher derivatives
@each_option
@each_layer
def test_derivatives_of_every_order(name: str, option: dict[str, float], device: str) -> None:
    module = getattr(rnnfast, name)(2, 2, **option, bidirectional=True, dtype=torch.float64, device=device)
    input = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def call(input: Tensor, w_hh: Tensor) -> Tensor:
        options = {"generator": generator(device, 3)}
        return torch.func.functional_call(module, {"weight_hh_l0": w_hh}, (input,), options)[0]

    assert torch.autograd.gradcheck(call, (input, module.weight_hh_l0), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (input, module.weight_hh_l0))


@needs_operators
@each_cell
def test_transforms_have_the_same_masks(cell: str, device: str) -> None:
    """torch.func's grad, jvp and vmap over samples, against autograd one by one."""
    for noise in noises(cell):
        arguments, _ = Sample(cell, directions=2).arguments(device=device)
        _, x, h0, c0, weights = arguments
        seed = seeds(3, device)

        def call(x: Tensor) -> Tensor:
            return ops.layer(cell, x, h0, c0, weights, seed=seed, noise=noise)[0]  # noqa: B023

        samples = torch.stack([x, x + 0.5])
        loss = torch.vmap(torch.func.grad(lambda x: call(x).square().sum()))(samples)
        outputs = torch.vmap(call)(samples)
        tangents = torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]
        for k, sample in enumerate(samples):
            leaf = sample.detach().requires_grad_()
            output = call(leaf)
            torch.testing.assert_close(outputs[k], output, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                loss[k], torch.autograd.grad(output.square().sum(), leaf)[0], rtol=1e-9, atol=1e-11
            )
        step = 1e-6
        finite = (call(x + step) - call(x - step)) / (2 * step)
        torch.testing.assert_close(tangents, finite, rtol=1e-6, atol=1e-7)


@needs_operators
def test_batched_gradients_are_refused() -> None:
    arguments, _ = Sample("gru").arguments(grad=True)
    output = ops.layer(*arguments, seed=seeds(3), noise=(0.5, 0.0, 0.0))[0]
    directions = torch.eye(output.numel(), dtype=torch.float64).view(-1, *output.shape)
    with pytest.raises(NotImplementedError, match="batched gradients with recurrent dropout, zoneout or layer"):
        torch.autograd.grad(output, arguments[1], directions, is_grads_batched=True)


@needs_operators
@each_cell
def test_opcheck(cell: str, device: str) -> None:
    arguments, _ = Sample(cell, directions=2).arguments(device=device, grad=True)
    operator = getattr(torch.ops.rnnfast, cell).default
    noise = list(noises(cell)[2])
    torch.library.opcheck(operator, (*arguments[1:], None, None, None, 2, seeds(3, device), noise))


@each_layer
def test_compiled(name: str, device: str) -> None:
    module = make(name, recurrent_dropout=0.3, zoneout=0.2, device=device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for layers in (module, compiled):
        torch.manual_seed(1)
        output = layers(inputs(device))[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    torch.testing.assert_close(results[0], results[1])


# ---------------------------------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize("value", [-0.1, 1.0, True, "half", (0.1, 0.1)])
@each_layer
def test_bad_recurrent_dropout(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"recurrent_dropout: expected a probability below 1, got"):
        getattr(rnnfast, name)(2, 3, recurrent_dropout=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, True, "half", (0.1,), (0.1, 1.0), (0.1, 0.1, 0.1)])
@each_layer
def test_bad_zoneout(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"zoneout: expected a probability below 1( or two, of h and c)?, got"):
        getattr(rnnfast, name)(2, 3, zoneout=value)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_zoneout_of_c_is_for_lstm(name: str) -> None:
    with pytest.raises(ValueError, match=r"zoneout: expected a probability below 1, got \(0\.1, 0\.2\)"):
        getattr(rnnfast, name)(2, 3, zoneout=(0.1, 0.2))


@each_backend
@pytest.mark.parametrize(
    ("seed", "noise", "error"),
    [
        (seeds(3), (0.1, 0.2), ValueError),
        (seeds(3), (1.0, 0.0, 0.0), ValueError),
        (seeds(3), (0.0, -0.5, 0.0), ValueError),
        (seeds(3), (0.0, math.nan, 0.0), ValueError),
        (seeds(3), (0.0, 0.0, 0.5), ValueError),  # of c, which a GRU has not
        (seeds(3), (0.5, 0.0, 0.0, -1), ValueError),
        (seeds(3), (0.5, 0.0, 0.0, 1.5), ValueError),
        (seeds(3), (0.5, 0.0, 0.0, 2**32), ValueError),
        (seeds(3), (0.5, 0.0, 0.0, math.nan), ValueError),
        (seeds(3), (0.5, 0.0, 0.0, 0, 0), ValueError),
        (None, (0.5, 0.0, 0.0), RuntimeError),
        (seeds(2), (0.5, 0.0, 0.0), RuntimeError),
        (seeds(3).double(), (0.5, 0.0, 0.0), (ValueError, RuntimeError)),
    ],
)
def test_bad_noise(seed: Tensor | None, noise: tuple[float, ...], error: Any, backend: str) -> None:
    arguments, _ = Sample("gru").arguments()
    with pytest.raises(error):
        ops.layer(*arguments, seed=seed, noise=noise, backend=backend)


@each_layer
def test_what_goes_with_it(name: str) -> None:
    module = make(name, recurrent_dropout=0.25, zoneout=0.5)
    assert "recurrent_dropout=0.25, zoneout=0.5" in repr(module)
    with pytest.raises(ValueError, match=r"with recurrent_dropout=0\.25, .* with zoneout=0\.5"):
        rnnfast.to_torch(module)
    module.recurrent_dropout = module.zoneout = 0.0
    assert type(rnnfast.to_torch(module)) is getattr(nn, name)


@each_layer
def test_batch_invariance_holds_where_nothing_is_drawn(name: str) -> None:
    module = make(name, zoneout=0.5, batch_invariant=True)
    input = inputs()
    with pytest.raises(
        ValueError, match="batch_invariant: expected False with dropout, whose mask depends on the batch"
    ):
        module(input)
    if ops.extension is None:
        return
    with torch.no_grad():
        module.eval()
        assert torch.equal(module(input)[0][:, 1:2], module(input[:, 1:2])[0])
