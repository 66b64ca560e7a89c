"""Derivatives of the operators as torch.func sees them.

Each ``torch.autograd.Function`` here is one operator: its derivatives are other operators, and vmap makes one call of
all samples, their rows merged into one batch. Must not know which backend runs a layer, layers, parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo
from torch.autograd import Function

from . import formula, reference
from .formula import OptionalTensors, find_operator, names, or_zeros, present, vjp

# A Function takes tensors flat: lists spliced, None where there is none. The layer's are
#     input, h0, c0, batch_sizes, lengths, reset, *weights
# and before them stand what the operator takes besides, in the operator's order, but for tangents of weights, which
# come last.

# Where a tensor has the rows of the batch: the axis, padded and packed.
_STEPS, _STATES, _SAVED, _LENGTHS, _RESET = (1, 0), (1, 1), (1, 1), (0, 0), (1, 0)
_LAYER = (_STEPS, _STATES, _STATES, None, _LENGTHS, _RESET)
_RESULTS = (_STEPS, _STATES, _STATES, _STEPS)  # output, h_n, c_n, c
_ARGUMENTS = (_STEPS, _STATES, _STATES)  # input, h0, c0
_KEPT = (_STEPS, _STEPS, _SAVED)  # output, c, saved


@dataclass(frozen=True)
class _Call:
    """A call of an operator, without its tensors."""

    cell: str
    weights: int  # how many
    save: int = 2
    output_mask: tuple[bool, ...] = (False,) * 4
    groups: int = 0  # of backward: gradients of the weights for each group of rows apart; row b is in group b % groups

    def layer(self, tensors: OptionalTensors) -> list[Any]:
        """The layer's arguments in the operator's order."""
        return [*tensors[:3], list(tensors[6 : 6 + self.weights]), *tensors[3:6]]

    def operator(self, suffix: str) -> Any:
        return find_operator(self.cell, suffix)


def _flat(layer: Sequence[Any]) -> list[Any]:
    """The inverse of :meth:`_Call.layer`."""
    return [*layer[:3], *layer[4:7], *layer[3]]


def _all_or_none(tangents: OptionalTensors, of: Sequence[Tensor]) -> list[Tensor]:
    """Tangents of weights as the operators take them."""
    return [] if all(tangent is None for tangent in tangents) else list(or_zeros(tangents, of))


def _vmap(
    run: Callable[..., tuple[Tensor, ...]],
    head: Sequence[Any],
    results: Sequence[Any],
    info: Any,
    in_dims: Sequence[int | None],
    call: _Call,
    *tensors: Tensor | None,
    kept: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """One call whose batch holds the rows of all samples, row b of sample v at b * samples + v.

    Where weights differ between samples, and where a kernel would have to tell the samples' weight gradients apart and
    cannot, a call for each sample. ``head`` and ``results`` say where the rows lie in the tensors before the layer's
    and in what ``run`` returns; its results beyond these are gradients of weights, or their tangents. ``kept`` says
    where in ``head`` stands what forward kept.
    """
    samples, in_dims = info.batch_size, in_dims[1:]
    of_each_lengths = in_dims[len(head) + 4] is not None
    if run is _run_forward and of_each_lengths:
        # Each sample has its own lengths: what forward keeps of the gates lies in the order of all samples' living rows
        # together, and would be no sample's own when a later call takes it apart. States keep their places.
        call = replace(call, save=min(call.save, 1))
    axes = [*head, *_LAYER]
    axes += [None] * (len(tensors) - len(axes))
    packed = tensors[len(head) + 3] is not None
    one_call = all(dim is None for dim, axis in zip(in_dims, axes, strict=True) if axis is None)
    if call.output_mask[3] and not (run is _run_backward and _can_group(call, tensors, in_dims)):
        one_call = False
    if of_each_lengths and kept is not None and in_dims[kept + 2] is not None:
        one_call = False  # gates that a sample's own forward kept
    if not one_call:
        each = []
        for sample in range(samples):
            selected = zip(tensors, in_dims, strict=True)
            one = (t if d is None or t is None else t.select(d, sample).contiguous() for t, d in selected)
            each.append(run(call, *one))
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])

    def merge(tensor: Tensor | None, dim: int | None, axis: tuple[int, int] | None) -> Tensor | None:
        if tensor is None or axis is None:
            return tensor
        at = axis[packed]
        of_sample = tensor if dim is None else tensor.select(dim, 0)
        if of_sample.dim() <= at:  # nothing kept
            return of_sample
        if dim is not None:
            return tensor.movedim(dim, at + 1).flatten(at, at + 1)
        return tensor.repeat_interleave(samples, at)

    merged = [merge(*part) for part in zip(tensors, in_dims, axes, strict=True)]
    if packed:
        batch_sizes = tensors[len(head) + 3]
        assert batch_sizes is not None
        merged[len(head) + 3] = batch_sizes * samples
    groups = max(call.groups, 1)
    found = run(replace(call, groups=groups * samples) if call.output_mask[3] else call, *merged)
    parts: list[Tensor] = []
    out_dims: list[int | None] = []
    for result, axis in zip(found, results, strict=False):
        at = axis[packed]
        absent = result.dim() == 1  # without elements
        parts.append(result if absent else result.unflatten(at, (result.size(at) // samples, samples)))
        out_dims.append(None if absent else at + 1)
    for grad in found[len(results) :]:
        parts.append(grad.unflatten(0, (groups, samples)) if call.groups else grad)
        out_dims.append(1 if call.groups else 0)
    return tuple(parts), tuple(out_dims)


def _only_vmap() -> bool:
    """Whether no transform that is active differentiates."""
    vmap = torch._C._functorch.TransformType.Vmap
    return all(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack() or ())


def _can_group(call: _Call, tensors: OptionalTensors, in_dims: Sequence[int | None]) -> bool:
    """Whether a kernel gives weight gradients of groups, and nobody asks for a derivative of them, which it has not."""
    grads, (input, h0, c0), weights = tensors[:4], tensors[7:10], tensors[13:]
    assert input is not None
    assert h0 is not None
    directions = h0.size(1 if in_dims[8] == 0 else 0)
    if call.weights // directions % 2:  # a projection
        return False
    if reference.find_cell(call.cell).two_products:
        return False
    return _only_vmap() and not _requires_grad((*grads, input, h0, c0, *weights))


def _run_forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return call.operator("")(*call.layer(tensors), call.save)  # type: ignore[no-any-return]


def _run_backward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors``: the gradients of the results, what forward kept, the layer's."""
    arguments = (*tensors[:4], *call.layer(tensors[7:]), *tensors[4:7], call.output_mask)
    if call.groups:
        *grads, weights = call.operator("_grouped_backward")(*arguments, call.groups)
    else:
        *grads, weights = call.operator("_backward")(*arguments)
    return *grads, *weights


def _tangents(call: _Call, tensors: OptionalTensors) -> list[Any]:
    """Of the layer's arguments, as an operator takes them.

    ``tensors``: those of input, h0, c0, then the layer's tensors, then the tangents of weights, none or all.
    """
    return [*tensors[:3], list(tensors[9 + call.weights :])]


def _is_recorded(tensors: OptionalTensors) -> bool:
    """Whether autograd records a call made now, outside of all transforms.

    The operators of tangents take the formula then, for a derivative that may never be asked for: parameters often
    require gradients while a transform differentiates by something else. The Functions wait until it is asked for.
    """
    return torch._C._functorch.peek_interpreter_stack() is None and _requires_grad(tensors)


def _requires_grad(tensors: OptionalTensors) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present(*tensors))


def _run_jvp(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors``: what forward kept, then those of :func:`_tangents`."""
    if _is_recorded(tensors):
        return _Jvp.apply(call, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    layer = call.layer(tensors[6:])
    return call.operator("_jvp")(*_tangents(call, tensors[3:]), *layer, *tensors[:3])  # type: ignore[no-any-return]


def _run_backward_jvp(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors``: the tangents of the results' gradients, these gradients, then those of :func:`_run_jvp`."""
    if _is_recorded(tensors):
        return _BackwardJvp.apply(call, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    t_grads, grads, kept, rest = tensors[:4], tensors[4:8], tensors[8:11], tensors[11:]
    operator = call.operator("_backward_jvp")
    layer = call.layer(rest[3:])
    *tangents, weights = operator(*t_grads, *_tangents(call, rest), *grads, *layer, *kept, call.output_mask)
    return *tangents, *weights


def _formula_jvp(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What :func:`_run_jvp` gives, differentiable."""
    return formula.jvp(call.cell, *_tangents(call, tensors[3:]), *call.layer(tensors[6:]))


def _formula_backward_jvp(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What :func:`_run_backward_jvp` gives, differentiable."""
    t_grads, grads, rest = tensors[:4], tensors[4:8], tensors[11:]
    arguments = (*t_grads, *_tangents(call, rest), *grads, *call.layer(rest[3:]), call.output_mask)
    *tangents, weights = formula.backward_jvp(call.cell, *arguments)
    return *tangents, *weights


def _gradients_of_layer(call: _Call, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Of the layer's flat tensors, from what an operator returns for those of the output_mask."""
    weights = list(grads[3:]) if call.output_mask[3] else [None] * call.weights
    arguments = [grad if wanted else None for grad, wanted in zip(grads[:3], call.output_mask[:3], strict=True)]
    return [*arguments, None, None, None, *weights]


def _wanted(needed: Sequence[bool]) -> tuple[bool, ...]:
    """The output_mask, from what is needed of the layer's flat tensors."""
    return (*needed[:3], any(needed[6:]))


def _needed(ctx: Any) -> list[bool]:
    """Of which tensors somebody needs a gradient.

    A transform asks for those of its own level alone: a parameter that requires a gradient outside of all transforms
    gets it there.
    """
    return [needed and own for needed, own in zip(ctx.needs_input_grad[1:], ctx.own, strict=True)]


def _check_not_grouped(call: _Call) -> None:
    if call.groups:
        raise NotImplementedError(f"rnnfast.{call.cell}_grouped_backward has no derivative")


def _save(ctx: Any, call: _Call, tensors: OptionalTensors, arguments: OptionalTensors) -> None:
    """``tensors`` for the derivatives of a Function of ``arguments``."""
    ctx.call = call
    transform = torch._C._functorch.peek_interpreter_stack()
    ctx.own = [
        transform is None or (t is not None and torch._C._functorch.maybe_get_level(t) == transform.level())
        for t in arguments
    ]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


class _Forward(Function):
    forward = staticmethod(_run_forward)
    vmap = staticmethod(partial(_vmap, _run_forward, (), (*_RESULTS, _SAVED)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        every_output, _, c_n, c, saved = output
        _save(ctx, call, [every_output, c, saved, *tensors], tensors)
        ctx.mark_non_differentiable(*([c_n, c, saved] if tensors[2] is None else [saved]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = replace(ctx.call, output_mask=_wanted(_needed(ctx)))
        return None, *_gradients_of_layer(call, _run_backward(call, *grads[:4], *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        t_layer = tangents[1:]
        t_weights = _all_or_none(t_layer[6:], tensors[9:])
        t_results = _run_jvp(ctx.call, *tensors[:3], *t_layer[:3], *tensors[3:], *t_weights)
        return *(t_results if tensors[5] is not None else (*t_results[:2], None, None)), None


class _Backward(Function):
    forward = staticmethod(_run_backward)
    vmap = staticmethod(partial(_vmap, _run_backward, (*_RESULTS, *_KEPT), _ARGUMENTS, kept=4))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        _save(ctx, call, tensors, tensors)
        ctx.mark_non_differentiable(
            *(grad for grad, wanted in zip(output, call.output_mask[:3], strict=False) if not wanted)
        )

    # As LayerBackwardFunction of csrc/ops/autograd.cpp. What forward kept has no derivative of its own.
    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        _check_not_grouped(ctx.call)
        tensors = ctx.saved_tensors
        grads, kept, layer = tensors[:4], tensors[4:7], tensors[7:]
        call = replace(ctx.call, output_mask=_wanted(_needed(ctx)[7:]))
        t_weights = _all_or_none(tangents[3:], layer[6:]) if ctx.call.output_mask[3] else []
        arguments = [*[None] * 4, *grads, *kept, *tangents[:3], *layer, *t_weights]
        results = _run_backward_jvp(call, *arguments)
        wanted = zip(results[:4], _needed(ctx)[:4], strict=True)
        t_results = [tangent if needed else None for tangent, needed in wanted]
        return None, *t_results, None, None, None, *_gradients_of_layer(call, results[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        _check_not_grouped(ctx.call)
        tensors = ctx.saved_tensors
        grads, kept, layer = tensors[:4], tensors[4:7], tensors[7:]
        t_layer = tangents[8:]
        t_weights = _all_or_none(t_layer[6:], layer[6:])
        arguments = [*tangents[1:5], *grads, *kept, *t_layer[:3], *layer, *t_weights]
        results = _run_backward_jvp(ctx.call, *arguments)[4:]
        mask = ctx.call.output_mask
        return *(tangent if wanted else None for tangent, wanted in zip(results[:3], mask[:3], strict=True)), *results[
            3:
        ]


# Third derivatives: those of the formula. Its tensors are those of the operator; what forward kept has no derivative.
def _of_formula(
    run: Callable[..., tuple[Tensor, ...]],
    call: _Call,
    tensors: OptionalTensors,
    chosen: Sequence[int],
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The formula as a function of the chosen tensors alone, and these."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = list(tensors)
        for index, value in zip(chosen, values, strict=True):
            replaced[index] = value
        return run(call, *replaced)

    return function, present(*(tensors[index] for index in chosen))


def _backward_of_formula(run: Any, kept: slice, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    without = range(len(tensors))[kept]
    chosen = [index for index, needed in enumerate(_needed(ctx)) if needed and index not in without]
    function, primals = _of_formula(run, ctx.call, tensors, chosen)
    results, pull = vjp(function, *primals)
    found = dict(zip(chosen, pull(or_zeros(grads, results)), strict=True))
    return None, *(found.get(index) for index in range(len(tensors)))


def _jvp_of_formula(run: Any, kept: slice, ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    without = range(len(tensors))[kept]
    along = dict(enumerate(tangents[1:]))
    chosen = [index for index, tangent in along.items() if tangent is not None and index not in without]
    function, primals = _of_formula(run, ctx.call, tensors, chosen)
    results, pushed = torch.func.jvp(function, tuple(primals), tuple(along[index] for index in chosen))  # type: ignore[misc]
    return tuple(
        None if result.dim() == 1 and not result.numel() else t for result, t in zip(results, pushed, strict=True)
    )


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, *tensors = inputs
    _save(ctx, call, tensors, tensors)
    ctx.mark_non_differentiable(*(result for result in output if result.dim() == 1 and result.numel() == 0))


class _Jvp(Function):
    forward = staticmethod(_run_jvp)
    setup_context = staticmethod(_save_all)
    jvp = staticmethod(partial(_jvp_of_formula, _formula_jvp, slice(0, 3)))
    vmap = staticmethod(partial(_vmap, _run_jvp, (*_KEPT, *_ARGUMENTS), _RESULTS, kept=0))

    # <grads, J t>, J the layer's derivative at x: the gradient by t is backward's, and that by x backward's tangent.
    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        kept, layer, t_weights = tensors[:3], tensors[6 : 12 + ctx.call.weights], tensors[12 + ctx.call.weights :]
        needed = _needed(ctx)
        of_layer = replace(ctx.call, output_mask=_wanted(needed[6 : 12 + ctx.call.weights]))
        of_tangents = replace(ctx.call, output_mask=(*needed[3:6], any(needed[12 + ctx.call.weights :])))
        by_layer = _run_backward_jvp(of_layer, *[None] * 4, *grads[:4], *kept, *tensors[3:6], *layer, *t_weights)
        by_tangents = _run_backward(of_tangents, *grads[:4], *kept, *layer)
        states = [g if wanted else None for g, wanted in zip(by_tangents[:3], needed[3:6], strict=True)]
        weights = by_tangents[3:] if of_tangents.output_mask[3] else [None] * len(t_weights)
        return None, None, None, None, *states, *_gradients_of_layer(of_layer, by_layer[4:]), *weights


class _BackwardJvp(Function):
    forward = staticmethod(_run_backward_jvp)
    setup_context = staticmethod(_save_all)
    backward = staticmethod(partial(_backward_of_formula, _formula_backward_jvp, slice(8, 11)))
    jvp = staticmethod(partial(_jvp_of_formula, _formula_backward_jvp, slice(8, 11)))
    vmap = staticmethod(
        partial(_vmap, _run_backward_jvp, (*_RESULTS, *_RESULTS, *_KEPT, *_ARGUMENTS), (*_RESULTS, *_ARGUMENTS), kept=8)
    )


# An operator's own arguments as its Function's, and how many of its results stand before a list; None for no list.
_Unpacked = tuple[type[Any], _Call, Sequence[Any], int | None]


def _unpack_forward(cell: str, *arguments: Any) -> _Unpacked:
    *layer, save = arguments
    if not save and not _only_vmap():  # backward needs more than nothing; outside of all, the operator sees to that
        save = 2
    return _Forward, _Call(cell, len(layer[3]), save=save), _flat(layer), None


def _unpack_backward(cell: str, *arguments: Any) -> _Unpacked:
    grads, layer, kept, (output_mask, *groups) = arguments[:4], arguments[4:11], arguments[11:14], arguments[14:]
    call = _Call(cell, len(layer[3]), output_mask=tuple(output_mask), groups=groups[0] if groups else 0)
    return _Backward, call, (*grads, *kept, *_flat(layer)), 3


def _unpack_jvp(cell: str, *arguments: Any) -> _Unpacked:
    tangents, t_weights, layer, kept = arguments[:3], arguments[3], arguments[4:11], arguments[11:]
    return _Jvp, _Call(cell, len(layer[3])), (*kept, *tangents, *_flat(layer), *t_weights), None


def _unpack_backward_jvp(cell: str, *arguments: Any) -> _Unpacked:
    t_grads, tangents, t_weights, grads = arguments[:4], arguments[4:7], arguments[7], arguments[8:12]
    layer, kept, output_mask = arguments[12:19], arguments[19:22], arguments[22]  # grad_states follow from these
    call = _Call(cell, len(layer[3]), output_mask=tuple(output_mask))
    return _BackwardJvp, call, (*t_grads, *grads, *kept, *tangents, *_flat(layer), *t_weights), 7


def _with_list(results: Sequence[Tensor], single: int | None) -> tuple[Any, ...]:
    return tuple(results) if single is None else (*results[:single], list(results[single:]))


def _without_variants(own: int, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first ``own`` arguments of an operator; then seed, noise and layer_norm, or nothing where they are off."""
    variants = arguments[own:]  # of what has its default the dispatcher drops the last
    varied = any(any(variant) if isinstance(variant, (list, tuple)) else variant for variant in variants[1:])
    return arguments[:own], variants if varied else ()


def _by_formula(
    unpack: Callable[..., _Unpacked], cell: str, arguments: Sequence[Any], variants: Sequence[Any]
) -> tuple[Any, ...]:
    """An operator whose derivatives the kernels of transforms do not have: with noise or layer normalisation, or of
    forward mode within itself."""
    if unpack is _unpack_backward:  # but for what forward kept
        return formula.backward(cell, *arguments[:11], arguments[14], *variants)
    *layer, _ = arguments  # but for what forward is to keep
    return *formula.layer(cell, *layer, *variants), arguments[0].new_empty(0)


def _loses_tangents(unpack: Callable[..., _Unpacked]) -> bool:
    """Whether a Function would get a derivative wrong: forward mode of forward mode.

    torch calls a Function's ``jvp`` with forward mode off, and the Functions called there leave it so for the levels
    outside: their tangents would be missing without a word.
    """
    if unpack not in (_unpack_forward, _unpack_backward):  # the others are called where one of these was
        return False
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in torch._C._functorch.get_interpreter_stack() or ()) > 1


def _transformed(unpack: Callable[..., _Unpacked], own: int, cell: str, *arguments: Any) -> tuple[Any, ...]:
    """The operator where a transform of torch.func is active."""
    arguments, variants = _without_variants(own, arguments)
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    autocast_dtype = reference.autocast_dtype(first)
    if autocast_dtype is not None:
        # The casts belong outside, where the transform sees them: what is kept has one dtype.
        if unpack is _unpack_forward:
            arguments = tuple(_cast(argument, autocast_dtype) for argument in arguments)
        with torch.autocast(first.device.type, enabled=False):
            return _transformed(unpack, own, cell, *arguments, *variants)
    if variants or _loses_tangents(unpack):
        return _by_formula(unpack, cell, arguments, variants)
    function, call, tensors, single = unpack(cell, *arguments)
    return _with_list(function.apply(call, *tensors), single)


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor):
        return reference.cast(argument, dtype)
    return [reference.cast(tensor, dtype) for tensor in argument] if isinstance(argument, (list, tuple)) else argument


def _vectorized(unpack: Callable[..., _Unpacked], own: int, cell: str, *arguments: Any) -> tuple[Any, ...]:
    """The operator inside the vmap of autograd itself, which is_grads_batched and vectorize=True use."""
    arguments, variants = _without_variants(own, arguments)
    if variants:
        raise NotImplementedError(
            f"rnnfast.{cell}: batched gradients with recurrent dropout, zoneout or layer normalisation"
        )
    function, call, tensors, single = unpack(cell, *arguments)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level != 1:
        raise NotImplementedError(f"rnnfast.{cell}: batched gradients inside batched gradients; torch.func.vmap nests")
    batched = torch._C._dispatch_key_parse("Batched")
    dims = [0 if t is not None and torch._C._dispatch_keys(t).has(batched) else None for t in tensors]
    # With a batch dimension, _remove_batch_dim does not look at the size it is told.
    physical = [t if d is None else torch._remove_batch_dim(t, level, 1, d) for t, d in zip(tensors, dims, strict=True)]
    size = next(t.size(0) for t, d in zip(physical, dims, strict=True) if d == 0)
    results, out_dims = function.vmap(VmapInfo(size, "error"), (None, *dims), call, *physical)
    # Samples come first in memory, as forward mode's check of a tangent's layout wants them.
    wrapped = [
        r if d is None else torch._add_batch_dim(r.movedim(d, 0).contiguous(), 0, level)
        for r, d in zip(results, out_dims, strict=True)
    ]
    return _with_list(wrapped, single)


def register(library: Any, cell: str) -> None:
    _, name = names(cell)
    for suffix, unpack, own in (  # own: arguments before seed, noise and layer_norm
        ("", _unpack_forward, 8),
        ("_backward", _unpack_backward, 15),
        ("_grouped_backward", _unpack_backward, 16),
        ("_jvp", _unpack_jvp, 14),
        ("_backward_jvp", _unpack_backward_jvp, 24),
    ):
        library.impl(name + suffix, partial(_transformed, unpack, own, cell), "FuncTorchDynamicLayerFrontMode")
        library.impl(name + suffix, partial(_vectorized, unpack, own, cell), "Batched")
