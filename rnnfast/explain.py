"""Owns: the account of which engine will run a module's layers, and why not a faster one. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from . import _extension, cells, modules, ops


@dataclass(frozen=True)
class LayerEngine:
    """What will run one layer."""

    name: str  # of the module in the model, and the layer's number
    engine: str  # "cpu (avx512)", "cuda stepwise", "reference"; "none" where nothing can run it
    reason: str  # why no faster engine runs; empty if there is none

    def __str__(self) -> str:
        return f"{self.name}: {self.engine}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Explanation:
    """What will run each recurrent layer of a model; prints as one line a layer."""

    layers: tuple[LayerEngine, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no rnnfast layer or cell"


def explain(module: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Say which engine will run each rnnfast layer and cell of ``module``, and why not a faster one.

    Args:
        module: a layer, a cell, or a model with some inside.
        inputs, kwargs: the call to explain, which is not made. The engines of this machine take every shape and form
            of input, so nothing depends on them.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    layers = []
    for name, part in module.named_modules():
        if not isinstance(part, (modules._Layers, cells._Cell)):
            continue
        engine, reason = _engine(part)
        label = f"{name} ({type(part).__name__})" if name else type(part).__name__
        if isinstance(part, modules._Layers):
            layers += [LayerEngine(f"{label} layer {index}", engine, reason) for index in range(part.num_layers)]
        else:
            layers.append(LayerEngine(label, engine, reason))
    return Explanation(tuple(layers))


def _engine(part: modules._Layers | cells._Cell) -> tuple[str, str]:
    """The engine's name, and why no faster one runs."""
    active, reason = ops.active_backend(part.backend)
    if active == "reference":
        return active, reason
    device = next(part.parameters()).device.type
    missing = ops.missing_kernels(device)
    if missing:
        return "none", missing if device == "meta" else f"a call would raise: {missing}"
    if device == "cpu":
        assert _extension.extension is not None  # or the reference would be active
        return f"cpu ({_extension.extension.instruction_set()})", ""
    return f"{device} stepwise", ""
