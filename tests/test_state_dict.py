"""Weights and states that go between torch.nn and rnnfast, and through files."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from sample_inputs import flatten
from torch import nn

import rnnfast

OPTIONS: dict[str, dict[str, Any]] = {
    "RNN": {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"},
    "LSTM": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
    "GRU": {"num_layers": 2, "batch_first": True},
    "RNNCell": {"nonlinearity": "relu"},
    "LSTMCell": {"bias": False},
    "GRUCell": {},
}
each_module = pytest.mark.parametrize("name", OPTIONS)


def make(namespace: Any, name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(namespace, name)(3, 5, **OPTIONS[name])


def run(module: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3) if isinstance(module, nn.RNNCellBase) else (6, 4, 3)
    return flatten(module(torch.randn(shape, generator=generator)))


@each_module
@pytest.mark.parametrize("assign", [False, True])
def test_both_ways(name: str, assign: bool) -> None:
    for source, target in ((nn, rnnfast), (rnnfast, nn)):
        giver, taker = make(source, name, seed=1), make(target, name, seed=2)
        state = giver.state_dict()
        assert list(state) == list(taker.state_dict())
        assert taker.load_state_dict(state, assign=assign).missing_keys == []
        torch.testing.assert_close(run(taker), run(giver))


@each_module
def test_wrong_keys_and_shapes_are_refused(name: str) -> None:
    module = make(rnnfast, name)
    state = module.state_dict()
    state["more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        module.load_state_dict(state)
    del state["more"]
    first = next(iter(state))
    state[first] = state[first][:-1]
    with pytest.raises(RuntimeError, match=f"size mismatch for {first}"):
        module.load_state_dict(state)


@each_module
def test_pickle_deepcopy_and_save(name: str) -> None:
    module = make(rnnfast, name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(file, weights_only=False)]
    expected = run(module)
    for other in copies:
        assert repr(other) == repr(module)
        torch.testing.assert_close(run(other), expected, rtol=0, atol=0)
        with torch.no_grad():
            next(other.parameters()).zero_()  # a copy's weights are its own, and in use
        assert not torch.equal(run(other)[0], expected[0])
    torch.testing.assert_close(run(module), expected, rtol=0, atol=0)


@each_module
def test_state_of_a_torch_module(name: str) -> None:
    """__setstate__ takes what torch.nn's __getstate__ gives."""
    theirs = make(nn, name)
    cls = getattr(rnnfast, name)
    ours = cls.__new__(cls)
    ours.__setstate__(theirs.__getstate__() if hasattr(theirs, "__getstate__") else theirs.__dict__.copy())
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(run(ours), run(theirs))
    torch.testing.assert_close(run(pickle.loads(pickle.dumps(ours))), run(theirs))


def test_state_of_an_old_torch_module() -> None:
    """Before proj_size, and with the weights' names (or, older still, the weights) under other keys."""
    theirs = nn.GRU(3, 5, 2)
    state = {
        key: value
        for key, value in theirs.__dict__.items()
        if key not in ("proj_size", "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights")
    }
    state["all_weights"] = theirs.all_weights
    ours = rnnfast.GRU.__new__(rnnfast.GRU)
    ours.__setstate__(state)
    input = torch.randn(4, 2, 3)
    torch.testing.assert_close(ours(input), theirs(input))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]


def test_cells_and_layers_exchange_weights() -> None:
    cell, layer = rnnfast.GRUCell(3, 5), rnnfast.GRU(3, 5)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input = torch.randn(4, 3)
    torch.testing.assert_close(layer(input.unsqueeze(0))[0][0], cell(input))
