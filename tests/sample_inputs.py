"""Owns: the inputs that tests feed on. One list of calls of one layer, `SAMPLES`, each by its name, covering every cell
and every form of a sequence; and `MODULE_GRID`, calls of modules that torch.nn has too.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnnfast import reference

CELLS = tuple(reference.CELLS)


def _stepwise_cells() -> tuple[str, ...]:
    registered = (Path(__file__).resolve().parents[1] / "csrc" / "cell" / "cell_list.h").read_text()
    (own_list,) = re.findall(r"define RNNFAST_FOR_EACH_STEPWISE_CELL\(X\)((?:.*\\\n)+.*\n)", registered)
    return tuple(re.findall(r"X\((\w+), ", own_list))


STEPWISE_CELLS = _stepwise_cells()  # without kernels of the persistent CUDA engines
PERSISTENT_CELLS = tuple(cell for cell in CELLS if cell not in STEPWISE_CELLS)
# With kernels of tangents, and of the gradients of groups of rows.
TANGENT_CELLS = tuple(cell for cell in CELLS if not reference.CELLS[cell].two_products)
TWO_STATES = tuple(cell for cell in CELLS if reference.CELLS[cell].states == 2)
# Whose gradients jump where rounding moves a unit across the corner of their nonlinearity.
KINKED_CELLS = tuple(cell for cell in CELLS if cell.endswith("relu"))


@dataclass(frozen=True)
class Sample:
    """One call of one layer, as rnnfast.reference.layer and rnnfast.ops.layer take it."""

    cell: str
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 5
    proj_size: int = 0
    directions: int = 1
    bias: bool = True
    form: str = "padded"  # padded, packed, lengths
    row_lengths: tuple[int, ...] | None = None  # packed: decreasing; None: some that end at 0 steps
    reset: bool = False
    batch_first: bool = False  # input and reset are transposed views
    layer_norm: bool = False

    @property
    def name(self) -> str:
        changed = [
            f"{field}={getattr(self, field)}"
            for field in self.__dataclass_fields__
            if field not in ("cell", "form") and getattr(self, field) != getattr(type(self), field)
        ]
        return " ".join([self.cell, self.form, *changed])

    @property
    def states(self) -> int:
        return reference.find_cell(self.cell).states

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def lengths(self) -> list[int]:
        """The steps of every row."""
        if self.form == "padded":
            return [self.steps] * self.batch
        if self.row_lengths is not None:
            return list(self.row_lengths)
        lengths = [max(self.steps - 2 * row, 0) for row in range(self.batch)]
        lengths[-1] = 0
        return lengths if self.form == "packed" else lengths[1:] + lengths[:1]

    def arguments(
        self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu", seed: int = 0, grad: bool = False
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of `layer`; the floating tensors require gradients if `grad`."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            # Drawn in float64, so that every dtype sees the same values, rounded.
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_(grad)

        def weight(*shape: int) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
            return values.to(device, dtype).requires_grad_(grad)

        form = reference.find_cell(self.cell)
        gates, out = form.gates * self.hidden_size, self.output_size
        weights = []
        for _ in range(self.directions):
            weights += [weight(gates, self.input_size), weight(gates) if form.diagonal else weight(gates, out)]
            weights += [weight(gates), weight(gates)] if self.bias else []
            weights += [weight(out, self.hidden_size)] if self.proj_size else []
            if self.layer_norm:
                weights += [weight(gates), weight(gates)]
                weights += [weight(self.hidden_size), weight(self.hidden_size)] if self.cell == "lstm" else []

        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        batch_sizes = None
        if self.form == "packed":
            batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(max(self.lengths, default=0))]).long()
        rows = (int(lengths.sum()),) if self.form == "packed" else (self.steps, self.batch)
        if self.batch_first:
            input = random(*rows[::-1], self.input_size).transpose(0, 1)
        else:
            input = random(*rows, self.input_size)
        reset = None
        if self.reset:
            shape = rows[::-1] if self.batch_first else rows
            reset = torch.rand(shape, generator=generator) < 0.3
            reset = reset.transpose(0, 1) if self.batch_first else reset
            if self.form == "lengths":  # there it must have no effect
                reset |= torch.arange(self.steps).unsqueeze(1) >= lengths
            reset = reset.to(device)
        h0 = random(self.directions, self.batch, out)
        c0 = random(self.directions, self.batch, self.hidden_size) if form.states == 2 else None
        options: dict[str, Any] = {
            "batch_sizes": batch_sizes,
            "lengths": lengths.to(device) if self.form == "lengths" else None,
            "reset": reset,
        }
        if self.layer_norm:
            options["layer_norm"] = True
        return [self.cell, input, h0, c0, weights], options


def _samples() -> list[Sample]:
    samples = [
        Sample(cell, directions=directions, form=form, reset=reset)
        for cell, directions, form, reset in itertools.product(
            CELLS, (1, 2), ("padded", "packed", "lengths"), (False, True)
        )
    ]
    for cell in CELLS:
        one, both = Sample(cell), Sample(cell, directions=2)
        samples += [
            replace(one, bias=False),
            replace(one, batch_first=True),
            replace(both, batch_first=True, reset=True),
            replace(one, steps=1),
            replace(both, batch=1),
            replace(both, steps=0),
            replace(one, batch=0),
            replace(both, steps=9, batch=5, input_size=1, hidden_size=1),
            replace(both, steps=3, batch=17, input_size=7, hidden_size=33),
            replace(both, form="packed", row_lengths=(4, 4, 4), steps=4),
            replace(both, form="lengths", row_lengths=(0, 0, 0)),
        ]
    samples += [
        Sample("lstm", proj_size=3),
        Sample("lstm", proj_size=3, directions=2, form="packed", reset=True),
        Sample("lstm", proj_size=3, directions=2, form="lengths", bias=False),
    ]
    return samples


SAMPLES = _samples()

LAYERS = ("RNN", "LSTM", "GRU")

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_layer = pytest.mark.parametrize("name", LAYERS)
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    """The floating tensors of `Sample.arguments`: input, h0, c0 if there is one, weights."""
    _, input, h0, c0, weights = arguments
    return [input, h0, *([] if c0 is None else [c0]), *weights]


@dataclass(frozen=True)
class ModuleCase:
    """One call of a module that torch.nn has under the same name."""

    name: str  # of the class: RNN, LSTM, GRU
    options: tuple[tuple[str, Any], ...]
    form: str  # batched, unbatched, packed, packed_unsorted
    hx: bool
    steps: int = 6
    batch: int = 4
    input_size: int = 3
    hidden_size: int = 5

    @property
    def id(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.name} {options} {self.form}{' hx' if self.hx else ''}"

    def pair(
        self, ours: Any, dtype: torch.dtype = torch.float64, device: str = "cpu", **extra: Any
    ) -> tuple[nn.Module, nn.Module]:
        """torch.nn's module and ours (from the namespace `ours`) with the same weights."""
        options = {**dict(self.options), "device": device, "dtype": dtype}
        theirs = getattr(nn, self.name)(self.input_size, self.hidden_size, **options)
        module = getattr(ours, self.name)(self.input_size, self.hidden_size, **options, **extra)
        module.load_state_dict(theirs.state_dict())
        return theirs, module

    def inputs(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor | PackedSequence, Any, list[Tensor]]:
        """(input, hx, the leaf tensors they are made of)."""
        generator = torch.Generator().manual_seed(seed)
        options = dict(self.options)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_()

        batch_first = options.get("batch_first", False)
        batched = self.form != "unbatched"
        rows = (self.batch, self.steps) if batch_first else (self.steps, self.batch)
        data = random(*(rows if batched else (self.steps,)), self.input_size)
        leaves, input = [data], data
        if self.form in ("packed", "packed_unsorted"):
            lengths = [max(self.steps - row, 1) for row in range(self.batch)]
            if self.form == "packed_unsorted":
                lengths = lengths[2:] + lengths[:2]
            input = pack_padded_sequence(data, torch.tensor(lengths), batch_first, self.form == "packed")
        if not self.hx:
            return input, None, leaves
        slots = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        rows = (slots, self.batch) if batched else (slots,)
        h0 = random(*rows, options.get("proj_size") or self.hidden_size)
        leaves.append(h0)
        if self.name != "LSTM":
            return input, h0, leaves
        leaves.append(random(*rows, self.hidden_size))
        return input, (h0, leaves[-1]), leaves


def _module_grid() -> list[ModuleCase]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("RNN", {"nonlinearity": "tanh"}),
        ("RNN", {"nonlinearity": "relu"}),
        ("LSTM", {}),
        ("LSTM", {"proj_size": 2}),
        ("GRU", {}),
    ]
    grid = itertools.product(
        kinds,
        (1, 3),
        (False, True),
        (True, False),
        ("batched", "batch_first", "unbatched", "packed", "packed_unsorted"),
    )
    cases = []
    for index, ((name, kind), layers, bidirectional, bias, form) in enumerate(grid):
        options = {**kind, "num_layers": layers, "bidirectional": bidirectional, "bias": bias}
        if form == "batch_first" or (form != "batched" and index % 2):
            options["batch_first"] = True
        form = "batched" if form == "batch_first" else form
        cases.append(ModuleCase(name, tuple(options.items()), form, hx=index % 3 != 0))
    return cases


MODULE_GRID = _module_grid()


def flatten(result: Any) -> list[Tensor]:
    """The tensors of a module's result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]
