"""Owns: what is compiled, and with which flags. Must not know: what the sources do.

The extension rnnfast._C is built by torch.utils.cpp_extension, against the torch it will run with:

    pip install --no-build-isolation .

Environment: RNNFAST_EXTENSION=0 builds none; RNNFAST_CUDA=0 or 1 overrides the choice of a CUDA build;
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX and CUDA_HOME mean what they mean to torch.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"rnnfast is built against the torch it runs with, and torch does not import here ({error}). "
        "Install torch, setuptools and ninja first, then run: pip install --no-build-isolation ."
    ) from error

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra"]


def compilation() -> ModuleType:
    """rnnfast/_build.py, without the package."""
    spec = importlib.util.spec_from_file_location("rnnfast_build", ROOT / "rnnfast" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = compilation()


def choose_extension(compiler: str | None, env: Mapping[str, str]) -> tuple[bool, str]:
    """Whether to build the extension, given the C++ compiler's path; if not, why."""
    choice = build.switch("RNNFAST_EXTENSION", env)
    if choice == "0":
        return False, "RNNFAST_EXTENSION=0"
    if compiler is not None:
        return True, ""
    reason = f"no C++ compiler was found ({env.get('CXX', 'c++')})"
    if choice == "1":
        raise RuntimeError(f"RNNFAST_EXTENSION=1, but {reason}")
    return False, reason


def find_compiler(env: Mapping[str, str]) -> str | None:
    return shutil.which(env.get("CXX", "c++").split()[0])


def package_version() -> str:
    match = re.search(r'^__version__ = (".+")$', (ROOT / "rnnfast" / "_version.py").read_text(), re.MULTILINE)
    assert match is not None, "rnnfast/_version.py defines no __version__"
    return str(ast.literal_eval(match.group(1)))


def make_extension(with_cuda: bool, no_cuda_reason: str) -> Extension:
    def sources(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    cuda_ops = sources("csrc/ops/*_cuda.cpp")
    cpp = [path for path in sources("csrc/ops/*.cpp") if path not in cuda_ops]
    cpp += sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp")
    headers: list[str] = []
    libraries: list[str] = []
    if with_cuda:
        headers, libraries = build.complete_toolkit(ROOT / "build" / "toolkit")
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or build.DEFAULT_CUDA_ARCHS
    facts = {
        "RNNFAST_VERSION": package_version(),
        "RNNFAST_TORCH_VERSION": str(torch.__version__),
        "RNNFAST_CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "",
        "RNNFAST_NO_CUDA_REASON": no_cuda_reason,
    }
    # Torch's headers are full of what -Wextra warns of; as system headers they are silent.
    cxx_flags = [*build.CXX_FLAGS, *WARNINGS, *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    toolkit_flags = [flag for path in headers for flag in ("-isystem", path)]  # two words, as nvcc takes them
    cxx_flags += [f'-D{name}="{value}"' for name, value in facts.items()]
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return make(
        "rnnfast._C",
        cpp + (cuda_ops + sources("csrc/cuda/*.cu") if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=libraries,
        define_macros=[("RNNFAST_WITH_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": cxx_flags + toolkit_flags, "nvcc": build.NVCC_FLAGS + toolkit_flags},
        extra_link_args=build.openmp_library(),
    )


class BuildExt(cpp_extension.BuildExtension):  # type: ignore[misc]
    """Builds the extension or, where that was decided against, leaves the reason beside the package's modules."""

    reason = ""  # why there is no extension
    message = ""  # what is built, in one line

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would build in a temporary directory, and so everything anew each time.
        tag = f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / tag)
        self.force = (
            True  # ninja knows what is out of date, headers and flags included; setuptools looks at sources only
        )

    def run(self) -> None:
        print(self.message, flush=True)
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "rnnfast"
        package.mkdir(parents=True, exist_ok=True)
        if not (self.inplace or self.editable_mode):  # a cell of one's own is compiled from the sources
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        record = package / "not_built.txt"
        record.unlink(missing_ok=True)
        if not self.reason:
            super().run()
            return
        for stale in package.glob("_C.*.so"):
            stale.unlink()
        record.write_text(self.reason)

    def get_source_files(self) -> list[str]:
        return [] if self.reason else super().get_source_files()


def main() -> None:
    with_extension, BuildExt.reason = choose_extension(find_compiler(os.environ), os.environ)
    if with_extension:
        with_cuda, reason = build.choose_cuda(torch.version.cuda, build.find_nvcc_version(), os.environ)
        extension = make_extension(with_cuda, reason)
        kind = f"CUDA build for {os.environ['TORCH_CUDA_ARCH_LIST']}" if with_cuda else f"CPU build: {reason}"
        BuildExt.message = f"rnnfast: {kind}"
    else:
        extension = Extension("rnnfast._C", [])
        BuildExt.message = f"rnnfast: no extension, the package will run on its slow reference path: {BuildExt.reason}"
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})


if __name__ == "__main__":
    main()
