"""One recurrent layer, and what runs it: the extension's operators, or the reference formula.

Owns that choice, and what torch must be told of the operators in Python: their shapes without data here, derivatives
and transforms in derivatives.py. Must not know stacks of layers, dropout, parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod  # unlike Size.numel, it leaves symbolic sizes symbolic
from threading import local
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import derivatives, formula, reference
from ._extension import error as extension_error
from ._extension import extension as extension

BACKENDS = ("auto", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of the operators


class _Choice(local):
    """What :func:`backend` chose. A thread-local object, because dynamo does not trace a ContextVar."""

    backend = "auto"


_choice = _Choice()


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
    save: int = 0,
    seed: Tensor | None = None,
    noise: Sequence[float] = (),
    layer_norm: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one layer, in one or two directions, over a whole sequence.

    The arguments but ``save`` and ``backend``, and the result ``(output, h_n, c_n, c)``, are those of
    :func:`rnnfast.reference.layer`, but for one thing: without gradients and with ``save = 0``, ``c`` has no elements.

    Args:
        save: what is kept for backward: 1 the states, from which backward recomputes the gates; 2 the gates too; 0 the
            gates where a gradient is wanted, and nothing elsewhere. A choice of memory against time, never of result.
        backend: ``"auto"``, ``"reference"``, or None for what :func:`backend` chose around the call.

    The operators run in first and second derivatives, forward-mode ones, and the transforms of ``torch.func``. What has
    no kernel takes the reference formula: third derivatives; second and forward-mode ones of a cell with two products a
    step, with noise or layer_norm; with noise or layer_norm all of ``torch.func``, and the gradient of zoneout's
    expectation.

    Raises:
        ValueError: a dtype or a value that the operator does not take: an input of integers, batch_sizes that do not
            fit, noise that is neither a probability below 1 nor a first unit, layer_norm for a cell that has none,
            another ``save`` or ``backend``.
        RuntimeError: a shape or a device that it does not take, such as CUDA where the extension was built without; a
            tensor of another dtype than the input; lengths outside [0, T] (on the CPU; elsewhere they are clamped, for
            a check would wait for the device).
    """
    if backend is None:
        backend = _choice.backend
    else:
        _check_backend(backend)
    if backend == "reference" or extension is None:
        return formula.reference_layer(
            cell, input, h0, c0, weights, batch_sizes, lengths, reset, seed, noise, layer_norm
        )
    # torch.ops costs microseconds more than the direct way, but tracers and overrides see only what goes through it.
    if torch.compiler.is_compiling() or has_torch_function(
        (input, h0, c0, *weights, batch_sizes, lengths, reset, seed)
    ):
        operator = formula.find_operator(cell)
    else:
        operator = _direct[cell]
    output, h_n, c_n, c, _ = operator(
        input, h0, c0, weights, batch_sizes, lengths, reset, save, seed, noise, layer_norm
    )
    return output, h_n, c_n, c


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, for this thread, what runs the layers called inside: ``"auto"`` or ``"reference"``.

    ``"auto"`` is the fused operators, or the reference formula where the extension was not built. Raises ValueError
    for another name.
    """
    _check_backend(name)
    outer, _choice.backend = _choice.backend, name
    try:
        yield
    finally:
        _choice.backend = outer


@contextmanager
def cuda_engine(name: str) -> Iterator[None]:
    """Force what runs layers on CUDA inside, forward and backward: one of ``extension.cuda_engines``, such as
    ``"stepwise"``. For tests and measurements; without it the plan of ``csrc/plan.h`` chooses.

    It counts for all threads, since backward runs in autograd's own. A layer called inside that the engine cannot run
    raises a RuntimeError that names the limit.

    Raises:
        ValueError: no engine has that name.
        RuntimeError: there is no extension.
    """
    if extension is None:
        raise RuntimeError(extension_error)
    extension.force_cuda_engine(name)
    _forced_engines.append(name)
    try:
        yield
    finally:
        _forced_engines.pop()
        extension.force_cuda_engine(_forced_engines[-1] if _forced_engines else None)


_forced_engines: list[str] = []


def active_backend(backend: str | None = None) -> tuple[str, str]:
    """What would run a layer called here with ``backend``, ``"operators"`` or ``"reference"``, and why the latter."""
    if (backend or _choice.backend) == "reference":
        return "reference", "backend 'reference' was chosen"
    if extension is None:
        return "reference", extension_error
    return "operators", ""


def missing_kernels(device_type: str) -> str:
    """Why the operators do not run on a kind of device; empty if they do."""
    if extension is None:
        return extension_error
    if device_type == "cuda":
        reason = extension.build_info()["no_cuda_reason"]
        return f"the extension rnnfast._C was built without CUDA kernels: {reason}" if reason else ""
    return "" if device_type == "cpu" else f"there are no kernels for {device_type}"


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")


# ---------------------------------------------------------------------------------------------- fake kernels
# One meta tensor among others is enough to bring a call here, where the result of the others would have no values.
def _check_devices(
    input: Tensor, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None, lengths: Tensor | None
) -> None:
    device, cpu = input.device, torch.device("cpu")
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise RuntimeError(f"expected every tensor on the input's device {device}, got one on {tensor.device}")
    for name, tensor in (("batch_sizes", batch_sizes), ("lengths", lengths)):
        if tensor is not None and tensor.device not in (device, cpu):
            raise RuntimeError(f"{name}: expected cpu or the input's device {device}, got {tensor.device}")


def _fake_layer(
    gates: int,  # of the cell
    saved_values: int,  # of the cell, per unit and step
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    save: int,
    seed: Tensor | None = None,
    noise: Sequence[float] = (),
    layer_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(input, (h0, c0, *weights, reset, seed), batch_sizes, lengths)
    directions, _, output_size = h0.shape
    hidden_size = output_size if c0 is None else c0.shape[2]
    shape = input.shape[:-1]
    output = input.new_empty(*shape, directions * output_size)
    c_n = input.new_empty(0 if c0 is None else c0.shape)
    c = input.new_empty((*shape, directions * hidden_size) if save and c0 is not None else 0)
    saved_values = 2 * gates if layer_norm else saved_values
    # With numbers of the row, of the type of sums: kNormNumbers in csrc/params.h.
    width = saved_values * hidden_size + (2 * (2 if input.itemsize == 2 else 1) if layer_norm else 0)
    saved = input.new_empty((directions, prod(shape), width) if save == 2 and saved_values else 0)
    return output, input.new_empty(h0.shape), c_n, c, saved


def _fake_layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_c: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    output: Tensor,
    c: Tensor,
    saved: Tensor,
    output_mask: Sequence[bool],
    seed: Tensor | None = None,
    noise: Sequence[float] = (),
    layer_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grads = (grad_output, grad_h_n, grad_c_n, grad_c)
    _check_devices(input, (h0, c0, *weights, reset, output, c, saved, seed, *grads), batch_sizes, lengths)
    grad_input, grad_h0, grad_c0 = (
        input.new_empty(tensor.shape if wanted and tensor is not None else 0)
        for tensor, wanted in zip((input, h0, c0), output_mask[:3], strict=True)
    )
    return grad_input, grad_h0, grad_c0, [weight.new_empty(weight.shape) for weight in weights if output_mask[3]]


def _fake_backward_with_states(*arguments: Any) -> tuple[Any, ...]:
    output = arguments[11]
    return *_fake_layer_backward(*arguments), output.new_empty(output.shape)


def _fake_grouped_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *of_backward, groups = arguments
    *grads, weights = _fake_layer_backward(*of_backward)
    return *grads, [weight.new_empty(groups, *weight.shape) for weight in weights]  # type: ignore[return-value]


def _fake_jvp(t_input: Any, t_h0: Any, t_c0: Any, t_weights: Any, *arguments: Any) -> tuple[Tensor, ...]:
    input, h0, c0, weights, batch_sizes, lengths, reset, output, c, saved = arguments
    tangents = (t_input, t_h0, t_c0, *t_weights)
    _check_devices(input, (h0, c0, *weights, reset, output, c, saved, *tangents), batch_sizes, lengths)
    t_states = [input.new_empty(0 if c0 is None else part.shape) for part in (c0, c)]
    return input.new_empty(output.shape), input.new_empty(h0.shape), *t_states


def _fake_backward_jvp(*arguments: Any) -> tuple[Any, ...]:
    t_grads, tangents, grads = arguments[:4], arguments[4:8], arguments[8:12]
    *layer, output, c, saved, output_mask = arguments[12:23]
    _check_devices(layer[0], (*t_grads, *grads, *arguments[23:]), None, None)
    t_results = _fake_jvp(*tangents, *layer, output, c, saved)
    return *t_results, *_fake_layer_backward(*(*grads, *layer, output, c, saved, output_mask))


# ------------------------------------------------------------------------------------ CUDA tensors in a CPU build
def _refuse_cuda(reason: str, *_arguments: object) -> NoReturn:
    raise RuntimeError(f"expected CPU tensors, got CUDA ones: {reason}")


# ------------------------------------------------------------------------------------ what torch is told of operators
_direct: dict[str, Any] = {}  # each cell's operator, by the shortest way
_libraries: dict[str, Any] = {}  # what is registered lives as long as they do


def _register_formulas(namespace: str, qualify: Callable[[str], str]) -> None:
    """The operators of the formula; ``qualify`` makes a cell's name of that in a schema."""

    def qualified(run: Callable[..., Any], cell: str, *arguments: Any) -> Any:
        return run(qualify(cell), *arguments)

    _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    for name, run in (
        ("reference", formula.layer),
        ("reference_backward", formula.backward),
        ("reference_jvp", formula.jvp),
        ("reference_backward_jvp", formula.backward_jvp),
    ):
        _libraries[namespace].impl(name, partial(qualified, run), "CompositeImplicitAutograd")


def _register_cell(cell: str, saved_values: int, no_cuda: str) -> None:
    """The shapes, the transforms and, where there are no kernels for CUDA, the reason."""
    namespace, name = formula.names(cell)
    library = _libraries[namespace]
    for suffix, fake in (
        ("", partial(_fake_layer, reference.find_cell(cell).gates, saved_values)),
        ("_backward", _fake_layer_backward),
        ("_backward_with_states", _fake_backward_with_states),
        ("_grouped_backward", _fake_grouped_backward),
        ("_jvp", _fake_jvp),
        ("_backward_jvp", _fake_backward_jvp),
    ):
        torch.library.register_fake(f"{namespace}::{name}{suffix}", fake)
    derivatives.register(library, cell)
    if no_cuda:
        for suffix in ("", "_backward", "_backward_with_states", "_grouped_backward", "_jvp", "_backward_jvp"):
            library.impl(name + suffix, partial(_refuse_cuda, no_cuda), "CUDA")


def register_own_cell(cell: str, saved_values: int, form: reference.Cell, no_cuda: str) -> None:
    """Make a cell known whose library of operators has been loaded; ``cell`` is "namespace::name", ``no_cuda`` says why
    the library has no kernels for CUDA, and is empty if it has."""
    namespace, _ = formula.names(cell)
    reference.OWN_CELLS[cell] = form
    _register_formulas(namespace, lambda name: f"{namespace}::{name}")
    _register_cell(cell, saved_values, no_cuda)
    _direct[cell] = formula.find_operator(cell)


if extension is not None:
    _register_formulas("rnnfast", lambda name: name)
    _no_cuda = missing_kernels("cuda")
    if _no_cuda:
        _no_cuda += ". Build rnnfast again with the nvcc of torch's CUDA version, or choose backend='reference'"
    for _cell in reference.CELLS:
        _register_cell(_cell, extension.saved_values[_cell], _no_cuda)
        _direct[_cell] = getattr(extension, _cell)
