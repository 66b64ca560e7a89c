"""The operators: values and gradients against rnnfast.reference, what they keep, what they refuse, and what torch's
machinery (fake tensors, autocast, transforms, compilation, overrides) sees of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_inputs import CELLS, SAMPLES, TANGENT_CELLS, Sample, each_cell, each_sample, tensors_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rnnfast import ops, reference

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no operators")

FORMS = [
    Sample(cell, directions=2, form=form, reset=reset)
    for cell in CELLS
    for form, reset in (("padded", False), ("packed", True), ("lengths", True))
] + [Sample("lstm", proj_size=3)]
each_form = pytest.mark.parametrize("sample", FORMS, ids=lambda sample: sample.name)
each_save = pytest.mark.parametrize("save", [0, 1, 2], ids=["save=0", "save=1", "save=2"])


def operator(name: str) -> Any:
    return getattr(torch.ops.rnnfast, name).default


def positional(arguments: list[Any], options: dict[str, Tensor | None]) -> list[Any]:
    """An operator's arguments, without `save`, from those of `layer`."""
    return [*arguments[1:], options["batch_sizes"], options["lengths"], options["reset"]]


def results_and_gradients(run: Callable[..., Any], arguments: list[Any], options: dict[str, Any]) -> list[Tensor]:
    """All results of `run`, and the gradients of their product with fixed random tensors."""
    results = [tensor for tensor in run(*arguments, **options) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    gradients = torch.autograd.grad(results, tensors_of(arguments), grads, materialize_grads=True)
    return [*(tensor.detach() for tensor in results), *gradients]


def backward_arguments(sample: Sample, save: int = 2) -> list[Any]:
    """Arguments of <cell>_backward, without `output_mask`: all gradients given, nothing that requires one."""
    arguments, options = sample.arguments()
    forward = operator(sample.cell)(*positional(arguments, options), save)
    grads = [torch.randn_like(tensor) if tensor.numel() else None for tensor in forward[:4]]
    output, _, _, c, saved = forward
    return [*grads, *positional(arguments, options), output, c, saved]


def in_double(arguments: list[Any]) -> list[Any]:
    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    cell, input, h0, c0, weights = arguments
    return [cell, double(input), double(h0), double(c0), [double(weight) for weight in weights]]


# ------------------------------------------------------------------------------------------------ values
@each_save
@each_sample
def test_equals_the_reference(sample: Sample, save: int, device: str) -> None:
    arguments, options = sample.arguments(device=device, grad=True)
    ours = results_and_gradients(ops.layer, arguments, {**options, "save": save})
    expected = results_and_gradients(reference.layer, arguments, options)
    assert len(ours) == len(expected)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
def test_error_is_at_most_twice_the_reference_s(sample: Sample, dtype: torch.dtype, device: str) -> None:
    sample = replace(sample, steps=9, batch=8, input_size=16, hidden_size=24)
    arguments, options = sample.arguments(dtype, device, grad=True)
    true = results_and_gradients(reference.layer, in_double(arguments), options)
    ours = results_and_gradients(ops.layer, arguments, options)
    theirs = results_and_gradients(reference.layer, arguments, options)
    assert {tensor.dtype for tensor in ours} == {dtype}

    def error(tensors: list[Tensor], part: slice) -> Tensor:
        return torch.cat([(a.double() - b).flatten() for a, b in zip(tensors[part], true[part], strict=True)]).norm()

    gradients = len(tensors_of(arguments))
    for part in (slice(None, -gradients), slice(-gradients, None)):
        assert error(ours, part) <= 2 * error(theirs, part)


@pytest.mark.parametrize("cell", CELLS)
def test_no_input_features(cell: str) -> None:
    arguments, options = Sample(cell, input_size=0, directions=2).arguments(grad=True)
    for actual, wanted in zip(
        results_and_gradients(ops.layer, arguments, options),
        results_and_gradients(reference.layer, arguments, options),
        strict=True,
    ):
        assert_close(actual, wanted)


@each_form
def test_strides_change_no_bit(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device, grad=True)
    expected = results_and_gradients(ops.layer, arguments, options)

    def strided(tensor: Tensor | None) -> Tensor | None:
        """The same values, every second element of a larger tensor in each dimension, the last one moved to front."""
        if tensor is None:
            return None
        larger = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = larger.movedim(0, -1).contiguous().movedim(-1, 0)[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    cell, input, h0, c0, weights = arguments
    views = [cell, strided(input), strided(h0), strided(c0), [strided(weight) for weight in weights]]
    assert not any(tensor.is_contiguous() for tensor in tensors_of(views) if tensor.numel() > 1)
    for actual, wanted in zip(results_and_gradients(ops.layer, views, options), expected, strict=True):
        assert torch.equal(actual, wanted)


@each_cell
def test_an_expanded_gradient(cell: str, device: str) -> None:
    arguments, options = Sample(cell, directions=2).arguments(device=device, grad=True)
    for actual, wanted in zip(
        torch.autograd.grad(ops.layer(*arguments, **options)[0].sum(), tensors_of(arguments)),
        torch.autograd.grad(reference.layer(*arguments, **options)[0].sum(), tensors_of(arguments)),
        strict=True,
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("sample", "index"),
    [(sample, index) for sample in FORMS for index in ((1, 2, 3) if sample.states == 2 else (1,))],
    ids=lambda value: value.name if isinstance(value, Sample) else f"result {value}",
)
def test_gradient_of_one_result_alone(sample: Sample, index: int, device: str) -> None:
    """Of h_n, c_n or c: what the loss does not see has no gradient to hand in."""
    arguments, options = sample.arguments(device=device, grad=True)

    def gradients(run: Callable[..., Any]) -> tuple[Tensor, ...]:
        result = run(*arguments, **options)[index]
        return torch.autograd.grad(result.square().sum(), tensors_of(arguments), materialize_grads=True)

    for actual, wanted in zip(gradients(ops.layer), gradients(reference.layer), strict=True):
        assert_close(actual, wanted)


@each_form
def test_arguments_stay_as_they_were(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device, grad=True)
    given = [*tensors_of(arguments), *(tensor for tensor in options.values() if tensor is not None)]
    before = [(tensor.detach().clone(), tensor._version) for tensor in given]
    results_and_gradients(ops.layer, arguments, options)
    for tensor, (values, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize("steps", [0, 2])
@each_cell
def test_final_states_are_not_the_initial_ones(cell: str, steps: int, device: str) -> None:
    arguments, options = Sample(cell, steps=steps, form="lengths", row_lengths=(0, 0, 0)).arguments(device=device)
    _, _, h0, c0, _ = arguments
    _, h_n, c_n, _ = ops.layer(*arguments, **options)
    assert torch.equal(h_n, h0)
    assert h_n.data_ptr() != h0.data_ptr()
    if c0 is not None:
        assert torch.equal(c_n, c0)
        assert c_n.data_ptr() != c0.data_ptr()


@pytest.mark.parametrize("threads", [1, 2, 5])
@each_form
def test_equal_bits_on_every_run(sample: Sample, threads: int) -> None:
    torch.set_num_threads(threads)
    arguments, options = sample.arguments(torch.float32, grad=True)
    first = results_and_gradients(ops.layer, arguments, options)
    for _ in range(3):
        for again, wanted in zip(results_and_gradients(ops.layer, arguments, options), first, strict=True):
            assert torch.equal(again, wanted)


# ---------------------------------------------------------------------------------------- what is kept, what is wanted
@each_form
def test_inference_keeps_nothing(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device)
    *_, c, saved = operator(sample.cell)(*positional(arguments, options), 0)
    assert c.numel() == saved.numel() == 0


@each_form
def test_recompute_keeps_no_gates(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device)
    *_, c, saved = operator(sample.cell)(*positional(arguments, options), 1)
    assert (c.numel() > 0) == (sample.states == 2)
    assert saved.numel() == 0


@each_cell
def test_what_a_gradient_needs_is_kept_unasked(cell: str, device: str) -> None:
    arguments, options = Sample(cell).arguments(device=device, grad=True)
    asked, unasked = (operator(cell)(*positional(arguments, options), save) for save in (2, 0))
    assert [tensor.shape for tensor in asked] == [tensor.shape for tensor in unasked]
    assert not unasked[4].requires_grad


@pytest.mark.parametrize("save", [1, 2], ids=["save=1", "save=2"])
@each_form
def test_output_mask(sample: Sample, save: int) -> None:
    arguments = backward_arguments(sample, save)
    everything = operator(f"{sample.cell}_backward")(*arguments, [True] * 4)
    states = 1 + sample.states
    for index in range(4):
        mask = [i == index for i in range(4)]
        some = operator(f"{sample.cell}_backward")(*arguments, mask)
        for i in range(3):
            if i == index and i < states:
                assert torch.equal(some[i], everything[i])
            else:
                assert some[i].numel() == 0
        assert len(some[3]) == (len(everything[3]) if index == 3 else 0)
        for actual, wanted in zip(some[3], everything[3], strict=False):
            assert torch.equal(actual, wanted)


@each_form
def test_gradients_that_are_not_given_are_zero(sample: Sample) -> None:
    arguments = backward_arguments(sample)
    run = operator(f"{sample.cell}_backward")
    for index in range(4):
        if arguments[index] is None:
            continue
        absent = run(*(None if i == index else part for i, part in enumerate(arguments)), [True] * 4)
        zero = run(*(torch.zeros_like(part) if i == index else part for i, part in enumerate(arguments)), [True] * 4)
        for actual, wanted in zip([*absent[:3], *absent[3]], [*zero[:3], *zero[3]], strict=True):
            assert torch.equal(actual, wanted)


# ------------------------------------------------------------------------------------------------ bad input
def change(index: int, new: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    def apply(arguments: list[Any]) -> None:
        arguments[index] = new(arguments[index])

    return apply


def change_weight(index: int, new: Callable[[Tensor], Tensor]) -> Callable[[list[Any]], None]:
    def apply(arguments: list[Any]) -> None:
        arguments[3] = list(arguments[3])
        arguments[3][index] = new(arguments[3][index])

    return apply


# Positions: input 0, h0 1, c0 2, weights 3, batch_sizes 4, lengths 5, reset 6, save 7. The layer has T = 5, B = 3,
# I = 4, H = 5; packed it has N = 9 rows.
BAD_CALLS: dict[str, tuple[str, Callable[[list[Any]], None], type[Exception], str]] = {
    "integer input": ("padded", change(0, lambda x: x.long()), ValueError, "input has dtype Long, it takes Double, "),
    "input of rank 2": (
        "padded",
        change(0, lambda x: x[0]),
        RuntimeError,
        r"input has shape \[3, 4\], it takes \[T, B",
    ),
    "packed input of rank 3": ("packed", change(0, lambda x: x[None]), RuntimeError, r"it takes \[N, I\]"),
    "input of 3 features": ("padded", change(0, lambda x: x[..., 1:]), RuntimeError, "input has 3 features.* I = 4"),
    "h0 of rank 2": ("padded", change(1, lambda h: h[0]), RuntimeError, r"h0 has shape \[3, 5\], it takes \[D, B, P\]"),
    "h0 of 2 rows": ("padded", change(1, lambda h: h[:, 1:]), RuntimeError, r"h0 has .*\[D, B, P\] = \[1, 3, 5\]"),
    "h0 of 3 directions": ("padded", change(1, lambda h: h.expand(3, -1, -1)), RuntimeError, "one or two directions"),
    "h0 of another dtype": ("padded", change(1, Tensor.float), RuntimeError, "h0 has dtype Float, .*Double"),
    "no c0": ("padded", change(2, lambda c: None), RuntimeError, "c0 is None, the cell has two states"),
    "c0 of 4 units": ("padded", change(2, lambda c: c[..., 1:]), RuntimeError, r"c0 has .*\[D, B, H\] = \[1, 3, 5\]"),
    "one weight": ("padded", change(3, lambda w: w[:1]), RuntimeError, r"weights has 1 tensors for 1 direction\(s\)"),
    "no weight": ("padded", change(3, lambda w: []), RuntimeError, "weights has 0 tensors"),
    "w_ih of 19 rows": ("padded", change_weight(0, lambda w: w[1:]), RuntimeError, r"w_ih has shape \[19, 4\]"),
    "w_hh of 4 columns": ("padded", change_weight(1, lambda w: w[:, 1:]), RuntimeError, r"w_hh.* = \[20, 5\]"),
    "b_ih of 19 elements": ("padded", change_weight(2, lambda w: w[1:]), RuntimeError, r"b_ih.*\[G\*H\] = \[20\]"),
    "b_hh of rank 0": ("padded", change_weight(3, lambda w: w[0]), RuntimeError, r"b_hh has shape \[\]"),
    "a weight of another dtype": ("padded", change_weight(3, Tensor.half), RuntimeError, "b_hh has dtype Half"),
    "int32 lengths": ("lengths", change(5, Tensor.int), ValueError, "lengths has dtype Int, it takes Long"),
    "lengths of 2 rows": ("lengths", change(5, lambda n: n[1:]), RuntimeError, r"lengths has shape \[2\].* = \[3\]"),
    "a length of 6": ("lengths", change(5, lambda n: n * 0 + 6), RuntimeError, r"lengths\[0\] is 6, it takes 0 to T"),
    "a length of -1": ("lengths", change(5, lambda n: n * 0 - 1), RuntimeError, r"lengths\[0\] is -1, it takes 0 to T"),
    "lengths of a packed input": (
        "packed",
        change(5, lambda n: torch.tensor([1, 1, 1])),
        RuntimeError,
        "lengths and batch_sizes are both given",
    ),
    "int32 batch_sizes": ("packed", change(4, Tensor.int), ValueError, "batch_sizes has dtype Int, it takes Long"),
    "batch_sizes of rank 2": ("packed", change(4, lambda n: n[None]), RuntimeError, "batch_sizes has shape"),
    "rising batch_sizes": ("packed", change(4, lambda n: n.flip(0)), ValueError, "batch_sizes has 2 after 1"),
    "batch_sizes above B": ("packed", change(4, lambda n: n + 2), ValueError, "batch_sizes has 4 after 3"),
    "batch_sizes below 0": ("packed", change(4, lambda n: n - 2), ValueError, "batch_sizes has -1 after 0"),
    "batch_sizes of 1 row less": ("packed", change(4, lambda n: n[:-1]), ValueError, "add up to 7, .*N = 8 rows"),
    "integer reset": ("padded", change(6, lambda r: torch.zeros(5, 3).int()), ValueError, "reset has dtype Int"),
    "reset of rank 1": ("padded", change(6, lambda r: torch.zeros(5).bool()), RuntimeError, r"\[T, B\] = \[5, 3\]"),
    "packed reset of rank 2": ("packed", change(6, lambda r: torch.zeros(5, 3).bool()), RuntimeError, r"\[N\] = \[8\]"),
    "save of 3": ("padded", change(7, lambda save: 3), ValueError, "save is 3, it takes 0"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    form, spoil, error, message = BAD_CALLS[name]
    arguments, options = Sample("lstm", form=form).arguments()
    call = [*positional(arguments, options), 0]
    operator("lstm")(*call)
    spoil(call)
    with pytest.raises(error, match=f"rnnfast.lstm: .*{message}"):
        operator("lstm")(*call)
    cell_input, h0, c0, weights, batch_sizes, lengths, reset, save = call
    with pytest.raises(error, match=message):
        ops.layer("lstm", cell_input, h0, c0, weights, batch_sizes=batch_sizes, lengths=lengths, reset=reset, save=save)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_cells_with_one_state_refuse_c0_and_projections(cell: str) -> None:
    arguments, options = Sample(cell).arguments()
    _, input, h0, _, weights = arguments
    with pytest.raises(RuntimeError, match="c0 is given, the cell has one state and takes None"):
        operator(cell)(input, h0, h0, weights, *options.values(), 0)
    with pytest.raises(RuntimeError, match="weights has 5 tensors a direction, but a projection is for cells with two"):
        operator(cell)(input, h0, None, [*weights, h0[0]], *options.values(), 0)


BAD_GRADIENTS: dict[str, tuple[int, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "grad_output of 4 units": (0, lambda g: g[..., 1:], RuntimeError, r"grad_output has .* = \[5, 3, 5\]"),
    "grad_output of another dtype": (0, Tensor.float, RuntimeError, "grad_output has dtype Float"),
    "grad_h_n of rank 2": (1, lambda g: g[0], RuntimeError, r"grad_h_n has shape \[3, 5\]"),
    "grad_c_n of 2 rows": (2, lambda g: g[:, 1:], RuntimeError, r"grad_c_n has .* = \[1, 3, 5\]"),
    "grad_c of 4 steps": (3, lambda g: g[1:], RuntimeError, r"grad_c has .* = \[5, 3, 5\]"),
    "output of 4 steps": (11, lambda o: o[1:], RuntimeError, r"output has .* = \[5, 3, 5\]"),
    "no c": (12, lambda c: c.new_empty(0), RuntimeError, r"c \(forward with save = 0 leaves none\) has shape \[0\]"),
    "saved of another layer": (13, lambda s: s[..., 1:], RuntimeError, r"saved has .*\[D, N, S\*H\] = \[1, 15, 20\]"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_bad_gradients(name: str) -> None:
    index, spoil, error, message = BAD_GRADIENTS[name]
    arguments = backward_arguments(Sample("lstm"))
    arguments[index] = spoil(arguments[index])
    with pytest.raises(error, match=message):
        operator("lstm_backward")(*arguments, [True] * 4)


@pytest.mark.skipif(not ops.missing_kernels("cuda"), reason="this extension has CUDA kernels")
@pytest.mark.parametrize("name", [*CELLS, *(f"{cell}_backward" for cell in CELLS)])
def test_cuda_tensors_in_a_cpu_build(name: str) -> None:
    """Sent on as if a tensor were on CUDA, for which no GPU is needed."""
    sample = Sample(name.removesuffix("_backward"))
    if name == sample.cell:
        arguments = [*positional(*sample.arguments()), 0]
    else:
        arguments = [*backward_arguments(sample), [True] * 4]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"built without CUDA kernels: .*Build rnnfast again .*backend='reference'"):
        operator(name).redispatch(cuda, *arguments)


@pytest.mark.skipif(not ops.missing_kernels("cuda"), reason="this extension has CUDA kernels")
def test_derivatives_of_cuda_tensors_in_a_cpu_build() -> None:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    of_jvp, of_backward_jvp = tangent_arguments(Sample("lstm"))
    backward = [*backward_arguments(Sample("lstm")), [True] * 4]
    for suffix, arguments in (
        ("_backward_with_states", backward),
        ("_grouped_backward", [*backward, 1]),
        ("_jvp", of_jvp),
        ("_backward_jvp", [*of_backward_jvp, [True] * 4]),
    ):
        with pytest.raises(RuntimeError, match="built without CUDA kernels: "):
            operator(f"lstm{suffix}").redispatch(cuda, *arguments)


# ------------------------------------------------------------------------------------------------ torch's machinery
# Full lengths: opcheck compares `saved` too, and what that holds past a row's end is nobody's.
OPCHECKED = [replace(sample, row_lengths=(5, 5, 5)) if sample.form == "lengths" else sample for sample in FORMS]
each_opchecked = pytest.mark.parametrize("sample", OPCHECKED, ids=lambda sample: sample.name)


@pytest.mark.parametrize(("save", "grad"), [(0, False), (1, True), (2, False)])
@each_opchecked
def test_opcheck_forward(sample: Sample, save: int, grad: bool, device: str) -> None:
    arguments, options = sample.arguments(device=device, grad=grad)
    torch.library.opcheck(operator(sample.cell), (*positional(arguments, options), save))


@pytest.mark.parametrize("mask", [[True] * 4, [True, False, True, False]], ids=["all gradients", "some gradients"])
@each_opchecked
def test_opcheck_backward(sample: Sample, mask: list[bool]) -> None:
    torch.library.opcheck(operator(f"{sample.cell}_backward"), (*backward_arguments(sample), mask))


def require_gradients(arguments: list[Any]) -> None:
    for part in tree_leaves(arguments):
        if isinstance(part, Tensor) and part.is_floating_point():
            part.requires_grad_()


@each_cell
def test_opcheck_second_derivative(cell: str) -> None:
    arguments = backward_arguments(Sample(cell, steps=2))
    require_gradients(arguments[:8])
    torch.library.opcheck(operator(f"{cell}_backward"), (*arguments, [True] * 4))
    torch.library.opcheck(operator(f"{cell}_backward_with_states"), (*arguments, [True] * 4))


def tangent_arguments(sample: Sample) -> tuple[list[Any], list[Any]]:
    """Arguments of <cell>_jvp, and of <cell>_backward_jvp without `output_mask`."""
    arguments = backward_arguments(sample)
    grads, layer, kept = arguments[:4], arguments[4:11], arguments[11:]
    t_grads, tangents = tree_map(lambda t: None if t is None else torch.randn_like(t), (grads, layer[:4]))
    return [*tangents, *layer, *kept], [*t_grads, *tangents, *grads, *layer, *kept]


@pytest.mark.parametrize(
    "sample", [s for s in OPCHECKED if not s.proj_size and s.cell in TANGENT_CELLS], ids=lambda sample: sample.name
)
def test_opcheck_tangents(sample: Sample) -> None:
    of_jvp, of_backward_jvp = tangent_arguments(sample)
    torch.library.opcheck(operator(f"{sample.cell}_jvp"), tuple(of_jvp))
    torch.library.opcheck(operator(f"{sample.cell}_backward_jvp"), (*of_backward_jvp, [True] * 4))
    with_states = (*backward_arguments(sample), [True] * 4)
    torch.library.opcheck(operator(f"{sample.cell}_backward_with_states"), with_states)
    grad_states = torch.randn_like(of_backward_jvp[19])
    torch.library.opcheck(operator(f"{sample.cell}_backward_jvp"), (*of_backward_jvp, [True] * 4, grad_states))


@each_cell
def test_opcheck_third_derivatives(cell: str) -> None:
    of_jvp, of_backward_jvp = tangent_arguments(Sample(cell, steps=2))
    require_gradients(of_jvp[:8])
    require_gradients(of_backward_jvp[:16])
    checks = ("test_schema", "test_autograd_registration")  # tracing the formula takes minutes
    torch.library.opcheck(operator(f"{cell}_jvp"), tuple(of_jvp), test_utils=checks)
    torch.library.opcheck(operator(f"{cell}_backward_jvp"), (*of_backward_jvp, [True] * 4), test_utils=checks)


@pytest.mark.parametrize(
    "sample",
    [s for s in OPCHECKED if not s.proj_size and s.form != "packed" and s.cell in TANGENT_CELLS],
    ids=lambda s: s.name,
)
def test_opcheck_groups(sample: Sample) -> None:
    torch.library.opcheck(operator(f"{sample.cell}_grouped_backward"), (*backward_arguments(sample), [True] * 4, 3))


@each_form
def test_groups_sum_to_the_whole(sample: Sample) -> None:
    if sample.proj_size:
        with pytest.raises(RuntimeError, match="a projection has no kernel for gradients of groups"):
            operator("lstm_grouped_backward")(*backward_arguments(sample), [True] * 4, 1)
        return
    if sample.cell not in TANGENT_CELLS:
        with pytest.raises(RuntimeError, match="two products a step has no kernel for gradients of groups"):
            operator(f"{sample.cell}_grouped_backward")(*backward_arguments(sample), [True] * 4, 1)
        return
    arguments = backward_arguments(replace(sample, batch=6, row_lengths=(5, 5, 4, 4, 0, 0)))
    whole = operator(f"{sample.cell}_backward")(*arguments, [True] * 4)
    groups = operator(f"{sample.cell}_grouped_backward")(*arguments, [True] * 4, 2)
    assert_close(groups[:3], whole[:3])
    assert_close([gradient.sum(0) for gradient in groups[3]], whole[3])


@each_cell
def test_gradients_of_all_states(cell: str) -> None:
    """That of step t's state is what grad_output gives there, and what the steps behind it give to their h0."""
    arguments = backward_arguments(Sample(cell))
    grad_output, grad_h_n, grad_c_n, grad_c, input, _, c0, *layer, output, c, _ = arguments
    grad_states = operator(f"{cell}_backward_with_states")(*arguments, [True] * 4)[4]
    for t in range(5):
        h_t, c_t, rest = output[t][None], None if c0 is None else c[t][None], input[t + 1 :]
        behind = operator(cell)(rest, h_t, c_t, *layer, 2)
        grad_behind = None if grad_c is None else grad_c[t + 1 :]
        of_behind = (grad_output[t + 1 :], grad_h_n, grad_c_n, grad_behind, rest, h_t, c_t, *layer)
        grad_h_t = operator(f"{cell}_backward")(*of_behind, behind[0], behind[3], behind[4], [True] * 4)[1]
        assert_close(grad_states[t], grad_output[t] + grad_h_t[0])


@each_form
def test_gradients_of_all_states_spare_what_they_are(sample: Sample) -> None:
    with_states = operator(f"{sample.cell}_backward_with_states")
    if sample.proj_size:
        with pytest.raises(RuntimeError, match="a projection has no kernel for the gradients of all states"):
            with_states(*backward_arguments(sample), [True] * 4)
        return
    arguments = backward_arguments(sample)
    *gradients, grad_states = with_states(*arguments, [True] * 4)
    assert_close(tuple(gradients), operator(f"{sample.cell}_backward")(*arguments, [True] * 4))
    if sample.cell not in TANGENT_CELLS:
        return
    _, of_jvp = tangent_arguments(sample)
    jvp = operator(f"{sample.cell}_backward_jvp")
    grad_states = with_states(*of_jvp[8:12], *of_jvp[12:], [True] * 4)[4]
    without = jvp(*of_jvp, [True] * 4)
    assert_close(jvp(*of_jvp, [True] * 4, grad_states), without)
    assert not torch.equal(jvp(*of_jvp, [True] * 4, 2 * grad_states)[4], without[4])  # they are what is read


def test_bad_gradients_of_states() -> None:
    _, of_jvp = tangent_arguments(Sample("lstm"))
    with pytest.raises(RuntimeError, match=r"grad_states has shape \[4, 3, 5\], .* = \[5, 3, 5\]"):
        operator("lstm_backward_jvp")(*of_jvp, [True] * 4, of_jvp[19][1:])


BAD_TANGENTS: dict[str, tuple[int, Callable[[Any], Any], type[Exception], str]] = {
    "t_input of 4 steps": (0, lambda t: t[1:], RuntimeError, r"t_input has shape \[4, 3, 4\], it takes .*\[5, 3, 4\]"),
    "t_h0 of another dtype": (1, Tensor.float, ValueError, "t_h0 has dtype Float, it takes .* Double"),
    "t_c0 of rank 2": (2, lambda t: t[0], RuntimeError, r"t_c0 has shape \[3, 5\]"),
    "one t_weights": (3, lambda t: t[:1], RuntimeError, "t_weights has 1 tensors, it takes none or as many .*, 4"),
    "a t_weights of other size": (3, lambda t: [w[1:] for w in t], RuntimeError, "a tangent of a weight has shape"),
}


@pytest.mark.parametrize("name", BAD_TANGENTS)
def test_bad_tangents(name: str) -> None:
    index, spoil, error, message = BAD_TANGENTS[name]
    arguments, _ = tangent_arguments(Sample("lstm"))
    operator("lstm_jvp")(*arguments)
    arguments[index] = spoil(arguments[index])
    with pytest.raises(error, match=f"rnnfast.lstm: {message}"):
        operator("lstm_jvp")(*arguments)


@pytest.mark.parametrize("groups", [0, -1, 2])
def test_bad_groups(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups is {groups}, it takes a divisor of the batch, 3"):
        operator("gru_grouped_backward")(*backward_arguments(Sample("gru")), [True] * 4, groups)


def test_groups_must_divide_each_step() -> None:
    arguments = backward_arguments(Sample("gru", batch=4, form="packed", row_lengths=(3, 2, 2, 1)))
    with pytest.raises(
        ValueError, match=r"groups is 2, it takes a divisor of every step's rows, batch_sizes\[1\] is 3"
    ):
        operator("gru_grouped_backward")(*arguments, [True] * 4, 2)


@pytest.mark.parametrize("directions", [0, 3])
def test_tangents_of_what_is_no_layer(directions: int) -> None:
    arguments, _ = tangent_arguments(Sample("lstm"))
    arguments[5] = arguments[5].new_zeros(directions, 3, 5)
    with pytest.raises(RuntimeError, match=r"rnnfast.lstm: h0 has shape"):
        operator("lstm_jvp")(*arguments)


def test_gradients_of_groups_refuse_a_derivative() -> None:
    arguments = backward_arguments(Sample("gru"))
    require_gradients(arguments[:8])
    with pytest.raises(NotImplementedError, match="gru_grouped_backward has no derivative"):
        operator("gru_grouped_backward")(*arguments, [True] * 4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_form
def test_autocast(sample: Sample, dtype: torch.dtype, device: str) -> None:
    arguments, options = sample.arguments(torch.float32, device, grad=True)
    with torch.autocast(device, dtype):
        actual = results_and_gradients(ops.layer, arguments, options)
    cell, input, h0, c0, weights = arguments
    cast = [None if part is None else part.to(dtype) for part in (input, h0, c0)]
    expected = ops.layer(cell, *cast, [weight.to(dtype) for weight in weights], **options)
    for result, wanted in zip(actual, (tensor for tensor in expected if tensor.requires_grad), strict=False):
        assert torch.equal(result, wanted)
    for gradient in actual[-len(tensors_of(arguments)) :]:
        assert gradient.dtype == torch.float32


def test_autocast_leaves_float64_alone(device: str) -> None:
    arguments, options = Sample("gru").arguments(device=device)
    with torch.autocast(device, torch.bfloat16):
        assert ops.layer(*arguments, **options)[0].dtype == torch.float64


@each_form
def test_transforms_of_torch_func(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device)
    cell, input, h0, c0, weights = arguments

    def loss(run: Callable[..., Any]) -> Callable[[Tensor, list[Tensor]], Tensor]:
        return lambda x, w: run(cell, x, h0, c0, w, **options)[0].sin().sum()

    inputs = torch.stack([input, input + 1])
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(input, weights),
        lambda f: torch.func.jvp(lambda x: f(x, weights), (input,), (torch.ones_like(input),)),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(inputs, weights),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x, weights).square().sum())(input),
    ):
        assert_close(transform(loss(ops.layer)), transform(loss(reference.layer)))


@each_form
def test_forward_mode(sample: Sample, device: str) -> None:
    arguments, options = sample.arguments(device=device)
    cell, input, h0, c0, weights = arguments

    def tangents(run: Callable[..., Any]) -> list[Tensor | None]:
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(input, torch.ones_like(input))
            results = run(cell, dual, h0, c0, weights, **options)
            return [forward_ad.unpack_dual(result).tangent for result in results]

    assert_close(tangents(ops.layer), tangents(reference.layer))
    assert tangents(ops.layer)[0] is not None


@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_one_compilation_serves_every_size(cell: str, form: str, device: str) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ops.layer, backend=graphs, fullgraph=True, dynamic=True)
    for batch, steps in ((6, 7), (8, 9), (11, 10)):  # unlike all other sizes: equal ones would be taken as the same
        arguments, options = Sample(
            cell, directions=2, form=form, batch=batch, steps=steps, row_lengths=(steps, *range(batch - 1, 0, -1))
        ).arguments(device=device, grad=True)
        expected = results_and_gradients(ops.layer, arguments, options)
        for actual, wanted in zip(results_and_gradients(compiled, arguments, options), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert graphs.frame_count == 1


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class DispatchRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@each_cell
def test_modes_see_the_operator(cell: str) -> None:
    arguments, options = Sample(cell).arguments()
    for recorder in (Recorder(), DispatchRecorder()):
        with recorder:
            ops.layer(*arguments, **options)
        assert operator(cell) in recorder.seen


@pytest.mark.parametrize("watched", ["input", "h0", "c0", "weight", "batch_sizes", "lengths", "reset"])
def test_a_tensor_with_overrides_sees_the_operator(watched: str) -> None:
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    form = "packed" if watched == "batch_sizes" else "lengths"
    (cell, input, h0, c0, weights), options = Sample("lstm", form=form, reset=True).arguments()
    call = {"input": input, "h0": h0, "c0": c0, "weight": weights[-1], **options}
    call[watched] = call[watched].as_subclass(Watched)
    weights[-1] = call.pop("weight")
    ops.layer(cell, weights=weights, **call)
    assert operator("lstm") in seen


# ------------------------------------------------------------------------------------------------ the choice of backend
@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that reference.layer was called for."""
    calls: list[str] = []
    original = reference.layer

    def counted(cell: str, *arguments: Any, **options: Any) -> Any:
        calls.append(cell)
        return original(cell, *arguments, **options)

    monkeypatch.setattr(reference, "layer", counted)
    return calls


def test_backend(reference_calls: list[str]) -> None:
    arguments, options = Sample("gru").arguments()
    ops.layer(*arguments, **options)
    ops.layer(*arguments, **options, backend="auto")
    assert reference_calls == []
    assert ops.active_backend() == ("operators", "")

    ops.layer(*arguments, **options, backend="reference")
    assert reference_calls == ["gru"]
    with ops.backend("reference"):
        assert ops.active_backend()[0] == "reference"
        ops.layer(*arguments, **options)
        assert reference_calls == ["gru"] * 2
        with ops.backend("auto"):
            ops.layer(*arguments, **options)
        ops.layer(*arguments, **options, backend="auto")
        assert reference_calls == ["gru"] * 2
    ops.layer(*arguments, **options)
    assert reference_calls == ["gru"] * 2


def test_backend_is_of_one_thread() -> None:
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.active_backend()[0]))
        thread.start()
        thread.join()
    assert seen == ["operators"]


def test_backend_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert ops.active_backend()[0] == "operators"


@pytest.mark.parametrize("name", ["fast", "", "Reference"])
def test_unknown_backend(name: str) -> None:
    arguments, options = Sample("gru").arguments()
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'reference'\), got"), ops.backend(name):
        pass
    with pytest.raises(ValueError, match="backend: expected one of"):
        ops.layer(*arguments, **options, backend=name)


def test_every_sample_is_a_cell_of_the_operators() -> None:
    assert {sample.cell for sample in SAMPLES} == set(ops.extension.saved_values) == set(reference.CELLS)
