"""RNNCell, LSTMCell and GRUCell against torch.nn's."""

from __future__ import annotations

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
