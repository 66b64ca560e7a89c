"""Removes each barrier, wait and fence of the CUDA kernels, one at a time, and asks whether the simulator notices.

Owns finding them in the source, the one build in which each can be switched off, and the verdicts. Must not know what the
kernels compute. Run it from the root of the repository:

    python tests/cuda_sim/mutate.py             every place; exit status 1 if one can go unnoticed
    python tests/cuda_sim/mutate.py --list      the places

A place is a call, in csrc/cuda, of a barrier of CUDA or of a wrapper of device_ptx.h whose name says that it waits, arrives,
acquires, releases, commits, synchronises or fences. It is changed in up to three ways: the statement is removed, its acquire
or release is made relaxed, a loop that waits for it does not wait. All changes are compiled into one library, where each is
off until cuda_sim::mutate switches it on.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from cuda_sim import build, driver
from sample_inputs import Sample
from test_cuda_sim import STATES, compare

WORDS = "sync|wait|arrive|acquire|release|fence|commit"
BUILT_IN = rf"__(?:{WORDS})\w*|__thread(?:{WORDS})\w*"


class Site(NamedTuple):
    """One change of one place."""

    number: int
    file: str
    line: int
    change: str  # "removed", "relaxed" or "does not wait"
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change}: {self.text}"


def wrappers(device_ptx: str) -> list[str]:
    """The functions of device_ptx.h that synchronise."""
    names = re.findall(r"__forceinline__ [\w:<>]+ (\w+)\(", device_ptx)
    return [name for name in names if re.search(WORDS, name)]


def instrument(text: str, file: str, names: Iterable[str], first: int) -> tuple[str, list[Site]]:
    """Return the source with a switch at every place, and the changes, numbered from `first`."""
    call = re.compile(rf"(?<![\w.:])(?:{BUILT_IN}|device::(?:{'|'.join(names)}))\b(?:<[^<>()]*>)?(?=\()")
    sites: list[Site] = []

    def add(number: int, change: str, code: str) -> int:
        sites.append(Site(first + len(sites), file, number, change, code.strip()))
        return sites[-1].number

    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        code, comment = (line[: line.find("//")], line[line.find("//") :]) if "//" in line else (line, "")
        found = list(call.finditer(code))
        changed = code
        for match in reversed(found):  # from the right, so that positions on the left hold
            if re.search("acquire|release", match[0]):
                relaxed = add(number, "relaxed", code)
                changed = f"{changed[: match.start()]}(cuda_sim::relax({relaxed}), {match[0]}){changed[match.end() :]}"
        if found:
            start = found[0].start()
            if loop := re.match(r"(\s*)while \((.*)\) (.*;\s*)$", changed):
                site = add(number, "does not wait", code)
                changed = f"{loop[1]}while (!cuda_sim::mutated({site}) && ({loop[2]})) {loop[3]}"
            elif re.search(r"(^|[{};)]|\belse)\s*$", code[:start]) and code.rstrip().endswith((";", "}")):
                site = add(number, "removed", code)
                changed = f"{changed[:start]}if (!cuda_sim::mutated({site})) {changed[start:]}"
            assert len(sites) and sites[-1].line == number, f"{file}:{number}: how does this synchronise? {code}"
        lines.append(changed + comment)
    return "\n".join(lines) + "\n", sites


def instrument_tree(sources: Iterable[Path], names: Sequence[str], destination: Path) -> list[Site]:
    """Rewrite `sources` into `destination`; return their changes."""
    sites: list[Site] = []
    for path in sorted(sources):
        text, more = instrument(path.read_text(), path.name, names, len(sites))
        (destination / path.name).write_text(text)
        sites += more
    return sites


# Small layers that take every way through the engines' kernels: an engine, how it spreads W_hh, a layer.
CASES = [
    *(
        (engine, spread, sample)
        for engine in ("persistent_grid", "persistent_cluster")
        for spread, sample in (
            ((1, 2, 3), Sample("lstm", steps=3, batch=19, hidden_size=40, directions=2, form="lengths", reset=True)),
            ((2, 1, 2), Sample("gru", steps=3, batch=9, hidden_size=70, form="packed")),
            ((1, 1, 1), Sample("rnn_tanh", steps=4, batch=3, hidden_size=33)),
        )
    ),
    ("persistent_cta", None, Sample("lstm", steps=3, batch=9, hidden_size=40, directions=2, form="lengths", reset=True)),
    ("persistent_cta", None, Sample("gru", steps=3, batch=3, hidden_size=33, form="packed")),
]
SEEDS = 6


def build_engines(directory: Path) -> tuple[driver.Simulator, list[Site]]:
    """The checked build of all engines with a switch at every place."""
    copy = directory / "csrc"
    shutil.copytree(build.CSRC, copy)
    cuda = build.CSRC / "cuda"
    names = wrappers((cuda / "device_ptx.h").read_text())
    sites = instrument_tree([*cuda.glob("*.cu"), *cuda.glob("*.cuh")], names, copy / "cuda")
    sources = [build.HERE / "driver.cpp", *sorted((copy / "cuda").glob("*.cu"))]
    return driver.Simulator(build.build("mutants", "check", sources, library=True, csrc=copy)), sites


def failure(sim: driver.Simulator, seeds: int = SEEDS) -> str | None:
    """Run the cases; return what went wrong first."""
    for seed in range(seeds):
        for number, (engine, spread, sample) in enumerate(CASES):
            sim.seed(seed * len(CASES) + number)
            sim.engine(engine)
            if spread is not None:
                sim.spread(*spread)
            try:
                compare(sim, sample, torch.bfloat16, (driver.GATES, STATES)[seed % 2])
            except (AssertionError, driver.SimulationError) as error:
                return f"{engine} {sample.cell}: {str(error).splitlines()[0]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the places, and build nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        if options.list:
            cuda = build.CSRC / "cuda"
            names = wrappers((cuda / "device_ptx.h").read_text())
            for site in instrument_tree([*cuda.glob("*.cu"), *cuda.glob("*.cuh")], names, Path(directory)):
                print(site)
            return
        sim, sites = build_engines(Path(directory))
        if found := failure(sim):
            sys.exit(f"the kernels fail as they are: {found}")
        unnoticed = 0
        for site in sites:
            sim.mutate(site.number)
            found = failure(sim)
            unnoticed += found is None
            print(f"{'UNNOTICED' if found is None else 'noticed'} {site}\n    {found or ''}", flush=True)
    print(f"{len(sites) - unnoticed} of {len(sites)} changes were noticed")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
