"""Owns: one measurement, both sides built, checked against each other and timed in turns.

Must not know: which measurements are made, what they should show, how they are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shape
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

# How far the two sides' results may be apart, as a part of the result's norm. TF32 has the 10 bits of float16.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
TF32_TOLERANCE = 1e-2
FEWEST_STEPS = 8
MOST_CUDA_STEPS = 65_535  # sizes of cuDNN's layers beyond 16 bits are not relied on


@dataclass(frozen=True)
class Case:
    """One thing to measure: rnnfast against ``baseline``."""

    shape: Shape
    cell: str  # rnn, gru, lstm
    training: bool  # forward and backward, or forward under no_grad
    dtype: torch.dtype
    device: str  # cpu, cuda
    threads: int
    baseline: str = "torch.nn"  # or "rnnfast float32"
    tf32: bool = False  # on CUDA: both sides may round float32 factors to TF32, or neither

    @property
    def arithmetic(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (" with TF32" if self.tf32 else "")

    @property
    def tolerance(self) -> float:
        return TF32_TOLERANCE if self.tf32 else TOLERANCES[self.dtype]

    @property
    def key(self) -> str:
        mode = "training" if self.training else "forward"
        sides = f"{self.threads} against {self.baseline}"
        return f"{self.shape.name} {self.cell} {mode} {self.arithmetic} {self.device} {sides}"


class Mismatch(Exception):
    """The two sides do not compute the same."""


def draw(case: Case, dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random numbers, drawn where the case runs: for a large shape one thread of the CPU takes seconds a call."""
    generator = torch.Generator(case.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=case.device).to(dtype)


def make_input(case: Case, dtype: torch.dtype, steps: int) -> Tensor | PackedSequence:
    """The case's input at ``steps`` steps: the same values at every call, for either side."""
    shape = case.shape
    dense = draw(case, dtype, 0, steps, shape.batch, shape.input_size)
    if not shape.packed:
        return dense.requires_grad_(case.training)
    lengths = torch.linspace(0.1, 1.0, shape.batch).mul(steps).ceil().long().clamp(1, steps).flip(0)
    packed = pack_padded_sequence(dense, lengths)
    return packed._replace(data=packed.data.detach().requires_grad_(case.training))


def make_layers(library: Any, case: Case) -> nn.Module:
    torch.manual_seed(0)
    shape, name = case.shape, {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[case.cell]
    return getattr(library, name)(
        shape.input_size, shape.hidden_size, shape.layers, bidirectional=shape.directions == 2, device=case.device
    )


class Side:
    """torch.nn or rnnfast, ready to run so many steps of a case."""

    def __init__(self, library: Any, case: Case, dtype: torch.dtype, steps: int) -> None:
        self.case, self.dtype = case, dtype
        # A forward alone is inference: in training mode torch.nn's layers keep what a backward would need.
        self.module = make_layers(library, case).to(dtype).train(case.training)
        self.prepare(steps)

    def prepare(self, steps: int) -> None:
        self.input = make_input(self.case, self.dtype, steps)
        data = self.input.data if isinstance(self.input, PackedSequence) else self.input
        features = self.case.shape.hidden_size * self.case.shape.directions
        self.grad_output = draw(self.case, self.dtype, 1, *data.shape[:-1], features)
        self.leaves = [data, *self.module.parameters()]

    def run(self) -> list[Tensor]:
        """The output and the final states, and in training the gradients of the input and every parameter."""
        if not self.case.training:
            with torch.no_grad():
                output, states = self.module(self.input)
            gradients: tuple[Tensor, ...] = ()
        else:
            output, states = self.module(self.input)
        output = output.data if isinstance(output, PackedSequence) else output
        if self.case.training:
            gradients = torch.autograd.grad(output, self.leaves, self.grad_output)
        return [output, *(states if isinstance(states, tuple) else (states,)), *gradients]


def compare(expected: list[Tensor], actual: list[Tensor], tolerance: float) -> float:
    """The largest distance between two results relative to the norm; raises Mismatch beyond ``tolerance``."""
    worst = 0.0
    for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
        left, right = left.detach().double(), right.detach().double()
        distance = ((left - right).norm() / left.norm().clamp_min(1e-30)).item()
        if not distance <= tolerance:
            raise Mismatch(f"result {index} differs by {distance:.1e} of its norm, more than {tolerance:.0e}")
        worst = max(worst, distance)
    return worst


def clock(device: str) -> Callable[[Callable[[], object], int], float]:
    """A function that returns the seconds that ``repeats`` calls take, one call's."""

    def cpu(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - start) / 1e9 / repeats

    def cuda(call: Callable[[], object], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # the clock starts on a device that is busy, or the way of the first launch would count
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    return cuda if device == "cuda" else cpu


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes allocated on the GPU at the height of one call, beyond what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def allow_tf32(allowed: bool) -> None:
    """For products, whose setting rnnfast follows, and for the layers of cuDNN, which have one of their own."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def fit_steps(side: Side, limit: float, measure: Callable[[Callable[[], object], int], float]) -> int:
    """The most steps, up to the shape's, of which one run of ``side`` passes ``limit`` seconds hardly or not."""
    full = side.case.shape.steps
    if side.case.device == "cuda":
        full = min(full, MOST_CUDA_STEPS)
    steps = min(full, FEWEST_STEPS)
    while True:
        side.prepare(steps)
        side.run()
        seconds = measure(side.run, 1)
        if steps == full or seconds > limit / 10:
            return max(min(full, FEWEST_STEPS), min(full, int(steps * limit / seconds)))
        steps = min(full, steps * 8)


def in_turns(
    calls: dict[str, Callable[[], object]], device: str, budget: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples of each call's seconds, and their medians; ``budget`` seconds for all, at least 2 samples of each."""
    measure = clock(device)
    # Calls of microseconds are timed many at once, and the sides take turns about who is first.
    repeats = {name: max(1, int(1e-3 / max(measure(call, 1), 1e-9))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start, order = time.perf_counter(), list(calls)
    while len(samples[order[0]]) < 2 or (time.perf_counter() - start < budget and len(samples[order[0]]) < 100):
        for name in order:
            samples[name].append(measure(calls[name], repeats[name]))
        order.reverse()
    return samples, {name: statistics.median(values) for name, values in samples.items()}


def measure_case(case: Case, limit: float, budget: float) -> dict[str, Any]:
    """Times both sides in turns.

    Args:
        limit: seconds that one run may take; a longer one is done with fewer time steps.
        budget: seconds for the samples, of both sides together; there are at least 2 of each.

    Returns: the case, ``steps`` as measured, the samples in seconds, their medians, and ``ratio``, the baseline's
        median by rnnfast's.

    Raises: Mismatch.
    """
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        # cuDNN asks the same setting whether bfloat16 may use tensor cores.
        allow_tf32(case.tf32 or case.dtype != torch.float32)
    measure = clock(case.device)
    against_float32 = case.baseline == "rnnfast float32"
    baseline_dtype = torch.float32 if against_float32 else case.dtype
    fewest = min(case.shape.steps, FEWEST_STEPS)
    sides = {
        "baseline": Side(rnnfast if against_float32 else nn, case, baseline_dtype, fewest),
        "rnnfast": Side(rnnfast, case, case.dtype, fewest),
    }
    steps = fit_steps(sides["baseline"], limit, measure)
    for side in sides.values():
        side.prepare(steps)

    difference = compare(sides["baseline"].run(), sides["rnnfast"].run(), case.tolerance)

    samples, medians = in_turns({name: side.run for name, side in sides.items()}, case.device, budget)
    shape = case.shape
    row = {
        "key": case.key,
        "shape": shape.name,
        "steps": steps,
        "full_steps": shape.steps,
        "batch": shape.batch,
        "input_size": shape.input_size,
        "hidden_size": shape.hidden_size,
        "layers": shape.layers,
        "directions": shape.directions,
        "packed": shape.packed,
        "cell": case.cell,
        "training": case.training,
        "dtype": case.arithmetic,
        "device": case.device,
        "threads": case.threads,
        "baseline": case.baseline,
        "difference": difference,
        "baseline_samples": samples["baseline"],
        "rnnfast_samples": samples["rnnfast"],
        "baseline_seconds": medians["baseline"],
        "rnnfast_seconds": medians["rnnfast"],
        "ratio": medians["baseline"] / medians["rnnfast"],
    }
    if case.device == "cuda":
        row |= {f"{name}_peak_bytes": peak_memory(side.run) for name, side in sides.items()}
        explanation = rnnfast.explain(sides["rnnfast"].module, sides["rnnfast"].input)
        row["engine"] = explanation.layers[0].engine.removeprefix("cuda ")
    return row
