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


def complete_toolkit(folder: Path) -> tuple[list[str], list[str]]:
    """Folders of headers and of libraries that a CUDA toolkit of the compiler alone lacks. Torch brings them, in
    NVIDIA's packages, whose libraries have no name that a linker looks for; `folder` is made anew, of links to them.
    """
    from torch.utils import cpp_extension  # a third of a second

    assert cpp_extension.CUDA_HOME is not None
    toolkit, package = Path(cpp_extension.CUDA_HOME), nvidia_package()
    shutil.rmtree(folder, ignore_errors=True)
    headers, libraries = folder / "include", folder / "lib"
    headers.mkdir(parents=True)
    libraries.mkdir()
    for source in package.glob("include/*"):
        if not (toolkit / "include" / source.name).exists():
            (headers / source.name).symlink_to(source)
    run_times = sorted(package.glob("lib/libcudart.so.*"))
    if run_times and not (toolkit / "lib64" / "libcudart.so").exists():
        (libraries / "libcudart.so").symlink_to(run_times[0])
    return ([str(headers)] if any(headers.iterdir()) else []), ([str(libraries)] if any(libraries.iterdir()) else [])


def nvidia_package() -> Path:
    """What torch brings of NVIDIA's toolkit, as of CUDA 13: for CUDA 12 it is a folder for each library, and this does
    not exist.
    """
    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{str(torch.version.cuda).split('.')[0]}"


def openmp_library() -> list[str]:
    """Link arguments that make a library share torch's OpenMP run time: two in a process fight for cores."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]
