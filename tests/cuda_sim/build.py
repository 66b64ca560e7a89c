"""Owns: how the simulator and what runs on it are compiled: three builds, cached by the content of what goes into them.
Must not know: tests.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))

COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
# The flags of a kernel file in each build.
KERNEL_FLAGS = {
    "sim": ["-O1"],
    "check": [
        "-O1",
        "-fsanitize=thread",
        *("--param", "tsan-instrument-func-entry-exit=0"),
        *("--param", "tsan-distinguish-volatile=1"),
    ],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
BUILDS = tuple(KERNEL_FLAGS)


def toolkit_headers() -> Path | None:
    """The include directory of a CUDA toolkit; its headers (types and prototypes) are all that the simulator needs."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    candidates += [Path("/usr/local/cuda/include")]
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    needed = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((path for path in candidates if all((path / name).exists() for name in needed)), None)


def missing() -> str | None:
    """Why nothing can be built here; None if it can."""
    if shutil.which("g++") is None:
        return "the CUDA simulator needs g++"
    if sysconfig.get_platform() != "linux-x86_64":
        return "the CUDA simulator switches stacks in x86-64 assembly for Linux"
    if toolkit_headers() is None:
        return "the CUDA simulator needs the headers of a CUDA toolkit"
    return None


def build(
    name: str,
    kind: str,
    sources: Sequence[Path],
    *,
    library: bool,
    torch_sources: Sequence[Path] = (),
    csrc: Path = CSRC,
    flags: Sequence[str] = (),
) -> Path:
    """Compile kernel `sources` for the simulator, in the build `kind`; return the program, or the shared library.

    `torch_sources` are compiled as they are, against torch's headers with cuda_sim/operators/ in front. `csrc` is where
    the headers of the engines are; `flags` are for the kernel sources alone. Processes that build at once take turns.
    """
    with lock():
        return _build(name, kind, sources, library, torch_sources, csrc, flags)


def lock() -> FileLock:
    """What a process holds while it changes the folder build/."""
    (HERE / "build" / "objects").mkdir(parents=True, exist_ok=True)
    return FileLock(HERE / "build" / "lock")


def _build(
    name: str,
    kind: str,
    sources: Sequence[Path],
    library: bool,
    torch_sources: Sequence[Path],
    csrc: Path,
    flags: Sequence[str],
) -> Path:
    objects = HERE / "build" / "objects"
    headers = toolkit_headers()
    assert headers is not None
    includes = [f"-I{HERE / 'include'}", f"-I{csrc}", f"-I{csrc / 'cuda'}", "-isystem", str(headers)]
    runtime_flags = ["-O2"] if kind != "asan" else ["-O1", *KERNEL_FLAGS["asan"][1:]]
    kernel_flags = ["-x", "c++", "-include", "cuda_sim.h", *KERNEL_FLAGS[kind]]
    jobs = [(path, [*COMMON, *WARNINGS, *includes, *runtime_flags]) for path in RUNTIME]
    jobs += [(path, [*COMMON, *WARNINGS, *includes, *kernel_flags, *flags]) for path in sources]
    jobs += [(path, [*COMMON, *_torch_flags(headers)]) for path in torch_sources]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda job: _compile(*job, objects), jobs))

    link = ["-shared"] if library else []
    link += ["-fsanitize=address,undefined"] if kind == "asan" else []
    link += ["-ldl", "-lpthread"]
    link += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"] if torch_sources else []
    key = hashlib.sha256(" ".join([*map(str, compiled), *link]).encode()).hexdigest()[:16]
    result = HERE / "build" / f"{name}-{kind}-{key}{'.so' if library else ''}"
    if not result.exists():
        _run(["g++", *map(str, compiled), *link, "-o", f"{result}.new"])
        Path(f"{result}.new").rename(result)
    return result


def _torch_flags(headers: Path) -> list[str]:
    system = [HERE / "operators", *cpp_extension.include_paths(), headers]
    return [
        "-std=c++20",
        "-O0",
        "-g0",
        f"-I{CSRC}",
        f"-I{CSRC / 'ops'}",
        *(flag for path in system for flag in ("-isystem", str(path))),
    ]


# Objects that did not compile, and why: the next test that wants one need not wait to see the same.
_failures: dict[Path, str] = {}


def _compile(source: Path, flags: list[str], objects: Path) -> Path:
    """An object is named by its preprocessed text and its flags: it is compiled when one of them is new."""
    preprocessed = subprocess.run(["g++", *flags, "-E", "-P", str(source)], capture_output=True, check=False)
    if preprocessed.returncode:
        raise RuntimeError(preprocessed.stderr.decode())
    # Reports name lines, which -P leaves out.
    key = hashlib.sha256(preprocessed.stdout + source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    result = objects / f"{source.stem}-{key}.o"
    if not result.exists():
        if result in _failures:
            raise RuntimeError(_failures[result])
        try:
            _run(["g++", *flags, "-c", str(source), "-o", f"{result}.new"])
        except RuntimeError as error:
            _failures[result] = str(error)
            raise
        Path(f"{result}.new").rename(result)
    return result


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
