"""Owns: the account of which engine will run a module's layers, and why not a faster one. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import cells, functional, modules, ops, own_cell
from .convert import is_convertible


@dataclass(frozen=True)
class LayerEngine:
    """What will run one layer, or a module of torch.nn's."""

    name: str  # of the module in the model, and the layer's number
    engine: str  # "cpu (avx512)", "cuda persistent_cta", "reference", and how often; "torch.nn"; "none": a call raises
    reason: str  # why no faster engine runs; empty if there is none

    def __str__(self) -> str:
        return f"{self.name}: {self.engine}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Explanation:
    """What will run each recurrent layer of a model; prints as one line a layer."""

    layers: tuple[LayerEngine, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no recurrent layer or cell"


def explain(module: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Say which engine will run each recurrent layer and cell of ``module``, and why not a faster one; those that are
    torch.nn's and not rnnfast's are named as such.

    Args:
        module: a layer, a cell, or a model with some inside.
        inputs, kwargs: the call to explain, which is not made. Where ``module`` is a layer itself, its steps and batch
            are those of its input; without one, and for layers inside a model, one step of one row is assumed.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    layers = []
    steps, batch = _steps_and_batch(module, inputs[0] if inputs else kwargs.get("input"))
    for name, part in module.named_modules():
        label = f"{name} ({type(part).__name__})" if name else type(part).__name__
        if not isinstance(part, (modules._Layers, cells._Cell)):
            if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
                layers.append(LayerEngine(label, "torch.nn", _torchs_reason(part)))
            continue
        engine, reason = _engine(part, steps, batch)
        if isinstance(part, modules._Layers):
            calls = _calls(part)
            if part.num_heads > 1 and engine != "none":
                engine += f", {part.num_heads} heads in {'one call' if calls == 1 else f'{calls} calls'}"
            layers += [LayerEngine(f"{label} layer {index}", engine, reason) for index in range(part.num_layers)]
        else:
            layers.append(LayerEngine(label, engine, reason))
    return Explanation(tuple(layers))


def _torchs_reason(part: nn.Module) -> str:
    if is_convertible(part):
        return "no layer of rnnfast; rnnfast.convert makes it one"
    return "no layer of rnnfast, and rnnfast.convert leaves subclasses alone"


def _steps_and_batch(module: nn.Module, input: Any) -> tuple[int, int]:
    if isinstance(module, modules._Layers):
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes
            return len(sizes), int(sizes[0]) if len(sizes) else 0
        if isinstance(input, torch.Tensor) and input.dim() in (2, 3):
            steps, batch = input.shape[:2] if input.dim() == 3 else (input.shape[0], 1)
            return (batch, steps) if module.batch_first and input.dim() == 3 else (steps, batch)
    return 1, 1


def _calls(part: modules._Layers[Any] | cells._Cell) -> int:
    """How often the engine runs for a layer: heads may share a call."""
    if isinstance(part, cells._Cell) or part.num_heads == 1:
        return 1
    return part.num_heads // functional.heads_a_call(part.mode.lower(), part.hidden_size, part.num_heads)


def _engine(part: modules._Layers[Any] | cells._Cell, steps: int, batch: int) -> tuple[str, str]:
    """The engine's name, and why no faster one runs."""
    active, reason = ops.active_backend(part.backend)
    if active == "reference":
        return active, reason
    parameter = next(part.parameters())
    device = parameter.device.type
    if parameter.dtype not in ops.DTYPES:
        return "none", f"a call would raise: there are no kernels for {parameter.dtype}"
    if isinstance(part, own_cell.OwnLayers) and device in ("cpu", "cuda"):
        if device == "cpu":
            return f"cpu ({part.instruction_set})", ""
        if part.no_cuda:
            return "none", f"a call would raise: {part.no_cuda}"
        return "cuda stepwise", "a cell of its own has no persistent kernels"
    missing = ops.missing_kernels(device)
    if missing:
        return "none", missing if device == "meta" else f"a call would raise: {missing}"
    assert ops.extension is not None  # or the reference would be active
    if device == "cpu":
        return f"cpu ({ops.extension.cpu_engine(str(parameter.dtype).removeprefix('torch.'))})", ""
    return _cuda_engine(part, steps, batch, parameter)


def _cuda_engine(
    part: modules._Layers[Any] | cells._Cell, steps: int, batch: int, parameter: torch.Tensor
) -> tuple[str, str]:
    """What the plan says of forward and backward in the parameters' dtype."""
    extension: Any = ops.extension
    index = parameter.device.index
    problem = {
        "cell": part.mode.lower() if isinstance(part, modules._Layers) else part.cell,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "steps": steps,
        "batch": batch,
        "hidden_size": part.hidden_size // _calls(part),
        "directions": 2 if getattr(part, "bidirectional", False) else 1,
        "projection": getattr(part, "proj_size", 0) > 0,
        "tf32": extension.tf32_allowed(),
        "noise": part._noisy(),
        "layer_norm": getattr(part, "layer_norm", False),
        "device": extension.cuda_device(-1 if index is None else index),
    }
    forward, backward = (extension.plan(**problem, backward=backward) for backward in (False, True))
    engine = f"cuda {forward['engine']}"
    if backward["engine"] != forward["engine"]:
        engine += f", backward {backward['engine']}"
    order = extension.cuda_engines
    reasons = {
        f"{name}: {plan['against'][name]}": None  # a dictionary keeps the order and drops what is said twice
        for plan in (forward, backward)
        for name in order[: order.index(plan["engine"])]
        if name in plan["against"]
    }
    return engine, "; ".join(reasons)
