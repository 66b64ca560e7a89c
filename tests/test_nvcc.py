"""All CUDA sources compile with nvcc, where there is one, without a warning and without a spilled register, and the
persistent kernels keep to the resources that the plan counts on; no GPU is needed. What faces torch compiles against a
CPU wheel's headers, given stand-ins (cuda_stubs/) for those it lacks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_sim import build
from filelock import FileLock
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
STUBS = ROOT / "tests" / "cuda_stubs"
SUBJECTS = ROOT / "tests" / "cuda_sim" / "subjects"
ARCHS = ("80", "90")
WITHOUT_KERNELS = {"persistent_cta.cu", "persistent_grid.cu"}  # launchers alone

NVCC = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_kernels(source: Path, archs: tuple[str, ...], output: Path, *flags: str) -> str:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas"]
    # As torch's extensions are compiled.
    common = [
        *cpp_extension.COMMON_NVCC_FLAGS,
        "-std=c++20",
        "-O3",
        f"-I{CSRC}",
        f"-I{CSRC / 'cuda'}",
        *warnings,
        *codes,
    ]
    return run([str(NVCC), "-c", *common, *flags, str(source), "-o", str(output)])


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture."""

    name: str  # mangled
    arch: str
    stack_bytes: int
    spilled_bytes: int
    registers: int
    shared_bytes: int  # static

    @property
    def in_words(self) -> str:
        return subprocess.run(["c++filt", self.name], capture_output=True, text=True, check=True).stdout.strip()


def kernels_of(log: str) -> list[Kernel]:
    """The kernels of which ptxas -v tells."""
    number = r"(\d+) bytes "
    pattern = (
        rf"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?{number}stack frame, {number}spill stores, "
        rf"{number}spill loads\s+.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    return [
        Kernel(name, arch, int(stack), int(stores) + int(loads), int(registers), int(shared or 0))
        for name, arch, stack, stores, loads, registers, shared in re.findall(pattern, log, re.DOTALL)
    ]


def test_kernels_of_reads_what_ptxas_prints() -> None:
    log = """ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
    assert kernels_of(log) == [Kernel("first", "80", 8, 16, 40, 512), Kernel("second", "90", 0, 0, 255, 0)]


def archs_of(source: Path, thorough: bool) -> tuple[str, ...]:
    """The architectures to compile for. Kernels for clusters are empty before sm_90. Without --long, files of
    persistent kernels are compiled for one alone: float16 for sm_80, the same text in bfloat16 for sm_90.
    """
    if source.name.startswith("persistent_cluster_"):
        return ARCHS[1:]
    if thorough or source not in PERSISTENT:
        return ARCHS
    return ARCHS[:1] if source.stem.endswith("_f16") else ARCHS[1:]


class Compiled:
    """Every kernel file, compiled once, by whichever of the processes that share the folder asks first."""

    def __init__(self, folder: Path, thorough: bool) -> None:
        self.folder, self.thorough = folder, thorough

    def object(self, source: Path) -> Path:
        result = self.folder / f"{source.stem}.o"
        with FileLock(result.with_suffix(".lock")):
            if not result.exists():
                archs = archs_of(source, self.thorough)
                log = compile_kernels(source, archs, result, "-Xptxas", "-v", "--threads", "2")
                result.with_suffix(".log").write_text(log)
        return result

    def kernels(self, source: Path) -> list[Kernel]:
        return kernels_of(self.object(source).with_suffix(".log").read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Compiled:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    (folder / "kernels").mkdir(exist_ok=True)
    return Compiled(folder / "kernels", pytestconfig.getoption("--long"))


each_source = pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.name)
PERSISTENT = sorted((CSRC / "cuda").glob("persistent_*_*.cu"))
each_persistent_source = pytest.mark.parametrize("source", PERSISTENT, ids=lambda path: path.name)


@each_source
def test_kernels_compile_without_spills(compiled: Compiled, source: Path) -> None:
    kernels = compiled.kernels(source)
    archs = () if source.name in WITHOUT_KERNELS else archs_of(source, compiled.thorough)
    assert {kernel.arch for kernel in kernels} == set(archs)
    assert [kernel.in_words for kernel in kernels if kernel.spilled_bytes] == []
    if source in PERSISTENT:
        assert [kernel.in_words for kernel in kernels if kernel.stack_bytes] == []


# ------------------------------------------------------------------------------------------------ persistent kernels
REGISTERS = 65536  # of a multiprocessor, dealt to warps by fours
# (cell, arithmetic, wide) in the name of a persistent_cta kernel -> the hidden units of its largest layer.
CTA_KERNEL = re.compile(
    r"(forward|backward)_kernel<rnnfast::(\w+Cell).*?, (\w+), .*?(TensorCore|ScalarFloat).*?(true|false)>"
)


def most_units(cell: str, arithmetic: str, wide: str) -> int:
    if wide == "true":
        return 192
    if cell == "ElmanCell":
        return 256 if arithmetic == "TensorCore" else 192
    return 128


@pytest.mark.parametrize(
    "source", [p for p in PERSISTENT if p.stem.startswith("persistent_cta_")], ids=lambda p: p.name
)
def test_a_block_of_persistent_cta_is_resident(compiled: Compiled, source: Path) -> None:
    """Its registers fit, and all its shared memory is dynamic, which the plan counts."""
    for kernel in compiled.kernels(source):
        match = CTA_KERNEL.search(kernel.in_words)
        assert match is not None, kernel.in_words
        warps = -(-most_units(*match.group(2, 4, 5)) // 16)
        assert kernel.registers * 32 * (-(-warps // 4) * 4) <= REGISTERS, kernel.in_words
        assert kernel.shared_bytes == 0, kernel.in_words


@pytest.mark.parametrize(
    "source", [p for p in PERSISTENT if not p.stem.startswith("persistent_cta_")], ids=lambda p: p.name
)
def test_a_block_of_a_spread_engine_is_resident(compiled: Compiled, source: Path) -> None:
    """As above; a block has eight warps at most."""
    for kernel in compiled.kernels(source):
        assert kernel.registers * 32 * 8 <= REGISTERS, kernel.in_words
        assert kernel.shared_bytes == 0, kernel.in_words


def test_the_plan_knows_the_largest_layers() -> None:
    """What the first of the two tests above assumes is what the plan says."""
    plan = pytest.importorskip("rnnfast._C").plan
    device = {"capability": 90, "multiprocessors": 132, "shared_bytes": 1 << 30, "registers": REGISTERS}
    device |= {"cooperative": True, "clusters": [132 // blocks for blocks in range(1, 17)]}
    for cell, name in (("lstm", "LstmCell"), ("gru", "GruCell"), ("rnn_tanh", "ElmanCell")):
        for dtype, tf32, arithmetic in (
            ("float16", False, "TensorCore"),
            ("float32", True, "TensorCore"),
            ("float32", False, "ScalarFloat"),
        ):
            units = most_units(name, arithmetic, "true" if dtype == "float16" and name != "ElmanCell" else "false")
            for hidden_size, fits in ((units, True), (units + 1, False)):
                options = {
                    "directions": 1,
                    "projection": False,
                    "backward": True,
                    "noise": False,
                    "layer_norm": False,
                    "device": device,
                }
                made = plan(cell, dtype, 5, 5, hidden_size, tf32=tf32, **options)
                assert ("persistent_cta" not in made["against"]) == fits, (cell, dtype, tf32, hidden_size)


def disassembler() -> dict[str, str] | None:
    """The environment in which cuobjdump and the nvdisasm it calls are found: a toolkit's, or those of the packages
    nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    packages = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = os.pathsep.join([*packages, os.environ["PATH"]])
    return {**os.environ, "PATH": path} if all(shutil.which(n, path=path) for n in ("cuobjdump", "nvdisasm")) else None


RESETS = 12  # a lane reads them at three places, for two rows, packed or padded
# The slow instructions of a cell's nonlinearities, for the four units of a lane.
NONLINEARITIES = {"LstmCell": 4 * (3 * 2 + 2 * 1), "GruCell": 4 * (2 * 2 + 1)}


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump or nvdisasm was not found")
@each_persistent_source
def test_machine_code_of_persistent_kernels(compiled: Compiled, source: Path) -> None:
    """Tensor cores where there are any; the nonlinearities of a lane side by side, without a branch between them, which
    would have one wait for the other; no local memory; no bytes loaded but resets, for what lies in pairs is loaded as
    words; nothing from caches that do not see what other blocks write, nor by addresses that may be shared memory's or
    not; in clusters, pushes of 16 bytes, and behind the first of them no fence of the GPU's memory or of its caches.
    """
    command = ["cuobjdump", "--dump-sass", str(compiled.object(source))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=disassembler())
    functions = re.split(r"^\s*Function : ", done.stdout, flags=re.MULTILINE)[1:]
    assert len(functions) == len(compiled.kernels(source))
    seen = dict.fromkeys(NONLINEARITIES, 0)
    for function in functions:
        name = function.splitlines()[0]
        assert ("HMMA" in function) == ("ScalarFloat" not in name), name
        assert "LDL" not in function, f"{name} reads local memory"
        assert function.count("LDG.E.U8") <= RESETS, f"{name} loads bytes"
        assert ".CONSTANT" not in function, f"{name} loads through the constant cache"
        for cell, count in NONLINEARITIES.items():
            if cell in name and "forward" in name and "ScalarFloat" not in name:
                seen[cell] += 1
                together = max(run.count("MUFU") for run in re.split(r"\b(?:BRA|BSYNC|BAR|EXIT)\b", function))
                assert together >= count, f"{name} computes {together} of {count} at a time"
        assert not re.search(r" LD\.E", function), f"{name} has generic loads"
        assert not re.search(r" ST\.E", function), f"{name} has generic stores"
        if "persistent_cluster" in source.name:
            prologue, push, steps = function.partition(" STAS.128 ")
            assert push, f"{name} pushes nothing"
            assert " MEMBAR.ALL.GPU " in prologue, f"{name} does not begin with the cluster's barrier"
            assert " STAS" not in steps.replace(" STAS.128 ", ""), f"{name} pushes a few bytes at a time"
            assert "MEMBAR" not in steps, f"{name} waits for its stores in each step"
            assert "CCTL" not in steps, f"{name} empties the first-level cache in each step"
    assert all(seen.values()) or all("ScalarFloat" in function.splitlines()[0] for function in functions)


LAYOUT = """
#include <cstdio>
#include "persistent_cluster.cuh"
#include "persistent_cta.cuh"
#include "persistent_grid.cuh"
#include "persistent_scatter.cuh"
#include "persistent_spread.cuh"
using namespace rnnfast;
using namespace rnnfast::cuda;
template <class Cell, class Math, bool kWide, bool kBackward>
void compare_pass() {
  constexpr CtaShape shape = persistent_cta::Kernel<Cell, Math, kWide, kBackward>::kShape;
  for (int units = 1; units <= shape.most_warps * kTileUnits; ++units) {
    const size_t layout = persistent_cta::Shared<Cell, Math, kWide, kBackward>(nullptr, units).bytes;
    const int plan = cta_shared_bytes(units, Cell::kGates, sizeof(typename Math::Operand), shape, kBackward);
    if (layout != static_cast<size_t>(plan)) printf("%d: %zu, planned %d\\n", units, layout, plan);
  }
}
template <class Cell, class Math, bool kWide>
void compare() {
  compare_pass<Cell, Math, kWide, false>();
  compare_pass<Cell, Math, kWide, true>();
}
template <class Function>
void for_each_spread(const Function& function) {
  for (int place = 0; place < 8 * 8 * 8; ++place) {
    const Spread spread = {1 + place / 64, 1 + place / 8 % 8, 1 + place % 8};
    if (spread.unit_tiles * spread.depth_splits > kSpreadMostWarps || spread.row_tiles > spread.depth_splits) continue;
    for (int units : {1, 40, 128, 250, 1024}) {
      for (int gates : {1, 3, 4}) function(spread, units, gates);
    }
  }
}
template <class Exchange, bool kTensorCores>
void compare_spread() {
  for_each_spread([](const Spread& spread, int units, int gates) {
    for (bool backward : {false, true}) {
      const SpreadSizes sizes(spread, units, 17, gates, backward, sizeof(typename Exchange::Operand), kTensorCores);
      const size_t layout = SpreadShared<Exchange>(nullptr, sizes).bytes;
      const size_t plan = sizes.shared_bytes(Exchange::kShared);
      if (layout != plan) printf("%d x %d: %zu, planned %zu\\n", units, gates, layout, plan);
    }
  });
}
template <class Operand, bool kTensorCores>
void compare_scatter() {
  for_each_spread([](const Spread& spread, int units, int gates) {
    const ScatterSizes sizes(spread, units, 17, gates, sizeof(Operand), kTensorCores);
    const size_t layout = ScatterShared<Operand>(nullptr, sizes, kClusterShared).bytes;
    const size_t plan = sizes.shared_bytes(kClusterShared);
    if (layout != plan) printf("%d x %d, scattered: %zu, planned %zu\\n", units, gates, layout, plan);
  });
}
int main() {
  compare_spread<persistent_cluster::Exchange<__half>, true>();
  compare_spread<persistent_grid::Exchange<float>, true>();
  compare_spread<persistent_grid::Exchange<float>, false>();
  compare_scatter<__half, true>();
  compare_scatter<float, true>();
  compare_scatter<float, false>();
  compare<LstmCell, TensorCore<__half>, false>();
  compare<LstmCell, TensorCore<__half>, true>();
  compare<GruCell, TensorCoreTf32, false>();
  compare<ElmanCell<Tanh>, ScalarFloat, false>();
  puts("compared");
}
"""


def test_shared_memory_is_as_planned(tmp_path: Path) -> None:
    """A block's layout, computed on the host, takes the bytes that the plan holds against the device's."""
    source, program = tmp_path / "layout.cu", tmp_path / "layout"
    source.write_text(LAYOUT)
    run([str(NVCC), "-std=c++20", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", str(source), "-o", str(program)])
    assert run([str(program)]) == "compared\n"


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
