"""CUDA for a cell from outside the package, without a GPU: its kernels on the simulator, and compiled by nvcc; the
operators, compiled; and what is decided where there is a torch with CUDA.
"""

from __future__ import annotations

import importlib
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_sim import build, driver
from examples_as_run import EXAMPLES
from sample_inputs import Sample
from test_cuda_sim import STATES, compare, compare_along
from test_nvcc import NVCC, STUBS, compile_kernels, run
from torch.utils import cpp_extension

import rnnfast
from rnnfast import _build, ops, own_cell, reference

HEADER = EXAMPLES / "minimal_gated_unit.h"
FULL = HEADER.read_text()
# The same unit with a vector for each gate's recurrent weights.
DIAGONAL = FULL.replace(
    "  static constexpr int kGates", "  static constexpr bool kDiagonal = true;\n  static constexpr int kGates"
)
HEADERS = {"minimal_gated_unit": FULL, "diagonal_unit": DIAGONAL}
each_unit = pytest.mark.parametrize("name", HEADERS)


def flags_of(name: str, folder: Path) -> list[str]:
    """What compiles the engines' sources for that cell alone."""
    own_cell._write_sources(
        folder, HEADER, {HEADER: HEADERS[name]}, "MinimalGatedUnit", f"library_of_{name}", name, "generic"
    )
    return ["-DRNNFAST_OWN_CELL", f"-I{folder}", f"-I{build.CSRC / 'cell'}"]


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@each_unit
def test_kernels_on_the_simulator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, with every access checked for races and uninitialised reads."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    step = importlib.import_module("own_cell").step
    monkeypatch.setitem(reference.OWN_CELLS, name, reference.Cell(2, 1, step, diagonal=name == "diagonal_unit"))
    sources = [build.HERE / "driver.cpp", *own_cell.cuda_sources()]
    sim = driver.Simulator(build.build(name, "check", sources, library=True, flags=flags_of(name, tmp_path)))
    samples = [
        Sample(name, directions=2, form="lengths", reset=True),
        Sample(name, directions=2, form="packed", reset=True),
        Sample(name, steps=3, batch=9, hidden_size=40),
    ]
    for index, sample in enumerate(samples):
        for dtype in driver.DTYPES:
            for save in (STATES, driver.GATES):
                sim.seed(index)
                compare(sim, sample, dtype, save, noise=[(), (0.3, 0.4, 0.0)][(index + save) % 2])
        for dtype in (torch.float64, torch.float32):  # by dual numbers, for the cells say nothing of tangents
            compare_along(sim, sample, dtype)


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_kernels_compile(tmp_path: Path) -> None:
    for source in own_cell.cuda_sources():
        compile_kernels(source, ("90",), tmp_path / "kernel.o", *flags_of("minimal_gated_unit", tmp_path))


@pytest.mark.skipif(build.toolkit_headers() is None, reason="there are no headers of CUDA")
def test_operators_compile(tmp_path: Path) -> None:
    system = [*cpp_extension.include_paths(), str(build.toolkit_headers()), str(STUBS)]
    includes = [f"-I{build.CSRC}", *(flag for path in system for flag in ("-isystem", path))]
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-DRNNFAST_WITH_CUDA",
        *flags_of("diagonal_unit", tmp_path),
    ]
    run(["g++", *flags, *includes, str(build.CSRC / "own_cell" / "operators.cpp")])


@pytest.fixture
def torch_with_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a toolkit that lacks a header and the run time's library, which torch brings."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(_build, "nvidia_package", lambda: tmp_path / "cu13")
    for file in ("include/cublas_v2.h", "lib/libcudart.so.13"):
        (tmp_path / "cu13" / file).parent.mkdir(parents=True)
        (tmp_path / "cu13" / file).touch()
    monkeypatch.setattr(_build, "find_nvcc_version", lambda: "13.2")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)


@pytest.mark.skipif(ops.extension is None, reason="a cell is compiled beside the extension")
@pytest.mark.usefixtures("torch_with_cuda")
def test_what_is_compiled_where_torch_has_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Compiles(Exception):
        pass

    given: dict[str, Any] = {}

    def load(name: str, sources: list[str], **options: Any) -> None:
        given.update(options, sources={Path(source).name for source in sources}, library=name)
        given["archs"] = os.environ.get("TORCH_CUDA_ARCH_LIST")
        raise Compiles

    monkeypatch.setattr(cpp_extension, "load", load)
    header = tmp_path / "a_unit_of_this_test.h"  # that no other test has compiled
    header.write_text(FULL + f"// {header.name}\n")
    engine = {f"stepwise_{loop}.cu" for loop in ("forward", "backward", "tangent")}
    engine |= {"previous_states.cu", "backward_preparation.cu", "device_sequence.cu"}
    with pytest.raises(Compiles):
        rnnfast.compile_cell(header, directory=tmp_path / "a folder")
    assert engine < given["sources"]
    assert given["with_cuda"]
    assert given["archs"] == _build.DEFAULT_CUDA_ARCHS
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ
    for flags in (given["extra_cflags"], given["extra_cuda_cflags"]):
        assert {"-DRNNFAST_OWN_CELL", "-DRNNFAST_WITH_CUDA"} <= set(flags)
    assert any((Path(folder) / "cublas_v2.h").exists() for folder in given["extra_include_paths"])
    library_folders = [flag[2:] for word in given["extra_ldflags"] for flag in shlex.split(word) if flag[:2] == "-L"]
    assert [(Path(folder) / "libcudart.so").exists() for folder in library_folders] == [True]
    libraries = {given["library"]}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    with pytest.raises(Compiles):
        rnnfast.compile_cell(header, directory=tmp_path)
    assert given["archs"] == os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    libraries.add(given["library"])
    monkeypatch.setenv("RNNFAST_CUDA", "0")
    with pytest.raises(Compiles):
        rnnfast.compile_cell(header, directory=tmp_path)
    assert not given["sources"] & engine
    assert not given["with_cuda"]
    assert len({*libraries, given["library"]}) == 3


@pytest.mark.usefixtures("torch_with_cuda")
def test_why_a_cell_is_compiled_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_cell._no_cuda() == ""
    monkeypatch.setattr(_build, "find_nvcc_version", lambda: None)
    reason = "the cell was compiled for the CPU alone: no nvcc was found, and torch is built for CUDA 13.0"
    assert own_cell._no_cuda() == reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert own_cell._no_cuda() == "the cell was compiled for the CPU alone: torch is built without CUDA"
