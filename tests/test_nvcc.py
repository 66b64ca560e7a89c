"""All CUDA sources compile with nvcc, where there is one, without a warning and without a spilled register; no GPU is
needed. What faces torch compiles against a CPU wheel's headers, given stand-ins (cuda_stubs/) for those it lacks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_sim import build
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
STUBS = ROOT / "tests" / "cuda_stubs"
SUBJECTS = ROOT / "tests" / "cuda_sim" / "subjects"
ARCHS = ("80", "90")
WITHOUT_KERNELS = {"persistent_cta.cu", "persistent_cluster.cu", "persistent_grid.cu"}  # launchers alone

NVCC = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_kernels(source: Path, archs: tuple[str, ...], output: Path, *flags: str) -> str:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas"]
    common = ["-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *warnings, *codes]
    return run([str(NVCC), "-c", *common, *flags, str(source), "-o", str(output)])


def spills(log: str) -> list[str]:
    """The kernels that ptxas says spill registers."""
    kernels = re.findall(r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert kernels, "ptxas -v named no kernel"
    return [name for name, stores, loads in kernels if int(stores) or int(loads)]


def test_spills_reads_what_ptxas_prints() -> None:
    line = "Function properties for {}\n    8 bytes stack frame, {} bytes spill stores, 0 bytes spill loads\n"
    assert spills(line.format("good", 0) + line.format("bad", 16)) == ["bad"]


@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, tmp_path: Path) -> None:
    # Kernels for clusters are empty before sm_90.
    archs = ARCHS[1:] if source.name.startswith("persistent_cluster_") else ARCHS
    log = compile_kernels(source, archs, tmp_path / "kernels.o", "-Xptxas", "-v")
    if source.name in WITHOUT_KERNELS:
        assert "entry function" not in log
        return
    assert set(re.findall(r"for 'sm_(\d+)'", log)) == set(archs)
    assert spills(log) == []


@pytest.mark.parametrize("source", sorted(SUBJECTS.glob("*.cu")), ids=lambda path: path.name)
def test_subjects_of_the_simulator_compile(source: Path, tmp_path: Path) -> None:
    compile_kernels(source, ("90",), tmp_path / "subject.o")


@pytest.mark.parametrize("source", sorted((CSRC / "ops").glob("*_cuda.cpp")), ids=lambda path: path.name)
def test_torch_facing_sources_compile(source: Path) -> None:
    toolkit = build.toolkit_headers()
    assert toolkit is not None
    # The toolkit's own headers, where it has them, come before the stand-ins.
    system = [*cpp_extension.include_paths(), str(toolkit), str(STUBS)]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    run(["g++", *flags, *(flag for path in system for flag in ("-isystem", path)), str(source)])
