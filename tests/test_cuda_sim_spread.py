"""The engines that spread W_hh over thread blocks (persistent_grid, persistent_cluster) on the simulator of cuda_sim/:
many ways to spread a layer, launches that cannot be, and a mutation of everything that synchronises.
"""

from __future__ import annotations

import re

import pytest
import torch
from cuda_sim import build, driver, instrument, mutate
from sample_inputs import Sample
from test_cuda_sim import NOTHING, STATES, Arithmetic, compare, each_persistent_cell, persistent_arithmetics, simulator

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

ENGINES = ["persistent_grid", "persistent_cluster"]
each_engine = pytest.mark.parametrize("engine", ENGINES)

# A layer, and ways to spread it: unit tiles of a block, row tiles of a team, parts of k. One block and several, one
# team and several, sizes that divide the tiles and sizes that do not, warps without k, W_hh in registers and beyond;
# where sums are scattered, warps of 1 to 8 of the team's tiles, with one row tile and with two.
LAYERS = [
    (Sample("lstm", steps=1, batch=1, hidden_size=16), [(1, 1, 1)]),
    (Sample("lstm", steps=1, batch=1, hidden_size=32), [(1, 1, 1)]),
    (
        Sample("lstm", steps=3, batch=19, hidden_size=40, directions=2, form="lengths", reset=True),
        [(1, 1, 1), (1, 2, 3), (3, 2, 2)],
    ),
    (Sample("lstm", steps=3, batch=9, hidden_size=32, form="packed"), [(1, 1, 8), (2, 2, 2)]),
    (Sample("lstm", steps=2, batch=8, hidden_size=160), [(2, 1, 1), (1, 1, 2)]),
    (Sample("lstm", steps=6, batch=20, hidden_size=80, directions=2, form="lengths"), [(2, 2, 2)]),
    (Sample("lstm", steps=2, batch=9, hidden_size=200), [(1, 2, 2)]),
    (Sample("lstm", steps=2, batch=3, hidden_size=250), [(1, 1, 2)]),
    (Sample("gru", steps=1, batch=9, hidden_size=48, directions=2), [(1, 1, 2), (2, 2, 2)]),
    (Sample("gru", steps=4, batch=17, hidden_size=37, directions=2, form="packed", reset=True), [(1, 1, 1), (2, 3, 3)]),
    (Sample("gru", steps=2, batch=3, hidden_size=200, form="lengths"), [(2, 1, 4), (4, 1, 1)]),
    (Sample("gru", steps=6, batch=12, hidden_size=180), [(1, 2, 2)]),
    (
        Sample("rnn_tanh", steps=3, batch=17, hidden_size=70, directions=2, form="lengths", reset=True),
        [(1, 1, 2), (3, 2, 2)],
    ),
    (Sample("rnn_tanh", steps=2, batch=5, hidden_size=33, form="packed"), [(1, 1, 5)]),
    (Sample("rnn_relu", steps=3, batch=12, hidden_size=64, reset=True), [(1, 1, 1), (4, 2, 2)]),
    (Sample("rnn_sigmoid", steps=3, batch=20, hidden_size=47, directions=2), [(1, 3, 4), (3, 1, 1)]),
]


@pytest.fixture(scope="module")
def simulators() -> dict[str, driver.Simulator]:
    return {}


def cases(engine: str, cell: str) -> list[tuple[Sample, tuple[int, int, int]]]:
    """A cluster has two blocks at least."""
    return [
        (sample, spread)
        for sample, spreads in LAYERS
        for spread in spreads
        if sample.cell == cell and (engine == "persistent_grid" or sample.hidden_size > 16 * spread[0])
    ]


@persistent_arithmetics
@each_persistent_cell
@each_engine
def test_spread_kernels_against_reference(
    simulators: dict[str, driver.Simulator], engine: str, cell: str, arithmetic: Arithmetic
) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    for index, (sample, spread) in enumerate(cases(engine, cell)):
        sim.spread(*spread)
        for save in (NOTHING, STATES, driver.GATES):
            sim.seed(3 * index + save)
            compare(sim, sample, arithmetic.dtype, save, tf32=arithmetic.tf32)


@persistent_arithmetics
@each_persistent_cell
@each_engine
def test_spread_kernels_have_no_races_and_read_no_garbage(
    simulators: dict[str, driver.Simulator], engine: str, cell: str, arithmetic: Arithmetic
) -> None:
    sim = simulator(simulators, "check")
    sim.engine(engine)
    offset = driver.DTYPES.index(arithmetic.dtype) + ENGINES.index(engine) + arithmetic.tf32
    for index, (sample, spread) in enumerate(cases(engine, cell)):
        if (index + offset) % 2:
            continue
        sim.spread(*spread)
        sim.seed(index)
        compare(sim, sample, arithmetic.dtype, (driver.GATES, STATES)[index % 2], tf32=arithmetic.tf32)


@each_engine
def test_the_order_of_threads_does_not_change_a_bit(simulators: dict[str, driver.Simulator], engine: str) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    sim.spread(1, 2, 3)
    arguments, options = LAYERS[2][0].arguments(torch.float32)
    layer = driver.Layer(*arguments, **options)
    results = []
    for seed in range(8):
        sim.seed(seed)
        output, h_n, _, saved = sim.forward(layer)
        grads = sim.backward(layer, output, saved, output, h_n, None, None)
        results.append(torch.cat([tensor.flatten() for tensor in (output, h_n, *grads)]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("engine", "spread", "sample", "error"),
    [
        # 132 multiprocessors hold 32 blocks each
        ("persistent_grid", (1, 1, 1), Sample("rnn_tanh", steps=1, batch=8 * 132 * 32 + 1, hidden_size=16), 720),
        ("persistent_cluster", (1, 1, 1), Sample("rnn_tanh", steps=1, batch=1, hidden_size=16 * 17), 912),
        ("persistent_cluster", (2, 1, 2), Sample("lstm", steps=1, batch=1, hidden_size=32), 1),  # a block alone
        ("persistent_grid", (1, 3, 2), Sample("gru", steps=1, batch=1, hidden_size=16), 1),  # rows without an owner
        ("persistent_cluster", (3, 1, 3), Sample("gru", steps=1, batch=1, hidden_size=16), 1),  # nine warps
    ],
)
def test_a_spread_that_cannot_be_is_an_error_and_the_next_call_works(
    simulators: dict[str, driver.Simulator], engine: str, spread: tuple[int, int, int], sample: Sample, error: int
) -> None:
    sim = simulator(simulators, "sim")
    sim.engine(engine)
    sim.spread(*spread)
    arguments, options = sample.arguments(torch.float32)
    with pytest.raises(driver.SimulationError, match=rf"error {error}:"):
        sim.forward(driver.Layer(*arguments, **options))
    sim.spread(1, 1, 1)
    compare(sim, LAYERS[1][0], torch.float32, driver.GATES)


def test_clusters_that_run_at_once_are_asked_for(simulators: dict[str, driver.Simulator]) -> None:
    """Each block has a multiprocessor to itself, and each cluster lies in a part of 16; four are left over."""
    expected = [8 * (16 // blocks) + 4 // blocks for blocks in range(1, 17)]
    assert simulator(simulators, "sim").active_clusters() == expected


def test_code_for_an_older_device_has_no_clusters(simulators: dict[str, driver.Simulator]) -> None:
    """Its kernels are empty on any device that runs it."""
    sim = simulator(simulators, "sim")
    try:
        sim.code_version(80)
        assert not any(sim.active_clusters())
    finally:
        sim.code_version(90)


# ------------------------------------------------------------------------------------------------ mutation
def test_instrument_finds_what_synchronises() -> None:
    names = instrument.wrappers("__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {")
    text = "\n".join(
        [
            "  __syncthreads();  // a comment about __syncthreads();",
            "  if (lane == 0) device::add_release(flag, 1);",
            "  while (device::load_acquire(flag) < 3) continue;",
            "  compute();",
        ]
    )
    changed, sites = instrument.instrument(text, "kernel.cu", [*names, "add_release"], 7)
    assert names == ["load_acquire"]
    assert [(site.number, site.line, site.change) for site in sites] == [
        (7, 1, "removed"),
        (8, 2, "relaxed"),
        (9, 2, "removed"),
        (10, 3, "relaxed"),
        (11, 3, "does not wait"),
    ]
    assert changed.splitlines() == [
        "  if (!cuda_sim::mutated(7)) __syncthreads();  // a comment about __syncthreads();",
        "  if (lane == 0) if (!cuda_sim::mutated(9)) (cuda_sim::relax(8), device::add_release)(flag, 1);",
        "  while (!cuda_sim::mutated(11) && ((cuda_sim::relax(10), device::load_acquire)(flag) < 3)) continue;",
        "  compute();",
    ]


def test_no_synchronisation_of_the_kernels_is_overlooked() -> None:
    sites = instrument.places()
    found = {(site.file, site.line) for site in sites}
    for path in [*(build.CSRC / "cuda").glob("*.cu"), *(build.CSRC / "cuda").glob("*.cuh")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if re.search(
                rf"(__(?!shfl|ballot|any|all)|device::)\w*({instrument.WORDS})\w*(<\d+>)?\(|\basm\b|cooperative_groups",
                code,
            ):
                assert (path.name, number) in found, f"{path.name}:{number}: {code.strip()}"
    assert len(found) > 5


def test_every_removed_synchronisation_is_noticed(simulators: dict[str, driver.Simulator]) -> None:
    sim = simulator(simulators, "check")
    unnoticed = [str(site) for site, found in mutate.verdicts(sim, instrument.places(), seeds=6) if found is None]
    assert unnoticed == []
