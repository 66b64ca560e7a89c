"""convert and to_torch: modules change class where they stand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sample_inputs import flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rnnfast

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
each_name = pytest.mark.parametrize("name", NAMES)


class Model(nn.Module):
    """Every recurrent module of torch.nn, one of them twice, some deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, num_layers=2, nonlinearity="relu")
        self.inner = nn.ModuleDict({"list": nn.ModuleList([nn.LSTM(4, 4, bidirectional=True), nn.GRU(8, 4)])})
        self.shared = self.inner["list"][1]
        self.cells = nn.ModuleList([nn.RNNCell(4, 4), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)])
        self.hidden = [nn.LSTM(1, 1)]  # no submodule, so not converted
        self.head = nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.rnn(input)[0]
        for layer in self.inner["list"]:
            x = layer(x)[0]
        h = self.cells[0](x[-1])
        h = self.cells[2](self.cells[1](h)[0])
        return self.head(h)


def test_model() -> None:
    model, input = Model(), torch.randn(5, 2, 3)
    expected = model(input)
    parameters, modules, state = list(model.parameters()), list(model.modules()), model.state_dict()
    model.inner["list"][0].eval()

    assert rnnfast.convert(model) is model
    recurrent = [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
    assert [type(m).__module__.split(".")[0] for m in recurrent] == ["rnnfast"] * 6
    assert model.shared is model.inner["list"][1]
    assert type(model.hidden[0]) is nn.LSTM
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert [m.training for m in recurrent] == [True, False, True, True, True, True]
    torch.testing.assert_close(model(input), expected)
    converted = repr(model)
    assert repr(rnnfast.convert(model)) == converted  # a second time changes nothing

    assert rnnfast.to_torch(model) is model
    assert repr(model) == converted  # the same names; the classes are torch.nn's again
    assert all(type(m).__module__ == "torch.nn.modules.rnn" for m in recurrent)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(input), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(input), expected)


@each_name
def test_one_module(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    input = torch.randn(2, 3)
    expected = flatten(module(input))
    assert rnnfast.convert(module) is module
    assert type(module) is getattr(rnnfast, name)
    torch.testing.assert_close(flatten(module(input)), expected)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(flatten(copied(input)), expected)
    assert type(rnnfast.to_torch(module)) is getattr(nn, name)
    torch.testing.assert_close(flatten(module(input)), expected)


def test_optimizer_made_before_goes_on() -> None:
    losses = []
    for convert in (False, True):
        torch.manual_seed(3)
        model, input = Model().double(), torch.randn(5, 2, 3, dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        history = []
        for step in range(4):
            if convert and step == 1:
                rnnfast.convert(model)
            loss = model(input).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_hooks_and_attributes_stay() -> None:
    module = nn.GRU(3, 4)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.note = "kept"
    module.register_buffer("counter", torch.zeros(1))
    rnnfast.convert(module)
    module(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    assert calls == ["pre", "forward", "backward"]
    assert module.note == "kept"
    assert "counter" in module.state_dict()


@each_name
def test_parametrized(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    weight = "weight_ih" if name.endswith("Cell") else "weight_ih_l0"
    parametrizations.weight_norm(module, weight)
    input = torch.randn(2, 3)
    expected, parameters = flatten(module(input)), list(module.parameters())
    rnnfast.convert(module)
    assert isinstance(module, getattr(rnnfast, name))
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    torch.testing.assert_close(flatten(module(input)), expected)
    torch.testing.assert_close(flatten(copy.deepcopy(module)(input)), expected)
    with torch.no_grad():
        module.parametrizations[weight].original0.mul_(2)
    assert not torch.equal(flatten(module(input))[0], expected[0])
    rnnfast.to_torch(module)
    assert isinstance(module, getattr(nn, name))
    rnnfast.convert(module)
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(rnnfast, name)


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return "mine"

    model = nn.ModuleList([Mine(2, 2)])
    assert type(rnnfast.convert(model)[0]) is Mine
    assert model[0](1) == "mine"


@each_name
def test_torchscript(name: str) -> None:
    """Scripting says what to do, which then works; tracing takes our layers as they are."""
    input = torch.randn(5, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    model = nn.Sequential(getattr(rnnfast, name)(3, 4))
    expected = model(input)
    takes = f"torch.jit.script: {name} is not written in TorchScript; script rnnfast.to_torch"
    with pytest.raises(NotImplementedError, match=takes):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.trace(model, input)(input), expected)
    torch.testing.assert_close(torch.jit.script(rnnfast.to_torch(model))(input), expected)


@pytest.mark.parametrize("base", [rnnfast.LSTM, rnnfast.GRUCell])
def test_to_torch_refuses_subclasses(base: Any) -> None:
    class Mine(base):
        pass

    model = nn.ModuleDict({"first": rnnfast.GRU(2, 2), "second": Mine(2, 2)})
    with pytest.raises(ValueError, match=r"torch\.nn has, got second with a subclass, Mine"):
        rnnfast.to_torch(model)
    assert type(model["first"]) is rnnfast.GRU


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "identity", "leaky_relu"])
@pytest.mark.parametrize("make", [rnnfast.RNN, rnnfast.RNNCell])
def test_nonlinearities_without_counterpart(make: Any, nonlinearity: str) -> None:
    model = nn.ModuleDict({"first": rnnfast.GRU(2, 2), "second": make(2, 2, nonlinearity=nonlinearity)})
    with pytest.raises(ValueError, match=rf"torch.nn has, got second with nonlinearity='{nonlinearity}'"):
        rnnfast.to_torch(model)
    assert type(model["first"]) is rnnfast.GRU
    with pytest.raises(ValueError, match="got the model itself"):
        rnnfast.to_torch(model["second"])


@each_name
def test_patch_torch(name: str) -> None:
    """Inside, the names are ours wherever torch.nn has them; outside, and after an exception, they are torch.nn's."""
    theirs, ours = getattr(nn, name), getattr(rnnfast, name)

    def named() -> set[type[nn.Module]]:
        return {getattr(place, name) for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn)}

    with rnnfast.patch_torch():
        assert named() == {ours}
        with rnnfast.patch_torch():
            assert named() == {ours}
        assert named() == {ours}
        assert type(rnnfast.convert(theirs(3, 4))) is ours
        assert type(rnnfast.to_torch(ours(3, 4))) is theirs
    assert named() == {theirs}
    with pytest.raises(ZeroDivisionError), rnnfast.patch_torch():
        raise ZeroDivisionError
    assert named() == {theirs}
