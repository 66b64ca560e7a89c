"""The formula: derivatives of the operators that have no kernel, themselves differentiable any number of times.

Of most layers it is that of the reference. A layer with a projection is one without between two products over
all steps, so that its derivatives are the operators' of that one. Must not know transforms, backends, parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference

OptionalTensors = Sequence[Tensor | None]


def names(cell: str) -> tuple[str, str]:
    """The namespace of a cell's operators, and its name there."""
    namespace, _, name = cell.rpartition("::")
    return namespace or "rnnfast", name


def find_operator(cell: str, suffix: str = "") -> Any:
    namespace, name = names(cell)
    return getattr(getattr(torch.ops, namespace), name + suffix).default


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """torch.func.vjp, by autograd alone where no transform is active: it costs less, and does not forbid saved-tensor
    hooks. ``function`` returns a tuple of tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        results, pull = torch.func.vjp(function, *primals)  # type: ignore[misc]
        return results, pull
    with torch.enable_grad():
        # A primal may have been made of another, whose gradient is not to go through it. Views keep tangents.
        own = [primal.view_as(primal) for primal in primals]
        of_own = function(*(tensor.requires_grad_() for tensor in own))

    def pull_back(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = [(result, grad) for result, grad in zip(of_own, grads, strict=True) if result.requires_grad]
        return torch.autograd.grad(
            [result for result, _ in pairs],
            own,
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            retain_graph=True,
            materialize_grads=True,
        )

    return of_own, pull_back


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def or_zeros(tensors: OptionalTensors, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True))


def _along(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The derivative of ``function`` along ``tangents``.

    It is the transpose of the transposed derivative. torch.func.jvp would do it in one pass, but not inside a
    dual_level of torch.autograd.forward_ad.
    """
    results, pull = vjp(function, *primals)
    _, push = vjp(lambda *grads: pull(grads), *(torch.zeros_like(result) for result in results))
    return push(tangents)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- operators' arguments
# Each takes the arguments of the operator of its name, in their order, but for what forward kept.
def layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *others: Any,  # batch_sizes, lengths and reset, then perhaps seed, noise and layer_norm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = _form(cell, input, h0, c0, weights, *others)
    return _four(form(*form.tensors), input)


def backward(cell: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grads, of_layer, output_mask, variants = arguments[:4], arguments[4:11], arguments[11], arguments[12:]
    form = _form(cell, *of_layer, *variants, output_mask=output_mask)
    return form.masked(form.backward(*grads[: form.results], *form.tensors))


def jvp(cell: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tangents, of_layer = arguments[:4], arguments[4:]
    form = _form(cell, *of_layer)
    return _four(form.jvp(form.tangents(*tangents)), of_layer[0])


def backward_jvp(cell: str, *arguments: Any) -> tuple[Any, ...]:
    t_grads, tangents, grads = arguments[:4], arguments[4:8], arguments[8:12]
    of_layer, output_mask = arguments[12:19], arguments[19]
    form = _form(cell, *of_layer, output_mask=output_mask)
    t_arguments = form.tangents(*tangents)
    t_results = form.jvp(t_arguments)
    at, along = (or_zeros(part[: form.results], t_results) for part in (grads, t_grads))
    return *_four(t_results, of_layer[0]), *form.masked(form.backward_jvp(at, along, t_arguments))


def _four(results: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator's output, h_n, c_n and c, from those that have elements."""
    return *results, *[like.new_empty(0)] * (4 - len(results))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------- forms
class _Form:
    """A layer by the reference, a function of its floating tensors: input, h0, c0 if there is one, weights.

    Its results are those with elements: output and h_n, and of a cell with two states c_n and c. ``output_mask`` is an
    operator's.
    """

    def __init__(
        self,
        cell: str,
        input: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        *others: Any,
        output_mask: Sequence[bool] = (True,) * 4,
    ) -> None:
        self.cell, self.others, self.output_mask = cell, others, output_mask
        self.tensors = present(input, h0, c0, *weights)
        self.has_c0 = c0 is not None
        self.results = 4 if self.has_c0 else 2

    def __call__(self, input: Tensor, h0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        c0, weights = (rest[0], rest[1:]) if self.has_c0 else (None, rest)
        return reference_layer(self.cell, input, h0, c0, weights, *self.others)[: self.results]

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The gradients of the floating tensors, from those of the results, absent ones zero, and the tensors.

        What the mask does not want may be zero.
        """
        tensors = arguments[self.results :]
        wanted = [index for index in range(len(tensors)) if self.wants(index)]

        if not wanted:
            return tuple(torch.zeros_like(tensor) for tensor in tensors)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            replaced = list(tensors)
            for index, value in zip(wanted, values, strict=True):
                replaced[index] = value
            return self(*replaced)

        results, pull = vjp(function, *(tensors[index] for index in wanted))
        found = dict(zip(wanted, pull(or_zeros(arguments[: self.results], results)), strict=True))
        return or_zeros([found.get(index) for index in range(len(tensors))], tensors)

    def wants(self, index: int) -> bool:
        """Whether the mask wants the gradient of a floating tensor."""
        return self.output_mask[index if index < 2 + self.has_c0 else 3]

    def jvp(self, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tangents of the results, from those of the floating tensors."""
        return _along(self, self.tensors, tangents)

    def backward_jvp(
        self,
        grads: tuple[Tensor, ...],
        t_grads: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """The tangents of what :meth:`backward` gives."""
        return _along(self.backward, [*grads, *self.tensors], (*t_grads, *tangents))

    def tangents(self, t_input: Any, t_h0: Any, t_c0: Any, t_weights: OptionalTensors) -> tuple[Tensor, ...]:
        """An operator's tangents as those of the floating tensors."""
        states = (t_input, t_h0, t_c0) if self.has_c0 else (t_input, t_h0)
        return or_zeros((*states, *(t_weights or [None] * (len(self.tensors) - len(states)))), self.tensors)

    def masked(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """An operator's gradients from those of the floating tensors."""
        nothing = grads[0].new_empty(0)
        states, weights = (grads[:3], grads[3:]) if self.has_c0 else ((*grads[:2], nothing), grads[2:])
        masked = (grad if wanted else nothing for grad, wanted in zip(states, self.output_mask[:3], strict=True))
        return *masked, list(weights) if self.output_mask[3] else []  # type: ignore[return-value]


def reference_layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None = None,
    noise: Sequence[float] = (),
    layer_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`rnnfast.reference.layer` with an operator's arguments."""
    options: dict[str, Any] = {"batch_sizes": batch_sizes, "lengths": lengths, "reset": reset}
    return reference.layer(cell, input, h0, c0, weights, seed=seed, noise=noise, layer_norm=layer_norm, **options)


class _Projected(_Form):
    """A layer with a projection, by the operators of one without.

    Where h = W_hr m, that layer has m for its state and W_hh W_hr for its W_hh. Before the first step there is an h but
    no m: it comes with that step's input, as further features whose weights are W_hh, and m starts from zero. So the
    derivatives are those of three functions, one behind the other:

        enter    the layer's arguments to those of the layer without a projection
        inner    that layer
        leave    m, h0 and the weights to output and h_n
    """

    def __init__(self, cell: str, *arguments: Any, **options: Any) -> None:
        super().__init__(cell, *arguments, **options)
        input, h0, c0 = self.tensors[:3]
        self.m0 = torch.zeros_like(c0)
        self.starts, self.slots, self.idle = _starts(input, h0, *self.others[:3])

    def enter(self, input: Tensor, h0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The input and the weights of the layer without a projection."""
        directions = h0.size(0)
        each = len(weights) // directions
        inner: list[Tensor] = []
        for d in range(directions):
            w_ih, w_hh, *biases, w_hr = weights[d * each : (d + 1) * each]
            of_h0 = [w_hh if other == d else torch.zeros_like(w_hh) for other in range(directions)]
            inner += [torch.cat([w_ih, *of_h0], 1), w_hh @ w_hr, *biases]
        first = [h0[d] if self.slots is None else h0[d].index_select(0, self.slots) for d in range(directions)]
        features = [torch.where(start, h, 0) for start, h in zip(self.starts, first, strict=False)]
        return torch.cat([input, *features], -1), *inner

    def leave(self, m: Tensor, m_n: Tensor, h0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The output and h_n."""
        each = len(weights) // h0.size(0)
        w_hr = weights[each - 1 :: each]
        output = [linear(rows, w) for rows, w in zip(m.chunk(h0.size(0), -1), w_hr, strict=True)]
        h_n = torch.stack([linear(rows, w) for rows, w in zip(m_n.unbind(), w_hr, strict=True)])
        return torch.cat(output, -1), torch.where(self.idle, h0, h_n)

    def enter_backward(self, grads: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradients of input, h0 and the weights, from those of what :meth:`enter` makes of them."""
        _, pull = vjp(self.enter, *tensors)
        return pull(tuple(grads))  # type: ignore[no-any-return]

    def leave_backward(self, grad_output: Tensor, grad_h_n: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradients of m, m_n, h0 and the weights, from those of what :meth:`leave` makes of them."""
        _, pull = vjp(self.leave, *tensors)
        return pull((grad_output, grad_h_n))  # type: ignore[no-any-return]

    def operator(self, suffix: str, *arguments: Any) -> Any:
        with torch.autocast(self.m0.device.type, enabled=False):  # the casts have been made
            return find_operator(self.cell, suffix)(*arguments)

    def forward(self, input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[list[Any], tuple[Tensor, ...]]:
        """The inner layer's arguments and its results: m, m_n, c_n, c, and the gates, which its derivatives read."""
        x, *inner = self.enter(input, h0, *weights)
        arguments = [x, self.m0.to(x.dtype), c0, inner, *self.others[:3]]
        return arguments, self.operator("", *arguments, 2)

    def inner_mask(self) -> list[bool]:
        """Of h0 the gradient is one of the inner layer's input."""
        of_input, of_h0, of_c0, of_weights = self.output_mask
        return [of_input or of_h0, False, of_c0, of_weights]

    def of_enter(self, grad_x: Tensor, grad_weights: Sequence[Tensor], inner: Sequence[Any]) -> list[Tensor]:
        """Gradients of what :meth:`enter` makes, zero where they are not wanted."""
        return [
            grad_x if self.inner_mask()[0] else torch.zeros_like(inner[0]),
            *(grad_weights if self.output_mask[3] else (torch.zeros_like(weight) for weight in inner[3])),
        ]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = _widened(tensors)
        _, (m, m_n, c_n, c, _) = self.forward(input, h0, c0, *weights)
        return self.narrowed((*self.leave(m, m_n, h0, *weights), c_n, c))

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        grads, (input, h0, c0, *weights) = _widened(arguments[:4]), _widened(arguments[4:])
        inner, (m, m_n, _, c, gates) = self.forward(input, h0, c0, *weights)
        left = (m, m_n, h0, *weights)
        of_left = self.leave_backward(*or_zeros(grads[:2], self.leave(*left)), *left)
        grad_x, _, grad_c0, of_inner = self.operator(
            "_backward", *of_left[:2], *grads[2:], *inner, m, c, gates, self.inner_mask()
        )
        of_entered = self.enter_backward(self.of_enter(grad_x, of_inner, inner), input, h0, *weights)
        return self.narrowed(_sum(of_entered, grad_c0, of_left))

    def jvp(self, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = _widened(self.tensors)
        t_input, t_h0, t_c0, *t_weights = _widened(tangents)
        inner, (m, m_n, _, c, gates) = self.forward(input, h0, c0, *weights)
        t_x, *t_inner = _along(self.enter, (input, h0, *weights), (t_input, t_h0, *t_weights))
        t_m, t_m_n, t_c_n, t_c = self.operator("_jvp", t_x, None, t_c0, t_inner, *inner, m, c, gates)
        t_left = _along(self.leave, (m, m_n, h0, *weights), (t_m, t_m_n, t_h0, *t_weights))
        return self.narrowed((*t_left, t_c_n, t_c))

    def backward_jvp(
        self, grads: tuple[Tensor, ...], t_grads: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = _widened(self.tensors)
        t_input, t_h0, t_c0, *t_weights = _widened(tangents)
        grads, t_grads = _widened(grads), _widened(t_grads)
        inner, (m, m_n, _, c, gates) = self.forward(input, h0, c0, *weights)
        entered, t_entered = (input, h0, *weights), (t_input, t_h0, *t_weights)
        t_x, *t_inner = _along(self.enter, entered, t_entered)
        t_m, t_m_n, *_ = self.operator("_jvp", t_x, None, t_c0, t_inner, *inner, m, c, gates)

        left, t_left = (m, m_n, h0, *weights), (t_m, t_m_n, t_h0, *t_weights)
        of_left = self.leave_backward(*grads[:2], *left)
        t_of_left = _along(self.leave_backward, (*grads[:2], *left), (*t_grads[:2], *t_left))
        kept, mask = (*inner, m, c, gates), self.inner_mask()
        inner_grads = (*of_left[:2], *grads[2:])
        grad_x, _, _, of_inner = self.operator("_backward", *inner_grads, *kept, mask)
        *_, t_grad_x, _, t_grad_c0, t_of_inner = self.operator(
            "_backward_jvp", *t_of_left[:2], *t_grads[2:], t_x, None, t_c0, t_inner, *inner_grads, *kept, mask
        )
        of_enter = self.of_enter(grad_x, of_inner, inner)
        t_of_enter = self.of_enter(t_grad_x, t_of_inner, inner)

        def enter_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.enter_backward(tensors[: len(of_enter)], *tensors[len(of_enter) :])

        t_of_entered = _along(enter_backward, (*of_enter, *entered), (*t_of_enter, *t_entered))
        return self.narrowed(_sum(t_of_entered, t_grad_c0, t_of_left))

    def narrowed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.tensors[0].dtype) for tensor in tensors)


def _sum(of_entered: Sequence[Tensor], grad_c0: Tensor, of_left: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the floating tensors, from those of ``enter``'s arguments, of c0 and of ``leave``'s arguments."""
    grad_input, *others = of_entered
    grad_h0, *grad_weights = (a + b for a, b in zip(others, of_left[2:], strict=True))
    return grad_input, grad_h0, grad_c0, *grad_weights


def _widened(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The 16-bit ones as float32: nothing is rounded between the three functions."""
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors)


def _starts(
    input: Tensor, h0: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Where a layer reads its initial states.

    Returns for each direction, ``[T, B, 1]`` or ``[N, 1]`` bool, whether a row's step does; for a packed input the row
    of h0 that belongs to each row, ``[N]``; and which rows have no step, ``[B, 1]`` bool.
    """
    device, batch = input.device, h0.size(1)
    slots = None
    if batch_sizes is None:
        step = torch.arange(input.size(0), device=device).unsqueeze(1).expand(-1, batch)
        steps = torch.full((batch,), input.size(0), device=device)
        if lengths is not None:
            steps = lengths.to(device).clamp(0, input.size(0))
        last = step + 1 == steps
    else:
        of_step = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes)
        slot = torch.arange(len(of_step)) - (batch_sizes.cumsum(0) - batch_sizes)[of_step]
        steps = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
        step, slots, last = (tensor.to(device) for tensor in (of_step, slot, of_step + 1 == steps[slot]))
        steps = steps.to(device)
    first = step == 0
    if reset is not None:
        first = first & ~reset
    return [first.unsqueeze(-1), last.unsqueeze(-1)][: h0.size(0)], slots, (steps == 0).unsqueeze(-1)


def _form(cell: str, *arguments: Any, output_mask: Sequence[bool] = (True,) * 4) -> _Form:
    h0, weights, variants = arguments[1], arguments[3], arguments[7:]
    projected = len(weights) // h0.size(0) % 2 == 1 and not any(bool(variant) for variant in variants[1:])
    return (_Projected if projected else _Form)(cell, *arguments, output_mask=output_mask)
