"""rnnfast.reference against the definition: every row and direction alone, step by step, by torch's own cells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_inputs import Sample, each_cell, each_sample, tensors_of
from torch import Tensor

from rnnfast import reference


def gru_reset_before(x: Tensor, h: Tensor, w: Tensor, u: Tensor, a: Tensor | None = None, b: Tensor | None = None):
    """As Cho et al. have it, gate by gate; torch has no such cell."""
    (w_r, w_z, w_n), (u_r, u_z, u_n) = w.chunk(3), u.chunk(3)
    a_r, a_z, a_n, b_r, b_z, b_n = (0,) * 6 if a is None else (*a.chunk(3), *b.chunk(3))
    r, z = torch.sigmoid(x @ w_r.T + a_r + h @ u_r.T + b_r), torch.sigmoid(x @ w_z.T + a_z + h @ u_z.T + b_z)
    return (1 - z) * torch.tanh(x @ w_n.T + a_n + (r * h) @ u_n.T + b_n) + z * h


TORCH_CELLS: dict[str, Callable[..., Tensor]] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "rnn_identity": lambda x, h, w, u, a=0, b=0: x @ w.T + a + h @ u.T + b,
    "rnn_leaky_relu": lambda x, h, w, u, a=0, b=0: torch.nn.functional.leaky_relu(x @ w.T + a + h @ u.T + b, 0.01),
    "rnn_sigmoid": lambda x, h, w, u, a=0, b=0: torch.sigmoid(x @ w.T + a + h @ u.T + b),
    "gru": torch.gru_cell,
    "gru_reset_before": gru_reset_before,
    "indrnn_relu": lambda x, h, w, u, a=0, b=0: torch.relu(x @ w.T + a + h * u + b),
    "indrnn_tanh": lambda x, h, w, u, a=0, b=0: torch.tanh(x @ w.T + a + h * u + b),
}


def own_step(cell: str) -> Callable[..., Tensor]:
    """Of a cell that torch does not know: what is tested of it is the way of rows, directions and steps."""
    form = reference.CELLS[cell]

    def step(x: Tensor, h: Tensor, w: Tensor, u: Tensor, a: Tensor | int = 0, b: Tensor | int = 0) -> Tensor:
        hgates = h.repeat(1, form.gates) * u if form.diagonal else h @ u.T
        return form.step(x @ w.T + a, hgates + b, h)[0]

    return step


def by_definition(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> list[Tensor]:
    """What `reference.layer` should return, with nothing for empty results."""
    directions, batch, out = h0.shape
    if batch_sizes is None:
        steps = input.size(0)
        row_steps = [steps] * batch if lengths is None else lengths.tolist()
    else:
        row_steps = [int((batch_sizes > row).sum()) for row in range(batch)]
        starts = [0, *batch_sizes.cumsum(0).tolist()]

    def place(t: int, row: int) -> tuple[int, ...]:
        return (t, row) if batch_sizes is None else (starts[t] + row,)

    per_direction = len(weights) // directions
    hidden = weights[1].size(0) // reference.CELLS[cell].gates
    output = {}
    cells = {}
    last_h, last_c = [], []
    for d in range(directions):
        own = weights[d * per_direction : (d + 1) * per_direction]
        w_hr = own[-1] if len(own) % 2 else None
        own = own[: len(own) // 2 * 2]
        for row in range(batch):
            h = h0[d, row : row + 1]
            c = None if c0 is None else c0[d, row : row + 1]
            for t in range(row_steps[row]) if d == 0 else reversed(range(row_steps[row])):
                # The boundary crossed on the way into step t: before t going forward, after t going backward.
                boundary = t if d == 0 else t + 1
                if reset is not None and boundary < row_steps[row] and bool(reset[place(boundary, row)]):
                    h = torch.zeros_like(h)
                    c = None if c is None else torch.zeros_like(c)
                x = input[place(t, row)].unsqueeze(0)
                if cell != "lstm":
                    h = TORCH_CELLS.get(cell, own_step(cell))(x, h, *own)
                elif w_hr is None:
                    h, c = torch.lstm_cell(x, (h, c), *own)
                else:  # torch has no cell with a projection: one whose w_hh takes the unprojected h
                    w_ih, w_hh, *biases = own
                    gates = x @ w_ih.T + h @ w_hh.T + sum(biases)
                    i, f, g, o = gates.chunk(4, 1)
                    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                    h = (torch.sigmoid(o) * torch.tanh(c)) @ w_hr.T
                output[(*place(t, row), d)] = h[0]
                cells[(*place(t, row), d)] = None if c is None else c[0]
            last_h.append(h[0])
            last_c.append(None if c is None else c[0])

    def gather(values: dict, features: int) -> Tensor:
        zero = input.new_zeros(features)
        keys = [
            (*index, d)
            for index in torch.cartesian_prod(*(torch.arange(n) for n in input.shape[:-1]))
            .reshape(-1, input.dim() - 1)
            .tolist()
            for d in range(directions)
        ]
        rows = [values.get(key, zero) for key in keys]
        shape = (*input.shape[:-1], directions * features)
        return torch.stack(rows).reshape(shape) if rows else input.new_zeros(shape)

    def stack(values: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(values).reshape(like.shape) if values else like

    results = [gather(output, out), stack(last_h, h0)]
    return results if c0 is None else [*results, stack(last_c, c0), gather(cells, hidden)]


def with_gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of a weighted sum of them."""
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum() for result in results
    )
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*results, *gradients]


@each_sample
def test_equals_the_definition(sample: Sample) -> None:
    arguments, options = sample.arguments(grad=True)
    leaves = tensors_of(arguments)
    expected = with_gradients(by_definition(*arguments, **options), leaves)
    results = reference.layer(*arguments, **options)
    for result in results[2:] if arguments[3] is None else ():
        assert result.numel() == 0
    got = with_gradients(list(results if arguments[3] is not None else results[:2]), leaves)
    torch.testing.assert_close(got, expected)


@each_cell
def test_padding_has_no_effect(cell: str) -> None:
    arguments, options = Sample(cell, form="lengths", directions=2).arguments()
    expected = reference.layer(*arguments, **options)
    input, weights = arguments[1], arguments[4]
    for row, length in enumerate(options["lengths"].tolist()):
        input[length:, row] = float("nan")
    for tensor in (input, *weights):
        tensor.requires_grad_()
    results = reference.layer(*arguments, **options)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), [input, *weights])
    assert all(gradient.isfinite().all() for gradient in gradients)
    for row, length in enumerate(options["lengths"].tolist()):
        assert (gradients[0][length:, row] == 0).all()


@each_cell
def test_reset_drops_even_nan(cell: str) -> None:
    arguments, options = Sample(cell, steps=2).arguments()
    options["reset"] = torch.tensor([[True], [False]]).expand(2, 3)
    expected = reference.layer(*arguments, **options)
    arguments[2].fill_(float("nan"))
    torch.testing.assert_close(reference.layer(*arguments, **options), expected, rtol=0, atol=0)


narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@each_cell
@narrow
def test_narrow_dtypes_sum_in_float32(cell: str, dtype: torch.dtype) -> None:
    """A step in 16 bits is the float32 step on the same numbers, rounded once."""
    arguments, options = Sample(cell, steps=1, hidden_size=64).arguments(dtype)
    _, input, h0, c0, weights = arguments
    wide = [cell, input.float(), h0.float(), None if c0 is None else c0.float(), [w.float() for w in weights]]
    got = reference.layer(*arguments, **options)
    assert {result.dtype for result in got} == {dtype}
    expected = [result.to(dtype) for result in reference.layer(*wide, **options)]
    torch.testing.assert_close(list(got), expected, rtol=0, atol=0)


@narrow
def test_narrow_cell_state_is_float32(dtype: torch.dtype) -> None:
    """c grows by less than 16 bits resolve at every step, and must not stand still."""
    arguments, options = Sample("lstm", steps=64, hidden_size=1, batch=1).arguments(dtype)
    _, _, h0, c0, weights = arguments
    for tensor in (*weights, h0):
        tensor.zero_()
    c0.fill_(1)
    weights[2].copy_(torch.tensor([-8.0, 20, 20, 0]))  # i = sigmoid(-8) = 3.4e-4, f = 1, g = 1
    _, _, c_n, _ = reference.layer(*arguments, **options)
    assert c_n.item() == torch.tensor(1 + 64 * torch.sigmoid(torch.tensor(-8.0)).item()).to(dtype).item()


def test_mixed_dtypes_are_refused() -> None:
    arguments, options = Sample("gru").arguments()
    arguments[2] = arguments[2].float()
    with pytest.raises(RuntimeError, match=r"one dtype, got torch.float64 and torch.float32"):
        reference.layer(*arguments, **options)


def test_another_cell_is_refused() -> None:
    x = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"cell: expected one of rnn_tanh, .*gru, .*, got 'peephole'"):
        reference.layer("peephole", x, x[:1], None, [])


@each_cell
def test_transforms(cell: str) -> None:
    """torch.func's vmap and jvp, and both together with a gradient, equal the loop."""
    arguments, options = Sample(cell, form="lengths", directions=2, reset=True).arguments()
    _, input, h0, c0, weights = arguments

    def loss(x: Tensor, w: Tensor) -> Tensor:
        output, h_n, c_n, c = reference.layer(cell, x, h0, c0, [weights[0], w, *weights[2:]], **options)
        return output.square().sum() + h_n.sum() + c_n.sum() + c.sum()

    inputs = torch.stack([input, 2 * input])
    w_hh = torch.stack([weights[1], weights[1] / 2])
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(inputs, w_hh)
    for index in range(2):
        expected = torch.func.grad(loss, argnums=(0, 1))(inputs[index], w_hh[index])
        torch.testing.assert_close([part[index] for part in per_sample], list(expected))

    direction = torch.ones_like(input)
    _, forward_mode = torch.func.jvp(lambda x: loss(x, w_hh[0]), (input,), (direction,))
    reverse_mode = (torch.func.grad(loss)(input, w_hh[0]) * direction).sum()
    torch.testing.assert_close(forward_mode, reverse_mode)
