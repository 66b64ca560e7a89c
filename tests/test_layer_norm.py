"""Layer normalisation of the gates, and of an LSTM's c.

What float64 comparisons allow is what the order of sums leaves: 1e-14 of a sum, more behind a few steps and in
gradients. A forgotten term is 1e-2 and more.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_inputs import SAMPLES, Sample, each_backend, each_layer, flatten, tensors_of
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import ops, reference

I, H, T, B = 5, 8, 6, 3
NORMED = tuple(cell for cell, form in reference.CELLS.items() if form.layer_norm)
each_normed = pytest.mark.parametrize("cell", NORMED)
needs_operators = pytest.mark.skipif(ops.extension is None, reason="the extension is not built: there are no operators")


def make(name: str, **options: Any) -> nn.Module:
    """A module whose norms are not those it starts with, which would hide what multiplies by 1 or adds 0."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, "layer_norm": True, **options}
    module: nn.Module = getattr(rnnfast, name)(I, H, **options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith("norm"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, B, I)), dtype=torch.float64)


def weighted(results: Sequence[Tensor]) -> Tensor:
    """A number that every element of the results counts in."""
    return sum((torch.linspace(-1, 1, r.numel()).to(r).view_as(r) * r).sum() for r in results)  # type: ignore[return-value]


def run(layer: Callable[..., Any], sample: Sample, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    """Results of a layer, and the gradients of their weighted sum."""
    arguments, given = sample.arguments(dtype, grad=True)
    results = [r for r in layer(*arguments, **given, **options) if r.numel()]
    loss = 0.0 * arguments[1].sum() + weighted(results)
    return [*results, *torch.autograd.grad(loss, tensors_of(arguments), materialize_grads=True)]


# ------------------------------------------------------------------------------------------------------- the values
def loop(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], bias: bool, projection: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction, padded: the definition in torch's layer_norm and the equations of torch.nn's documentation."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = (rest.pop(0), rest.pop(0)) if bias else (None, None)
    w_hr = rest.pop(0) if projection else None
    norm_ih, norm_hh, *of_c = rest
    gates = norm_ih.shape
    outputs = []
    for x_t in x:
        i = layer_norm(x_t @ w_ih.T, gates, norm_ih, b_ih)  # whose epsilon is 1e-5 unless told
        g = layer_norm(h @ w_hh.T, gates, norm_hh, b_hh)
        if cell == "lstm":
            assert c is not None
            into, forget, new, out = (i + g).chunk(4, 1)
            c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
            h = out.sigmoid() * layer_norm(c, c.shape[1:], *of_c).tanh()
        elif cell == "gru":
            (ir, iz, inew), (hr, hz, hnew) = i.chunk(3, 1), g.chunk(3, 1)
            z = (iz + hz).sigmoid()
            h = (1 - z) * (inew + (ir + hr).sigmoid() * hnew).tanh() + z * h
        else:
            named = cell.removeprefix("rnn_")
            h = (torch.clone if named == "identity" else getattr(nn.functional, named))(i + g)
        if w_hr is not None:
            h = h @ w_hr.T
        outputs.append(h)
    return torch.stack(outputs), h, c


@each_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in NORMED), ("lstm", 3)])
def test_against_a_loop(cell: str, proj_size: int, bias: bool, backend: str) -> None:
    sample = Sample(cell, steps=7, proj_size=proj_size, bias=bias, layer_norm=True)
    results = []
    for by_loop in (False, True):
        arguments, options = sample.arguments(grad=True)
        _, x, h0, c0, weights = arguments
        if by_loop:
            output, h_n, c_n = loop(
                cell, x, h0[0], None if c0 is None else c0[0], weights, bias=bias, projection=bool(proj_size)
            )
        else:
            output, h_n, c_n, _ = ops.layer(*arguments, **options, backend=backend)
            h_n, c_n = h_n[0], c_n[0] if c0 is not None else None
        states = [output, h_n, *([] if c_n is None else [c_n])]
        results.append([*states, *torch.autograd.grad(weighted(states), tensors_of(arguments))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@needs_operators
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.cell in NORMED], ids=lambda sample: sample.name)
def test_operators_against_reference(sample: Sample) -> None:
    """With what backward reads kept and made again; some with recurrent dropout and zoneout."""
    sample = replace(sample, layer_norm=True)
    seed = torch.arange(sample.batch)
    noise = (0.3, 0.2, 0.4 if sample.cell == "lstm" else 0.0)
    for options in ({"save": 1}, {"save": 2}, {"save": 1, "seed": seed, "noise": noise}):
        ours = run(ops.layer, sample, **options)
        theirs = run(reference.layer, sample, **{key: value for key, value in options.items() if key != "save"})
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@needs_operators
@each_normed
def test_threads_and_instruction_sets(cell: str) -> None:
    """Whoever computes: results are the same bit for bit on any number of threads, and so is what a row's gradient is;
    sums over rows, and other instruction sets, differ by rounding alone."""
    assert ops.extension is not None
    several = Sample(
        cell, steps=9, batch=5, input_size=40, hidden_size=96, directions=2, form="lengths", row_lengths=(9, 2, 9, 5, 9)
    )
    for sample in (several, Sample(cell, steps=6, batch=2, input_size=130, hidden_size=320)):
        sample = replace(sample, layer_norm=True)
        of_rows = 4 + (sample.cell == "lstm") * 3  # output, h_n, their like of c, gradients of input and states
        results = []
        for name in ops.extension.instruction_sets():
            ops.extension.set_instruction_set(name)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(run(ops.layer, sample))
            for other in results[-2:]:
                assert all(map(torch.equal, other[:of_rows], results[-3][:of_rows]))
        torch.testing.assert_close(results, results[:1] * len(results), rtol=1e-9, atol=1e-10)


@needs_operators
@each_normed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    """Errors against float64 are not above twice the formula's in the same dtype, on every instruction set."""
    assert ops.extension is not None
    sample = Sample(cell, steps=6, batch=4, input_size=19, hidden_size=35, directions=2, layer_norm=True)
    arguments, _ = sample.arguments(dtype)
    exact_arguments, options = sample.arguments(grad=True)
    for leaf, rounded in zip(tensors_of(exact_arguments), tensors_of(arguments), strict=True):
        leaf.data.copy_(rounded)
    exact = [r for r in reference.layer(*exact_arguments, **options) if r.numel()]
    exact += torch.autograd.grad(weighted(exact), tensors_of(exact_arguments))

    def error(results: list[Tensor]) -> Tensor:
        return torch.stack([(r.double() - e).norm() / e.norm() for r, e in zip(results, exact, strict=True)])

    allowed = 2 * error(run(reference.layer, sample, dtype)) + torch.finfo(dtype).eps
    for name in ops.extension.instruction_sets():
        ops.extension.set_instruction_set(name)
        for save in (1, 2):
            results = run(ops.layer, sample, dtype, save=save)
            assert {result.dtype for result in results} == {dtype}
            assert (error(results) <= allowed).all()


@each_backend
@each_normed
def test_rows_far_from_zero_and_rows_of_one_value(cell: str, backend: str) -> None:
    """A mean a thousand times the deviation costs three digits, no more; a row without deviation becomes zero."""
    sample = Sample(cell, hidden_size=33, layer_norm=True)
    arguments, options = sample.arguments(torch.float32)
    _, x, h0, c0, weights = arguments
    wide, _ = sample.arguments(torch.float64)
    for tensors in (weights, wide[4]):
        tensors[0][:, 0] = 1000.0
    x[..., 0] = wide[1][..., 0] = 1.0
    output = ops.layer(*arguments, **options, backend=backend)[0]
    expected = reference.layer(*wide, **options)[0]
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-3)
    weights[0].fill_(0.25)
    weights[1].zero_()
    output = ops.layer(cell, x, h0, c0, weights, **options, backend=backend)[0]
    weights[0].zero_()
    torch.testing.assert_close(output, ops.layer(cell, x, h0, c0, weights, **options, backend=backend)[0])


@needs_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
def test_backward_of_relu_has_the_slope_of_the_side_that_forward_took(
    dtype: torch.dtype, recompute: bool, zoneout: float
) -> None:
    """Of every unit, though what is kept of its gates is rounded: a bias has 1 for each row where its unit is open."""
    options: dict[str, Any] = {"layer_norm": True, "recompute": recompute, "zoneout": zoneout, "dtype": dtype}
    module = rnnfast.RNN(I, 64, nonlinearity="relu", **options)
    h0 = -torch.rand(1, 200, 64, dtype=dtype)  # which no unit has itself; bfloat16 can count as many rows
    output, _ = module(torch.randn(1, 200, I, dtype=dtype), h0)
    (grad,) = torch.autograd.grad(output.sum(), module.bias_hh_l0)
    assert torch.equal(grad.double(), (output > 0).double().sum((0, 1)))


# ------------------------------------------------------------------------------------------------ forms of a sequence
@each_layer
def test_packed_lengths_and_batch_first(name: str) -> None:
    module, input, lengths = make(name), inputs(), torch.tensor([2, T, 4])
    padded, padded_state = module(input, lengths=lengths)
    output, state = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
    output, _ = pad_packed_sequence(output, total_length=T)
    torch.testing.assert_close([output, *flatten(state)], [padded, *flatten(padded_state)], rtol=1e-12, atol=1e-12)
    first = make(name, batch_first=True)
    first.load_state_dict(module.state_dict())
    assert torch.equal(first(input.transpose(0, 1), lengths=lengths)[0].transpose(0, 1), padded)


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_layer
def test_a_row_does_not_depend_on_its_batch(name: str, dtype: torch.dtype) -> None:
    """Bit for bit: output and gradient of the input."""
    module, input = make(name, batch_invariant=True, dtype=dtype), inputs(T, 19, I).to(dtype).requires_grad_()
    output = module(input)[0]
    (grad,) = torch.autograd.grad(weighted([output.sum(1)]), input)
    for rows in (slice(3, 4), slice(2, 13)):
        part = input[:, rows].detach().requires_grad_()
        part_output = module(part)[0]
        assert torch.equal(part_output, output[:, rows])
        assert torch.equal(torch.autograd.grad(weighted([part_output.sum(1)]), part)[0], grad[:, rows])


@needs_operators
@each_layer
def test_a_sequence_in_pieces(name: str) -> None:
    module, input = make(name, bidirectional=False), inputs()
    whole, last = module(input)
    state, pieces = None, []
    for piece in input.split([1, 3, 2]):
        output, state = module(piece, state)
        pieces.append(output)
    assert torch.equal(torch.cat(pieces), whole)
    assert all(map(torch.equal, flatten(state), flatten(last)))


@each_layer
def test_resets_are_separate_sequences(name: str) -> None:
    module, input = make(name, bidirectional=False, num_layers=1), inputs()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    both = torch.cat([module(part)[0] for part in input.split([2, T - 2])])
    torch.testing.assert_close(module(input, reset=reset)[0], both, rtol=1e-12, atol=1e-12)


@needs_operators
@each_layer
def test_recomputing_is_the_same(name: str) -> None:
    """Bit for bit, in 16 bits too: what is kept is rounded, and so it is when it is made again."""
    for dtype in (torch.float64, torch.bfloat16):
        module = make(name, dtype=dtype)
        again = make(name, dtype=dtype, recompute=True)
        again.load_state_dict(module.state_dict())
        input, results = inputs().to(dtype), []
        for layers in (module, again):
            output, _, states = layers(input, return_states=True)
            assert torch.equal(states.h[-1], output)
            loss = weighted([output, *states.h, *states.c])
            results.append([output, *torch.autograd.grad(loss, list(layers.parameters()))])
        assert all(map(torch.equal, *results))


# ---------------------------------------------------------------------------------------------------- derivatives
@pytest.mark.parametrize("option", [{}, {"zoneout": 0.4, "recurrent_dropout": 0.3}], ids=str)
@each_layer
def test_derivatives_of_every_order(name: str, option: dict[str, float]) -> None:
    module = getattr(rnnfast, name)(2, 2, **option, bidirectional=True, dtype=torch.float64, layer_norm=True)
    names = ["weight_hh_l0", "norm_weight_ih_l0", "norm_weight_hh_l0"]
    names += ["norm_weight_c_l0", "norm_bias_c_l0"] if name == "LSTM" else []
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(input: Tensor, *parameters: Tensor) -> Tensor:
        options = {"generator": torch.Generator().manual_seed(3)}
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (input,), options)[0]

    values = (input, *(getattr(module, name) for name in names))
    assert torch.autograd.gradcheck(call, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, values)


@needs_operators
@each_normed
def test_transforms(cell: str) -> None:
    """torch.func's grad, jvp and vmap over samples, against autograd one by one."""
    arguments, options = Sample(cell, directions=2, layer_norm=True).arguments()
    _, x, h0, c0, weights = arguments

    def call(x: Tensor) -> Tensor:
        return ops.layer(cell, x, h0, c0, weights, **options)[0]

    samples = torch.stack([x, x + 0.5])
    loss = torch.vmap(torch.func.grad(lambda x: call(x).square().sum()))(samples)
    outputs = torch.vmap(call)(samples)
    for k, sample in enumerate(samples):
        leaf = sample.detach().requires_grad_()
        output = call(leaf)
        torch.testing.assert_close(outputs[k], output, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss[k], torch.autograd.grad(output.square().sum(), leaf)[0], rtol=1e-9, atol=1e-11)
    tangents, step = torch.func.jvp(call, (x,), (torch.ones_like(x),))[1], 1e-6
    torch.testing.assert_close(tangents, (call(x + step) - call(x - step)) / (2 * step), rtol=1e-6, atol=1e-6)


@needs_operators
def test_batched_gradients_are_refused() -> None:
    arguments, options = Sample("gru", layer_norm=True).arguments(grad=True)
    output = ops.layer(*arguments, **options)[0]
    directions = torch.eye(output.numel(), dtype=torch.float64).view(-1, *output.shape)
    with pytest.raises(NotImplementedError, match=r"batched gradients with .*layer normalisation"):
        torch.autograd.grad(output, arguments[1], directions, is_grads_batched=True)


@needs_operators
@each_normed
def test_opcheck(cell: str) -> None:
    arguments, _ = Sample(cell, directions=2, layer_norm=True).arguments(grad=True)
    operator = getattr(torch.ops.rnnfast, cell).default
    torch.library.opcheck(operator, (*arguments[1:], None, None, None, 2), {"layer_norm": True})


@each_layer
def test_compiled(name: str) -> None:
    module, input = make(name), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for layers in (module, compiled):
        output = layers(input)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    torch.testing.assert_close(results[0], results[1])


@each_backend
@each_layer
def test_autocast(name: str, backend: str) -> None:
    module = make(name, dtype=torch.float32, backend=backend)
    narrow = make(name, dtype=torch.bfloat16, backend=backend)
    narrow.load_state_dict(module.state_dict())
    input = inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(input)[0]
    assert torch.equal(output.bfloat16(), narrow(input.bfloat16())[0])


# ----------------------------------------------------------------------------------------------------- parameters
NORMS = {
    "RNN": ["norm_weight_ih", "norm_weight_hh"],
    "GRU": ["norm_weight_ih", "norm_weight_hh"],
    "LSTM": ["norm_weight_ih", "norm_weight_hh", "norm_weight_c", "norm_bias_c"],
}


@pytest.mark.parametrize("proj_size", [0, 3])
@each_layer
def test_parameters(name: str, proj_size: int) -> None:
    """torch.nn's values from the same seed, and the random stream where torch.nn leaves it; then ones and zeros."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    if proj_size:
        if name != "LSTM":
            return
        options["proj_size"] = proj_size
    torch.manual_seed(7)
    theirs = getattr(nn, name)(I, H, **options)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    module = getattr(rnnfast, name)(I, H, **options, layer_norm=True)
    assert torch.equal(torch.get_rng_state(), after)
    state, usual = module.state_dict(), theirs.state_dict()
    assert list(state)[: len(usual)] == list(usual)
    suffixes = [f"_l{layer}{direction}" for layer in range(2) for direction in ("", "_reverse")]
    assert list(state)[len(usual) :] == [norm + suffix for suffix in suffixes for norm in NORMS[name]]
    assert all(torch.equal(state[key], value) for key, value in usual.items())
    gates = state["weight_ih_l0"].shape[0]
    for key in list(state)[len(usual) :]:
        size, start = (H, float("weight" in key)) if "_c_" in key else (gates, 1.0)
        assert torch.equal(state[key], torch.full((size,), start))
    for ours, known in zip(module.all_weights, theirs.all_weights, strict=True):
        assert [w.shape for w in ours[: len(known)]] == [w.shape for w in known]
        assert len(ours) == len(known) + len(NORMS[name])
    assert module._flat_weights_names[-1] == f"{NORMS[name][-1]}_l1_reverse"


@each_layer
def test_reset_parameters_draws_no_norm(name: str) -> None:
    module = make(name)
    theirs = getattr(nn, name)(I, H, 2, bidirectional=True, dtype=torch.float64)
    torch.manual_seed(3)
    theirs.reset_parameters()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    module.reset_parameters()
    assert torch.equal(torch.get_rng_state(), after)
    fresh = getattr(rnnfast, name)(I, H, layer_norm=True, dtype=torch.float64)
    for norm in NORMS[name]:
        assert torch.equal(getattr(module, f"{norm}_l1"), getattr(fresh, f"{norm}_l0"))
    assert torch.equal(module.weight_hh_l1, theirs.weight_hh_l1)


@each_layer
def test_what_goes_with_it(name: str) -> None:
    """Copies, pickles, state dicts, conversion, and states from before there was such an option."""
    module, input = make(name), inputs()
    expected = module(input)[0]
    assert "layer_norm=True" in repr(module)
    assert "layer_norm" not in repr(make(name, layer_norm=False))
    module.flatten_parameters()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(input)[0], expected)
    with pytest.raises(ValueError, match="with layer_norm=True"):
        rnnfast.to_torch(module)
    with pytest.raises(RuntimeError, match="norm_weight_ih_l0"):
        make(name, layer_norm=False).load_state_dict(module.state_dict())
    plain = make(name, layer_norm=False)
    old = {key: value for key, value in plain.__dict__.items() if key != "layer_norm"}
    restored = type(plain).__new__(type(plain))
    restored.__setstate__(old)
    assert torch.equal(restored(input)[0], plain(input)[0])
    assert type(rnnfast.to_torch(plain)) is getattr(nn, name)


# ---------------------------------------------------------------------------------------------------- bad arguments
@each_layer
def test_bad_options(name: str) -> None:
    with pytest.raises(TypeError, match="layer_norm: expected a bool, got 1"):
        getattr(rnnfast, name)(2, 4, layer_norm=1)
    with pytest.raises(ValueError, match="layer_norm: expected False with num_heads = 2, got True"):
        getattr(rnnfast, name)(2, 4, layer_norm=True, num_heads=2)
    if name == "GRU":
        with pytest.raises(ValueError, match="layer_norm: expected False with the cell gru_reset_before, got True"):
            rnnfast.GRU(2, 4, layer_norm=True, reset_after=False)
    module = getattr(rnnfast, name)(2, 4, num_heads=2)
    module.layer_norm = True
    with pytest.raises(ValueError, match="layer_norm: expected False with num_heads = 2, got True"):
        module(torch.zeros(1, 1, 2))


@needs_operators
@pytest.mark.parametrize(
    ("index", "argument"), [(4, "norm_ih"), (5, "norm_hh"), (6, "norm_c"), (7, "norm_bias_c"), (12, "norm_ih")]
)
def test_bad_shapes(index: int, argument: str) -> None:
    arguments, options = Sample("lstm", directions=2, layer_norm=True).arguments()
    weights = arguments[4]
    right = weights[index]
    for wrong in (right[1:], right.unsqueeze(0)):
        weights[index] = wrong
        with pytest.raises(
            RuntimeError, match=rf"rnnfast.lstm: {argument} has shape .*, it takes \[.*H\] = \[{len(right)}\]"
        ):
            ops.layer(*arguments, **options)
    weights[index] = right.float()
    with pytest.raises(RuntimeError, match=f"{argument} has dtype Float, it takes the input's"):
        ops.layer(*arguments, **options)


@each_backend
def test_cells_that_have_none(backend: str) -> None:
    arguments, _ = Sample("gru_reset_before", layer_norm=True).arguments()
    with pytest.raises(ValueError, match="layer_norm"):
        ops.layer(*arguments, layer_norm=True, backend=backend)


@needs_operators
def test_a_wrong_number_of_weights() -> None:
    arguments, options = Sample("gru", layer_norm=True).arguments()
    with pytest.raises(
        RuntimeError, match=r"weights has 3 tensors .* it takes 4 to 7 a direction: .* norm_ih and norm_hh"
    ):
        ops.layer(*arguments[:4], arguments[4][:3], **options)
    with pytest.raises(RuntimeError, match=r"weights has 6 tensors .* it takes 2 to 5"):
        ops.layer(*arguments)
