"""Owns: turning torch.nn's recurrent modules into ours, and back, where they stand. Must not know: how a layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import cells, modules, own_cell

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cells.RNNCell,
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# What torch.nn's modules lack.
_OWN_ATTRIBUTES = (
    "backend",
    "recompute",
    "batch_invariant",
    "weight_dropout",
    "recurrent_dropout",
    "zoneout",
    "num_heads",
    "layer_norm",
    "forget_bias",
    "reset_after",
    "_layer_names",
    "_names",
)

# Options under which a layer or cell has a counterpart in torch.nn, and the values they have then.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "nonlinearity": ("tanh", "relu"),
    "weight_dropout": (0.0,),
    "recurrent_dropout": (0.0,),
    "zoneout": (0.0, (0.0, 0.0)),
    "num_heads": (1,),
    "layer_norm": (False,),
    "reset_after": (True,),
}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert(model: ModuleT) -> ModuleT:
    """Turn every torch.nn recurrent layer and cell of ``model``, or ``model`` itself, into rnnfast's.

    The modules stay the objects they are and change their class: parameters, buffers, hooks, parametrizations, training
    flags, references and sharing are untouched, and an optimizer made before goes on working. Subclasses of torch.nn's
    classes are left alone, for what they add is not known here.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    for module in _find(model, _OURS):
        _become(module, _OURS, module.__dict__.copy())
    return model


def to_torch(model: ModuleT) -> ModuleT:
    """Turn every rnnfast layer and cell of ``model``, or ``model`` itself, into torch.nn's, as :func:`convert` does.

    What says how a layer runs (``backend``, ``recompute``, ``batch_invariant``) or starts (``forget_bias``) is dropped.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer or cell has no counterpart (a nonlinearity but tanh and relu, ``weight_dropout``,
            ``recurrent_dropout``, ``zoneout``, ``num_heads``, ``layer_norm``, ``reset_after=False``, an ``IndRNN``, a
            cell of its own, a subclass, for what it adds is not known here); nothing has been changed then.
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    found = _find(model, _TORCHS)
    lone = [
        f"{name or 'the model itself'} with {option}"
        for name, module in model.named_modules()
        if isinstance(module, (modules._Layers, cells._Cell))
        for option in _without_counterpart(module)
    ]
    if lone:
        raise ValueError(f"model: expected layers that torch.nn has, got {', '.join(lone)}")
    for module in found:
        state = {key: value for key, value in module.__dict__.items() if key not in _OWN_ATTRIBUTES}
        if isinstance(module, nn.RNNBase):
            state["_flat_weights"] = module._flat_weights
        _become(module, _TORCHS, state)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return model


@contextmanager
def patch_torch() -> Iterator[None]:
    """Let ``torch.nn.LSTM``, and torch.nn's other recurrent layers and cells, name rnnfast's inside the ``with`` block.

    For programs that build their models out of sight: what they build inside is rnnfast's and stays so, what is there
    already is not touched, and subclasses defined inside inherit from rnnfast's. A program that imported the class
    itself before (``from torch.nn import LSTM``) keeps torch.nn's: :func:`convert` its model instead. The names are
    the whole process's, so other threads see them too.
    """
    places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
    before = [(place, torchs.__name__, getattr(place, torchs.__name__)) for place in places for torchs in _OURS]
    try:
        for torchs, ours in _OURS.items():
            for place in places:
                setattr(place, torchs.__name__, ours)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _without_counterpart(module: nn.Module) -> list[str]:
    """The options of a layer or cell that torch.nn's lacks."""
    if isinstance(module, own_cell.OwnLayers):
        return [f"a cell of its own, {type(module).__name__}"]
    if isinstance(module, modules.IndRNN):
        return ["an independent recurrence"]
    if type_before_parametrizations(module) not in _TORCHS:
        return [f"a subclass, {type(module).__name__}"]
    options = {name: getattr(module, name, plain[0]) for name, plain in _PLAIN.items()}
    return [f"{name}={value!r}" for name, value in options.items() if value not in _PLAIN[name]]


def is_convertible(module: nn.Module) -> bool:
    """Whether :func:`convert` takes this very module."""
    return type_before_parametrizations(module) in _OURS


def _find(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if type_before_parametrizations(module) in classes]


def _become(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]], state: dict[str, Any]) -> None:
    """Make ``module`` an instance of the class that takes its class's place, with ``state``."""
    target = classes[type_before_parametrizations(module)]
    if is_parametrized(module):
        # A parametrized module has a class of its own, with a property for each parametrized weight.
        own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), own)
    module.__dict__.clear()
    module.__class__ = target
    module.__setstate__(state)
