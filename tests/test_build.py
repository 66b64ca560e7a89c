"""What setup.py decides to build, and the package with and without its extension."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

import rnnfast
from rnnfast import _extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rnnfast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "env", "build", "reason"),
    [
        ("13.0", "13.0", {}, True, ""),
        ("13.0", "13.2", {}, True, ""),
        ("13.0", "13.0", {"RNNFAST_CUDA": "1"}, True, ""),
        ("13.0", "13.0", {"RNNFAST_CUDA": "0"}, False, "RNNFAST_CUDA=0"),
        ("13.0", "12.9", {}, False, "nvcc is of CUDA 12.9, and torch is built for CUDA 13.0"),
        ("13.0", None, {}, False, "no nvcc was found, and torch is built for CUDA 13.0"),
        (None, "13.0", {}, False, "torch is built without CUDA (nvcc 13.0 is not used)"),
        (None, None, {}, False, "torch is built without CUDA"),
        (None, None, {"RNNFAST_CUDA": "0"}, False, "RNNFAST_CUDA=0"),
    ],
)
def test_cuda_is_built_where_torch_and_nvcc_allow_it(
    setup_py: ModuleType, torch_cuda: str | None, nvcc: str | None, env: dict[str, str], build: bool, reason: str
) -> None:
    assert setup_py.build.choose_cuda(torch_cuda, nvcc, env) == (build, reason)


@pytest.fixture
def torch_brings(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """A toolkit of the compiler alone, and a function that makes a package of NVIDIA's and has torch bring it."""
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda.h").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))

    def bring(name: str) -> Path:
        package = tmp_path / name
        for file in ("include/cuda.h", "include/cublas_v2.h", f"include/{name}.h", "lib/libcudart.so.13"):
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            (package / file).touch()
        monkeypatch.setattr(setup_py.build, "nvidia_package", lambda: package)
        return package

    return bring


def test_a_toolkit_of_the_compiler_alone_is_completed_from_torchs_packages(
    setup_py: ModuleType, torch_brings: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):  # links are renewed
        package = torch_brings(name)
        headers, libraries = setup_py.build.complete_toolkit(tmp_path / "made")
        assert headers == [str(tmp_path / "made" / "include")]
        assert libraries == [str(tmp_path / "made" / "lib")]
        assert {path.resolve() for path in Path(headers[0]).iterdir()} == {
            package / "include" / "cublas_v2.h",
            package / "include" / f"{name}.h",
        }
        assert (Path(libraries[0]) / "libcudart.so").resolve() == package / "lib" / "libcudart.so.13"
    for file in ("include/cublas_v2.h", "include/two.h", "lib64/libcudart.so"):
        (tmp_path / "cuda" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "cuda" / file).touch()
    assert setup_py.build.complete_toolkit(tmp_path / "made") == ([], [])


def test_where_torch_brings_nvidias_package(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup_py.build.nvidia_package() == Path(torch.__file__).parents[1] / "nvidia" / "cu13"


@pytest.mark.usefixtures("torch_brings")
def test_what_the_toolkit_lacks_reaches_both_compilers_and_the_linker(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setup_py.build, "complete_toolkit", lambda _: (["headers"], ["libraries"]))
    extension = setup_py.make_extension(True, "")
    assert "libraries" in extension.library_dirs
    for flags in extension.extra_compile_args.values():
        assert ("-isystem", "headers") in pairwise(flags)  # nvcc does not take them in one word


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "cause"),
    [(None, "13.0", "without CUDA"), ("13.0", None, "no nvcc"), ("13.0", "12.9", "nvcc is of CUDA 12.9")],
)
def test_asking_for_an_impossible_cuda_build_is_an_error(
    setup_py: ModuleType, torch_cuda: str | None, nvcc: str | None, cause: str
) -> None:
    with pytest.raises(RuntimeError, match=f"RNNFAST_CUDA=1, but .*{cause}"):
        setup_py.build.choose_cuda(torch_cuda, nvcc, {"RNNFAST_CUDA": "1"})


def test_the_extension_is_built_where_there_is_a_compiler(setup_py: ModuleType) -> None:
    assert setup_py.choose_extension("/bin/c++", {}) == (True, "")
    assert setup_py.choose_extension(None, {}) == (False, "no C++ compiler was found (c++)")
    assert setup_py.choose_extension(None, {"CXX": "icpx"}) == (False, "no C++ compiler was found (icpx)")
    assert setup_py.choose_extension("/bin/c++", {"RNNFAST_EXTENSION": "0"}) == (False, "RNNFAST_EXTENSION=0")
    with pytest.raises(RuntimeError, match="RNNFAST_EXTENSION=1, but no C"):
        setup_py.choose_extension(None, {"RNNFAST_EXTENSION": "1"})


def test_a_switch_is_0_or_1(setup_py: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="RNNFAST_CUDA must be 0 or 1, got 'yes'"):
        setup_py.build.choose_cuda("13.0", "13.0", {"RNNFAST_CUDA": "yes"})
    with pytest.raises(RuntimeError, match="RNNFAST_EXTENSION must be 0 or 1, got 'no'"):
        setup_py.choose_extension("/bin/c++", {"RNNFAST_EXTENSION": "no"})


def test_a_compiler_with_arguments_is_found(setup_py: ModuleType) -> None:
    assert setup_py.find_compiler({"CXX": f"{sys.executable} -v"}) == sys.executable
    assert setup_py.find_compiler({"CXX": "no-such-compiler"}) is None


def test_cuda_sources_belong_to_a_cuda_build_alone(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    cpu, cuda = setup_py.make_extension(False, "no GPU is wanted"), setup_py.make_extension(True, "")
    cuda_only = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/ops/*_cuda.cpp")]
    assert set(cuda.sources) - set(cpu.sources) == {str(path.relative_to(ROOT)) for path in cuda_only}
    assert set(cpu.sources) < set(cuda.sources)
    assert ("RNNFAST_WITH_CUDA", None) in cuda.define_macros
    assert cpu.define_macros == []
    assert '-DRNNFAST_CUDA_ARCHS="9.0a"' in cuda.extra_compile_args["cxx"]
    assert '-DRNNFAST_NO_CUDA_REASON="no GPU is wanted"' in cpu.extra_compile_args["cxx"]
    # What runs on any x86-64 is built; faster instruction sets are chosen at run time.
    assert not [flag for flag in cuda.extra_compile_args["cxx"] if flag.startswith("-m")]


# ----------------------------------------------------------------------------------------------- with the extension


def test_the_extension_was_built_and_loads() -> None:
    assert _extension.extension is not None, _extension.error
    assert _extension.extension.build_info()["version"] == rnnfast.__version__


def test_one_openmp_runtime_serves_torch_and_the_extension() -> None:
    # In a process of its own: other packages bring runtimes with them.
    script = "import rnnfast; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[-1] for line in maps.splitlines() if "omp" in line}
    runtimes = {path for path in libraries if re.search(r"lib[gi]?omp[^/]*\.so", path)}
    assert len(runtimes) == 1, runtimes


def test_an_instruction_set_is_chosen_by_name() -> None:
    extension = _extension.extension
    assert extension is not None
    in_use, available = extension.instruction_set(), extension.instruction_sets()
    assert in_use in available
    try:
        for name in available:
            extension.set_instruction_set(name)
            assert extension.instruction_set() == name
            assert extension.instruction_sets() == available
            assert extension.instruction_set() == name
        with pytest.raises(ValueError, match=r"name must be one of .*'generic'.*, got 'mmx'"):
            extension.set_instruction_set("mmx")
        assert extension.instruction_set() == available[-1]
    finally:
        extension.set_instruction_set(in_use)


def test_show_config_tells_what_is_in_use() -> None:
    assert _extension.extension is not None
    info = _extension.extension.build_info()
    config = dict(re.split(r"  +", line, maxsplit=1) for line in rnnfast.show_config().splitlines())
    assert config["rnnfast"] == rnnfast.__version__
    assert config["torch"] == torch.__version__
    assert config["extension"] == f"rnnfast._C, compiled by {info['compiler']}"
    assert config["CUDA kernels"] in (info["cuda_archs"], f"none: {info['no_cuda_reason']}")
    assert config["instruction set"].startswith(f"{_extension.extension.instruction_set()} of ")
    assert config["threads"] == str(torch.get_num_threads())


def test_the_self_test_passes() -> None:
    result = subprocess.run([sys.executable, "-m", "rnnfast"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(rnnfast.show_config().splitlines()[0])
    for cell in rnnfast.reference.CELLS:
        assert re.search(rf"^cpu +{cell} .* ok$", result.stdout, re.MULTILINE)
    assert "No kernel was tested" not in result.stdout


def test_the_self_test_says_that_it_had_no_kernels() -> None:
    result = python("import rnnfast.__main__ as main; main.ops.extension = None; raise SystemExit(main.main([]))")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().splitlines()[-1].startswith("No kernel was tested: without the extension")


def test_the_self_test_fails_where_a_cell_is_wrong() -> None:
    result = python(
        """
import rnnfast.__main__ as main
from rnnfast import reference

correct = reference.layer
def wrong(cell, input, *args, **kwargs):
    if cell == "gru" and input.dtype == main.torch.float64:
        input = input * 1.001
    return correct(cell, input, *args, **kwargs)

reference.layer = wrong
raise SystemExit(main.main([]))
"""
    )
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAILED")]
    assert failed
    assert all(" gru " in line for line in failed)


# -------------------------------------------------------------------------------------------- without the extension

# What the import of rnnfast._C raises where there is no such file, and where the dynamic linker refuses it.
NOT_BUILT = "ModuleNotFoundError(\"No module named 'rnnfast._C'\", name='rnnfast._C')"
NOT_LOADED = "ImportError('_C.so: undefined symbol: _ZN3c105ErrorE', name='rnnfast._C')"

WITHOUT_EXTENSION = """
import sys, warnings

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "rnnfast._C":
            raise {exception}

sys.meta_path.insert(0, Blocker())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, rnnfast
    for name in ("RNN", "LSTM", "GRU"):
        layer = getattr(rnnfast, name)(3, 4)
        twin = getattr(torch.nn, name)(3, 4)
        twin.load_state_dict(layer.state_dict())
        input = torch.randn(5, 2, 3)
        torch.testing.assert_close(layer(input)[0], twin(input)[0])
        layer(input)[0].sum().backward()
    print(rnnfast.show_config())
for warning in caught:
    if "rnnfast" in str(warning.message):
        print("warned:", warning.category.__name__, warning.message)
"""


@pytest.mark.parametrize(
    ("exception", "cause"),
    [
        (
            NOT_BUILT,
            f"the extension rnnfast._C was not built: the package was imported from its sources in {ROOT}, which",
        ),
        (NOT_LOADED, "the extension rnnfast._C does not load, was it built for another torch? _C.so: undefined symbol"),
    ],
    ids=["not built", "not loaded"],
)
def test_without_the_extension_the_package_works_and_warns_once(exception: str, cause: str) -> None:
    result = python(WITHOUT_EXTENSION.format(exception=exception))
    assert result.returncode == 0, result.stderr
    warned = [line for line in result.stdout.splitlines() if line.startswith("warned:")]
    assert len(warned) == 1, warned
    assert f"RuntimeWarning rnnfast runs on its slow reference path: {cause}" in warned[0]
    assert re.search(rf"^extension +none: {re.escape(cause)}", result.stdout, re.MULTILINE)


def test_an_extension_of_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("rnnfast._C")
    other.build_info = lambda: {"torch": "1.13.0", "version": rnnfast.__version__}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rnnfast._C", other)
    extension, error = _extension.load()
    assert extension is None
    assert "built for torch 1.13.0, and this is torch " + torch.__version__ in error
