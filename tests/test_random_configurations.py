"""Random configurations of a module against rnnfast.reference: results, states and all gradients.

A configuration is drawn from its number alone, so that one that failed is seen again. 300 are tested; with
``--configurations 10000`` as many as that. The reference always runs one layer at a time on padded rows, time first,
with their lengths: what a module makes of packing, of the batch's place and order, and of the stack is tested too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from sample_inputs import TWO_STATES, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional, ops, reference

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no operators")

# A cell is called as its class is, with the nonlinearity behind.
CLASSES = {name.lower(): getattr(rnnfast, name) for name in rnnfast.__all__}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Configuration:
    number: int
    cell: str
    dtype: str
    form: str  # padded, lengths, packed, packed_unsorted, unbatched
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    proj_size: int
    hx: bool
    reset: bool
    recompute: bool
    return_states: bool
    batch_invariant: bool
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    threads: int
    instruction_set: str  # of the CPU engine
    recurrent_dropout: float
    zoneout_h: float
    zoneout_c: float
    training: bool
    layer_norm: bool
    num_heads: int
    shared_units: int  # of heads in one call

    @property
    def noise(self) -> tuple[float, float, float]:
        """As the reference takes it."""
        return self.recurrent_dropout if self.training else 0.0, self.zoneout_h, self.zoneout_c

    @classmethod
    def draw(cls, number: int) -> Configuration:
        random = Random(number)

        def coin() -> bool:
            return random.random() < 0.5

        form = random.choice(["padded", "lengths", "packed", "packed_unsorted", "unbatched"])
        cell, hidden_size = random.choice(list(reference.CELLS)), random.choice([1, 2, 3, 5, 8, 13, 16, 17, 24, 33])
        dtype = random.choice(["float64", *DTYPES])
        if dtype != "float64":  # an error is measured over all units: of a few, luck decides
            hidden_size = max(hidden_size, 13)
        if dtype == "float16" and cell in ("rnn_identity", "rnn_leaky_relu"):  # whose states grow past what it holds
            dtype = "bfloat16"
        configuration = cls(
            number=number,
            cell=cell,
            dtype=dtype,
            form=form,
            layers=random.choice([1, 1, 2, 3]),
            bidirectional=coin(),
            bias=coin(),
            batch_first=coin(),
            proj_size=random.randrange(hidden_size) if cell == "lstm" and coin() else 0,
            hx=coin(),
            reset=coin(),
            recompute=coin(),
            return_states=coin(),
            batch_invariant=coin(),
            steps=random.choice([1, 2, 3, 5, 8] if form.startswith("packed") else [0, 1, 2, 3, 5, 8]),
            batch=1 if form == "unbatched" else random.choice([1, 2, 3, 4, 5, 9]),
            input_size=random.choice([1, 2, 3, 5, 8, 16, 17]),
            hidden_size=hidden_size,
            threads=random.choice([1, 1, 2]),
            instruction_set=random.choice(ops.extension.instruction_sets()),
            recurrent_dropout=random.choice([0.0, 0.0, 0.0, 0.2, 0.5]),
            zoneout_h=random.choice([0.0, 0.0, 0.0, 0.1, 0.5]),
            zoneout_c=random.choice([0.0, 0.1, 0.5]) if cell in TWO_STATES and coin() else 0.0,
            training=random.random() < 0.8,
            layer_norm=random.random() < 0.25,
            num_heads=1,
            shared_units=random.choice([1, 8, 128]),
        )
        if dtype != "float64" and configuration.zoneout_h:  # which stops up to half of the units
            configuration = replace(configuration, hidden_size=max(hidden_size, 26))
        if dtype != "float64" and 0 < configuration.steps * configuration.batch < 3:  # as of few units
            configuration = replace(configuration, steps=3)
        if random.random() < 0.6 or configuration.normalised or configuration.proj_size or cell.startswith("indrnn"):
            return configuration
        heads = [n for n in range(2, configuration.hidden_size + 1) if configuration.hidden_size % n == 0]
        return replace(configuration, num_heads=random.choice(heads or [1]))

    @property
    def normalised(self) -> bool:
        return self.layer_norm and reference.CELLS[self.cell].layer_norm

    def __str__(self) -> str:
        switches = ("bidirectional", "bias", "batch_first", "hx", "reset", "recompute", "return_states", "layer_norm")
        sizes = f"T{self.steps} B{self.batch} I{self.input_size} H{self.hidden_size} P{self.proj_size} L{self.layers}"
        words = [str(self.number), self.cell, self.dtype, self.form, sizes]
        words += [name for name in switches if getattr(self, name)]
        if self.num_heads > 1:
            words.append(f"{self.num_heads} heads, {self.shared_units} units a call")
        return " ".join([*words, f"noise{self.noise}"] if any(self.noise) else words)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("--configurations") if ops.extension is not None else 0
    metafunc.parametrize("configuration", [Configuration.draw(number) for number in range(count)], ids=str)


class Values:
    """A configuration's module, and its arguments as the reference takes them: padded rows, time first."""

    def __init__(self, configuration: Configuration, device: str) -> None:
        c = self.configuration = configuration
        generator = torch.Generator().manual_seed(c.number)
        dtype = DTYPES[c.dtype]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

        slots = c.layers * (1 + c.bidirectional)
        self.input = random(c.steps, c.batch, c.input_size)
        self.h0 = random(slots, c.batch, c.proj_size or c.hidden_size)
        self.c0 = random(slots, c.batch, c.hidden_size)
        lengths = torch.full((c.batch,), c.steps)
        if c.form == "lengths":
            lengths = torch.randint(c.steps + 1, (c.batch,), generator=generator)
        elif c.form.startswith("packed"):
            lengths = torch.randint(1, c.steps + 1, (c.batch,), generator=generator)
            lengths = lengths.sort(descending=True).values if c.form == "packed" else lengths
        self.lengths = lengths
        self.reset = (torch.rand(c.steps, c.batch, generator=generator) < 0.3).to(device) if c.reset else None
        self.module = self.make_module(device, dtype)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5)

    def make_module(self, device: str, dtype: torch.dtype) -> nn.Module:
        c = self.configuration
        options: dict[str, Any] = {"zoneout": c.zoneout_h}
        if c.cell == "lstm":
            options = {"proj_size": c.proj_size, "zoneout": (c.zoneout_h, c.zoneout_c)}
        if c.normalised:
            options["layer_norm"] = True
        if c.num_heads > 1:
            options["num_heads"] = c.num_heads
        name, _, nonlinearity = c.cell.partition("_")
        if name == "gru":
            options["reset_after"] = c.cell == "gru"
        elif nonlinearity:
            options["nonlinearity"] = nonlinearity
        module: nn.Module = CLASSES[name](
            c.input_size,
            c.hidden_size,
            c.layers,
            bias=c.bias,
            batch_first=c.batch_first,
            bidirectional=c.bidirectional,
            recompute=c.recompute,
            batch_invariant=c.batch_invariant and device == "cpu" and not (c.training and any(c.noise)),
            recurrent_dropout=c.recurrent_dropout,
            device=device,
            dtype=dtype,
            **options,
        )
        return module.train(c.training)

    @property
    def leaves(self) -> list[Tensor]:
        states = [self.h0, *([self.c0] if self.configuration.cell in TWO_STATES else [])]
        return [self.input, *(states if self.configuration.hx else []), *self.module.parameters()]


def from_module(values: Values) -> list[Tensor]:
    """The results of the module's call, in the form of the reference's."""
    c = values.configuration

    def given(steps: Tensor) -> Any:
        """[T, B, ...] in the configuration's form."""
        if c.form == "unbatched":
            return steps.squeeze(1)
        steps = steps.transpose(0, 1) if c.batch_first else steps
        if c.form.startswith("packed"):
            return pack_padded_sequence(steps, values.lengths, c.batch_first, enforce_sorted=c.form == "packed")
        return steps

    def taken(steps: Any) -> Tensor:
        if isinstance(steps, PackedSequence):
            steps, lengths = pad_packed_sequence(steps, c.batch_first, total_length=c.steps)
            assert torch.equal(lengths, values.lengths)
        if c.form == "unbatched":
            return steps.unsqueeze(1)
        return steps.transpose(0, 1) if c.batch_first else steps

    def state(initial: Tensor) -> Tensor:
        return initial.squeeze(1) if c.form == "unbatched" else initial

    hx = None
    if c.hx:
        hx = (state(values.h0), state(values.c0)) if c.cell in TWO_STATES else state(values.h0)
    output, final, *states = values.module(
        given(values.input),
        hx,
        lengths=values.lengths.to(values.input.device) if c.form == "lengths" else None,
        reset=None if values.reset is None else given(values.reset),
        return_states=c.return_states,
        generator=torch.Generator(values.input.device).manual_seed(c.number),
    )
    last = [tensor.unsqueeze(1) if c.form == "unbatched" else tensor for tensor in flatten(final)]
    assert len(states) == c.return_states
    every = [taken(tensor) for tensors in states for group in tensors for tensor in group]
    return [taken(output), *last, *every]


def whole(w_hh: Tensor, num_heads: int) -> Tensor:
    """With zeros for what the heads do not see of each other."""
    size = w_hh.shape[1]
    gates = w_hh.unflatten(0, (-1, num_heads, size))
    return torch.cat([torch.block_diag(*blocks) for blocks in gates])


def from_reference(values: Values) -> list[Tensor]:
    c, x = values.configuration, values.input
    weights = [
        whole(weight, c.num_heads) if index == 1 and c.num_heads > 1 else weight
        for group in values.module.all_weights
        for index, weight in enumerate(group)
    ]
    h0, c0 = (values.h0, values.c0) if c.hx else (torch.zeros_like(values.h0), torch.zeros_like(values.c0))
    each = len(weights) // c.layers
    options: dict[str, Any] = {"lengths": values.lengths.to(x.device), "reset": values.reset, "noise": c.noise}
    options["layer_norm"] = values.module.layer_norm
    seeds: Any = [None] * c.layers
    if c.training and any(c.noise):  # as the module draws them
        generator = torch.Generator(x.device).manual_seed(c.number)
        seeds = torch.randint(2**63 - 1, (c.layers, c.batch), generator=generator, device=x.device)
    layers = []
    for index, (layer_h0, layer_c0) in enumerate(zip(h0.chunk(c.layers), c0.chunk(c.layers), strict=True)):
        own = weights[index * each : (index + 1) * each]
        options["seed"] = seeds[index]
        layers.append(reference.layer(c.cell, x, layer_h0, layer_c0 if c.cell in TWO_STATES else None, own, **options))
        x = layers[-1][0]
    every_h, h_n, c_n, every_c = (list(parts) for parts in zip(*layers, strict=True))
    if c.cell not in TWO_STATES:
        return [x, torch.cat(h_n), *(every_h if c.return_states else [])]
    return [x, torch.cat(h_n), torch.cat(c_n), *(every_h + every_c if c.return_states else [])]


def with_gradients(results: list[Tensor], values: Values) -> tuple[list[Tensor], list[Tensor]]:
    """``results``, and the gradients of their sum with random weights, the same ones for every dtype of results."""
    generator = torch.Generator().manual_seed(values.configuration.number)
    dtype = DTYPES[values.configuration.dtype]
    loss = 0 * values.input.sum()  # no other result need have a gradient where there are no steps
    for result in results:
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype)
        loss = loss + (result * weight.to(result)).sum()
    return results, list(torch.autograd.grad(loss, values.leaves, materialize_grads=True))


def in_double(values: Values, device: str) -> Values:
    """The same values, as rounded to their dtype."""
    double = Values(values.configuration, device)
    double.module.double()  # from the rounded parameters
    for name in ("input", "h0", "c0"):
        setattr(double, name, getattr(values, name).detach().double().requires_grad_())
    return double


def test_configuration(configuration: Configuration, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WHOLE_UNITS", "SHARED_UNITS"):
        monkeypatch.setattr(functional, name, configuration.shared_units)
    torch.set_num_threads(configuration.threads)
    in_use = ops.extension.instruction_set()
    ops.extension.set_instruction_set(configuration.instruction_set)
    try:
        values = Values(configuration, device)
        ours = with_gradients(from_module(values), values)
    finally:
        ops.extension.set_instruction_set(in_use)
    theirs = with_gradients(from_reference(values), values)
    assert [tensor.shape for part in ours for tensor in part] == [tensor.shape for part in theirs for tensor in part]
    assert {tensor.dtype for part in ours for tensor in part} == {DTYPES[configuration.dtype]}
    if configuration.dtype == "float64":
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        return

    # As a whole: single elements of so small a layer may be exact by chance.
    exact_values = in_double(values, device)
    exact = with_gradients(from_reference(exact_values), exact_values)
    for part in range(2):
        error, reference_error = (
            torch.cat([(a.double() - b).flatten() for a, b in zip(run[part], exact[part], strict=True)]).norm()
            for run in (ours, theirs)
        )
        size = torch.cat([b.flatten() for b in exact[part]]).norm()
        rounding = torch.finfo(DTYPES[configuration.dtype]).eps * size
        assert error <= 2 * reference_error + rounding
