"""explain names the engine of every layer, and why it is not a faster one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast import ops


@pytest.fixture
def model(device: str) -> nn.Module:
    parts = {"encoder": rnnfast.LSTM(3, 4, num_layers=2), "head": nn.Linear(4, 2), "cell": rnnfast.GRUCell(2, 2)}
    return nn.ModuleDict(parts).to(device)


def test_reference_and_its_cause(model: nn.Module) -> None:
    with rnnfast.backend("reference"):
        layers = rnnfast.explain(model).layers
    assert [layer.name for layer in layers] == ["encoder (LSTM) layer 0", "encoder (LSTM) layer 1", "cell (GRUCell)"]
    assert {(layer.engine, layer.reason) for layer in layers} == {("reference", "backend 'reference' was chosen")}


def test_a_module_s_own_backend_counts() -> None:
    explanation = rnnfast.explain(rnnfast.GRU(3, 4, backend="reference"), torch.zeros(5, 2, 3))
    assert str(explanation) == "GRU layer 0: reference (backend 'reference' was chosen)"


def test_operators(model: nn.Module, device: str) -> None:
    engine = rnnfast.explain(model).layers[0].engine
    with ops.backend("auto"):
        active, _ = ops.active_backend()
    if active == "reference":
        assert engine == "reference"
    else:
        assert engine.startswith(device)
        assert engine != device  # the instruction set, or the engine's name


def test_without_an_extension(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "extension", None)
    monkeypatch.setattr(ops, "extension_error", "the extension rnnfast._C was not built: no compiler")
    assert (
        str(rnnfast.explain(model["cell"]))
        == "GRUCell: reference (the extension rnnfast._C was not built: no compiler)"
    )


def test_nothing_to_explain() -> None:
    assert str(rnnfast.explain(nn.Linear(2, 2))) == "no rnnfast layer or cell"
