"""Parameters are ordinary: whatever replaces or changes one takes effect at the next forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sample_inputs import each_backend, flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rnnfast

MODULES: dict[str, dict[str, Any]] = {
    "RNN": {"num_layers": 2},
    "LSTM": {"num_layers": 2, "bidirectional": True},
    "GRU": {"num_layers": 2, "bias": False},
    "RNNCell": {},
    "LSTMCell": {"bias": False},
    "GRUCell": {},
}
each_module = pytest.mark.parametrize("name", MODULES)

INPUT = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make(name: str, namespace: Any = rnnfast) -> nn.Module:
    return getattr(namespace, name)(4, 4, **MODULES[name], dtype=torch.float64)


def run(module: nn.Module) -> list[Tensor]:
    hidden = torch.ones(5, 4, dtype=torch.float64)  # so that w_hh counts in a cell too
    if not isinstance(module, nn.RNNCellBase):
        return flatten(module(INPUT))
    return flatten(module(INPUT, (hidden, hidden) if isinstance(module, nn.LSTMCell | rnnfast.LSTMCell) else hidden))


def expected_of(module: nn.Module, name: str) -> list[Tensor]:
    """What torch.nn makes of the weights that `module` has now, read by their public names."""
    theirs = make(name, nn)
    theirs.load_state_dict({key: getattr(module, key).detach() for key in theirs.state_dict()})
    return run(theirs)


def check(module: nn.Module, name: str, before: list[Tensor]) -> None:
    """A change of the weights took effect, and rightly."""
    got = run(module)
    assert not torch.equal(got[0], before[0])
    torch.testing.assert_close(got, expected_of(module, name))


def names_of(module: nn.Module) -> list[str]:
    return [key for key, _ in module.named_parameters()]


@each_module
def test_new_parameter(name: str) -> None:
    module = make(name)
    for key in names_of(module):
        before = run(module)
        setattr(module, key, nn.Parameter(torch.randn_like(getattr(module, key))))
        check(module, name, before)


@each_module
def test_in_place_and_data(name: str) -> None:
    module = make(name)
    for key in names_of(module):
        before = run(module)
        with torch.no_grad():
            getattr(module, key).mul_(2)
        check(module, name, before)
        before = run(module)
        getattr(module, key).data = torch.randn_like(getattr(module, key))
        check(module, name, before)


@each_module
def test_functional_call(name: str) -> None:
    module = make(name)
    before = run(module)
    weights = {key: torch.randn_like(weight, requires_grad=True) for key, weight in module.named_parameters()}
    with torch.no_grad():
        other = make(name)
        other.load_state_dict(weights)
    cell = isinstance(module, nn.RNNCellBase)
    got = flatten(torch.func.functional_call(module, weights, (INPUT,)))
    torch.testing.assert_close(got, flatten(other(INPUT)))
    gradients = torch.autograd.grad(sum(part.sum() for part in got), list(weights.values()), materialize_grads=True)
    assert sum(bool(gradient.any()) for gradient in gradients) >= (1 if cell else len(gradients) - 2)
    torch.testing.assert_close(run(module), before, rtol=0, atol=0)


@each_module
def test_parametrize(name: str) -> None:
    module = make(name)
    key = names_of(module)[1]
    before = run(module)
    parametrizations.spectral_norm(module, key)
    module.eval()  # in training every forward takes a step of the power iteration
    check(module, name, before)
    before = run(module)
    with torch.no_grad():
        module.parametrizations[key].original[0].mul_(2)
    check(module, name, before)
    torch.testing.assert_close(run(copy.deepcopy(module)), run(module))
    sum(part.sum() for part in run(module)).backward()
    assert module.parametrizations[key].original.grad.any()
    parametrize.remove_parametrizations(module, key)
    check(module, name, before=[torch.zeros(1)])
    assert key in names_of(module)


@each_module
def test_weight_norm(name: str) -> None:
    module = make(name)
    key = names_of(module)[1]
    before = run(module)
    parametrizations.weight_norm(module, key)
    torch.testing.assert_close(run(module), before)
    with torch.no_grad():
        module.parametrizations[key].original0.mul_(2)
    check(module, name, before)


@each_module
def test_weight_norm_by_hook(name: str) -> None:
    """The older weight_norm makes the weight a plain attribute, set anew by a hook before each forward."""
    module = make(name)
    key = names_of(module)[1]
    before = run(module)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, key)
    torch.testing.assert_close(run(module), before)
    with torch.no_grad():
        getattr(module, f"{key}_g").mul_(2)
    check(module, name, before)


@each_module
def test_prune(name: str) -> None:
    from torch.nn.utils import prune

    module = make(name)
    before = run(module)
    prune.l1_unstructured(module, names_of(module)[0], amount=0.5)
    check(module, name, before)


@each_backend
def test_tied_between_layers(backend: str, device: str) -> None:
    """A weight used by two layers has the sum of both gradients."""
    module = rnnfast.GRU(4, 4, num_layers=2, backend=backend, dtype=torch.float64, device=device)
    theirs = nn.GRU(4, 4, num_layers=2, dtype=torch.float64, device=device)
    module.load_state_dict(theirs.state_dict())
    for gru in (module, theirs):
        gru.weight_hh_l1 = gru.weight_hh_l0
        assert len(list(gru.parameters())) == 7
        gru(INPUT.to(device))[0].square().sum().backward()
    for ours_weight, theirs_weight in zip(module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_weight.grad, theirs_weight.grad)


def test_tied_between_modules() -> None:
    first, second = make("LSTM"), make("LSTM")
    for key in names_of(first):
        setattr(second, key, getattr(first, key))
    model = nn.ModuleList([first, second])
    assert len(list(model.parameters())) == len(list(first.parameters()))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight_hh_l1.zero_()
    torch.testing.assert_close(run(copied[1]), run(copied[0]), rtol=0, atol=0)
    check(copied[1], "LSTM", run(second))


@each_module
@pytest.mark.parametrize("convert", ["float", "bfloat16", "to"])
def test_dtype_of_the_module(name: str, convert: str) -> None:
    module = make(name)
    dtype = {"float": torch.float32, "bfloat16": torch.bfloat16, "to": torch.float16}[convert]
    expected = run(module)
    module = module.to(dtype) if convert == "to" else getattr(module, convert)()
    assert {weight.dtype for weight in module.parameters()} == {dtype}
    got = flatten(module(INPUT.to(dtype)))
    assert {part.dtype for part in got} == {dtype}
    back = module.double()
    check(back, name, expected)


@each_module
def test_frozen_parameters(name: str) -> None:
    module = make(name)
    keys = names_of(module)
    getattr(module, keys[0]).requires_grad_(False)
    sum(part.square().sum() for part in run(module)).backward()
    assert getattr(module, keys[0]).grad is None
    assert all(getattr(module, key).grad is not None for key in keys[1:])


@each_module
def test_meta_and_to_empty(name: str) -> None:
    with torch.device("meta"):
        module = make(name)
    module = module.to_empty(device="cpu")
    source = make(name)
    module.load_state_dict(source.state_dict())
    torch.testing.assert_close(run(module), run(source), rtol=0, atol=0)


@each_module
def test_replica(name: str) -> None:
    """As DataParallel makes one: the weights are plain attributes."""
    module = make(name)
    before = run(module)
    replica = module._replicate_for_data_parallel()
    for key, weight in module.named_parameters():
        setattr(replica, key, 2 * weight)
    check(replica, name, before)
    torch.testing.assert_close(run(module), before, rtol=0, atol=0)


@each_module
def test_no_weight_is_kept_behind(name: str) -> None:
    """A replaced parameter is freed: the module holds no second reference."""
    import weakref

    module = make(name)
    key = names_of(module)[0]
    old = weakref.ref(getattr(module, key))
    run(module)
    setattr(module, key, nn.Parameter(torch.zeros_like(getattr(module, key))))
    assert old() is None


def test_flat_weights_are_the_parameters() -> None:
    """What programs set that know torch.nn's list of weights."""
    module = rnnfast.LSTM(3, 4, num_layers=2)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    twice = [nn.Parameter(2 * weight.detach()) for weight in module._flat_weights]
    module._flat_weights = twice
    assert all(a is b for a, b in zip(module.parameters(), twice, strict=True))
    with pytest.raises(TypeError, match="weight_ih_l0"):  # torch's: no tensor replaces a parameter
        module._flat_weights = [weight.detach() for weight in twice]
    with pytest.raises(ValueError, match="shorter"):
        module._flat_weights = twice[:-1]


@each_module
def test_an_error_of_a_parametrization_is_shown_alone(name: str) -> None:
    class Broken(nn.Module):
        broken = False

        def forward(self, weight: Tensor) -> Tensor:
            if self.broken:
                raise ZeroDivisionError
            return weight

    module = getattr(rnnfast, name)(3, 4)
    key = next(key for key, _ in module.named_parameters())
    broken = Broken()
    parametrize.register_parametrization(module, key, broken)
    broken.broken = True
    with pytest.raises(ZeroDivisionError) as raised:
        module(torch.randn(5, 3))
    assert raised.value.__context__ is None
