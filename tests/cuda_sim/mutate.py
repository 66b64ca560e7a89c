"""Removes each barrier, wait and fence of the CUDA kernels, one at a time, and asks whether the simulator notices.

Owns the layers that the kernels are run on and the verdicts. Must not know how places are found (instrument.py), what
the kernels compute. Run it in tests/:

    python -m cuda_sim.mutate             every place; exit status 1 if one can go unnoticed (make mutate)
    python -m cuda_sim.mutate --list      the places
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from sample_inputs import Sample
from test_cuda_sim import SPREADS, STATES, compare, compare_normalised, engine_sources

from . import build, driver, instrument

# Small layers that take every way through the kernels: an engine, a layer, how it is spread.
CASES = [
    (engine, sample, spread)
    for engine in ("persistent_grid", "persistent_cluster", "persistent_cta")
    for sample, spread in SPREADS
] + [
    ("stepwise", Sample("lstm", steps=2, hidden_size=33, layer_norm=True), (1, 1, 1)),
]


def failure(sim: driver.Simulator, seeds: int) -> str | None:
    """Run the cases in so many orders of the threads; return what went wrong first."""
    for seed in range(seeds):
        for number, (engine, sample, spread) in enumerate(CASES):
            sim.seed(seed * len(CASES) + number)
            sim.engine(engine)
            sim.spread(*spread)
            try:
                check = compare_normalised if sample.layer_norm else compare
                check(sim, sample, torch.bfloat16, (driver.GATES, STATES)[seed % 2])
            except (AssertionError, driver.SimulationError) as error:
                return f"{engine} {sample.cell}: {str(error).splitlines()[0]}"
    return None


def verdicts(
    sim: driver.Simulator, sites: list[instrument.Site], seeds: int
) -> Iterator[tuple[instrument.Site, str | None]]:
    """For each change, what went wrong; None: nobody noticed."""
    for site in sites:
        sim.mutate(site.number)
        try:
            yield site, failure(sim, seeds)
        finally:
            sim.mutate(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the places, and build nothing")
    parser.add_argument("--seeds", type=int, default=12, help="orders of the threads to try for each place")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sites = instrument.places()
    if options.list:
        print(*sites, sep="\n")
        return
    sources, csrc = engine_sources("check")
    sim = driver.Simulator(build.build("engine", "check", sources, library=True, csrc=csrc))
    if found := failure(sim, options.seeds):
        sys.exit(f"the kernels fail as they are: {found}")
    unnoticed = 0
    for site, found in verdicts(sim, sites, options.seeds):
        unnoticed += found is None
        print(f"{'UNNOTICED' if found is None else 'noticed'} {site}\n    {found or ''}", flush=True)
    print(f"{len(sites) - unnoticed} of {len(sites)} changes were noticed")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
