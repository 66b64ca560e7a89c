"""Owns: the CUDA engines on the simulator as two Python functions with the operators' arguments: the structs of
csrc/params.h in ctypes, and around the launchers the matrix products that csrc/ops adds to them.
Must not know: what a layer computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # in the order of params.h
GATES = 2  # Save::gates


class SequenceStruct(Structure):
    _fields_ = [
        ("steps", c_int64),
        ("batch", c_int64),
        ("rows", c_int64),
        ("packed", c_bool),
        ("batch_sizes", c_void_p),
        ("offsets", c_void_p),
        ("batch_index", c_void_p),
        ("lengths", c_void_p),
        ("reset", c_void_p),
    ]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("stride_t", c_int64), ("stride_b", c_int64)]


class Weights(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")],
        *[(name, c_void_p) for name in ("norm_ih", "norm_hh", "norm_c", "norm_bias_c")],
    ]


class DirectionForward(Structure):
    _fields_ = [
        ("weights", Weights),
        ("h0", c_void_p),
        ("c0", c_void_p),
        ("reverse", c_bool),
        ("igates", c_void_p),
        ("output", Rows),
        ("c", Rows),
        ("h_n", c_void_p),
        ("c_n", c_void_p),
        ("saved", c_void_p),
    ]


class Noise(Structure):
    _fields_ = [
        ("seeds", c_void_p),
        *[(name, c_double) for name in ("recurrent_dropout", "zoneout_h", "zoneout_c")],
        ("first_unit", c_int64),
    ]


class Spread(Structure):
    _fields_ = [(name, c_int) for name in ("unit_tiles", "row_tiles", "depth_splits")]


class LayerForward(Structure):
    _fields_ = [
        ("cell", c_int),
        ("dtype", c_int),
        ("input_size", c_int64),
        ("hidden_size", c_int64),
        ("output_size", c_int64),
        ("directions", c_int),
        ("save", c_int),
        ("tf32", c_bool),
        ("sequence", SequenceStruct),
        ("input", Rows),
        ("direction", DirectionForward * 2),
        ("spread", Spread),
        ("noise", Noise),
        ("layer_norm", c_bool),
    ]


class DirectionBackward(Structure):
    _fields_ = [
        ("weights", Weights),
        ("h0", c_void_p),
        ("c0", c_void_p),
        ("reverse", c_bool),
        ("output", Rows),
        ("c", Rows),
        ("saved", c_void_p),
        ("grad_output", Rows),
        ("grad_c", Rows),
        *[(name, c_void_p) for name in ("grad_h_n", "grad_c_n", "grad_h0", "grad_c0")],
        ("grad_states", Rows),
        *[(name, c_void_p) for name in ("grad_igates", "grad_hgates")],
        *[(name, c_void_p) for name in ("grad_w_ih", "grad_w_hh", "grad_b_ih", "grad_b_hh", "grad_w_hr")],
        *[(name, c_void_p) for name in ("grad_norm_ih", "grad_norm_hh", "grad_norm_c", "grad_norm_bias_c")],
    ]


class LayerBackward(Structure):
    _fields_ = [
        ("cell", c_int),
        ("dtype", c_int),
        ("input_size", c_int64),
        ("hidden_size", c_int64),
        ("output_size", c_int64),
        ("directions", c_int),
        ("tf32", c_bool),
        ("sequence", SequenceStruct),
        ("input", Rows),
        ("grad_input", Rows),
        ("direction", DirectionBackward * 2),
        ("spread", Spread),
        ("noise", Noise),
        ("layer_norm", c_bool),
    ]


class DualRows(Structure):
    _fields_ = [("value", Rows), ("tangent", Rows)]


class DualPointer(Structure):
    _fields_ = [("value", c_void_p), ("tangent", c_void_p)]


class DirectionTangent(Structure):
    _fields_ = [
        *[(name, DualPointer) for name in ("w_ih", "w_hh", "h0", "c0")],
        ("reverse", c_bool),
        ("saved", c_void_p),
        *[(name, DualRows) for name in ("output", "c")],
        *[(name, Rows) for name in ("t_igates", "t_hgates", "igates", "hgates")],
        *[(name, c_void_p) for name in ("t_h_n", "t_c_n")],
        ("grad_states", Rows),
        *[(name, DualRows) for name in ("grad_output", "grad_c")],
        *[(name, DualPointer) for name in ("grad_h_n", "grad_c_n")],
        *[(name, c_void_p) for name in ("t_grad_h0", "t_grad_c0")],
        *[(name, c_void_p) for name in ("t_grad_w_ih", "t_grad_w_hh", "t_grad_b_ih", "t_grad_b_hh")],
        *[(name, c_void_p) for name in ("grad_igates", "grad_hgates")],
    ]


class LayerTangent(Structure):
    _fields_ = [
        ("cell", c_int),
        ("dtype", c_int),
        ("input_size", c_int64),
        ("hidden_size", c_int64),
        ("directions", c_int),
        ("backward", c_bool),
        ("sequence", SequenceStruct),
        ("input", DualRows),
        ("t_grad_input", Rows),
        ("direction", DirectionTangent * 2),
    ]


class DirectionPrevious(Structure):
    _fields_ = [("reverse", c_bool), ("states", Rows), ("initial", c_void_p), ("previous", c_void_p)]


class PreviousStates(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("features", c_int64),
        ("directions", c_int),
        ("sequence", SequenceStruct),
        ("direction", DirectionPrevious * 2),
    ]


class Products(Structure):
    _fields_ = [(name, c_void_p) for name in ("h_prev", "grad_h", "hidden", "gated")]


class Saved(NamedTuple):
    """What forward leaves for backward: the layer's own `output`, and these."""

    c: Tensor | None  # [T, B, D*H], packed [N, D*H]
    values: list[Tensor]  # for each direction [N, S*H]; empty: recompute


class SimulationError(RuntimeError):
    """A kernel was stopped; the text is the simulator's report."""


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> Rows:
    if tensor is None:
        return Rows()
    return Rows(_pointer(tensor), tensor.stride(0) if tensor.dim() == 3 else 0, tensor.stride(-2))


class Simulator:
    """One build of the driver. `seed` chooses the order in which the threads of all later kernels run, `engine` what
    runs all later layers."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.spread_of_layers = Spread(1, 1, 1)
        self.library.sim_set_seed.argtypes = [c_uint64]
        self.library.sim_set_engine.argtypes = [ctypes.c_char_p]
        self.library.sim_set_engine.restype = c_bool
        self.library.sim_set_shift.argtypes = [c_size_t]
        self.library.sim_last_message.restype = ctypes.c_char_p
        self.library.sim_forward.argtypes = [POINTER(LayerForward)]
        self.library.sim_backward.argtypes = [POINTER(LayerBackward), POINTER(Products)]
        self.library.sim_previous_states.argtypes = [POINTER(PreviousStates)]
        self.library.sim_tangent.argtypes = [POINTER(LayerTangent)]
        for name, struct in (
            ("forward", LayerForward),
            ("backward", LayerBackward),
            ("products", Products),
            ("previous", PreviousStates),
            ("tangent", LayerTangent),
        ):
            size = getattr(self.library, f"sim_size_of_{name}")
            size.restype = c_size_t
            assert size() == ctypes.sizeof(struct), f"{struct.__name__} is not as params.h declares it"

    def seed(self, seed: int) -> None:
        self.library.sim_set_seed(seed)

    def spread(self, unit_tiles: int, row_tiles: int, depth_splits: int) -> None:
        """How all later layers are cut by the engines that spread W_hh over blocks: spread.h."""
        self.spread_of_layers = Spread(unit_tiles, row_tiles, depth_splits)

    def engine(self, name: str) -> None:
        assert self.library.sim_set_engine(name.encode()), f"the driver has no engine {name}"

    def active_clusters(self) -> list[int]:
        """What the plan is told of the device: how many clusters of 1, 2, .. blocks run at once."""
        clusters = (ctypes.c_int * 16)(*[-1] * 16)
        self._check(self.library.sim_active_clusters(clusters))
        return list(clusters)

    def code_version(self, version: int) -> None:
        """For which architecture all kernels count as compiled: 90 is sm_90."""
        self.library.sim_set_code_version(version)

    def mutate(self, site: int) -> None:
        """Which place that mutate.py numbered does not synchronise; -1: all do."""
        self.library.sim_mutate(site)

    def shift(self, elements: int) -> None:
        """Where the tensors of all later layers lie: so many elements behind an aligned address."""
        self.library.sim_set_shift(elements)

    def _check(self, error: int) -> None:
        if error:
            raise SimulationError(f"error {error}: {self.library.sim_last_message().decode()}")

    def fast_functions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """tanh and sigmoid of float32 numbers, as kernels compute them that round the state anyway."""
        results = torch.empty_like(x), torch.empty_like(x)
        pointers = (c_void_p(t.data_ptr()) for t in (x, *results))
        self.library.sim_fast_functions(*pointers, c_size_t(x.numel()))
        return results

    def forward(self, layer: Layer, *, save: int = GATES) -> tuple[Tensor, Tensor, Tensor, Saved]:
        """Return ``(output, h_n, c_n, saved)`` of one layer."""
        output, h_n = layer.empty_rows(layer.output_size), torch.empty_like(layer.h0)
        c_n = torch.empty(0) if layer.c0 is None else torch.empty_like(layer.c0)
        c = layer.empty_rows(layer.hidden_size) if layer.c0 is not None and save else None
        values_size = layer.saved_values(self) * layer.hidden_size
        values = [layer.empty(layer.rows, values_size) for _ in layer.directions if save == GATES and values_size]
        igates = layer.igates()

        struct = LayerForward(save=save)
        layer.fill(self, struct)
        for d, direction in zip(layer.directions, struct.direction, strict=False):
            direction.igates = _pointer(igates[d])
            direction.output = _rows(output)
            direction.c = _rows(c)
            direction.h_n = _pointer(h_n[d])
            direction.c_n = None if layer.c0 is None else _pointer(c_n[d])
            direction.saved = _pointer(values[d]) if values else None
        self._check(self.library.sim_forward(struct))
        return output, h_n, c_n, Saved(c, values)

    def backward(
        self,
        layer: Layer,
        output: Tensor,
        saved: Saved,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_c: Tensor | None,
    ) -> list[Tensor]:
        """Return the gradients of input, h0, c0 where there is one, and the weights."""
        splits = layer.norms or self.library.sim_splits_gates(layer.cell_number(self))
        grad_h0 = torch.empty_like(layer.h0)
        grad_c0 = None if layer.c0 is None else torch.empty_like(layer.c0)
        grad_igates = [layer.empty(layer.rows, layer.gates_size) for _ in layer.directions]
        if not saved.values:
            grad_igates = layer.igates()
        grad_hgates = [torch.empty_like(g) if splits else g for g in grad_igates]
        h_prev, grad_h, hidden, gated = (
            [layer.empty(layer.rows, size) for _ in layer.directions]
            for size in (layer.output_size, layer.output_size, layer.hidden_size, layer.hidden_size)
        )
        first = self.library.sim_first_gates(layer.cell_number(self)) * layer.hidden_size

        # The engine sums what belongs to the norms and, with them, to the biases.
        norm_grads = [[torch.empty_like(w) for w in layer.norms_of(d)] for d in layer.directions]
        bias_grads = [[layer.empty(layer.gates_size) for _ in range(2 * layer.has_bias)] for _ in layer.directions]

        struct, products = LayerBackward(), (Products * 2)()
        layer.fill(self, struct)
        for d, direction in zip(layer.directions, struct.direction, strict=False):
            direction.output, direction.c = _rows(output), _rows(saved.c)
            direction.saved = _pointer(saved.values[d]) if saved.values else None
            direction.grad_output, direction.grad_c = _rows(grad_output), _rows(grad_c)
            direction.grad_h_n = None if grad_h_n is None else _pointer(grad_h_n[d])
            direction.grad_c_n = None if grad_c_n is None else _pointer(grad_c_n[d])
            direction.grad_h0 = _pointer(grad_h0[d])
            direction.grad_c0 = None if grad_c0 is None else _pointer(grad_c0[d])
            direction.grad_igates = _pointer(grad_igates[d])
            direction.grad_hgates = _pointer(grad_hgates[d]) if splits else None
            for name, grad in zip(("ih", "hh", "c", "bias_c"), norm_grads[d], strict=False):
                setattr(direction, f"grad_norm_{name}", _pointer(grad))
            for name, grad in zip(("ih", "hh") if layer.norms else (), bias_grads[d], strict=False):
                setattr(direction, f"grad_b_{name}", _pointer(grad))
            products[d].h_prev = _pointer(h_prev[d])
            if first < layer.gates_size:
                products[d].gated = _pointer(gated[d])
            if layer.projects:
                products[d].grad_h, products[d].hidden = _pointer(grad_h[d]), _pointer(hidden[d])
        self._check(self.library.sim_backward(struct, products))

        grad_input = torch.zeros_like(layer.input)
        grad_weights = []
        x = layer.input.flatten(0, -2)
        if layer.lengths is not None:
            past = torch.arange(layer.steps).unsqueeze(1) >= layer.lengths
            x = x.masked_fill(past.reshape(-1, 1), 0)
        for d in layer.directions:
            grad_input += (grad_igates[d] @ layer.weights_of(d)[0]).view_as(layer.input)
            grad_w_hh = layer.grad_w_hh(grad_hgates[d], h_prev[d], gated[d], first)
            grad_weights += [grad_igates[d].T @ x, grad_w_hh]
            if layer.has_bias:
                grad_weights += bias_grads[d] if layer.norms else [grad_igates[d].sum(0), grad_hgates[d].sum(0)]
            if layer.projects:
                grad_weights += [grad_h[d].T @ hidden[d]]
            grad_weights += norm_grads[d]
        return [grad_input, grad_h0, *([] if grad_c0 is None else [grad_c0]), *grad_weights]

    def previous_states(self, layer: Layer, states: Tensor, initial: Tensor | None) -> list[Tensor]:
        """Of each direction ``[N, H]``, the state that each step reads; ``initial`` None is zero."""
        previous = [layer.empty(layer.rows, layer.output_size) for _ in layer.directions]
        struct = PreviousStates(DTYPES.index(layer.input.dtype), layer.output_size, len(layer.directions))
        layer.fill_sequence(struct.sequence)
        for d, result in enumerate(previous):
            first = None if initial is None else _pointer(initial[d])
            struct.direction[d] = DirectionPrevious(d == 1, _rows(states), first, _pointer(result))
        self._check(self.library.sim_previous_states(struct))
        return previous

    def tangent(
        self,
        layer: Layer,
        output: Tensor,
        saved: Saved,
        tangents: Sequence[Any],
        grads: Sequence[Tensor | None],
        t_grads: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Return the tangents of output, h_n, c_n and c, and of the gradients of input, h0, c0 and the weights, without
        those of c where there is none. ``tangents`` are those of input, h0, c0 and the list of weights; None: zero.
        """
        t_input, t_h0, t_c0, t_weights = tangents
        number = layer.cell_number(self)
        splits = bool(self.library.sim_splits_gates(number))
        x, t_x = (None if t is None else t.flatten(0, -2).nan_to_num() for t in (layer.input, t_input))
        previous = self.previous_states(layer, output, layer.h0)
        gates: list[Tensor] = []  # which live until the call is over

        def rows_of_gates(values: Tensor | None) -> Rows:
            if values is None:
                return Rows()
            gates.append(values.contiguous())
            return Rows(_pointer(gates[-1]), layer.batch * layer.gates_size, layer.gates_size)

        t_output, t_h_n = layer.empty_rows(layer.output_size), torch.empty_like(layer.h0)
        t_c = None if layer.c0 is None else layer.empty_rows(layer.hidden_size)
        t_c_n, t_grad_c0 = (None if layer.c0 is None else torch.empty_like(layer.c0) for _ in range(2))
        t_grad_h0 = torch.empty_like(layer.h0)
        grad_igates = [layer.empty(layer.rows, 2, layer.gates_size) for _ in layer.directions]
        grad_hgates = [torch.empty_like(g) if splits else g for g in grad_igates]

        def pair(value: Tensor | None, tangent: Tensor | None, d: int) -> DualPointer:
            return DualPointer(*(None if t is None else _pointer(t[d]) for t in (value, tangent)))

        struct = LayerTangent(number, DTYPES.index(layer.input.dtype), hidden_size=layer.hidden_size, backward=True)
        struct.directions = len(layer.directions)
        layer.fill_sequence(struct.sequence)
        for d, direction in zip(layer.directions, struct.direction, strict=False):
            w_ih, w_hh, *biases = layer.weights_of(d)
            t_w_ih, t_w_hh, *t_biases = layer.of_direction(t_weights, d) if t_weights else (None, None)
            direction.reverse = d == 1
            direction.w_hh = DualPointer(_pointer(w_hh), _pointer(t_w_hh))
            direction.h0, direction.c0 = pair(layer.h0, t_h0, d), pair(layer.c0, t_c0, d)
            direction.saved = _pointer(saved.values[d]) if saved.values else None
            direction.output = DualRows(_rows(output), _rows(t_output))
            direction.c = DualRows(_rows(saved.c), _rows(t_c))
            t_igates = None if t_x is None else linear(t_x, w_ih)
            t_hgates = None
            if t_w_hh is not None:
                of_input = linear(x, t_w_ih, t_biases[0] if t_biases else None)
                t_igates = of_input if t_igates is None else t_igates + of_input
                t_hgates = layer.hgates(previous[d], t_w_hh, t_biases[1] if t_biases else None)
                if not splits:
                    t_igates, t_hgates = t_igates + t_hgates, None
            direction.t_igates, direction.t_hgates = rows_of_gates(t_igates), rows_of_gates(t_hgates)
            if not self.library.sim_has_tangent(number):
                direction.igates = rows_of_gates(linear(x, w_ih, biases[0] if biases else None))
                direction.hgates = rows_of_gates(layer.hgates(previous[d], w_hh, biases[1] if biases else None))
            direction.t_h_n, direction.t_c_n = _pointer(t_h_n[d]), None if t_c_n is None else _pointer(t_c_n[d])
            direction.grad_output = DualRows(_rows(grads[0]), _rows(t_grads[0]))
            direction.grad_c = DualRows(_rows(grads[3]), _rows(t_grads[3]))
            direction.grad_h_n, direction.grad_c_n = pair(grads[1], t_grads[1], d), pair(grads[2], t_grads[2], d)
            direction.t_grad_h0 = _pointer(t_grad_h0[d])
            direction.t_grad_c0 = None if t_grad_c0 is None else _pointer(t_grad_c0[d])
            direction.grad_igates = _pointer(grad_igates[d])
            direction.grad_hgates = _pointer(grad_hgates[d]) if splits else None
        self._check(self.library.sim_tangent(struct))

        t_grad_input, t_grad_weights = torch.zeros_like(layer.input), []
        t_previous = self.previous_states(layer, t_output, t_h0)
        for d in layer.directions:
            (values, along), (hidden_values, hidden_along) = (g[d].unbind(1) for g in (grad_igates, grad_hgates))
            w_ih = layer.weights_of(d)[0]
            products = along @ w_ih
            grad_w_ih, grad_w_hh = along.T @ x, layer.grad_w_hh(hidden_along, previous[d], None, layer.gates_size)
            if t_x is not None:
                grad_w_ih = grad_w_ih + values.T @ t_x
            grad_w_hh = grad_w_hh + layer.grad_w_hh(hidden_values, t_previous[d], None, layer.gates_size)
            if t_weights:
                products = products + values @ layer.of_direction(t_weights, d)[0]
            t_grad_input += products.view_as(layer.input)
            t_grad_weights += [grad_w_ih, grad_w_hh]
            t_grad_weights += [along.sum(0), hidden_along.sum(0)] if layer.has_bias else []
        of_c = [] if t_c is None else [t_c_n, t_c]
        return [t_output, t_h_n, *of_c, t_grad_input, t_grad_h0, *([] if t_c is None else [t_grad_c0]), *t_grad_weights]


class Layer:
    """The arguments of one layer, as rnnfast.reference.layer takes them, in the form that engines read."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        seed: Tensor | None = None,
        noise: Sequence[float] = (),
        layer_norm: bool = False,
        tf32: bool = False,
    ) -> None:
        self.tf32 = tf32
        self.seed, self.noise = seed, noise
        self.cell, self.input, self.h0, self.c0 = cell, input.contiguous(), h0, c0
        self.weights = list(weights)
        self.batch_sizes, self.lengths = batch_sizes, lengths
        self.reset = None if reset is None else reset.contiguous()
        self.directions = range(h0.size(0))
        self.batch, self.output_size = h0.shape[1:]
        self.per_direction = len(weights) // len(self.directions)
        self.norms = (2 if c0 is None else 4) if layer_norm else 0  # tensors a direction
        self.projects = self.per_direction % 2 == 1
        self.has_bias = self.per_direction - self.norms >= 4
        self.gates_size = weights[0].size(0)
        self.hidden_size = self.projection_of(0).size(1) if self.projects else self.output_size
        self.steps = input.size(0) if batch_sizes is None else len(batch_sizes)
        self.rows = self.input[..., 0].numel()
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            self.offsets = torch.tensor([0, *accumulate(sizes)][:-1], dtype=torch.int64)

    def cell_number(self, simulator: Simulator) -> int:
        number = int(simulator.library.sim_cell(self.cell.encode()))
        assert number >= 0, f"params.h has no cell {self.cell}"
        return number

    def saved_values(self, simulator: Simulator) -> int:
        """S of params.h."""
        if self.norms:
            return 2 * self.gates_size // self.hidden_size
        return int(simulator.library.sim_saved_values(self.cell_number(simulator)))

    def projection_of(self, direction: int) -> Tensor:
        return self.weights_of(direction)[4 if self.has_bias else 2]

    def norms_of(self, direction: int) -> list[Tensor]:
        return self.weights_of(direction)[self.per_direction - self.norms :]

    def weights_of(self, direction: int) -> list[Tensor]:
        return self.of_direction(self.weights, direction)

    def of_direction(self, weights: Sequence[Tensor], direction: int) -> list[Tensor]:
        return list(weights[direction * self.per_direction : (direction + 1) * self.per_direction])

    def hgates(self, h_prev: Tensor, w_hh: Tensor, bias: Tensor | None) -> Tensor:
        """What the gates take of states ``[N, H]``, ``[N, G*H]``."""
        if w_hh.dim() == 2:
            return linear(h_prev, w_hh, bias)
        product = h_prev.repeat(1, self.gates_size // self.hidden_size) * w_hh
        return product if bias is None else product + bias

    def grad_w_hh(self, grad_hgates: Tensor, h_prev: Tensor, gated: Tensor, first: int) -> Tensor:
        """gated: what the gates from ``first`` on read in place of h_prev."""
        if self.weights[1].dim() == 1:  # diagonal
            terms = grad_hgates.double() * h_prev.double().repeat(1, self.gates_size // self.hidden_size)
            return terms.sum(0).to(h_prev.dtype)
        grad = grad_hgates[:, :first].T @ h_prev
        return grad if first == self.gates_size else torch.cat([grad, grad_hgates[:, first:].T @ gated])

    def empty(self, *shape: int) -> Tensor:
        """Filled with what no result should hold."""
        return torch.full(shape, float("nan"), dtype=self.input.dtype)

    def empty_rows(self, size: int) -> Tensor:
        return self.empty(*self.input.shape[:-1], len(self.directions) * size)

    def igates(self) -> list[Tensor]:
        """For each direction W_ih x + b_ih, ``[N, G*H]``; with norms W_ih x."""
        x, biased = self.input.flatten(0, -2), self.has_bias and not self.norms
        return [linear(x, w[0], w[2] if biased else None) for w in map(self.weights_of, self.directions)]

    def fill(self, simulator: Simulator, struct: Any) -> None:
        """Set what LayerForward and LayerBackward share. The struct's pointers live as long as this object."""
        struct.cell = self.cell_number(simulator)
        struct.dtype = DTYPES.index(self.input.dtype)
        struct.hidden_size, struct.output_size = self.hidden_size, self.output_size
        struct.directions = len(self.directions)
        struct.spread = simulator.spread_of_layers
        struct.tf32 = self.tf32
        struct.layer_norm = self.norms > 0
        struct.noise = Noise(_pointer(self.seed), *self.noise)
        self.fill_sequence(struct.sequence)
        for d in self.directions:
            direction, weights = struct.direction[d], self.weights_of(d)
            direction.reverse = d == 1
            direction.weights.w_hh = _pointer(weights[1])
            direction.weights.b_ih = _pointer(weights[2]) if self.has_bias else None
            direction.weights.b_hh = _pointer(weights[3]) if self.has_bias else None
            direction.weights.w_hr = _pointer(self.projection_of(d)) if self.projects else None
            for name, norm in zip(("ih", "hh", "c", "bias_c"), self.norms_of(d), strict=False):
                setattr(direction.weights, f"norm_{name}", _pointer(norm))
            direction.h0 = _pointer(self.h0[d])
            direction.c0 = None if self.c0 is None else _pointer(self.c0[d])

    def fill_sequence(self, sequence: SequenceStruct) -> None:
        sequence.steps, sequence.batch, sequence.rows = self.steps, self.batch, self.rows
        sequence.packed = self.batch_sizes is not None
        if self.batch_sizes is not None:
            sequence.batch_sizes, sequence.offsets = _pointer(self.batch_sizes), _pointer(self.offsets)
        sequence.lengths, sequence.reset = _pointer(self.lengths), _pointer(self.reset)
