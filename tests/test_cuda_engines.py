"""Every CUDA engine on a GPU, forced at layers of the sizes it is for, against the formula in float64. The other tests
have small layers, for which the plan takes persistent_cta. What needs no GPU holds the expectations of those that do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from sample_inputs import KINKED_CELLS, PERSISTENT_CELLS, Sample, tensors_of
from test_cuda_runtime import warm_up
from test_plan import HOPPER
from torch import Tensor

from rnnfast import ops, reference

needs_extension = pytest.mark.skipif(ops.extension is None, reason="the plan is in the extension")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(ops.missing_kernels("cuda")), reason="there is no GPU, or no kernels for it"
)
ENGINES = ("persistent_cta", "persistent_cluster", "persistent_grid", "stepwise")
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_persistent_engine = pytest.mark.parametrize("engine", ENGINES[:3])
each_cell = pytest.mark.parametrize("cell", PERSISTENT_CELLS)

SIZES = (130, 250, 512, 768, 1024)  # H: none of the first two divides a tile of 16 units
FORMS: tuple[dict[str, Any], ...] = (
    {"batch": 5},
    {"batch": 5, "form": "packed", "row_lengths": (6, 6, 4, 1, 1)},
    {"batch": 9, "form": "lengths", "reset": True},
    {"batch": 17, "directions": 2},
)


@dataclass(frozen=True)
class Arithmetic:
    """What tensors hold, and the precision of what is multiplied."""

    name: str
    dtype: torch.dtype
    eps: float  # of a factor of the products
    tf32: bool = False

    @property
    def bound(self) -> float:
        """Of a result's or a gradient's error, as a part of its norm: twice what the simulator's engines and the CPU's
        show at these samples. cuBLAS may cut factors to TF32 that our kernels round, which is off by twice as much.
        """
        return self.eps * (4 if self.tf32 else 8 if self.dtype == torch.float32 else 1)


ARITHMETICS = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic("bfloat16", torch.bfloat16, torch.finfo(torch.bfloat16).eps),
        Arithmetic("float16", torch.float16, torch.finfo(torch.float16).eps),
        Arithmetic("float32", torch.float32, torch.finfo(torch.float32).eps),
        Arithmetic("tf32", torch.float32, 2.0**-10, tf32=True),
    )
}
each_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)

# The largest of SIZES that each engine runs in every one of FORMS on an H200, forward and backward; 0 for none.
MOST_UNITS = {
    ("persistent_cta", "rnn"): {
        "bfloat16": (250, 250),
        "float16": (250, 250),
        "float32": (130, 130),
        "tf32": (250, 250),
    },
    ("persistent_cta", "lstm"): {"bfloat16": (130, 130), "float16": (130, 130), "float32": (0, 0), "tf32": (0, 0)},
    ("persistent_cta", "gru"): {"bfloat16": (130, 130), "float16": (130, 130), "float32": (0, 0), "tf32": (0, 0)},
    ("persistent_cluster", "rnn"): {
        "bfloat16": (1024, 1024),
        "float16": (1024, 1024),
        "float32": (768, 768),
        "tf32": (1024, 1024),
    },
    ("persistent_cluster", "lstm"): {
        "bfloat16": (768, 512),
        "float16": (768, 512),
        "float32": (250, 250),
        "tf32": (512, 512),
    },
    ("persistent_cluster", "gru"): {
        "bfloat16": (768, 768),
        "float16": (768, 768),
        "float32": (512, 512),
        "tf32": (512, 512),
    },
    ("persistent_grid", "rnn"): dict.fromkeys(ARITHMETICS, (1024, 1024)),
    ("persistent_grid", "lstm"): {
        "bfloat16": (1024, 768),
        "float16": (1024, 768),
        "float32": (512, 250),
        "tf32": (768, 512),
    },
    ("persistent_grid", "gru"): {
        "bfloat16": (1024, 1024),
        "float16": (1024, 1024),
        "float32": (768, 512),
        "tf32": (1024, 512),
    },
    **{("stepwise", kind): dict.fromkeys(ARITHMETICS, (1024, 1024)) for kind in ("rnn", "lstm", "gru")},
}


def expected_sizes(engine: str, cell: str, arithmetic: Arithmetic, backward: bool) -> set[int]:
    most = MOST_UNITS[engine, cell.split("_")[0]][arithmetic.name][backward]
    return {size for size in SIZES if size <= most}


def sample_of(cell: str, hidden_size: int, form: dict[str, Any]) -> Sample:
    return Sample(cell, steps=6, input_size=8, hidden_size=hidden_size, **form)


def plan_arguments(sample: Sample, arithmetic: Arithmetic, backward: bool, device: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell": sample.cell,
        "dtype": str(arithmetic.dtype).removeprefix("torch."),
        "steps": sample.steps,
        "batch": sample.batch,
        "hidden_size": sample.hidden_size,
        "directions": sample.directions,
        "projection": False,
        "tf32": arithmetic.tf32,
        "backward": backward,
        "noise": False,
        "layer_norm": False,
        "device": device,
    }


def against(engine: str, sample: Sample, arithmetic: Arithmetic, backward: bool, device: dict[str, Any]) -> str:
    """The first line of the plan's error where it says that ``engine`` cannot run the sample; empty where it can."""
    assert ops.extension is not None
    with ops.cuda_engine(engine):
        try:
            ops.extension.plan(**plan_arguments(sample, arithmetic, backward, device))
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


# ------------------------------------------------------------------------------------------------------- comparison
@lru_cache(maxsize=len(SIZES) * len(FORMS))  # of a cell, for one arithmetic after another
def drawn(sample: Sample, device: str) -> tuple[list[Any], dict[str, Any]]:
    """The sample's arguments in float64. W_hh gets torch.nn's range, at which a state neither grows nor saturates."""
    arguments, options = sample.arguments(torch.float64, device)
    for w_hh in arguments[-1][1::4]:
        w_hh.mul_(2 / sample.hidden_size**0.5)
    return arguments, options


class Problem:
    """A sample in an arithmetic, with random gradients of its results, and what float64 says of the same values."""

    def __init__(self, sample: Sample, arithmetic: Arithmetic, device: str) -> None:
        self.sample, self.arithmetic = sample, arithmetic
        (cell, input, h0, c0, weights), self.options = drawn(sample, device)

        def rounded(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(arithmetic.dtype, copy=True)

        self.arguments = [cell, *map(rounded, (input, h0, c0)), [rounded(weight) for weight in weights]]
        self.leaves = [leaf.requires_grad_() for leaf in tensors_of(self.arguments)]
        exact = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        states = exact[1:3] if sample.states == 2 else [exact[1], None]
        results = ops.layer(cell, exact[0], *states, exact[1 + sample.states :], **self.options, backend="reference")
        self.results = list(results[: 2 * sample.states])
        generator = torch.Generator(device).manual_seed(1)
        self.grads = [
            torch.randn(r.shape, generator=generator, device=device, dtype=torch.float64).to(arithmetic.dtype)
            for r in self.results
        ]
        grads = [grad.double() for grad in self.grads]
        self.gradients = torch.autograd.grad(self.results, exact, grads, materialize_grads=True)

    def forward(self) -> list[Tensor]:
        return list(ops.layer(*self.arguments, **self.options)[: 2 * self.sample.states])

    def backward(self, results: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(results, self.leaves, self.grads, materialize_grads=True))

    def check_results(self, results: list[Tensor]) -> None:
        check(results, self.results, self.arithmetic.bound)

    def check_gradients(self, gradients: list[Tensor], output: Tensor) -> None:
        """The derivative of relu jumps: where rounding moves a unit across zero, its gradient is another. Errors of
        such units are independent, so that of their sum goes with the root of their number.
        """
        bound = self.arithmetic.bound
        if self.sample.cell in KINKED_CELLS:
            bound += 8 * ((output > 0) != (self.results[0] > 0)).double().mean().sqrt().item()
        check(gradients, list(self.gradients), bound)


def check(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for index, (tensor, exact) in enumerate(zip(got, expected, strict=True)):
        distance = (tensor.detach().double() - exact.detach()).norm().item()
        norm = exact.norm().item()
        assert distance <= bound * norm, f"tensor {index}: {distance / norm:.1e} of its norm, at most {bound:.1e}"


def set_tf32(arithmetic: Arithmetic) -> None:
    torch.set_float32_matmul_precision("high" if arithmetic.tf32 else "highest")


# ---------------------------------------------------------------------------------------------------- without a GPU
@needs_extension
@each_arithmetic
@each_cell
@each_engine
def test_the_plan_gives_each_engine_what_is_expected_of_it(engine: str, cell: str, arithmetic: Arithmetic) -> None:
    for backward in (False, True):
        runs = {
            size
            for size in SIZES
            if not any(against(engine, sample_of(cell, size, form), arithmetic, backward, HOPPER) for form in FORMS)
        }
        assert runs == expected_sizes(engine, cell, arithmetic, backward)


@needs_extension
@each_persistent_engine
def test_some_blocks_take_more_shared_memory_than_needs_no_asking(engine: str) -> None:
    """More than 48 KB a kernel must be allowed; 16-bit weights that registers do not hold lie there as well."""
    assert ops.extension is not None
    size = max(expected_sizes(engine, "lstm", ARITHMETICS["bfloat16"], True))
    problem = plan_arguments(sample_of("lstm", size, FORMS[0]), ARITHMETICS["bfloat16"], True, HOPPER)
    with ops.cuda_engine(engine):
        made = ops.extension.plan(**problem)
    assert made["tile"]["shared_bytes"] > 48 * 1024


@needs_extension
@each_cell
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_comparison_passes_what_is_right_and_nothing_else(cell: str, name: str) -> None:
    """On the CPU's engine: the bounds hold there, and without a tile of W_hh nothing is within them."""
    for form in FORMS:
        problem = Problem(sample_of(cell, 130, form), ARITHMETICS[name], "cpu")
        results = problem.forward()
        problem.check_results(results)
        problem.check_gradients(problem.backward(results), results[0])
        with torch.no_grad():
            problem.arguments[-1][1][:16] = 0
        wrong = problem.forward()
        with pytest.raises(AssertionError, match="of its norm"):
            problem.check_results(wrong)
        with pytest.raises(AssertionError, match="of its norm"):
            problem.check_gradients(problem.backward(wrong), results[0])


# ---------------------------------------------------------------------------------------------------------- on a GPU
def device_here() -> dict[str, Any]:
    assert ops.extension is not None
    device: dict[str, Any] = ops.extension.cuda_device(-1)
    return device


def as_large_as_hopper(device: dict[str, Any]) -> bool:
    """Clusters and cooperative launches it then has to have as well: without them, an engine would be missing."""
    sizes = ("multiprocessors", "shared_bytes", "registers")
    return device["capability"] == HOPPER["capability"] and all(device[key] >= HOPPER[key] for key in sizes)


@needs_gpu
@each_arithmetic
@each_cell
@each_engine
def test_every_size_and_form(engine: str, cell: str, arithmetic: Arithmetic) -> None:
    """An engine runs what the plan says it can, and refuses the rest in the plan's words."""
    set_tf32(arithmetic)
    device = device_here()
    ran: tuple[set[int], set[int]] = (set(SIZES), set(SIZES))
    reason = ""
    for size in SIZES:
        for form in FORMS:
            sample = sample_of(cell, size, form)
            problem = Problem(sample, arithmetic, "cuda")
            limits = [against(engine, sample, arithmetic, backward, device) for backward in (False, True)]
            for sizes, limit in zip(ran, limits, strict=True):
                if limit:
                    reason = limit
                    sizes.discard(size)
            with ops.cuda_engine(engine):
                if limits[0]:
                    with pytest.raises(RuntimeError, match=re.escape(limits[0])):
                        problem.forward()
                    continue
                results = problem.forward()
                problem.check_results(results)
                if limits[1]:
                    with pytest.raises(RuntimeError, match=re.escape(limits[1])):
                        problem.backward(results)
                    continue
                problem.check_gradients(problem.backward(results), results[0])
    if as_large_as_hopper(device):
        assert ran[0] >= expected_sizes(engine, cell, arithmetic, backward=False)
        assert ran[1] >= expected_sizes(engine, cell, arithmetic, backward=True)
    if not ran[0]:
        pytest.skip(reason)


# A layer that takes more than one block of each engine, and one that takes many for many steps.
SMALL = Sample("lstm", steps=3, batch=5, input_size=8, hidden_size=130, directions=2)
LARGE = {
    "persistent_cta": Sample("lstm", steps=100, batch=17, input_size=8, hidden_size=130, directions=2),
    "persistent_cluster": Sample("lstm", steps=100, batch=17, input_size=8, hidden_size=512, directions=2),
    "persistent_grid": Sample("gru", steps=100, batch=16, input_size=8, hidden_size=1024),
    "stepwise": Sample("lstm", steps=100, batch=17, input_size=8, hidden_size=512, directions=2),
}
BFLOAT16 = ARITHMETICS["bfloat16"]


def problem_for(engine: str, sample: Sample) -> Problem:
    """In bfloat16; skips where the device is too small for the engine to take it."""
    limits = [against(engine, sample, BFLOAT16, backward, device_here()) for backward in (False, True)]
    if any(limits):
        assert not as_large_as_hopper(device_here())
        pytest.skip("; ".join(filter(None, limits)))
    return Problem(sample, BFLOAT16, "cuda")


def large_problem(engine: str) -> Problem:
    return problem_for(engine, LARGE[engine])


def forward_and_backward(problem: Problem) -> list[Tensor]:
    results = problem.forward()
    return [*(tensor.detach() for tensor in results), *problem.backward(results)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@needs_gpu
@each_engine
def test_a_small_call(engine: str) -> None:
    """Little enough for compute-sanitizer."""
    problem = problem_for(engine, SMALL)
    with ops.cuda_engine(engine):
        results = problem.forward()
        gradients = problem.backward(results)
    problem.check_results(results)
    problem.check_gradients(gradients, results[0])


def second_derivatives(run: Callable[..., Any], cell: str, device: str) -> list[Tensor]:
    arguments, options = Sample(cell, directions=2, reset=True).arguments(device=device, grad=True)
    inputs = tensors_of(arguments)
    output = run(*arguments, **options)[0]
    gradients = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    return [g.cpu() for g in torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)]


@needs_gpu
@pytest.mark.parametrize("cell", ["lstm", "gru", "indrnn_tanh"])
def test_a_small_call_along_a_tangent(cell: str) -> None:
    expected = second_derivatives(reference.layer, cell, "cpu")
    torch.testing.assert_close(second_derivatives(ops.layer, cell, "cuda"), expected)


@needs_gpu
@each_engine
def test_runs_repeat_bit_for_bit(engine: str) -> None:
    """Over many steps, in which a block that ran ahead of another would now and then read what is half written."""
    problem = large_problem(engine)
    with ops.cuda_engine(engine):
        first = forward_and_backward(problem)
        for _ in range(10):
            assert_equal(forward_and_backward(problem), first)
    count = len(problem.results)
    problem.check_results(first[:count])
    problem.check_gradients(first[count:], first[0])


@needs_gpu
@each_engine
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_captured_graph(engine: str, training: bool) -> None:
    problem = large_problem(engine)
    run: Callable[[], list[Tensor]] = (lambda: forward_and_backward(problem)) if training else problem.forward
    graph = torch.cuda.CUDAGraph()
    with ops.cuda_engine(engine), torch.set_grad_enabled(training):
        warm_up(run)
        with torch.cuda.graph(graph):
            captured = run()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                for leaf in problem.leaves[:3]:  # the input and the states
                    leaf.copy_(torch.randn_like(leaf))
            expected = [tensor.clone() for tensor in run()]
            graph.replay()
            assert_equal(captured, expected)


@needs_gpu
@each_engine
def test_two_streams(engine: str) -> None:
    """Layers whose blocks together are more than the GPU holds, launched so that they could run at once."""
    problems = [large_problem(engine), large_problem(engine)]
    with torch.no_grad():
        for leaf in problems[1].leaves[:2]:
            leaf.copy_(torch.randn_like(leaf))
    with ops.cuda_engine(engine):
        expected = [forward_and_backward(problem) for problem in problems]
        streams = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        results: list[list[list[Tensor]]] = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # until launches of both are waiting
        for _ in range(5):
            for stream, problem, runs in zip(streams, problems, results, strict=True):
                with torch.cuda.stream(stream):
                    runs.append(forward_and_backward(problem))
        torch.cuda.synchronize()
    for runs, wanted in zip(results, expected, strict=True):
        for got in runs:
            assert_equal(got, wanted)
