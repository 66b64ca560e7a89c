"""Owns: how C++ and CUDA are compiled, and whether CUDA is, for setup.py and for cells of one's own. Must not know the
rest of the package: setup.py reads this file before there is one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

CXX_FLAGS = [
    "-O3",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own flags ask for debug information, which takes long and makes the library huge
    "-Wno-psabi",  # a note on passing SIMD vectors by value, which never crosses from one instruction set to another
]
NVCC_FLAGS = ["-O3", "--compiler-options", "-fvisibility=hidden"]
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"


def choose_cuda(torch_cuda: str | None, nvcc: str | None, env: Mapping[str, str]) -> tuple[bool, str]:
    """Whether to compile the CUDA sources, given the CUDA versions of torch and of nvcc; if not, why."""
    choice = switch("RNNFAST_CUDA", env)
    if choice == "0":
        return False, "RNNFAST_CUDA=0"
    if torch_cuda is None:
        reason = "torch is built without CUDA" + (f" (nvcc {nvcc} is not used)" if nvcc else "")
    elif nvcc is None:
        reason = f"no nvcc was found, and torch is built for CUDA {torch_cuda}"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"nvcc is of CUDA {nvcc}, and torch is built for CUDA {torch_cuda}"
    else:
        return True, ""
    if choice == "1":
        raise RuntimeError(f"RNNFAST_CUDA=1, but {reason}")
    return False, reason


def switch(name: str, env: Mapping[str, str]) -> str:
    value = env.get(name, "")
    if value not in ("", "0", "1"):
        raise RuntimeError(f"{name} must be 0 or 1, got {value!r}")
    return value


def find_nvcc_version() -> str | None:
    from torch.utils import cpp_extension  # a third of a second

    # A torch without CUDA has no CUDA_HOME; an nvcc on the path is then looked up to be named, not to be used.
    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc") if cpp_extension.CUDA_HOME else shutil.which("nvcc")
    if nvcc is None or not os.path.exists(nvcc):
        return None
    match = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    return match.group(1) if match else None


def complete_toolkit(cuda_home: Path, packages: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Folders of headers and of libraries that a CUDA toolkit of the compiler alone lacks. Torch brings them, in
    NVIDIA's packages, whose libraries have no name that a linker looks for; `folder` gets links to them.
    """
    headers, libraries = folder / "include", folder / "lib"
    headers.mkdir(parents=True, exist_ok=True)
    libraries.mkdir(exist_ok=True)
    for source in sorted(packages.glob("nvidia/cu[0-9]*/include/*")):
        link, found = headers / source.name, (cuda_home / "include" / source.name).exists()
        if not found and not link.is_symlink():
            link.symlink_to(source)
    for source in sorted(packages.glob("nvidia/cu[0-9]*/lib/libcudart.so.*")):
        link, found = libraries / "libcudart.so", (cuda_home / "lib64" / "libcudart.so").exists()
        if not found and not link.is_symlink():
            link.symlink_to(source)
    return ([str(headers)] if any(headers.iterdir()) else []), ([str(libraries)] if any(libraries.iterdir()) else [])


def openmp_library() -> list[str]:
    """Link arguments that make a library share torch's OpenMP run time: two in a process fight for cores."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]
