"""Owns: a stack of layers, dropout between them, the input's form (batched, unbatched, batch first, packed), the
initial states, and the checks of what a caller hands in. Must not know: parameters, or what runs a layer.

Sizes: L layers, D directions, T steps, B rows, I input features, H hidden units, P outputs a direction (H, or the
projection's), N rows of a packed input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from . import ops, reference

# hx and the final states, as torch.nn has them: one tensor, or (h, c) for LSTM.
State: TypeAlias = Tensor | tuple[Tensor, Tensor]

BACKENDS = (None, *ops.BACKENDS)
NONLINEARITIES = tuple(cell.removeprefix("rnn_") for cell in reference.CELLS if cell.startswith("rnn_"))  # of RNN
INDRNN_NONLINEARITIES = tuple(cell.removeprefix("indrnn_") for cell in reference.CELLS if cell.startswith("indrnn_"))


class States(NamedTuple):
    """The states of every layer after every step, differentiable, each in the form of the output.

    A layer's tensor is ``[T, B, D*P]`` for h and ``[T, B, D*H]`` for c (the batch first if ``batch_first``, no batch if
    unbatched), a PackedSequence where the input was one. The backward direction's features come second; at step t they
    are its state after that step, which has seen the steps from t on. Past a row's length there are zeros.
    """

    h: tuple[Tensor | PackedSequence, ...]  # of each layer, before the dropout that the next one sees
    c: tuple[Tensor | PackedSequence, ...]  # of each layer; empty for RNN and GRU


# Units of a layer whose heads all share a call, and of a call in larger ones; see heads_a_call.
WHOLE_UNITS, SHARED_UNITS = 128, 64

LayerResult: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # output, h_n, c_n, c, as rnnfast.ops.layer's
Result: TypeAlias = (
    tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, States]  # with return_states
)


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Sequence[Tensor]],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    lengths: Tensor | None = None,
    reset: Tensor | PackedSequence | None = None,
    return_states: bool = False,
    recompute: bool = False,
    batch_invariant: bool = False,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    training: bool = True,
    num_heads: int = 1,
    layer_norm: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Result:
    """Run a stack of layers, with torch.nn's forms of input and result.

    Args:
        cell: a name in :data:`rnnfast.reference.CELLS`, or that of a compiled cell (its class's ``mode``).
        input: ``[T, B, I]``, ``[B, T, I]`` if ``batch_first``, ``[T, I]`` unbatched, or a ``PackedSequence``.
        hx: ``[L*D, B, P]`` (unbatched ``[L*D, P]``), for LSTM a pair with ``[L*D, B, H]`` second; None means zeros.
            With a PackedSequence, B is the length of its ``sorted_indices`` if it has them; rows beyond
            ``batch_sizes[0]`` are empty and keep their state.
        weights: the layers' weights, each in the order that :func:`rnnfast.ops.layer` takes.
        dropout: probability of zeroing an element of every layer's output but the last's.
        lengths: ``[B]`` integers, on the input's device or the CPU: the number of steps of each row of a padded input,
            0 to T. Outputs past them are zero and the final states are the row's last. On the CPU the values are
            checked; elsewhere they are clamped, for a check would wait for the device, and so they are where the
            reference formula is compiled or exported, for a graph of it has no values to check.
        reset: bool, shaped as the input without its features: where set, the state before that step is zero. For a
            PackedSequence, one packed as the input, or its data ``[N]``. That the order of its rows is the input's is
            checked on the CPU; not on CUDA, where a check would wait for the device, nor where a graph is compiled or
            exported.
        return_states: also return the states of every layer at every step.
        recompute: keep the states alone for backward, which computes the gates again from them: less memory for more
            time, and the same result. The reference formula keeps what autograd keeps.
        batch_invariant: promise that output and states of a row, and what backward gives for its input and its initial
            states, are the same bit for bit whatever else is in the batch and wherever in it the row is. It holds on
            the CPU at no cost.
        weight_dropout: probability of zeroing an element of every ``w_hh``, the rest scaled by 1 / (1 - p): one mask a
            direction and call, so the same at every step (Merity, Keskar and Socher, "Regularizing and Optimizing LSTM
            Language Models", ICLR 2018).
        recurrent_dropout: probability below 1 of zeroing an element of h where it meets ``w_hh``, the rest scaled by
            1 / (1 - p): one mask a row, layer, direction and call, see :class:`rnnfast.reference.Noise`.
        zoneout: probability below 1 that a unit of h, and one of c, keeps its last value, drawn anew at every step; or
            one for each of both.
        training: False is a module's evaluation: no dropout of any kind, and ``zoneout`` takes the expectation.
        num_heads: with n heads, W_hh is block-diagonal with n blocks, and ``w_hh`` is ``[G*H, H/n]``: row u of a gate
            meets the states of u's own head, of which each has H/n neighbouring units. 1 for a diagonal cell and with a
            projection.
        layer_norm: whether the gates are normalised, and c where h reads it, see :func:`rnnfast.reference.layer`; the
            weights end with the norms then. Not with several heads.
        generator: what the masks of ``weight_dropout`` and the seeds of the others, one a layer and row, are drawn
            from, of the weights' device; None: torch's default.
        backend: None, ``"auto"`` or ``"reference"``, see :func:`rnnfast.ops.layer`.

    Returns:
        ``(output, state)`` in exactly torch.nn's structure; with ``return_states``, ``(output, state, States)``.

    Raises:
        ValueError: input has the wrong rank, another dtype than the weights, or is not dense; lengths come with a
            PackedSequence; batch_invariant is asked where it does not hold: on CUDA, from the reference formula, with
            dropout, recurrent dropout or zoneout; a probability is outside of [0, 1], of recurrent_dropout and zoneout
            [0, 1); num_heads does not divide H, or comes with a projection; layer_norm comes with heads, or for a cell
            that has none; weights are no layers.
        RuntimeError: a wrong size, or a tensor of another dtype or on another device than the rest; a reset that is
            packed otherwise than the input.
        TypeError: an argument is no tensor, lengths and reset are not integers and bool, num_heads is no int, generator
            no torch.Generator, return_states no bool, or a layer's weights no sequence of tensors.
    """
    form = reference.find_cell(cell)
    if num_heads != 1 or layer_norm:
        check_options(cell, num_heads, layer_norm)
    if dropout != 0.0 or weight_dropout != 0.0 or recurrent_dropout != 0.0:
        check_dropouts(dropout, weight_dropout, recurrent_dropout)
        if not training:
            dropout = weight_dropout = recurrent_dropout = 0.0
    _check_generator(generator)
    if return_states is not False:
        check_bools(return_states=return_states)
    try:
        w_ih, w_hh = weights[0][:2]
        rows, features = w_ih.shape
        hidden_size = rows // form.gates
        output_size = hidden_size if form.diagonal else w_hh.shape[1] * num_heads
    except (TypeError, AttributeError, ValueError, IndexError):
        raise _weights_error(weights, layers=True) from None
    directions = 2 if bidirectional else 1
    if num_heads != 1:
        check_heads(num_heads, hidden_size, projection=len(weights[0]) // directions % 2 == 1)
        if output_size != hidden_size:
            takes = f"w_hh [G*H, H / num_heads] = {(rows, hidden_size // num_heads)} with num_heads = {num_heads}"
            raise RuntimeError(f"weights: expected {takes}, got {tuple(w_hh.shape)}")
    batch_sizes = sorted_indices = unsorted_indices = None
    batched = True
    if isinstance(input, PackedSequence):
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if x.dim() != 2:
            raise RuntimeError(f"input: expected a PackedSequence with 2D data [N, input_size], got {x.dim()}D data")
        if sorted_indices is None:
            first: Any = batch_sizes[0] if len(batch_sizes) else 0
            batch = first if torch.jit.is_tracing() else int(first)  # type: ignore[no-untyped-call,attr-defined]
        else:
            batch = sorted_indices.shape[0]  # len() would be a constant in a trace
            # While compiling there is no value to compare with.
            if not torch.compiler.is_compiling() and len(batch_sizes) and batch < batch_sizes[0]:
                raise RuntimeError(f"input: expected sorted_indices of {batch_sizes[0]} rows or more, got {batch}")
    else:
        x = input
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(x).__name__}")
        if x.dim() == 2:
            batched = False
            x = x.unsqueeze(1)
        elif x.dim() != 3:
            batched_form = "[B, T, input_size]" if batch_first else "[T, B, input_size]"
            raise ValueError(f"input: expected 2D [T, input_size] or 3D {batched_form}, got {x.dim()}D")
        elif batch_first:
            x = x.transpose(0, 1)
        batch = x.shape[1]
    _check_input(x, w_ih, features, ValueError)

    slots = directions * len(weights)
    h_shape = (slots, batch, output_size)
    c0 = None
    if form.states == 1:
        h0 = x.new_zeros(h_shape) if hx is None else _state("hx", hx, h_shape, batched, x)
    else:
        c_shape = (slots, batch, hidden_size)
        if hx is None:
            c0 = x.new_zeros(c_shape)
            h0 = c0 if c_shape == h_shape else x.new_zeros(h_shape)
        else:
            h0, c0 = _pair(hx)
            h0 = _state("hx[0]", h0, h_shape, batched, x)
            c0 = _state("hx[1]", c0, c_shape, batched, x)
    if sorted_indices is not None and hx is not None:
        h0 = h0.index_select(1, sorted_indices)
        c0 = None if c0 is None else c0.index_select(1, sorted_indices)
    if lengths is not None:
        lengths = _lengths(lengths, x, batched, batch_sizes is not None)
    if reset is not None:
        reset = _reset(reset, x, batched, batch_first and batch_sizes is None, batch_sizes, sorted_indices)

    if weight_dropout:
        weights = _with_w_hh(weights, directions, partial(_dropped, probability=weight_dropout, generator=generator))
    noise: tuple[float, ...] = ()
    seeds = None
    if recurrent_dropout != 0.0 or zoneout != 0.0:
        noise = _noise(cell, recurrent_dropout, zoneout)
    if noise and training:
        seeds = _seeds((len(weights), batch), x, generator)
        seeds = seeds if sorted_indices is None else seeds.index_select(1, sorted_indices)
    shared = heads_a_call(cell, h_shape[2], num_heads) if num_heads > 1 else 1
    if shared > 1:
        weights = _with_w_hh(weights, directions, partial(_joined_blocks, num_heads=shared))
        num_heads //= shared
    if batch_invariant:
        _check_batch_invariant(x, (dropout and len(weights) > 1) or seeds is not None, backend)
    save = 0
    if recompute or return_states:
        save = _save((x, h0, c0), weights, recompute, return_states)
    states: list[tuple[Tensor, Tensor]] | None = [] if return_states else None

    try:
        output, h_n, c_n = _layers(
            cell,
            x,
            h0,
            c0,
            weights,
            directions,
            dropout,
            batch_sizes,
            lengths,
            reset,
            num_heads,
            seeds,
            noise,
            layer_norm,
            save,
            states,
            backend,
        )
    except (TypeError, AttributeError, NotImplementedError):
        _check_tensors(weights, layers=True)
        _check_layout(x)
        raise
    if cell.startswith("gru"):
        output, h_n = _as_state(output, h0), _as_state(h_n, h0)
        states = None if states is None else [(_as_state(h, h0), c) for h, c in states]

    def formed(steps: Tensor) -> Tensor | PackedSequence:
        """What a layer gives for every step, in the form of the input."""
        if batch_sizes is not None:
            return PackedSequence(steps, batch_sizes, sorted_indices, unsorted_indices)
        if not batched:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if batch_first else steps

    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
        c_n = c_n if c0 is None else c_n.index_select(1, unsorted_indices)
    elif not batched:
        h_n, c_n = h_n.squeeze(1), c_n if c0 is None else c_n.squeeze(1)
    state = h_n if c0 is None else (h_n, c_n)
    if states is None:
        return formed(output), state
    h, c = zip(*states, strict=True)
    return formed(output), state, States(tuple(map(formed, h)), () if c0 is None else tuple(map(formed, c)))


def step(
    cell: str,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    zoneout: float | tuple[float, float] = 0.0,
    training: bool = True,
    layer_norm: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> State:
    """Run one step of one cell, with the forms of torch.nn's cells.

    ``input`` is ``[B, I]`` or ``[I]``; ``hx`` and the result are ``[B, H]`` or ``[H]``, for LSTM a pair of them; None
    means zeros. The options are those of :func:`recurrent`; zoneout's masks are a call's own. Raises ValueError for a
    wrong rank, a zoneout outside of [0, 1) or what is no cell's weights, RuntimeError for a wrong size, dtype or
    device, as torch.nn does, and TypeError for what is no tensor or no generator.
    """
    _check_generator(generator)
    try:
        w_ih = weights[0]
        rows, features = w_ih.shape
    except (TypeError, AttributeError, ValueError, IndexError):
        raise _weights_error(weights, layers=False) from None
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    batched = input.dim() == 2
    if not batched:
        if input.dim() != 1:
            raise ValueError(f"input: expected 1D [input_size] or 2D [B, input_size], got {input.dim()}D")
        input = input.unsqueeze(0)
    x = input.unsqueeze(0)
    _check_input(x, w_ih, features, RuntimeError)

    shape = (1, input.shape[0], rows // reference.find_cell(cell).gates)
    if hx is None:
        h0 = x.new_zeros(shape)
        c0 = h0 if cell == "lstm" else None
    elif cell == "lstm":
        h0, c0 = _pair(hx)
        h0, c0 = _cell_state("hx[0]", h0, shape, batched, x), _cell_state("hx[1]", c0, shape, batched, x)
    else:
        h0, c0 = _cell_state("hx", hx, shape, batched, x), None

    noise = _noise(cell, 0.0, zoneout) if zoneout != 0.0 else ()
    seed = _seeds((shape[1],), x, generator) if noise and training else None
    options: dict[str, Any] = {"seed": seed, "noise": noise, "layer_norm": layer_norm, "backend": backend}
    try:
        _, h_n, c_n, _ = ops.layer(cell, x, h0, c0, weights, **options)
    except (TypeError, AttributeError, NotImplementedError):
        _check_tensors(weights, layers=False)
        _check_layout(x)
        raise
    if not cell.startswith("rnn_"):
        h_n, c_n = _as_state(h_n, h0), c_n if c0 is None else _as_state(c_n, c0)
    h_n, c_n = h_n.squeeze(0), c_n if c0 is None else c_n.squeeze(0)
    if not batched:
        h_n, c_n = h_n.squeeze(0), c_n if c0 is None else c_n.squeeze(0)
    return h_n if c0 is None else (h_n, c_n)


def _layers(
    cell: str,
    input: Tensor,  # [T, B, I] or [N, I]
    h0: Tensor,  # [L*D, B, P]
    c0: Tensor | None,  # [L*D, B, H]
    weights: Sequence[Sequence[Tensor]],
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    num_heads: int,
    seeds: Tensor | None,  # [L, B]
    noise: Sequence[float],
    layer_norm: bool,
    save: int,
    states: list[tuple[Tensor, Tensor]] | None,  # takes every layer's h and c of every step
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack itself, time first: (output, h_n, c_n)."""
    run = partial(ops.layer, cell, batch_sizes=batch_sizes, lengths=lengths, reset=reset, save=save, backend=backend)
    if layer_norm:
        run = partial(run, layer_norm=True)
    if num_heads > 1:
        run = partial(_heads, run, num_heads, states is not None)
    if noise:
        run = partial(run, noise=noise)
    if len(weights) == 1:
        if seeds is not None:
            run = partial(run, seed=seeds[0])
        output, h_n, c_n, c = run(input, h0, c0, weights[0])
        if states is not None:
            states.append((output, c))
        return output, h_n, c_n

    h_ns, c_ns = [], []
    for index, layer_weights in enumerate(weights):
        if index and dropout:
            input = drop(input, dropout)
        slots = slice(index * directions, (index + 1) * directions)
        c0_layer = None if c0 is None else c0[slots]
        seed = None if seeds is None else seeds[index]
        input, h_n, c_n, c = run(input, h0[slots], c0_layer, layer_weights, seed=seed)
        if states is not None:
            states.append((input, c))
        h_ns.append(h_n)
        c_ns.append(c_n)
    return input, torch.cat(h_ns), torch.cat(c_ns)


def _heads(
    run: Callable[..., LayerResult],
    num_heads: int,
    all_states: bool,
    input: Tensor,
    h0: Tensor,  # [D, B, H]
    c0: Tensor | None,
    weights: Sequence[Tensor],
    seed: Tensor | None = None,
    noise: Sequence[float] = (),
) -> LayerResult:
    """One layer. A head does not see the others' states: it is a layer of its own, with its rows of the weights and the
    masks of its units in the whole one.

    Without ``all_states`` the result's ``c`` is the first head's.
    """
    directions, _, hidden_size = h0.shape
    size = hidden_size // num_heads
    # One copy of a weight for all heads: [G*H, I] becomes [heads, G*s, I].
    of_heads = [w.unflatten(0, (-1, num_heads, size)).transpose(0, 1).flatten(1, 2).unbind() for w in weights]
    h0s, c0s = (None if s is None else s.split(size, -1) for s in (h0, c0))
    assert h0s is not None
    results = [
        run(
            input,
            h0s[head],
            None if c0s is None else c0s[head],
            [w[head] for w in of_heads],
            seed=seed,
            noise=(*noise, float(head * size)) if noise else (),
        )
        for head in range(num_heads)
    ]
    output, h_n, c_n, c = zip(*results, strict=True)

    def joined(steps: tuple[Tensor, ...]) -> Tensor:
        """Features of all heads, direction by direction."""
        if directions == 1:
            return torch.cat(steps, -1)
        return torch.stack([part.unflatten(-1, (directions, size)) for part in steps], -2).flatten(-3)

    return joined(output), torch.cat(h_n, -1), torch.cat(c_n, -1), joined(c) if all_states and c0s else c[0]


def heads_a_call(cell: str, hidden_size: int, num_heads: int) -> int:
    """How many neighbouring heads share a call of the operator, their blocks written out as one matrix with zeros.

    A call of a few units takes its time for the way there, the input and the cells, not for the product with W_hh; and
    weights, states and outputs have to be divided among several calls and joined. One call for all heads costs what the
    plain layer costs. In layers of up to WHOLE_UNITS more calls are somewhat better where rows and steps are many, and
    several times slower where they are few. In larger layers the zeros cost more than calls do, up to SHARED_UNITS a
    call. Both limits were measured on a CPU, with heads of 4 to 64 units, 1 to 64 rows and 1 to 100 steps. Sizes alone
    decide, neither rows nor steps: so a sequence fed in pieces has the bits of the whole, and one compilation serves
    every T and B.

    A head has a call of its own where nothing bounds the cell's state, for 0 * inf is nan, and a head that overflowed
    would spoil the others. Otherwise who shares a call changes nothing but rounding, and on the CPU not even that in
    outputs and states, unless bfloat16's products sum pairs that reach from one head into the next: zeros add nothing,
    and masks count a head's units in the whole layer.
    """
    if not reference.find_cell(cell).bounded:
        return 1
    if hidden_size <= WHOLE_UNITS:
        return num_heads
    most = SHARED_UNITS * num_heads // hidden_size
    return max(heads for heads in range(1, max(1, most) + 1) if num_heads % heads == 0)


def _joined_blocks(w_hh: Tensor, num_heads: int) -> Tensor:
    """Each ``num_heads`` neighbouring blocks as one, zero between them: ``[G*H, s]`` to ``[G*H, num_heads * s]``."""
    rows, size = w_hh.shape
    blocks = w_hh.reshape(-1, num_heads, size, size)
    return torch.diag_embed(blocks.permute(0, 2, 3, 1), dim1=1, dim2=3).reshape(rows, num_heads * size)


def _with_w_hh(
    weights: Sequence[Sequence[Tensor]], directions: int, change: Callable[[Tensor], Tensor]
) -> list[list[Tensor]]:
    """The layers' weights with every w_hh changed."""
    _check_tensors(weights, layers=True)  # while they are the caller's
    changed = []
    for layer_weights in weights:
        layer = list(layer_weights)
        for index in range(1, len(layer), len(layer) // directions):
            layer[index] = change(layer[index])
        changed.append(layer)
    return changed


def _dropped(w_hh: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """``w_hh`` with elements dropped."""
    if generator is None:
        return drop(w_hh, probability)
    # torch's dropout takes no generator.
    keep = torch.empty_like(w_hh, requires_grad=False).bernoulli_(1 - probability, generator=generator)
    return w_hh * (keep * (1 / (1 - probability) if probability < 1 else 0.0))


def _noise(cell: str, recurrent_dropout: float, zoneout: float | tuple[float, float]) -> tuple[float, ...]:
    """As :func:`rnnfast.ops.layer` takes it, empty where there is none."""
    has_c = reference.find_cell(cell).states == 2
    zoneout = check_zoneout(cell, zoneout)
    of_h, of_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout if has_c else 0.0)
    noise = (float(recurrent_dropout), of_h, of_c)
    return noise if any(noise) else ()


def _seeds(shape: tuple[int, ...], input: Tensor, generator: torch.Generator | None) -> Tensor:
    """What the masks of noise are drawn from."""
    # generator=None is another overload than none, which takes no symbolic batch.
    draw: Callable[..., Tensor] = torch.randint if generator is None else partial(torch.randint, generator=generator)
    return draw(2**63 - 1, shape, device=input.device)


def _save(
    inputs: Sequence[Tensor | None], weights: Sequence[Sequence[Tensor]], recompute: bool, return_states: bool
) -> int:
    """What :func:`rnnfast.ops.layer` is to keep: with gradients gates or states, without them at most the states."""
    tensors = (tensor for group in (inputs, *weights) for tensor in group)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return 1 if recompute else 2
    return 1 if return_states else 0


def _as_state(result: Tensor, state: Tensor) -> Tensor:
    """``result`` in the dtype of the initial state, which the CPU's autocast leaves to torch.nn's GRU and cells."""
    return result.to(state.dtype) if result.dtype != state.dtype and result.device.type == "cpu" else result


def _check_batch_invariant(input: Tensor, dropout: bool, backend: str | None) -> None:
    active, reason = ops.active_backend(backend)
    if active == "reference":
        raise ValueError(f"batch_invariant: expected False where the reference formula runs ({reason}), got True")
    if input.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"batch_invariant: expected False on {input.device.type}, where the order of a matrix product's sums "
            "depends on the batch, got True"
        )
    if dropout:
        raise ValueError("batch_invariant: expected False with dropout, whose mask depends on the batch, got True")


def _check_tensors(weights: Any, layers: bool) -> None:
    try:
        are_tensors = all(isinstance(weight, Tensor) for part in (weights if layers else [weights]) for weight in part)
    except TypeError:  # a layer that is no sequence
        are_tensors = False
    if not are_tensors:
        raise _weights_error(weights, layers) from None


def _check_layout(input: Tensor) -> None:
    if input.layout is not torch.strided:
        raise ValueError(f"input: expected a dense tensor, of layout torch.strided, got {input.layout}") from None


def _weights_error(weights: Any, layers: bool) -> ValueError:
    """For weights that are no tensors, or do not begin with the two that every layer has."""

    def outline(part: Any) -> str:
        if isinstance(part, (list, tuple)):
            return f"[{', '.join(map(outline, part))}]"
        return f"{type(part).__name__} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__

    takes = "w_ih [G*H, I], w_hh and so on"
    return ValueError(f"weights: expected [{takes}]{' for each layer' if layers else ''}, got {outline(weights)}")


def _check_input(input: Tensor, w_ih: Tensor, features: int, dtype_error: type[Exception]) -> None:
    if input.shape[-1] != features:
        raise RuntimeError(f"input: expected {features} features (input_size), got {input.shape[-1]}")
    if input.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise dtype_error(f"input: expected the weights' dtype {w_ih.dtype}, got {input.dtype}")
    if input.device != w_ih.device:
        raise RuntimeError(f"input: expected the weights' device {w_ih.device}, got {input.device}")


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def _pair(hx: State) -> tuple[Tensor, Tensor]:
    if not isinstance(hx, (tuple, list)):
        error = RuntimeError if isinstance(hx, Tensor) else TypeError  # as torch.nn
        raise error(f"hx: expected two states (h_0, c_0), got a {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"hx: expected two states (h_0, c_0), got {len(hx)} of them")
    return hx[0], hx[1]


def _state(name: str, state: State, shape: tuple[int, int, int], batched: bool, input: Tensor) -> Tensor:
    """``state`` as ``shape`` [L*D, B, P or H]; unbatched it comes without B."""
    expected = shape if batched else (shape[0], shape[2])
    state = _check_tensor(name, state, input)
    if state.shape != expected:
        meaning = "(layers * directions, batch, features)" if batched else "(layers * directions, features)"
        raise RuntimeError(f"{name}: expected shape {expected} {meaning}, got {tuple(state.shape)}")
    return state if batched else state.unsqueeze(1)


def _cell_state(name: str, state: State, shape: tuple[int, int, int], batched: bool, input: Tensor) -> Tensor:
    """``state`` as ``shape`` [1, B, H]; it comes as [B, H], unbatched as [H]."""
    expected = shape[1:] if batched else shape[2:]
    state = _check_tensor(name, state, input)
    if state.shape != expected:
        error = RuntimeError if state.dim() in (1, 2) else ValueError
        raise error(f"{name}: expected shape {expected}, got {tuple(state.shape)}")
    return state.unsqueeze(0) if batched else state.view(shape)


def _check_tensor(name: str, tensor: State, input: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"{name}: expected the input's dtype {input.dtype}, got {tensor.dtype}")
    if tensor.device != input.device:
        raise RuntimeError(f"{name}: expected the input's device {input.device}, got {tensor.device}")
    return tensor


def _lengths(lengths: Tensor, input: Tensor, batched: bool, packed: bool) -> Tensor:
    if packed:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own")
    no_integers = not isinstance(lengths, Tensor) or lengths.dtype == torch.bool
    if no_integers or lengths.is_floating_point() or lengths.is_complex():
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected a Tensor of integers, got {got}")
    steps, batch = input.shape[:2]
    if lengths.shape != ((batch,) if batched else ()):
        expected = f"shape ({batch},), one for each row" if batched else "shape (), the input being unbatched"
        raise RuntimeError(f"lengths: expected {expected}, got {tuple(lengths.shape)}")
    lengths = lengths.to(torch.int64)  # first: unsigned types have no minimum of their own in torch
    # A graph has no values to look at; there the operator checks them.
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and lengths.numel():
        values = lengths
        while torch._C._functorch.is_functorch_wrapped_tensor(values):  # a transform's, of all its samples
            values = torch._C._functorch.get_unwrapped(values)
        low, high = (int(bound) for bound in torch.aminmax(values))
        if low < 0 or high > steps:
            raise RuntimeError(f"lengths: expected values from 0 to {steps} (T), got {low} to {high}")
    return lengths.reshape(-1)


def _reset(
    reset: Tensor | PackedSequence,
    input: Tensor,
    batched: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    sorted_indices: Tensor | None,
) -> Tensor:
    if isinstance(reset, PackedSequence):
        if batch_sizes is None:
            raise TypeError("reset: expected a bool Tensor, the input being no PackedSequence, got a PackedSequence")
        if not torch.compiler.is_compiling():
            if not torch.equal(reset.batch_sizes, batch_sizes):
                raise RuntimeError("reset: expected the input's batch_sizes, got others")
            _check_order(reset.sorted_indices, sorted_indices, batch_sizes)
        reset = reset.data
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset: expected a bool Tensor, got {got}")
    if reset.device != input.device:
        raise RuntimeError(f"reset: expected the input's device {input.device}, got {reset.device}")
    expected = tuple(input.shape[:-1]) if batched else (input.size(0),)
    given = tuple(reset.shape)
    if batch_first and batched:
        expected = expected[::-1]
    if given != expected:
        raise RuntimeError(f"reset: expected shape {expected}, the input's without its features, got {given}")
    if not batched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if batch_first else reset


def _check_order(of_reset: Tensor | None, of_input: Tensor | None, batch_sizes: Tensor) -> None:
    """Raise unless the rows with steps stand in one order. On a device it would have to be waited for."""
    given = [indices for indices in (of_reset, of_input) if indices is not None]
    if of_reset is of_input or not len(batch_sizes) or any(indices.device.type != "cpu" for indices in given):
        return
    rows = int(batch_sizes[0])
    as_they_come = torch.arange(rows, device="cpu")
    ours, theirs = (as_they_come if part is None else part[:rows] for part in (of_input, of_reset))
    if not torch.equal(ours, theirs):
        raise RuntimeError("reset: expected the input's order of rows (sorted_indices), got another")


def check_options(cell: str, num_heads: int, layer_norm: bool) -> None:
    """Raise ValueError unless a layer of the cell can have both, TypeError unless num_heads is an int."""
    check_sizes(num_heads=num_heads)
    form = reference.find_cell(cell)
    if form.diagonal and num_heads > 1:
        raise ValueError(f"num_heads: expected 1 for a diagonal cell, whose units are heads already, got {num_heads}")
    if layer_norm and (num_heads > 1 or not form.layer_norm):
        other = f"num_heads = {num_heads}" if num_heads > 1 else f"the cell {cell}"
        raise ValueError(f"layer_norm: expected False with {other}, got True")


def check_heads(num_heads: int, hidden_size: int, projection: bool) -> None:
    """Raise ValueError unless the units of a layer can be divided into so many heads."""
    if hidden_size % num_heads or (num_heads > 1 and projection):
        takes = "1 with a projection" if projection else f"a divisor of hidden_size = {hidden_size}"
        raise ValueError(f"num_heads: expected {takes}, got {num_heads}")


def check_sizes(zero: bool = False, **sizes: int) -> None:
    """Raise TypeError for a value that is no int, ValueError for one below 0, or for 0 unless ``zero``."""
    for name, size in sizes.items():
        if not isinstance(size, (int, Integral)):  # an int is found faster than what is Integral
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < 0 or (size == 0 and not zero):
            raise ValueError(f"{name}: expected {'0 or ' if zero else ''}an int above 0, got {size}")


def check_dropouts(dropout: Any, weight_dropout: Any, recurrent_dropout: Any) -> None:
    """Raise ValueError unless they are probabilities, the last below 1."""
    for name, probability in (("dropout", dropout), ("weight_dropout", weight_dropout)):
        if not is_probability(probability, one=True):
            raise ValueError(f"{name}: expected a probability from 0 to 1, got {probability!r}")
    if not is_probability(recurrent_dropout):
        raise ValueError(f"recurrent_dropout: expected a probability below 1, got {recurrent_dropout!r}")


def check_zoneout(cell: str, zoneout: Any) -> float | tuple[float, float]:
    """``zoneout`` in floats; raise ValueError unless it is a probability below 1, or with c one for each of h and c."""
    if isinstance(zoneout, float) and 0 <= zoneout < 1:
        return zoneout
    has_c = reference.find_cell(cell).states == 2
    each: Sequence[Any] = zoneout if has_c and isinstance(zoneout, (tuple, list)) and len(zoneout) == 2 else (zoneout,)
    if not all(map(is_probability, each)):
        takes = "a probability below 1" + (" or two, of h and c" if has_c else "")
        raise ValueError(f"zoneout: expected {takes}, got {zoneout!r}")
    return (float(each[0]), float(each[1])) if len(each) == 2 else float(each[0])


def is_probability(value: object, one: bool = False) -> bool:
    """Whether it is one below 1, or 1 if ``one``."""
    if not isinstance(value, (float, Real)) or isinstance(value, bool):  # a float is found faster than what is Real
        return False
    return 0 <= float(value) < 1 or (one and value == 1)


def check_bools(**values: object) -> None:
    """Raise TypeError for a value that is no bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
