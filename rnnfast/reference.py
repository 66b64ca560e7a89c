"""The specification: what one recurrent layer computes, in plain differentiable PyTorch.

Owns the equations of every cell and the one loop over time, with the meaning of packing, lengths and resets. It runs
on every device, in every dtype, under every transform of ``torch.func`` and to any order of derivative: the fused
operators are tested against it, it stands in where they were not built, and it supplies the derivatives that have no
kernel. Must not know the rest of the package.

Sizes: T steps, B rows, I input features, H hidden units, P outputs a direction (H, or the projection's), D directions,
G gates of the cell, N rows over all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import leaky_relu, linear, pad

# A step maps (igates [B, G*H], hgates [B, G*H], *state) to the new state: (h,) or (h, c), each [B, H].
# igates = W_ih x + b_ih, hgates = W_hh h + b_hh; of a diagonal cell w_hh * h + b_hh, of every gate and unit by itself.
# Normalised, with two states it also gets what makes of c what h reads.
Step = Callable[..., tuple[Tensor, ...]]
# The hgates of an operand, of some of the gates: what a cell takes that has a second product behind the first.
HiddenGates = Callable[[Tensor, slice], Tensor]


def elman_step(nonlinearity: Callable[[Tensor], Tensor]) -> Step:
    """h' = f(igates + hgates). Elman, "Finding Structure in Time", Cognitive Science 14 (1990).

    With a diagonal recurrence it is the IndRNN: Li, Li, Cook, Zhu and Gao, "Independently Recurrent Neural Network
    (IndRNN): Building A Longer and Deeper RNN", CVPR 2018.
    """

    def step(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
        return (nonlinearity(igates + hgates),)

    return step


def lstm_step(
    igates: Tensor, hgates: Tensor, h: Tensor, c: Tensor, read: Callable[[Tensor], Tensor] = lambda c: c
) -> tuple[Tensor, Tensor]:
    """i, f, o = sigmoid, g = tanh of the four sums; c' = f c + i g; h' = o tanh(c'), which may read c' normalised.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9 (1997), with the forget gate of Gers,
    Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12 (2000).
    """
    i, f, g, o = (igates + hgates).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * read(c).tanh(), c


def gru_step(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
    """r, z = sigmoid(i + h); n = tanh(i_n + r h_n); h' = (1 - z) n + z h = n + z (h - n).

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014, with the reset gate applied
    after the matrix product, as torch.nn.GRU does.
    """
    (i_r, i_z, i_n), (h_r, h_z, h_n) = igates.chunk(3, -1), hgates.chunk(3, -1)
    r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
    n = (i_n + r * h_n).tanh()
    return (n + z * (h - n),)


def gru_reset_before_step(igates: Tensor, hgates: HiddenGates, h: Tensor, operand: Tensor) -> tuple[Tensor]:
    """r, z = sigmoid(i + W_h h + b_h); n = tanh(i_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h = n + z (h - n).

    Cho et al., as above, with the reset gate where they have it. Recurrent dropout is in both products, with one mask:
    ``operand`` is h behind it.
    """
    i_r, i_z, i_n = igates.chunk(3, -1)
    h_r, h_z = hgates(operand, slice(0, 2)).chunk(2, -1)
    r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
    n = (i_n + hgates(r * operand, slice(2, 3))).tanh()
    return (n + z * (h - n),)


class Cell(NamedTuple):
    """What a layer needs to know of its cell."""

    gates: int  # G
    states: int  # 1: h; 2: h and c
    step: Step
    two_products: bool = False  # the step takes hgates as a function and, behind the state, what of h the products read
    layer_norm: bool = True  # whether its gates, and c, can be normalised
    diagonal: bool = False  # a unit's gates see its own state alone: w_hh is [G*H]
    bounded: bool = False  # the nonlinearities bound h, whatever the gates are


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(1, 1, elman_step(torch.tanh), bounded=True),
    "rnn_relu": Cell(1, 1, elman_step(torch.relu)),
    "rnn_sigmoid": Cell(1, 1, elman_step(torch.sigmoid), bounded=True),
    "rnn_identity": Cell(1, 1, elman_step(lambda gates: gates)),
    "rnn_leaky_relu": Cell(1, 1, elman_step(leaky_relu)),
    "lstm": Cell(4, 2, lstm_step, bounded=True),
    "gru": Cell(3, 1, gru_step, bounded=True),
    "gru_reset_before": Cell(3, 1, gru_reset_before_step, two_products=True, layer_norm=False, bounded=True),
    "indrnn_relu": Cell(1, 1, elman_step(torch.relu), layer_norm=False, diagonal=True),
    "indrnn_tanh": Cell(1, 1, elman_step(torch.tanh), layer_norm=False, diagonal=True),
}

# Layer normalisation, over the whole vector of a row's gates, with shifts that are absent without bias:
#
#   igates = norm_ih LN(W_ih x) + b_ih      hgates = norm_hh LN(W_hh h) + b_hh      LN(x) = (x - mean) / sqrt(var + eps)
#
# and of an LSTM's c where h reads it: h' = o tanh(norm_c LN(c') + norm_bias_c), while c' itself goes on as it is.
# Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450 (2016).
NORM_EPSILON = 1e-5


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight LN(x) + bias``."""
    return functional.layer_norm(x, weight.shape, weight, bias, NORM_EPSILON)


# Those of other people, by namespace and name of their operators: "namespace::name".
OWN_CELLS: dict[str, Cell] = {}


def find_cell(name: str) -> Cell:
    """The cell of a name in ``CELLS`` or ``OWN_CELLS``; raises ValueError for another."""
    cell = CELLS.get(name) or OWN_CELLS.get(name)
    if cell is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {name!r}")
    return cell


class Noise(NamedTuple):
    """What changes at random inside the recurrence: probabilities below 1, and which units they are for.

    Recurrent dropout multiplies h, where it meets W_hh, by a mask of 0 and 1 / (1 - p), one a row and unit for all
    steps. Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS
    2016.

    Zoneout lets h, and c, keep their last value with that probability, each step and unit by itself:
    k old + (1 - k) new with k 0 or 1. h is computed from the new c. Krueger et al., "Zoneout: Regularizing RNNs by
    Randomly Preserving Hidden Activations", ICLR 2017.
    """

    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    first_unit: float = 0  # a whole number: the masks count the units from it on, as those of a part of a layer

    def masks(
        self, seed: Tensor | None, reverse: bool, steps: int, outputs: int, hidden: int, dtype: torch.dtype
    ) -> Masks:
        """The masks of one direction, from the seeds of the rows, ``[B]`` int64.

        Without them zoneout's k is its expectation, the probability itself.
        """

        def draw(probability: float, purpose: int, steps: int, units: int) -> Tensor | None:
            if not probability:
                return None
            if seed is None:
                return torch.tensor(probability, dtype=dtype)
            unit = (int(self.first_unit) + torch.arange(units, device=seed.device)) & (2**32 - 1)
            fours = torch.arange((steps + 3) // 4, device=seed.device).view(-1, 1, 1)
            words = philox(unit, fours, 2 * purpose + reverse, seed.unsqueeze(1))  # each of the next of four steps
            numbers = torch.stack(words, 1).flatten(0, 1)[:steps]
            return (numbers < int(probability * 2**32)).to(dtype)

        dropped = draw(self.recurrent_dropout, 0, 1, outputs)
        return Masks(
            None if dropped is None else (1 - dropped[0]) * (1 / (1 - self.recurrent_dropout)),
            draw(self.zoneout_h, 1, steps, outputs),
            draw(self.zoneout_c, 2, steps, hidden),
        )


class Masks(NamedTuple):
    """What :meth:`Noise.masks` draws; None where there is nothing to draw."""

    dropout: Tensor | None  # [B, P], 0 or 1 / (1 - p)
    keep_h: Tensor | None  # [T, B, P], 1 where the last value stays; [] the expectation
    keep_c: Tensor | None  # [T, B, H]


def philox(unit: Tensor, step: Tensor, purpose: int, seed: Tensor) -> list[Tensor]:
    """Philox4x32-7 of the counter (unit, step, purpose, 0) and the 64-bit key ``seed``: four words of 32 bits, int64.

    Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The arguments are broadcast.
    """
    low = 2**32 - 1

    def multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
        """The high and the low word of the product, which as one number would overflow."""
        upper, lower = x * (by >> 16), x * (by & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, (x * by) & low

    words = [*torch.broadcast_tensors(unit, step, torch.full_like(seed, purpose), torch.zeros_like(seed))]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(7):
        (high0, low0), (high1, low1) = multiply(words[0], 0xD2511F53), multiply(words[2], 0xCD9E8D57)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return words


def layer(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one layer, in one or two directions, over a whole sequence.

    Args:
        cell: a name in ``CELLS`` or ``OWN_CELLS``.
        input: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes``.
        h0, c0: ``[D, B, P]`` and ``[D, B, H]``; ``c0`` is None for a cell with one state. D comes from here.
        weights: for each direction ``w_ih [G*H, I]``, ``w_hh [G*H, P]`` (``[G*H]`` for a diagonal cell), then ``b_ih``
            and ``b_hh [G*H]`` (both or neither), then ``w_hr [P, H]`` with a projection, which a diagonal cell has not,
            then with ``layer_norm`` ``norm_ih`` and ``norm_hh [G*H]`` and, for a cell with two states, ``norm_c`` and
            ``norm_bias_c [H]``.
        batch_sizes: ``[T]`` int64 on the CPU, decreasing: the input is packed as in ``PackedSequence``. Rows beyond
            ``batch_sizes[0]`` have no steps, and a step may be without rows.
        lengths: ``[B]`` int64: row b of a padded input has ``lengths[b]`` steps; one below 0 counts as 0, one above T
            as T. What the input holds past them, NaN included, has no effect and no gradient.
        reset: ``[T, B]`` (packed: ``[N]``) bool. Set at step t, it says that a new episode begins there: the forward
            direction enters step t, and the backward direction step t - 1, with a zero state.
        seed: ``[B]`` int64 on the input's device: what the masks of ``noise`` are drawn from, those of a row from its
            own number alone. None: zoneout takes its expectation.
        noise: the values of :class:`Noise`, or nothing. The state behind a reset is what zoneout may keep: zero.
        layer_norm: whether the gates, and c where h reads it, are normalised as beside :data:`NORM_EPSILON`.

    Returns:
        ``(output, h_n, c_n, c)``. ``output`` is ``[T, B, D*P]`` or ``[N, D*P]``, zero past a row's length; ``h_n`` and
        ``c_n`` are as ``h0`` and ``c0``, a row without steps keeps its initial state; ``c`` is the cell state of every
        step, as ``output`` with H for P. ``c_n`` and ``c`` have no elements for a cell with one state.

    All floating tensors share one dtype. For the 16-bit ones sums, nonlinearities and the cell state are float32, and
    h is rounded at every step. Under autocast the layer runs in autocast's dtype.

    Raises ValueError for another cell, batch_sizes that do not fit, noise that is neither a probability below 1 nor a
    first unit, or layer_norm for a cell that has none,
    RuntimeError for a tensor of another dtype than the input or recurrent dropout without a seed, and for another shape
    what the operations of torch raise.
    """
    known = find_cell(cell)
    narrow = autocast_dtype(input)
    if narrow is not None:
        input, h0, *rest = (cast(tensor, narrow) for tensor in (input, h0, *weights))
        c0 = None if c0 is None else cast(c0, narrow)
        with torch.autocast(input.device.type, enabled=False):
            options: dict[str, Tensor | None] = {
                "batch_sizes": batch_sizes,
                "lengths": lengths,
                "reset": reset,
                "seed": seed,
            }
            return layer(cell, input, h0, c0, rest, noise=noise, layer_norm=layer_norm, **options)

    for tensor in (h0, *weights) if c0 is None else (h0, c0, *weights):
        if tensor.dtype != input.dtype:
            raise RuntimeError(f"expected input, states and weights of one dtype, got {input.dtype} and {tensor.dtype}")

    directions, batch = h0.shape[:2]
    states = (h0,) if c0 is None else (h0, c0)

    # Packed rows are the general form: a padded sequence has B of them at every step.
    shape = input.shape[:-1]
    sizes = [batch] * shape[0] if batch_sizes is None else _living_rows(batch_sizes, batch, shape[0])
    sizes = sizes or [0]  # without steps, one without rows: the results still have gradients for all that is given
    alive = None
    if lengths is not None:
        alive = torch.arange(shape[0], device=input.device).unsqueeze(1) < lengths.to(input.device)  # [T, B]
        input = input.where(alive.unsqueeze(-1), 0)
        reset = None if reset is None else reset & alive
        alive = alive.reshape(-1, 1)
    input = input.flatten(0, -2)
    reset = None if reset is None else reset.reshape(-1, 1)

    _check_noise(seed, noise, known, batch)
    widths = h0.shape[2], h0.shape[2] if c0 is None else c0.shape[2]
    wide = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    masks = [Noise(*noise).masks(seed, d == 1, len(sizes), *widths, wide) for d in range(directions)]

    if layer_norm and not known.layer_norm:
        raise ValueError(f"layer_norm: expected False with {cell}, got True")
    norms = 2 * known.states if layer_norm else 0
    per_direction = len(weights) // directions
    if known.diagonal and (per_direction % 2 or weights[1].dim() != 1):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights[:per_direction])
        raise RuntimeError(f"weights: expected w_hh [G*H] and no projection for a diagonal cell, got {shapes}")
    results = [
        _direction(
            known,
            input,
            sizes,
            tuple(state[d] for state in states),
            weights[d * per_direction : (d + 1) * per_direction - norms],
            weights[(d + 1) * per_direction - norms : (d + 1) * per_direction],
            alive,
            reset,
            masks[d],
            reverse=d == 1,
        )
        for d in range(directions)
    ]
    every, last = zip(*results, strict=True)
    output, *c = (torch.cat(rows, -1).unflatten(0, shape) for rows in zip(*every, strict=True))
    h_n, *c_n = (torch.stack(state) for state in zip(*last, strict=True))
    nothing = h0.new_empty(0)
    return output, h_n, c_n[0] if c_n else nothing, c[0] if c else nothing


def _direction(
    cell: Cell,
    input: Tensor,  # [N, I]
    sizes: Sequence[int],  # [T] living rows of each step
    initial: tuple[Tensor, ...],  # h [B, P] and perhaps c [B, H]
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],  # none without layer normalisation
    alive: Tensor | None,  # [N, 1] bool
    reset: Tensor | None,  # [N, 1] bool
    masks: Masks,
    reverse: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the states of every step, ``[N, P]`` and perhaps ``[N, H]``, and those of every row's last."""
    dtype = input.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    weights = [weight.to(wide) for weight in weights]
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if len(weights) >= 4 else (None, None)
    w_hr = weights[-1] if len(weights) % 2 else None

    norm_ih, norm_hh, *norm_c = (norm.to(wide) for norm in norms) if norms else (None, None)

    def gates(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        return linear(x, weight, bias) if norm is None else normalised(linear(x, weight), norm, bias)

    step = partial(cell.step, read=lambda c: normalised(c, *norm_c)) if norm_c else cell.step
    igates = gates(input.to(wide), w_ih, b_ih, norm_ih).split(sizes)
    alive_at = None if alive is None else alive.split(sizes)
    reset_at = None if reset is None else reset.split(sizes)

    steps = len(sizes)
    state = tuple(tensor.to(wide) for tensor in initial)
    history: list[tuple[Tensor, ...]] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        size = sizes[t]
        previous = tuple(tensor[:size] for tensor in state)
        entering = previous
        if reset_at is not None and not (reverse and t + 1 == steps):
            boundary = _grow(reset_at[t + 1], size) if reverse else reset_at[t]
            entering = tuple(tensor.where(~boundary, 0) for tensor in previous)

        operand = entering[0]
        if masks.dropout is not None:
            operand = (operand * masks.dropout[:size]).to(dtype).to(wide)
        if cell.two_products:
            h, *c = cell.step(igates[t], partial(_hidden_gates, cell, w_hh, b_hh), *entering, operand)
        elif cell.diagonal:
            h, *c = cell.step(igates[t], _diagonal_gates(cell, w_hh, b_hh, operand), *entering)
        else:
            h, *c = step(igates[t], gates(operand, w_hh, b_hh, norm_hh), *entering)
        if w_hr is not None:
            h = linear(h, w_hr)
        h, *c = (_zoned(keep, t, old, new) for keep, old, new in zip(masks[1:], entering, (h, *c), strict=False))
        current = (h.to(dtype).to(wide), *c)

        if alive_at is None:
            history.append(current)
        else:
            history.append(tuple(tensor.where(alive_at[t], 0) for tensor in current))
            current = tuple(new.where(alive_at[t], old) for new, old in zip(current, previous, strict=True))
        # Rows without this step keep their state: the forward direction has finished them, the backward not begun.
        state = tuple(torch.cat([new, old[size:]]) for new, old in zip(current, state, strict=True))

    in_order = reversed(history) if reverse else history
    every = tuple(torch.cat(rows).to(dtype) for rows in zip(*in_order, strict=True))
    return every, tuple(tensor.to(dtype) for tensor in state)


def _hidden_gates(cell: Cell, w_hh: Tensor, b_hh: Tensor | None, operand: Tensor, gates: slice) -> Tensor:
    size = w_hh.shape[0] // cell.gates
    rows = slice(gates.start * size, gates.stop * size)
    return linear(operand, w_hh[rows], None if b_hh is None else b_hh[rows])


def _diagonal_gates(cell: Cell, w_hh: Tensor, b_hh: Tensor | None, operand: Tensor) -> Tensor:
    hgates = operand.repeat(1, cell.gates) * w_hh
    return hgates if b_hh is None else hgates + b_hh


def _zoned(keep: Tensor | None, step: int, old: Tensor, new: Tensor) -> Tensor:
    if keep is None:
        return new
    k = keep if keep.dim() == 0 else keep[step, : new.size(0)]
    return k * old + (1 - k) * new


def _check_noise(seed: Tensor | None, noise: Sequence[float], cell: Cell, batch: int) -> None:
    takes = "no values, or 3 probabilities from 0 to below 1 and perhaps the number of the first unit, below 2^32"
    first_unit = noise[3] if len(noise) == 4 else 0
    known = len(noise) in (0, 3, 4) and 0 <= first_unit < 2**32 and first_unit == int(first_unit)
    if not known or not all(0 <= p < 1 for p in noise[:3]):
        raise ValueError(f"noise: expected {takes}, got {tuple(noise)}")
    if noise and noise[2] and cell.states == 1:
        raise ValueError(f"noise: expected 0 for c of a cell with one state, got {noise[2]}")
    if seed is not None and seed.dtype != torch.int64:
        raise ValueError(f"seed: expected a Tensor of int64, got {seed.dtype}")
    if seed is not None and seed.shape != (batch,):
        raise RuntimeError(f"seed: expected shape ({batch},), one for each row, got {tuple(seed.shape)}")
    if seed is None and noise and noise[0]:
        raise RuntimeError("seed: expected a Tensor [B] of int64 with recurrent dropout, got None")


def _living_rows(batch_sizes: Tensor, batch: int, rows: int) -> list[int]:
    if batch_sizes.dtype != torch.int64:
        raise ValueError(f"batch_sizes: expected a Tensor of int64, got {batch_sizes.dtype}")
    sizes: list[int] = batch_sizes.tolist()
    if sorted(sizes, reverse=True) != sizes or not all(0 <= size <= batch for size in sizes) or sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes: expected sizes from 0 to {batch} (B) that do not increase and sum to {rows} (the rows of "
            f"input), got {sizes if len(sizes) <= 10 else f'{len(sizes)} that sum to {sum(sizes)}'}"
        )
    return sizes


def _grow(mask: Tensor, size: int) -> Tensor:
    """Extend ``mask [n, 1]`` with False to ``[size, 1]``: a row whose last step this is meets no boundary after it."""
    return pad(mask, (0, 0, 0, size - mask.size(0)))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensor's device; None where it is off."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's rule: it casts what is floating, and leaves float64 alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
