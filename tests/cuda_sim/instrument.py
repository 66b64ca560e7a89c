"""Owns: where the CUDA kernels synchronise, and a copy of their source in which each such place can be switched off.
Must not know: what the kernels compute, who runs them.

A place is a call, in csrc/cuda, of a barrier of CUDA or of a wrapper of device_ptx.h whose name says that it waits,
arrives, acquires, releases, commits, synchronises or fences. It is changed in up to three ways: the statement is
removed, its acquire or release is made relaxed, a loop that waits for it does not wait. All changes are compiled into
one library, where each is off until cuda_sim::mutate, or the environment's CUDA_SIM_MUTATE, switches it on.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import build

INSTRUMENTED = build.HERE / "build" / "instrumented"
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
            if not sites or sites[-1].line != number:
                raise ValueError(f"{file}:{number}: how does this synchronise? {code.strip()}")
        lines.append(changed + comment)
    return "\n".join(lines) + "\n", sites


def _instrument_tree(sources: Iterable[Path], names: Sequence[str], destination: Path) -> list[Site]:
    """Rewrite `sources` into `destination`; return their changes."""
    sites: list[Site] = []
    for path in sorted(sources):
        text, more = instrument(path.read_text(), path.name, names, len(sites))
        (destination / path.name).write_text(text)
        sites += more
    return sites


def places() -> list[Site]:
    """Write the copy of csrc with its switches to build/instrumented, and return its changes."""
    sources = build.CSRC / "cuda"
    new = INSTRUMENTED.with_name("instrumented.new")
    names = wrappers((sources / "device_ptx.h").read_text())
    with build.lock():
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(build.CSRC, new)
        sites = _instrument_tree([*sources.glob("*.cu"), *sources.glob("*.cuh")], names, new / "cuda")
        if _texts(new) != _texts(INSTRUMENTED):  # another process may be reading what is there
            shutil.rmtree(INSTRUMENTED, ignore_errors=True)
            new.rename(INSTRUMENTED)
    return sites


def _texts(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
