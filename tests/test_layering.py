"""Data flows one way (docs/ARCHITECTURE.md): what each layer may include or import, and what it may contain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "rnnfast"

# What a layer of csrc may include of csrc; a layer is a directory, or a file beside the directories without its suffix.
CSRC_MAY_INCLUDE = {
    "cell": {"cell"},
    "tiles": set(),
    "spread": {"tiles"},
    "philox": {"cell"},
    "params": {"cell", "spread"},
    "plan": {"plan", "params", "spread", "tiles", "cell"},
    "cpu": {"cpu", "params", "philox", "cell"},
    "cuda": {"cuda", "params", "philox", "spread", "tiles", "cell"},
    "ops": {"ops", "plan", "params", "cell"},
    "own_cell": {"ops", "plan", "cpu", "cell"},
}
TORCH = re.compile(r"^(torch|ATen|c10|pybind11)/|^Python\.h$")
CUDA = re.compile(r"^(cuda|cublas|curand|cooperative_groups|mma|nv/|cub/|thrust/)|/cuda/")

# A module may import those of the lower ranks.
PACKAGE_RANKS = [
    {"reference", "_extension", "_version", "_build"},
    {"formula"},
    {"derivatives"},
    {"ops"},
    {"functional"},
    {"modules"},
    {"cells"},
    {"own_cell"},
    {"convert"},
    {"explain", "_config"},
    {"__init__"},
    {"__main__"},
]

CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0].split(".")[0]


def includes(path: Path) -> Iterator[tuple[str, bool]]:
    """The names a file includes, and whether in angle brackets."""
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        yield name, bracket == "<"


def code_of(path: Path) -> str:
    """A file's text without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def illegal_includes(path: Path) -> list[str]:
    layer = layer_of(path)
    may_include_cuda = layer == "cuda" or path.name.endswith("_cuda.cpp")

    def legal(name: str, system: bool) -> bool:
        if not system:
            target = next((base / name for base in (path.parent, CSRC) if (base / name).exists()), None)
            return target is not None and layer_of(target.resolve()) in CSRC_MAY_INCLUDE[layer]
        if layer == "cell":
            return name in ("cmath", "rnnfast_own_cell.h")  # the latter is made by rnnfast/own_cell.py
        return (layer == "ops" or not TORCH.search(name)) and (may_include_cuda or not CUDA.search(name))

    return [name for name, system in includes(path) if not legal(name, system)]


def illegal_imports(module: str, source: str) -> list[str]:
    """The modules of the package that one of them imports and may not; "" is the package itself."""
    rank = next(rank for rank, modules in enumerate(PACKAGE_RANKS) if module in modules)
    allowed = set().union(*PACKAGE_RANKS[:rank])
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if alias.name.split(".")[0] == "rnnfast"]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "rnnfast"):
            base = f"rnnfast.{node.module or ''}" if node.level else str(node.module)
            own = base.strip(".") == "rnnfast"
            imported += [f"rnnfast.{alias.name}" for alias in node.names] if own else [base]
    names = [name.split(".")[1] if "." in name else "__init__" for name in imported]
    # What is no module is a name that __init__ defines.
    modules = set().union(*PACKAGE_RANKS)
    return [name for name in names if (name if name in modules else "__init__") not in allowed]


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_down(path: Path) -> None:
    assert layer_of(path) in CSRC_MAY_INCLUDE, "a new layer says in this test what it may include"
    assert illegal_includes(path) == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    assert path.stem in set().union(*PACKAGE_RANKS), "a new module says in this test what it may import"
    assert illegal_imports(path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "illegal"),
    [
        ("ops", "from . import reference\nfrom ._extension import error", []),
        ("ops", "from . import functional", ["functional"]),
        ("ops", "from .functional import recurrent", ["functional"]),
        ("functional", "import rnnfast.modules", ["modules"]),
        ("functional", "import rnnfast", ["__init__"]),
        ("functional", "def f():\n  from rnnfast.modules import LSTM", ["modules"]),
        ("modules", "from . import show_config", ["show_config"]),
        ("reference", "from . import _extension", ["_extension"]),
        ("__main__", "from . import functional, show_config", []),
    ],
)
def test_an_upward_import_is_seen(module: str, source: str, illegal: list[str]) -> None:
    assert illegal_imports(module, source) == illegal


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_code_stays_in_its_layer(path: Path) -> None:
    code, name = code_of(path), str(path.relative_to(CSRC))
    if layer_of(path) != "ops":
        assert not re.search(r"\b(at|c10|torch)::", code), "tensors and the dispatcher belong to csrc/ops"
    if name != "cuda/device_ptx.h":
        assert not re.search(r"\b(asm|__asm__)\b", code), "inline PTX belongs to csrc/cuda/device_ptx.h"
    # Types of numbers define the functions that the cells call on them.
    if layer_of(path) != "cell" and name not in ("cpu/simd.h", "cuda/lane_number.cuh"):
        functions = r"\b(tanh|exp|exp2|expm1|log1p|erf|sigmoid)f?\s*\("
        assert not re.search(functions, code), "equations belong to csrc/cell"
    if layer_of(path) in ("cpu", "cuda"):
        assert not re.search(r"\b(malloc|cudaMalloc\w*)\s*\(|\bnew\b|std::vector", code), "engines allocate nothing"
