"""The CUDA kernels, run on the CPU by the simulator of cuda_sim/, against the reference; and the simulator itself."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_sim import build, driver, instrument
from sample_inputs import CELLS, KINKED_CELLS, PERSISTENT_CELLS, SAMPLES, TANGENT_CELLS, TWO_STATES, Sample, tensors_of
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_map_only

from rnnfast import formula, ops, reference

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

ENGINE = [build.HERE / "driver.cpp", *sorted((build.CSRC / "cuda").glob("*.cu"))]


def engine_sources(kind: str) -> tuple[list[Path], Path]:
    """What the engines are compiled from, and where their headers lie. In the checked build every barrier can be
    switched off: see mutate.py.
    """
    if kind != "check":
        return ENGINE, build.CSRC
    instrument.places()
    return [ENGINE[0], *sorted((instrument.INSTRUMENTED / "cuda").glob("*.cu"))], instrument.INSTRUMENTED


NORMED_CELLS = tuple(cell for cell, form in reference.CELLS.items() if form.layer_norm)
NOTHING, STATES = 0, 1  # Save::nothing, Save::states: backward recomputes the gates

# Sizes that SAMPLES leave out: rows that vector loads divide, more units and more rows than a block has threads.
WIDE = [
    Sample("lstm", steps=2, batch=5, hidden_size=8, directions=2, reset=True),
    Sample("lstm", steps=2, batch=5, hidden_size=8, proj_size=4, directions=2, form="lengths"),
    Sample("gru", steps=2, batch=5, hidden_size=8, directions=2, form="packed", reset=True),
    Sample("gru_reset_before", steps=3, batch=5, hidden_size=8, directions=2, form="lengths", reset=True),
    Sample("gru_reset_before", steps=2, batch=2, hidden_size=132, form="packed", reset=True),
    Sample("rnn_tanh", steps=2, batch=9, hidden_size=12, directions=2, form="lengths", reset=True),
    Sample("gru", steps=2, batch=2, hidden_size=516),
    Sample("lstm", steps=1, batch=150, input_size=2, hidden_size=4),
]


@pytest.fixture(scope="module")
def simulators() -> dict[str, driver.Simulator]:
    return {}


def simulator(simulators: dict[str, driver.Simulator], kind: str) -> driver.Simulator:
    if kind not in simulators:
        sources, csrc = engine_sources(kind)
        simulators[kind] = driver.Simulator(build.build("engine", kind, sources, library=True, csrc=csrc))
    simulators[kind].engine("stepwise")
    return simulators[kind]


# For the persistent engines: sizes that divide their tiles of 16 units and 8 rows and sizes that do not, more tiles of
# k than registers hold, one step, several tiles of the batch, of which the last has no living row.
TILES = [
    Sample("lstm", steps=1, batch=1, hidden_size=16),
    Sample("lstm", steps=3, batch=17, hidden_size=40, directions=2, form="lengths", reset=True),
    Sample("lstm", steps=4, batch=12, hidden_size=112, form="packed"),
    Sample("gru", steps=1, batch=9, hidden_size=32),
    Sample("gru", steps=3, batch=8, hidden_size=101, directions=2, reset=True),
    Sample("gru", steps=20, batch=17, hidden_size=16, directions=2, form="packed", reset=True),
    Sample("rnn_tanh", steps=3, batch=17, hidden_size=130, directions=2, form="lengths", reset=True),
    Sample("rnn_relu", steps=2, batch=8, hidden_size=192),
    Sample("rnn_sigmoid", steps=3, batch=9, hidden_size=47, form="packed", directions=2),
]
# Those that the 16-bit types alone can hold.
WIDE_TILES = [
    Sample("lstm", steps=4, batch=12, hidden_size=128, form="packed"),
    Sample("rnn_relu", steps=2, batch=8, hidden_size=256),
    Sample("lstm", steps=3, batch=3, hidden_size=144, directions=2, form="lengths"),
    Sample("gru", steps=3, batch=3, hidden_size=192, reset=True),
]


# Ways to spread a layer over blocks: unit tiles of a block, row tiles of a team, parts of k.
SPREADS = [
    (Sample("lstm", steps=3, batch=19, hidden_size=40, directions=2, form="lengths", reset=True), (1, 2, 3)),
    (Sample("gru", steps=3, batch=9, hidden_size=70, form="packed"), (2, 2, 2)),
    (Sample("rnn_tanh", steps=4, batch=3, hidden_size=33), (1, 1, 1)),
]


@dataclass(frozen=True)
class Arithmetic:
    """How an engine computes: what tensors hold, and the precision of what is multiplied."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def bound(self) -> float:
        """Of an error, relative to the largest element."""
        if self.tf32:
            return 8 * 2.0**-10
        return (16 if self.dtype.itemsize == 2 else 64) * torch.finfo(self.dtype).eps


class Problem:
    """A sample in a dtype, with random gradients of its results, and what float64 says of the same rounded values."""

    def __init__(self, sample: Sample, dtype: torch.dtype, noise: Sequence[float] = ()) -> None:
        (cell, input, h0, c0, weights), options = sample.arguments(dtype)
        seed = torch.randint(-(2**63), 2**63 - 1, (sample.batch,)) if noise else None
        self.options: dict[str, Any] = {**options, "seed": seed, "noise": noise}
        wide = [cell, *(None if t is None else t.double().clone() for t in (input, h0, c0))]
        wide.append([w.double().clone() for w in weights])
        self.leaves = [leaf.requires_grad_() for leaf in tensors_of(wide)]
        output, h_n, c_n, c = reference.layer(*wide, **self.options)
        self.states = 1 if c0 is None else 2
        self.results = [output, h_n, c_n, c][: 2 * self.states]
        generator = torch.Generator().manual_seed(1)
        self.grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype) for r in self.results]
        lengths = self.options["lengths"]
        if lengths is not None:  # what stands past a length has no effect
            past = torch.arange(sample.steps).unsqueeze(1) >= lengths
            input = input.masked_fill(past.unsqueeze(-1), float("nan"))
        self.arguments = [cell, input, h0, c0, weights]
        self.dtype = dtype

    def gradients(self) -> list[Tensor]:
        """Of input, h0, c0 where there is one, and the weights."""
        grads = [grad.double() for grad in self.grads]
        return list(torch.autograd.grad(self.results, self.leaves, grads, materialize_grads=True, retain_graph=True))

    def differentiable(self, output: Tensor) -> bool:
        """The derivative of relu jumps: where rounding moved a unit across zero, gradients may differ by any amount."""
        return self.arguments[0] not in KINKED_CELLS or torch.equal(output > 0, self.results[0] > 0)


def compare(
    sim: driver.Simulator,
    sample: Sample,
    dtype: torch.dtype,
    save: int,
    *,
    tf32: bool = False,
    backward_engine: str = "",
    noise: Sequence[float] = (),
) -> None:
    """Forward of a sample on the simulator, and backward, by the same engine or another, against the reference."""
    problem = Problem(sample, dtype, noise)
    bound = Arithmetic(dtype, tf32).bound
    layer = driver.Layer(*problem.arguments, **problem.options, tf32=tf32)
    output, h_n, c_n, saved = sim.forward(layer, save=save)
    results = [output, h_n, c_n, saved.c if save else problem.results[-1]]
    assert_close(results[: 2 * problem.states], problem.results, bound)
    if save and problem.differentiable(output):
        if backward_engine:
            sim.engine(backward_engine)
        grad_output, grad_h_n, grad_c_n, grad_c = [*problem.grads, None, None][:4]
        assert_close(
            sim.backward(layer, output, saved, grad_output, grad_h_n, grad_c_n, grad_c), problem.gradients(), bound
        )


def assert_close(got: Sequence[Tensor | None], expected: Sequence[Tensor], bound: float) -> None:
    """The error of a sum goes with its largest terms: the bound is relative to the largest element."""
    for tensor, wanted in zip(got, expected, strict=True):
        assert tensor is not None
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(tensor.double(), wanted.detach(), rtol=0, atol=bound * scale)


each_dtype = pytest.mark.parametrize("dtype", driver.DTYPES, ids=str)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_tangent_cell = pytest.mark.parametrize("cell", TANGENT_CELLS)
each_normed_cell = pytest.mark.parametrize("cell", NORMED_CELLS)
each_persistent_cell = pytest.mark.parametrize("cell", PERSISTENT_CELLS)


@each_dtype
@each_cell
def test_kernels_against_reference(simulators: dict[str, driver.Simulator], cell: str, dtype: torch.dtype) -> None:
    sim = simulator(simulators, "sim")
    for index, sample in enumerate(s for s in [*SAMPLES, *WIDE] if s.cell == cell):
        for save in (driver.GATES, STATES):
            sim.seed(2 * index + save)
            compare(sim, sample, dtype, save)


@each_dtype
@each_cell
def test_kernels_have_no_races_and_read_no_garbage(
    simulators: dict[str, driver.Simulator], cell: str, dtype: torch.dtype
) -> None:
    sim = simulator(simulators, "check")
    samples = [s for s in [*SAMPLES, *WIDE] if s.cell == cell]
    offset = driver.DTYPES.index(dtype)
    for index, sample in enumerate(samples):
        if index % 2 == offset % 2 or sample in WIDE or sample.proj_size:  # two dtypes share each sample
            sim.seed(index)
            compare(sim, sample, dtype, (driver.GATES, STATES)[(index // 2 + offset // 2) % 2])


def noises(cell: str) -> list[tuple[float, float, float]]:
    """Recurrent dropout alone, zoneout alone, both."""
    zoneout_c = 0.4 if cell in TWO_STATES else 0.0
    return [(0.3, 0.0, 0.0), (0.0, 0.4, zoneout_c), (0.5, 0.2, zoneout_c)]


@each_dtype
@each_cell
def test_recurrent_dropout_and_zoneout(simulators: dict[str, driver.Simulator], cell: str, dtype: torch.dtype) -> None:
    """The masks that the reference draws from the same seed, forward and backward."""
    sim = simulator(simulators, "sim")
    for index, sample in enumerate(s for s in [*SAMPLES, *WIDE] if s.cell == cell):
        sim.seed(index)
        noise = (*noises(cell)[index // 2 % 3], 11 * (index % 3))  # the units counted from 0, 11 and 22
        compare(sim, sample, dtype, (driver.GATES, STATES)[index % 2], noise=noise)
    expectation = Problem(WIDE[0] if cell == "lstm" else Sample(cell, directions=2, reset=True), dtype)
    expectation.options.update(noise=(0.0, 0.3, noises(cell)[1][2]))
    layer = driver.Layer(*expectation.arguments, **expectation.options)
    wide = [None if t is None else t.double() for t in expectation.arguments[1:4]]
    weights = [weight.double() for weight in expectation.arguments[4]]
    results = reference.layer(cell, *wide, weights, **expectation.options)
    assert_close(sim.forward(layer)[:2], results[:2], Arithmetic(dtype).bound)


@each_cell
def test_noise_has_no_races_and_reads_no_garbage(simulators: dict[str, driver.Simulator], cell: str) -> None:
    sim = simulator(simulators, "check")
    for index, sample in enumerate(s for s in [*SAMPLES, *WIDE] if s.cell == cell):
        if index % 3 == 0 or sample in WIDE:
            sim.seed(index)
            save = (driver.GATES, STATES)[index // 3 % 2]
            compare(sim, sample, driver.DTYPES[index % 4], save, noise=noises(cell)[index // 2 % 3])


def along(problem: Problem) -> tuple[list[Tensor | None], list[Any]]:
    """Tangents of a problem's four results, and of its arguments; what stands past a length is nan."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, input, h0, c0, weights = problem.arguments
    of_results = [draw(grad.shape).to(problem.dtype) for grad in problem.grads]
    t_input, t_h0, t_c0, *t_weights = (
        None if t is None else draw(t.shape).to(problem.dtype) for t in (input, h0, c0, *weights)
    )
    return [*of_results, None, None][:4], [t_input.masked_fill(input.isnan(), float("nan")), t_h0, t_c0, t_weights]


def wide(argument: Any) -> Any:
    """float64, and zero where nan stands past a length."""
    return tree_map_only(Tensor, lambda t: t.double().nan_to_num() if t.is_floating_point() else t, argument)


def compare_along(sim: driver.Simulator, sample: Sample, dtype: torch.dtype, *, all_tangents: bool = True) -> None:
    """The derivative of a sample and of its backward on the simulator, against the reference."""
    problem = Problem(sample, dtype)
    layer = driver.Layer(*problem.arguments, **problem.options)
    output, _, _, saved = sim.forward(layer)
    if not problem.differentiable(output):
        return
    grads = [*problem.grads, None, None][:4]
    t_grads, tangents = along(problem)
    if not all_tangents:
        grads, t_grads, tangents = [None, *grads[1:]], [*t_grads[:3], None], [None, tangents[1], None, []]
    others = [problem.options[name] for name in ("batch_sizes", "lengths", "reset")]
    *expected, weights = formula.backward_jvp(
        sample.cell, *wide((*t_grads, *tangents, *grads, *problem.arguments[1:])), *others, [True] * 4
    )
    expected = [tensor for tensor in expected if tensor.dim() > 1]  # those of c have no elements where there is none
    got = sim.tangent(layer, output, saved, tangents, grads, t_grads)
    assert_close(got, [*expected, *weights], 4 * Arithmetic(dtype).bound)


def tangent_samples(cell: str) -> list[Sample]:
    return [s for s in [*SAMPLES, *WIDE] if s.cell == cell and not s.proj_size and sum(s.lengths)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_tangent_cell
def test_kernels_along_a_tangent(simulators: dict[str, driver.Simulator], cell: str, dtype: torch.dtype) -> None:
    sim = simulator(simulators, "sim")
    for index, sample in enumerate(tangent_samples(cell)):
        sim.seed(index)
        compare_along(sim, sample, dtype, all_tangents=index % 3 != 2)


@each_tangent_cell
def test_tangents_have_no_races_and_read_no_garbage(simulators: dict[str, driver.Simulator], cell: str) -> None:
    sim = simulator(simulators, "check")
    for index, sample in enumerate(tangent_samples(cell)):
        sim.seed(index)
        compare_along(sim, sample, torch.float32, all_tangents=index % 3 != 2)


def normalised(cell: str) -> list[Sample]:
    return [replace(s, layer_norm=True) for s in [*SAMPLES, *WIDE] if s.cell == cell]


def compare_normalised(
    sim: driver.Simulator, sample: Sample, dtype: torch.dtype, save: int, noise: Sequence[float] = ()
) -> None:
    """Layer normalisation divides the rounding of its products by their deviation, which may be small. What is allowed
    as a whole is four times the error of the plain formula in the same dtype, and beside that of rounding 16-bit
    products (a hundredth in float16) or sums of float32 and float64, of which a wrong term would be far more.
    """
    problem = Problem(sample, dtype, noise)
    layer = driver.Layer(*problem.arguments, **problem.options)
    output, h_n, c_n, saved = sim.forward(layer, save=save)
    got = [[output, h_n, c_n, saved.c][: 2 * problem.states]]
    arguments, _ = sample.arguments(dtype, grad=True)
    plain = [list(reference.layer(*arguments, **problem.options)[: 2 * problem.states])]
    expected = [problem.results]
    if problem.differentiable(output) and problem.differentiable(plain[0][0]):
        got.append(sim.backward(layer, output, saved, *[*problem.grads, None, None][:4]))
        plain.append(list(torch.autograd.grad(plain[0], tensors_of(arguments), problem.grads, materialize_grads=True)))
        expected.append(problem.gradients())
    for parts in zip(got, plain, expected, strict=True):
        ours, theirs, exact = (torch.cat([tensor.detach().double().flatten() for tensor in part]) for part in parts)
        rounding = (1 if dtype.itemsize == 2 else 16) * Arithmetic(dtype).bound * (1 + exact.norm())
        assert (ours - exact).norm() <= 4 * (theirs - exact).norm() + rounding


@each_dtype
@each_normed_cell
def test_layer_normalisation(simulators: dict[str, driver.Simulator], cell: str, dtype: torch.dtype) -> None:
    """Forward and backward, with the products kept and made again, with noise and without."""
    sim = simulator(simulators, "sim")
    for index, sample in enumerate(normalised(cell)):
        sim.seed(index)
        save = (driver.GATES, STATES)[index % 2]
        compare_normalised(sim, sample, dtype, save, ((), *noises(cell))[index // 2 % 4])


@each_normed_cell
def test_layer_normalisation_has_no_races_and_reads_no_garbage(
    simulators: dict[str, driver.Simulator], cell: str
) -> None:
    sim = simulator(simulators, "check")
    for index, sample in enumerate(normalised(cell)):
        if index % 4 == 1 or sample.hidden_size > 5:
            sim.seed(index)
            save = (driver.GATES, STATES)[index // 4 % 2]
            compare_normalised(sim, sample, driver.DTYPES[index // 4 % 4], save, ((), *noises(cell))[index // 8 % 4])


persistent_arithmetics = pytest.mark.parametrize(
    "arithmetic",
    [Arithmetic(torch.float32), Arithmetic(torch.float32, True), Arithmetic(torch.bfloat16), Arithmetic(torch.float16)],
    ids=["float32", "tf32", "bfloat16", "float16"],
)
persistent_engines = pytest.mark.parametrize("engine", ["persistent_cta"])


def persistent_samples(cell: str, dtype: torch.dtype) -> list[Sample]:
    candidates = [*SAMPLES, *WIDE, *TILES, *(WIDE_TILES if dtype.itemsize == 2 else [])]
    return [
        s for s in candidates if s.cell == cell and not s.proj_size and s.hidden_size <= 256 and s.steps and s.batch
    ]


@persistent_arithmetics
@each_persistent_cell
@persistent_engines
def test_persistent_kernels_against_reference(
    simulators: dict[str, driver.Simulator], engine: str, cell: str, arithmetic: Arithmetic
) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    for index, sample in enumerate(persistent_samples(cell, arithmetic.dtype)):
        sim.seed(index)
        for save in (NOTHING, STATES, driver.GATES) if sample in TILES else (STATES, driver.GATES)[index % 2 :][:1]:
            compare(sim, sample, arithmetic.dtype, save, tf32=arithmetic.tf32)


@persistent_arithmetics
@each_persistent_cell
@persistent_engines
def test_persistent_kernels_have_no_races_and_read_no_garbage(
    simulators: dict[str, driver.Simulator], engine: str, cell: str, arithmetic: Arithmetic
) -> None:
    sim = simulator(simulators, "check")
    sim.engine(engine)
    for index, sample in enumerate(persistent_samples(cell, arithmetic.dtype)):
        if sample in TILES or sample in WIDE_TILES or index % 4 == driver.DTYPES.index(arithmetic.dtype):
            sim.seed(index)
            compare(sim, sample, arithmetic.dtype, (driver.GATES, STATES)[index % 2], tf32=arithmetic.tf32)


def test_fast_nonlinearities(simulators: dict[str, driver.Simulator]) -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 2, 10_001), -torch.logspace(-30, 2, 10_001)])
    tanh, sigmoid = simulator(simulators, "sim").fast_functions(x)
    torch.testing.assert_close(tanh.double(), x.double().tanh(), rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(sigmoid.double(), x.double().sigmoid(), rtol=2e-6, atol=1e-9)
    assert (tanh.abs() <= 1).all()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    tanh, sigmoid = simulator(simulators, "sim").fast_functions(special)
    # tanh ends where it differs from 1 by 3.4e-7, and rounding.
    torch.testing.assert_close(tanh[:2], torch.tensor([1.0, -1.0]), rtol=5e-7, atol=0)
    assert sigmoid.tolist()[:2] == [1, 0]
    assert tanh[2].isnan()
    assert sigmoid[2].isnan()
    assert (tanh[3], sigmoid[3]) == (0, 0.5)


@persistent_engines
def test_the_largest_layer_of_float_that_forward_holds(simulators: dict[str, driver.Simulator], engine: str) -> None:
    """Without tensor cores the backward of an LSTM holds less."""
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    sample = WIDE_TILES[0]
    compare(sim, sample, torch.float32, driver.GATES, backward_engine="stepwise")
    with pytest.raises(driver.SimulationError, match="error 1"):
        compare(sim, sample, torch.float32, driver.GATES, backward_engine=engine)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@persistent_engines
def test_engines_read_what_another_saved(simulators: dict[str, driver.Simulator], engine: str, cell: str) -> None:
    sim = simulator(simulators, "sim")
    for sample in [s for s in TILES if s.cell == cell]:
        for save in (STATES, driver.GATES):
            for forward, backward in ((engine, "stepwise"), ("stepwise", engine)):
                sim.engine(forward)
                compare(sim, sample, torch.float32, save, backward_engine=backward)


@persistent_engines
def test_rows_that_cannot_be_loaded_in_pairs(simulators: dict[str, driver.Simulator], engine: str) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    sim.shift(1)
    try:
        for sample in TILES:
            if sample.steps * sample.batch < 60:
                compare(sim, sample, torch.bfloat16, driver.GATES)
    finally:
        sim.shift(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["stepwise", "persistent_cta"])
def test_the_order_of_threads_does_not_change_a_bit(
    simulators: dict[str, driver.Simulator], engine: str, dtype: torch.dtype
) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    sample = WIDE[0] if engine == "stepwise" else TILES[1]
    arguments, options = sample.arguments(dtype)
    layer = driver.Layer(*arguments, **options)
    results = []
    for seed in range(12):
        sim.seed(seed)
        output, h_n, _, saved = sim.forward(layer)
        grads = sim.backward(layer, output, saved, output, h_n, None, None)
        results.append(torch.cat([tensor.flatten() for tensor in (output, h_n, *grads)]))
    assert all(torch.equal(result, results[0]) for result in results)


# ------------------------------------------------------------------------------------------------ the operators
@pytest.fixture(scope="module")
def operators_library() -> Path:
    if ops.extension is None:
        pytest.skip("the extension is not built, so there are no operators")
    sources = [build.HERE / "operators" / "operators.cpp"]
    library = build.build("operators", "sim", ENGINE[1:], library=True, torch_sources=sources)
    torch.ops.load_library(str(library))
    return library


@pytest.fixture
def operators(operators_library: Path) -> DispatchKeySet:
    """The CUDA operators of csrc/ops, on host tensors and the simulator: a key that dispatches to them."""
    assert operators_library.exists()
    return DispatchKeySet(DispatchKey.PrivateUse1)


@pytest.fixture
def force_engine(operators_library: Path) -> Iterator[Callable[[str], None]]:
    """Chooses the engine of the operators on the simulator; "" leaves the choice to the plan."""
    force = ctypes.CDLL(str(operators_library)).sim_force_engine
    force.argtypes = [ctypes.c_char_p]
    yield lambda name: force(name.encode())
    force(b"")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_cell
def test_operators_against_reference(operators: DispatchKeySet, cell: str, dtype: torch.dtype) -> None:
    forward = getattr(torch.ops.rnnfast, cell).default
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward").default
    for index, sample in enumerate(s for s in [*SAMPLES, *WIDE] if s.cell == cell):
        problem = Problem(sample, dtype)
        arguments = [*problem.arguments[1:], *(problem.options[k] for k in ("batch_sizes", "lengths", "reset"))]
        save = (driver.GATES, STATES)[index % 2]
        output, h_n, c_n, c, saved = forward.redispatch(operators, *arguments, save)
        bound = Arithmetic(dtype).bound
        assert_close([output, h_n, c_n, c][: 2 * problem.states], problem.results, bound)
        assert (saved.numel() > 0) == (
            save == driver.GATES and ops.extension.saved_values[cell] > 0 and output.numel() > 0
        )
        if not problem.differentiable(output):
            continue
        grads = [*problem.grads, None, None][:4]
        grad_input, grad_h0, grad_c0, grad_weights = backward.redispatch(
            operators, *grads, *arguments, output, c, saved, [True] * 4
        )
        got = [grad_input, grad_h0, *([grad_c0] if problem.states == 2 else []), *grad_weights]
        assert_close(got, problem.gradients(), bound)


def test_operators_take_the_engine_that_was_forced(
    operators: DispatchKeySet, force_engine: Callable[[str], None]
) -> None:
    def run(hidden_size: int, dtype: torch.dtype) -> Tensor:
        arguments, _ = Sample("gru", steps=20, hidden_size=hidden_size).arguments(dtype)
        result = torch.ops.rnnfast.gru.default.redispatch(operators, *arguments[1:], None, None, None, driver.GATES)
        return torch.cat([tensor.flatten() for tensor in result])

    planned = run(40, torch.float32)
    force_engine("persistent_cta")
    assert torch.equal(run(40, torch.float32), planned)
    for hidden_size, dtype, limit in (
        (40, torch.float64, "it has no float64"),
        (300, torch.float32, "a block holds 128 hidden units of this cell and dtype, the layer has 300"),
    ):
        with pytest.raises(RuntimeError, match=f"persistent_cta was forced and cannot run this gru: {limit}"):
            run(hidden_size, dtype)
    force_engine("stepwise")
    other = run(40, torch.float32)
    assert not torch.equal(other, planned)  # sums in another order
    assert_close([other], [planned.double()], Arithmetic(torch.float32).bound)


def test_operators_with_noise_run_stepwise(operators: DispatchKeySet, force_engine: Callable[[str], None]) -> None:
    noise = [0.4, 0.3, 0.2]
    problem = Problem(Sample("lstm", hidden_size=40, directions=2, reset=True), torch.float32, noise)
    arguments = [*problem.arguments[1:], None, None, problem.options["reset"]]
    drawn = (problem.options["seed"], noise)
    bound = Arithmetic(torch.float32).bound
    output, h_n, c_n, c, saved = torch.ops.rnnfast.lstm.default.redispatch(operators, *arguments, driver.GATES, *drawn)
    assert_close([output, h_n, c_n, c], problem.results, bound)
    *grads, weights = torch.ops.rnnfast.lstm_backward.default.redispatch(
        operators, *problem.grads, *arguments, output, c, saved, [True] * 4, *drawn
    )
    assert_close([*grads, *weights], problem.gradients(), bound)
    with pytest.raises(NotImplementedError, match="the expectation of zoneout has no kernel for its gradient"):
        torch.ops.rnnfast.lstm_backward.default.redispatch(
            operators, *problem.grads, *arguments, output, c, saved, [True] * 4, None, [0.0, 0.3, 0.2]
        )
    force_engine("persistent_cta")
    with pytest.raises(RuntimeError, match="cannot run this lstm: it has no recurrent dropout or zoneout"):
        torch.ops.rnnfast.lstm.default.redispatch(operators, *arguments, driver.GATES, *drawn)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_operators_with_layer_normalisation_run_stepwise(
    operators: DispatchKeySet, force_engine: Callable[[str], None], cell: str
) -> None:
    forward = getattr(torch.ops.rnnfast, cell).default
    backward = getattr(torch.ops.rnnfast, f"{cell}_backward").default
    for index, sample in enumerate(normalised(cell)):
        problem = Problem(sample, torch.float64)
        arguments = [*problem.arguments[1:], *(problem.options[k] for k in ("batch_sizes", "lengths", "reset"))]
        options = {"layer_norm": True}
        output, h_n, c_n, c, saved = forward.redispatch(operators, *arguments, (driver.GATES, 1)[index % 2], **options)
        bound = 16 * Arithmetic(torch.float64).bound
        assert_close([output, h_n, c_n, c][: 2 * problem.states], problem.results, bound)
        grads = [*problem.grads, None, None][:4]
        *states, weights = backward.redispatch(operators, *grads, *arguments, output, c, saved, [True] * 4, **options)
        assert_close([*states[: 1 + problem.states], *weights], problem.gradients(), bound)
        *_, weights = backward.redispatch(
            operators, *grads, *arguments, output, c, saved, [True, True, True, False], **options
        )
        assert weights == []
    force_engine("persistent_cta")
    arguments, _ = Sample(cell, layer_norm=True).arguments(torch.float32)
    with pytest.raises(RuntimeError, match=f"cannot run this {cell}: it has no layer normalisation"):
        forward.redispatch(operators, *arguments[1:], None, None, None, driver.GATES, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_tangent_cell
def test_operators_along_a_tangent(operators: DispatchKeySet, cell: str, dtype: torch.dtype) -> None:
    """The derivative of a layer and that of its backward, with all tangents and with some of them alone."""
    forward, jvp, backward_jvp = (
        getattr(torch.ops.rnnfast, f"{cell}{suffix}").default for suffix in ("", "_jvp", "_backward_jvp")
    )
    for sample in (s for s in [*SAMPLES, *WIDE] if s.cell == cell and not s.proj_size):
        problem = Problem(sample, dtype)
        layer = [*problem.arguments[1:], *(problem.options[k] for k in ("batch_sizes", "lengths", "reset"))]
        output, _, _, c, saved = forward.redispatch(operators, *layer, driver.GATES)
        if not problem.differentiable(output):
            continue
        bound, states = 4 * Arithmetic(dtype).bound, problem.states
        grads = [*problem.grads, None, None][:4]
        t_grads, tangents = along(problem)
        for t_arguments, mask in ((tangents, [True] * 4), ([None, tangents[1], None, []], [True, False, False, True])):
            got = jvp.redispatch(operators, *t_arguments, *layer, output, c, saved)
            expected = formula.jvp(cell, *wide(t_arguments), *wide(layer))
            assert_close(got[: 2 * states], expected[: 2 * states], bound)
            *got, weights = backward_jvp.redispatch(
                operators, *t_grads, *t_arguments, *grads, *layer, output, c, saved, mask, None
            )
            *expected, expected_weights = formula.backward_jvp(
                cell, *wide(t_grads), *wide(t_arguments), *wide(grads), *wide(layer), mask
            )
            assert_close([*got, *weights], [*expected, *expected_weights], bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_tangent_cell
def test_operators_with_gradients_of_groups(operators: DispatchKeySet, cell: str, dtype: torch.dtype) -> None:
    """With a group for each row, and with one for all where packed steps have rows that nothing divides."""
    forward = getattr(torch.ops.rnnfast, cell).default
    backward = getattr(torch.ops.rnnfast, f"{cell}_grouped_backward").default
    for index, sample in enumerate(s for s in [*SAMPLES, *WIDE] if s.cell == cell and not s.proj_size and s.batch < 20):
        problem = Problem(sample, dtype)
        layer = [*problem.arguments[1:], *(problem.options[k] for k in ("batch_sizes", "lengths", "reset"))]
        output, _, _, c, saved = forward.redispatch(operators, *layer, (driver.GATES, STATES)[index % 2])
        if not problem.differentiable(output) or not sample.batch:
            continue
        groups = 1 if sample.form == "packed" else sample.batch
        grads = [*problem.grads, None, None][:4]
        got = backward.redispatch(operators, *grads, *layer, output, c, saved, [True] * 4, groups)
        states, bound = problem.states, Arithmetic(dtype).bound
        expected = problem.gradients()
        assert_close(got[: 1 + states], expected[: 1 + states], bound)
        for group in range(groups):
            of_row = [g.double() if groups == 1 else only_row(g.double(), group) for g in problem.grads]
            weights = torch.autograd.grad(
                problem.results, problem.leaves[1 + states :], of_row, materialize_grads=True, retain_graph=True
            )
            assert_close([weight[group] for weight in got[3]], weights, bound)


def only_row(grad: Tensor, row: int) -> Tensor:
    """A gradient that is zero for the other rows of the batch."""
    return torch.zeros_like(grad).index_copy_(1, torch.tensor([row]), grad[:, row : row + 1])


def test_operators_return_the_gradients_asked_for(operators: DispatchKeySet) -> None:
    problem = Problem(WIDE[0], torch.float64)
    arguments = [*problem.arguments[1:], *(problem.options[k] for k in ("batch_sizes", "lengths", "reset"))]
    output, _, _, c, saved = torch.ops.rnnfast.lstm.default.redispatch(operators, *arguments, driver.GATES)
    for wanted in range(4):
        mask = [k == wanted for k in range(4)]
        *states, weights = torch.ops.rnnfast.lstm_backward.default.redispatch(
            operators, None, problem.grads[1], None, None, *arguments, output, c, saved, mask
        )
        assert [*(tensor.numel() > 0 for tensor in states), len(weights) > 0] == mask


def test_operators_keep_no_gradients_of_states(operators: DispatchKeySet) -> None:
    problem = Problem(Sample("gru"), torch.float32)
    arguments = [*problem.arguments[1:], None, None, None]
    output, _, _, c, saved = torch.ops.rnnfast.gru.default.redispatch(operators, *arguments, driver.GATES)
    with pytest.raises(RuntimeError, match="gru_backward_with_states: expected CPU tensors, got CUDA ones"):
        torch.ops.rnnfast.gru_backward_with_states.default.redispatch(
            operators, *[*problem.grads, None, None][:4], *arguments, output, c, saved, [True] * 4
        )


def test_operators_refuse_lengths_above_the_steps(operators: DispatchKeySet) -> None:
    sample = Sample("gru", form="lengths", row_lengths=(1, 9, 2))
    arguments, options = sample.arguments()
    with pytest.raises(RuntimeError, match=r"lengths\[1\] is 9"):
        torch.ops.rnnfast.gru.default.redispatch(
            operators, *arguments[1:], None, options["lengths"], None, driver.GATES
        )


def run_in_subprocess(program: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300)


def test_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    library = build.build("engine", "asan", ENGINE, library=True)
    names = ("libasan.so", "libubsan.so")
    preload = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names]
    done = run_in_subprocess(
        [sys.executable, __file__, str(library)],
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=os.pathsep.join([str(build.ROOT), str(Path(__file__).parent)]),
    )
    assert done.returncode == 0, done.stderr[-4000:]


# ------------------------------------------------------------------------------------------------ the simulator itself
FEATURES = ["sum", "transpose", "tile_of_warp", "mma", "cluster_push", "warp_barrier"]
# Each mistake of features.cu, with a build that must find it and a word of its report.
MISTAKES = {
    "BAD_no_warp_barrier": ("check", "uninitialised"),
    "BAD_lock_step": ("check", "RACE"),
    "BAD_same_value": ("check", "RACE"),
    "BAD_host_pointer": ("check", "host memory"),
    "BAD_use_after_free": ("sim", "illegal address"),
    "BAD_uninitialised": ("check", "uninitialised"),
    "BAD_past_the_end": ("sim", "offset 16 of an allocation of 16 bytes"),
    "BAD_grid_barrier_in_plain_launch": ("sim", "without a cooperative launch"),
    "BAD_shared_memory_without_attribute": ("sim", "above the limit"),
    "BAD_cooperative_grid_too_large": ("sim", "cannot all be resident"),
    "BAD_empty_grid": ("sim", "the grid is empty"),
    "BAD_masks_disagree": ("sim", "lane 20, which is not there"),
    "BAD_barrier_counts_differ": ("sim", "thread(s) of the block exited"),
    "BAD_own_barrier_in_plain_launch": ("sim", "livelock"),
    "BAD_volatile_spin": ("sim", "without reaching a synchronisation"),
    "BAD_push_in_a_cluster_of_one": ("sim", "in a cluster of one block"),
    "BAD_push_without_arrival": ("sim", "in mbarrier_wait"),
    "BAD_push_with_two_arrivals": ("sim", "more arrivals in a phase"),
    "BAD_push_without_wait": ("check", "uninitialised"),
    "BAD_push_and_wait_for_another_turn": ("check", "uninitialised"),
    "BAD_push_expects_less": ("sim", "in mbarrier_wait"),
    "BAD_push_to_a_block_that_left": ("sim", "has exited"),
    "BAD_push_to_a_block_that_leaves": ("sim", "with an st.async to it still in flight"),
    "BAD_push_to_no_barrier": ("sim", "was not initialised"),
    "BAD_push_before_all_have_begun": ("sim", "was not initialised"),
    "BAD_large_cluster_without_attribute": ("sim", "more than 8 blocks"),
    "BAD_misaligned": ("asan", "misaligned address"),
    "BAD_local_bounds": ("asan", "out of bounds for type"),
}


def subject(name: str, kind: str) -> str:
    return str(build.build(name, kind, [build.HERE / "subjects" / f"{name}.cu"], library=False))


@pytest.mark.parametrize("kind", build.BUILDS)
def test_features_work(kind: str) -> None:
    program = subject("features", kind)
    names = run_in_subprocess([program]).stdout.split()
    assert set(names) == {*FEATURES, *MISTAKES}
    for name in FEATURES:
        done = run_in_subprocess([program, name])
        assert (done.returncode, done.stdout) == (0, "error 0 wrong 0\n"), f"{name}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str) -> None:
    kind, report = MISTAKES[name]
    done = run_in_subprocess([subject("features", kind), name])
    assert report in done.stderr
    assert done.returncode != 0 or "error 0 " not in done.stdout


PLANTED = [
    "grid_sync no_block_barrier",
    "mma no_block_barrier",
    "grid_sync off_by_one_shared_read",
    "cluster off_by_one_shared_read",
    "grid_sync no_grid_barrier",
    "flags no_grid_barrier",
    "cluster no_grid_barrier",
    "mma no_grid_barrier",
    "mma no_cp_async_wait",
    "grid_sync divergent_barrier",
    "cluster uninitialised_state",
    "grid_sync shuffle_after_exit",
    "cluster exit_while_peers_write",
    "grid_sync single_buffer",
    "flags single_buffer",
    "grid_sync off_by_one_global_write",
    "mma swapped_fragments",
    "flags no_release",
]


@pytest.mark.parametrize("kind", ["sim", "check"])
@pytest.mark.parametrize("variant", ["grid_sync", "flags", "cluster", "mma"])
def test_persistent_kernels_run(variant: str, kind: str) -> None:
    done = run_in_subprocess([subject("lstm", kind), variant, "none", "6", "5"])
    assert done.stdout == "0 of 6\n", done.stderr


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_found(mistake: str) -> None:
    done = run_in_subprocess([subject("lstm", "check"), *mistake.split(), "3", "4"])
    assert done.stdout == "3 of 3\n", done.stderr


def main() -> None:
    """The sanitizers' part of the tests, in a process that has loaded them first."""
    torch.set_num_threads(1)
    sim = driver.Simulator(Path(sys.argv[1]))
    for index, sample in enumerate([*SAMPLES, *WIDE]):
        sim.seed(index)
        compare(sim, sample, driver.DTYPES[index % 4], (driver.GATES, STATES)[index // 4 % 2])
    sim.engine("persistent_cta")
    for index, sample in enumerate([*TILES, *WIDE_TILES]):
        dtype = driver.DTYPES[1 + index % 3] if sample in TILES else torch.bfloat16
        compare(sim, sample, dtype, (driver.GATES, STATES)[index % 2], tf32=dtype == torch.float32 and index % 2 == 0)
    for index, (sample, spread) in enumerate(SPREADS):
        sim.spread(*spread)
        for engine in ("persistent_grid", "persistent_cluster"):
            sim.engine(engine)
            sim.shift(index % 2)
            dtype = driver.DTYPES[1 + index % 3]
            compare(sim, sample, dtype, (driver.GATES, STATES)[index % 2], tf32=dtype == torch.float32)
    sim.engine("stepwise")
    sim.shift(1)  # vector loads would be misaligned
    for sample in WIDE:
        compare(sim, sample, torch.float32, STATES)
        compare(sim, sample, torch.bfloat16, driver.GATES)
        compare(sim, sample, torch.bfloat16, STATES, noise=noises(sample.cell)[2])
        if sample.cell in NORMED_CELLS:
            compare_normalised(sim, replace(sample, layer_norm=True), torch.float32, STATES, noises(sample.cell)[2])
            compare_normalised(sim, replace(sample, layer_norm=True), torch.bfloat16, driver.GATES)


if __name__ == "__main__":
    main()
