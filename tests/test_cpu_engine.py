"""The CPU engine by itself: every instruction set, odd sizes, more threads than cores, denormals, memory.

Owns: what must hold whatever the processor offers. What an operator promises on any device is in test_ops.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_inputs import KINKED_CELLS, TANGENT_CELLS
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import rnnfast
from rnnfast import _extension, ops, reference

SETS = _extension.extension.instruction_sets() if _extension.extension else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not SETS, reason="the extension is not loaded: there is no CPU engine to test")


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest):
    """Each that this processor has, forced in turn."""
    extension = _extension.extension
    before = extension.instruction_set()
    extension.set_instruction_set(request.param)
    assert extension.instruction_set() == request.param
    yield request.param
    extension.set_instruction_set(before)


def arguments(
    cell: str, steps: int, batch: int, inputs: int, hidden: int, outputs: int, dtype: torch.dtype, directions: int = 2
):
    """[input, h0, c0 or None, *weights], rounded to dtype, with weights of a trained size."""
    form = reference.CELLS[cell]
    gates = form.gates * hidden
    states = (directions, batch)
    shapes = [(steps, batch, inputs), (*states, outputs), (*states, hidden) if form.states == 2 else None]
    for _ in range(directions):
        shapes += [(gates, inputs), (gates,) if form.diagonal else (gates, outputs), (gates,), (gates,)]
        shapes += [(outputs, hidden)] if outputs != hidden else []
    scale = max(hidden, inputs) ** -0.5
    scales = [1.0, 1.0, 1.0, *(scale for _ in shapes[3:])]
    return [s and (torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]


def results(
    layer, cell: str, tensors: list[Tensor | None], dtype: torch.dtype, of_input: bool = True, **options
) -> list[Tensor]:
    """Outputs and all gradients, or all but the input's, with fixed gradients of the outputs."""
    leaves = [t if t is None else t.to(dtype).requires_grad_(i > 0 or of_input) for i, t in enumerate(tensors)]
    outputs = [t for t in layer(cell, *leaves[:3], leaves[3:], **options) if t.numel()]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(tensors[0].dtype).to(dtype) for t in outputs]
    return outputs + list(torch.autograd.grad(outputs, [t for t in leaves if t is not None and t.requires_grad], grads))


def allowed_error(plain: list[Tensor], want: list[Tensor]) -> float:
    """Twice the error of the plain formula in the same dtype, and one more rounding of the results.

    The formula in float64 is what is compared with: there the floor is the error of sums in another order.
    """
    dtype = plain[0].dtype
    floor = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    return 2 * error(plain, want) + floor * float(torch.cat([w.detach().flatten() for w in want]).norm())


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The norm of the error of all results together."""
    return float(
        torch.cat([(g.detach().double() - w.detach()).flatten() for g, w in zip(got, want, strict=True)]).norm()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 17, 50, 130])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_every_instruction_set(cell: str, hidden: int, dtype: torch.dtype, instruction_set: str) -> None:
    if cell in KINKED_CELLS and dtype in (torch.bfloat16, torch.float16):
        # Where rounding moves a unit across the corner, gradients differ by right.
        cell = f"{cell.partition('_')[0]}_tanh"
    inputs = {1: 1, 3: 5, 17: 33, 50: 7, 130: 64}[hidden]
    # One row, less than a tile, more than a tile; of the small layers many rows, for an error that is no accident.
    batches = ((1, 2), (3, 1), (19 if hidden > 3 else 301, 2))
    tensors = [arguments(cell, 5, batch, inputs, hidden, hidden, dtype) for batch, _ in batches]
    want = [tensor for t in tensors for tensor in results(reference.layer, cell, t, torch.float64)]
    plain = [tensor for t in tensors for tensor in results(reference.layer, cell, t, dtype)]
    allowed = allowed_error(plain, want)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got = []
        for t, (_, save) in zip(tensors, batches, strict=True):
            got += results(ops.layer, cell, t, dtype, save=save)
        assert error(got, want) <= allowed, threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(dtype: torch.dtype, instruction_set: str) -> None:
    tensors = arguments("lstm", 6, 7, 5, 37, 11, dtype)
    want = results(reference.layer, "lstm", tensors, torch.float64)
    allowed = allowed_error(results(reference.layer, "lstm", tensors, dtype), want)
    for save in (1, 2):
        assert error(results(ops.layer, "lstm", tensors, dtype, save=save), want) <= allowed


WINDOW_FORMS = ("padded", "resets", "lengths", "packed", "projection", "recomputed", "noise", "layer_norm")


def many_rows(cell: str, form: str, dtype: torch.dtype, directions: int) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors of a layer whose backward makes its products in several windows, and options of the call."""
    description = reference.CELLS[cell]
    steps, batch, hidden = 61, 37, 256 // description.gates
    outputs = 30 if form == "projection" else hidden
    tensors = arguments(cell, steps, batch, 11, hidden, outputs, dtype, directions)
    lengths = torch.randint(steps + 1, (batch,)).index_fill(0, torch.tensor([0]), steps)
    options: dict[str, Any] = {}
    if form == "resets":
        options["reset"] = torch.rand(steps, batch) < 0.1
    elif form == "lengths":
        options["lengths"] = lengths
    elif form == "packed":
        options["batch_sizes"] = (torch.arange(steps)[:, None] < lengths).sum(1)
        tensors[0] = tensors[0].flatten(0, 1)[: int(lengths.sum())].contiguous()
    elif form == "noise":
        zoneout = [0.2] * description.states + [0.0] * (2 - description.states)
        options.update(seed=torch.randint(2**62, (batch,)), noise=[0.3, *zoneout])
    elif form == "layer_norm":
        norms = [description.gates * hidden] * 2 + [hidden] * 2 * (description.states - 1)
        for d in range(directions, 0, -1):  # behind each direction's four weights
            tensors[3 + 4 * d : 3 + 4 * d] = [torch.rand(size).to(dtype) for size in norms]
        options["layer_norm"] = True
    return tensors, options


def windowed_cases() -> Iterator[tuple[str, str, torch.dtype]]:
    for cell, description in reference.CELLS.items():
        yield from ((cell, "padded", dtype) for dtype in DTYPES[1:3] if cell not in KINKED_CELLS)
        for form in WINDOW_FORMS:
            takes = {"projection": description.states == 2, "layer_norm": description.layer_norm}
            if takes.get(form, True):
                yield cell, form, torch.float64


@pytest.mark.parametrize(("cell", "form", "dtype"), list(windowed_cases()), ids=str)
def test_products_in_windows(cell: str, form: str, dtype: torch.dtype) -> None:
    """One direction, and two, which meet in the gradient of the input if it is wanted.

    Equal bits on any number of threads, whether the loop stops behind each window or, with rows of different length on
    several threads, not; but for the sums of layer normalisation, which each thread makes for its own rows.
    """
    for directions, of_input in ((1, True), (2, True), (2, False)):
        tensors, options = many_rows(cell, form, dtype, directions)
        want, plain = (results(reference.layer, cell, tensors, d, of_input, **options) for d in (torch.float64, dtype))
        allowed = allowed_error(plain, want)
        save = 1 if form == "recomputed" else 2
        on_one = None
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            got = results(ops.layer, cell, tensors, dtype, of_input, **options, save=save)
            assert error(got, want) <= allowed, (directions, of_input, threads)
            on_one = on_one or got
            equal = all(torch.equal(a, b) for a, b in zip(got, on_one, strict=True))
            assert equal or form == "layer_norm", (directions, of_input, threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_windows_of_one_large_step(dtype: torch.dtype) -> None:
    """Steps with more rows than a window, and steps without rows, which each direction meets at another end."""
    tensors = arguments("lstm", 6, 2500, 3, 64, 64, dtype)
    options = {"lengths": torch.cat([torch.full((2400,), 2), torch.full((100,), 1)])}
    want, plain = (results(reference.layer, "lstm", tensors, d, **options) for d in (torch.float64, dtype))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = results(ops.layer, "lstm", tensors, dtype, **options)
        assert error(got, want) <= allowed_error(plain, want), threads


def second_derivatives(layer, cell: str, tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The derivatives of all gradients, with fixed gradients of outputs and gradients."""
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in tensors]
    wanted = [t for t in leaves if t is not None]
    generator = torch.Generator().manual_seed(1)

    def incoming(results: list[Tensor]) -> list[Tensor]:
        return [torch.randn(t.shape, generator=generator).to(dtype) for t in results]

    outputs = [t for t in layer(cell, *leaves[:3], leaves[3:]) if t.numel()]
    gradients = list(torch.autograd.grad(outputs, wanted, incoming(outputs), create_graph=True))
    return list(torch.autograd.grad(gradients, wanted, incoming(gradients)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # the 16-bit types become float32
@pytest.mark.parametrize("cell", TANGENT_CELLS)
def test_second_derivatives_by_every_instruction_set(cell: str, dtype: torch.dtype, instruction_set: str) -> None:
    """With 135 rows, of which the products over all steps make 270: more than they take in a pass."""
    tensors = arguments(cell, 5, 27, 21, 37, 37, dtype)
    want = second_derivatives(reference.layer, cell, tensors, torch.float64)
    allowed = allowed_error(second_derivatives(reference.layer, cell, tensors, dtype), want)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert error(second_derivatives(ops.layer, cell, tensors, dtype), want) <= allowed, threads


@pytest.mark.parametrize("form", ["padded", "resets", "lengths", "packed"])
@pytest.mark.parametrize("cell", TANGENT_CELLS)
def test_second_derivatives_in_windows(cell: str, form: str) -> None:
    """As :func:`test_products_in_windows`, of the gradients of input and states: only products of the engine's own."""
    for directions in (1, 2):
        tensors, options = many_rows(cell, form, torch.float64, directions)
        tensors[3:] = [0.5 * weight for weight in tensors[3:]]  # or states grow where nothing bounds them

        def by_all(layer: Any, tensors: list[Tensor | None], options: dict[str, Any]) -> list[Tensor]:
            leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
            wanted = [t for t in leaves if t is not None]
            results = layer(cell, *leaves[:3], leaves[3:], **options)
            generator = torch.Generator().manual_seed(1)
            loss = sum((r * torch.randn(r.shape, generator=generator)).sin().sum() for r in results if r.numel())
            states = [t for t in leaves[:3] if t is not None]
            gradients = torch.autograd.grad(loss, states, create_graph=True)
            return list(torch.autograd.grad(sum(g.sin().sum() for g in gradients), wanted))

        want, on_one = by_all(reference.layer, tensors, options), None
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            got = by_all(ops.layer, tensors, options)
            on_one = on_one or got
            assert error(got, want) <= 1e-13 * float(torch.cat([w.flatten() for w in want]).norm()), threads
            assert all(torch.equal(a, b) for a, b in zip(got, on_one, strict=True)), (directions, threads)


def every_operator(cell: str, tensors: list[Tensor | None], *sequences: Tensor | None) -> list[Tensor]:
    """What the layer, its backward, and the derivative of either along a tangent return.

    ATen multiplies by the tangents of weights, whose rows have a single 1 here: such a product is exact, and has the
    same bits in whatever order ATen sums.
    """
    generator = torch.Generator().manual_seed(1)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def exact(weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return random(weight)
        columns = torch.randint(weight.shape[1], (len(weight), 1), generator=generator)
        return torch.zeros_like(weight).scatter_(1, columns, 1.0)

    def run(suffix: str, *arguments: object) -> tuple[Tensor, ...]:
        return getattr(torch.ops.rnnfast, cell + suffix)(*arguments)

    layer = (*tensors[:3], tensors[3:], None, *sequences)
    output, h_n, c_n, c, saved = run("", *layer, 2)
    results = [output, h_n, c_n, c]
    grads, t_grads = ([random(t) if t.numel() else None for t in results] for _ in range(2))
    tangents = (*tree_map(lambda t: None if t is None else random(t), tensors[:3]), [exact(w) for w in tensors[3:]])
    kept = (output, c, saved)
    # Each finds in the workspace what another has left there, so that a value read too early is a wrong one.
    backward = run("_backward", *grads, *layer, *kept, [True] * 4)
    jvp = run("_jvp", *tangents, *layer, *kept)
    run("", *layer, 0)
    backward_jvp = run("_backward_jvp", *t_grads, *tangents, *grads, *layer, *kept, [True] * 4)
    return tree_leaves((results, backward, jvp, backward_jvp))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("shape", [(8, 2, 250, 450), (12, 40, 64, 128), (9, 5, 200, 70)], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_equal_bits_on_any_number_of_threads(cell: str, shape: tuple[int, int, int, int], directions: int) -> None:
    """Sizes for which the engine divides the units, the rows, or, with a thread for each direction, neither.

    Two directions have rows of several lengths, with resets.
    """
    steps, batch, inputs, hidden = shape
    tensors = arguments(cell, steps, batch, inputs, hidden, hidden, torch.float32, directions)
    sequences = (None, None)
    if directions == 2:
        sequences = (
            torch.randint(steps + 1, (batch,)).index_fill(0, torch.tensor([1]), steps),
            torch.rand(steps, batch) < 0.2,
        )
    torch.set_num_threads(1)
    want = every_operator(cell, tensors, *sequences)
    for threads in (2, 3, 4, 2):
        torch.set_num_threads(threads)
        for got, one in zip(every_operator(cell, tensors, *sequences), want, strict=True):
            assert torch.equal(got, one), threads


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_denormals_stay_the_caller_s_business(name: str, instruction_set: str) -> None:
    """The engine flushes denormals while it runs, and the setting of the calling thread outlives it."""
    layer = getattr(rnnfast, name)(4, 8)
    denormal = torch.tensor([1e-40])
    assert (denormal * 1.0).item() > 0
    output, _ = layer(torch.full((3, 2, 4), 1e-40).requires_grad_())
    output.sum().backward()
    assert output.isfinite().all()
    assert (denormal * 1.0).item() > 0


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_backward_keeps_no_more_than_torch_nn_s(name: str) -> None:
    def kept_bytes(layer: torch.nn.Module) -> int:
        storages: dict[int, int] = {}

        weights = {parameter.data_ptr() for parameter in layer.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:  # there anyway
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept.append(layer(torch.randn(50, 16, 32).requires_grad_()))
        return sum(storages.values())

    kept: list[object] = []  # results stay alive, so that no storage's address is used twice
    assert kept_bytes(getattr(rnnfast, name)(32, 64)) <= kept_bytes(getattr(torch.nn, name)(32, 64))


def flags_of_memory(tensor: Tensor) -> list[str]:
    """What the kernel has noted for the stretch of memory in which the middle of the tensor lies."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            first, last = (int(address, 16) for address in head.split("-"))
            inside = first <= middle < last
        elif inside and head == "VmFlags:":
            return rest
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no transparent huge pages"
)
def test_large_results_are_wanted_in_large_pages() -> None:
    """From 32 MB on: what is smaller malloc need not map anew."""
    input, h0, c0, *weights = arguments("lstm", 100, 64, 8, 350, 350, torch.float32, directions=1)
    *_, saved = torch.ops.rnnfast.lstm(input, h0, c0, weights, None, None, None, 2)
    assert saved.nbytes > 32 << 20
    assert "hg" in flags_of_memory(saved)


PEAK = """
import torch, rnnfast
from pathlib import Path

def kilobytes(of):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(of))

layer = getattr(rnnfast, {name!r})(16, 256, bidirectional={bidirectional})
torch.set_num_threads(2)
x = torch.randn({steps}, 32, 16, requires_grad=True)
layer(x[:1])[0].sum().backward()
resident = kilobytes("VmRSS")
layer(x)[0].sum().backward()
print(kilobytes("VmHWM") - resident)
"""


@pytest.mark.parametrize(("name", "bidirectional"), [("LSTM", False), ("GRU", False), ("LSTM", True)])
def test_backward_keeps_the_gradients_of_a_window_of_gates(name: str, bidirectional: bool) -> None:
    """At the peak of a training step there is what forward kept, and little else that grows with the sequence."""
    steps = 512 // (1 + bidirectional)
    script = PEAK.format(name=name, bidirectional=bidirectional, steps=steps)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    values = 512 * 32 * 256 * 4 // 1024  # kilobytes of a value of each unit and step
    # saved, output, its gradient, and of an LSTM c; those of the gates would be four more, of a GRU six.
    most = {"LSTM": 4 + 1 + 1 + 1, "GRU": 4 + 1 + 1}[name] * values
    assert int(run.stdout) < most + 2 * values


MANY_THREADS = """
import resource, torch, rnnfast
from pathlib import Path

def step(layer, batch):
    output, _ = layer(torch.randn(2, batch, 8))
    output.sum().backward()

torch.set_num_threads(64)
layer = rnnfast.GRU(8, 64, recompute=True, zoneout=0.1, layer_norm={layer_norm})
step(layer, 128)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = mapped + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
step(layer, 100_000)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what a process has mapped is read from Linux")
@pytest.mark.parametrize("layer_norm", [False, True])
def test_workspace_has_room_for_the_batch_once(layer_norm: bool) -> None:
    """Not once a thread, which would be 5 GB of gates. Threads need the rest for their stacks and heaps."""
    script = MANY_THREADS.format(layer_norm=layer_norm)
    environment = {**os.environ, "OMP_STACKSIZE": "256K", "OMP_WAIT_POLICY": "passive", "MALLOC_ARENA_MAX": "2"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)


def test_instruction_sets_may_change_beside_a_call() -> None:
    """Each call keeps to the engine it began with, whose workspace it asked for."""
    extension = _extension.extension
    before = extension.instruction_set()
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for name in SETS:
                extension.set_instruction_set(name)
                time.sleep(0)  # lets the calls have the interpreter

    layer, x = rnnfast.GRU(5, 37), torch.randn(20, 7, 5)
    want, _ = layer(x)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            torch.testing.assert_close(layer(x)[0], want)
    finally:
        done.set()
        thread.join()
        extension.set_instruction_set(before)
