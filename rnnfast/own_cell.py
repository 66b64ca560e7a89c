"""Owns: layers of a cell that is not the package's, compiled from its header of equations.

The package's own engine and operators, of ``csrc/``, are compiled for that cell alone, into a namespace of their own.
Must not know how a layer runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _build, _extension, modules, ops, reference
from ._version import __version__

_HERE = Path(__file__).resolve().parent
# Of an installed package, or of a checkout.
_SOURCES = _HERE / "csrc" if (_HERE / "csrc").exists() else _HERE.parent / "csrc"
_FLAGS = ["-DRNNFAST_OWN_CELL", "-w"]
_one_thread = threading.Lock()

Step = Callable[..., "tuple[Tensor, ...]"]


class OwnLayers(modules._Layers[Any]):
    """What the classes share that :func:`compile_cell` makes."""

    cell: ClassVar[str]  # "namespace::name" of the operators
    gates: ClassVar[int]  # of the cell
    instruction_set: ClassVar[str]  # that it was compiled for
    no_cuda: ClassVar[str]  # why it has no kernels for CUDA; empty if it has

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        batch_invariant: bool = False,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        num_heads: int = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            self.cell,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            batch_invariant=batch_invariant,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            num_heads=num_heads,
            backend=backend,
        )
        # RNNBase made the parameters of a cell with one gate.
        for name, parameter in list(self.named_parameters()):
            shape = (self.gates * hidden_size, *parameter.shape[1:])
            setattr(self, name, nn.Parameter(parameter.new_empty(shape)))
        self.reset_parameters()


def compile_cell(
    header: str | os.PathLike[str],
    struct: str | None = None,
    *,
    step: Step | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> type[OwnLayers]:
    """Compile the equations of a recurrent cell into a layer, as fast as the package's own, and return its class.

    The class takes what :class:`rnnfast.GRU` takes, but for proj_size, layer_norm and reset_after: layers, directions,
    dropout, PackedSequence, ``lengths``, ``reset``, ``recompute`` and so on. Its parameters are ``weight_ih_l0 [G*H,
    input_size]``, ``weight_hh_l0 [G*H, H]``, or ``[G*H]`` of a struct with ``kDiagonal = true``, ``bias_ih_l0`` and
    ``bias_hh_l0 [G*H]``, G gates of H = hidden_size units, initialised as torch.nn's are. For a cell with two states
    ``hx`` and the final states are pairs, as an LSTM's are. There are first and second derivatives.
    ``docs/ADDING_A_CELL.md`` says what the header holds.

    It runs on the CPU and, where torch is built with CUDA and an nvcc of the same major version is found, on CUDA too,
    step by step; elsewhere tensors on CUDA are an error that says why. ``RNNFAST_CUDA=0`` leaves CUDA out, and
    ``TORCH_CUDA_ARCH_LIST`` names other architectures than those of the package.

    A compilation takes a C++ compiler and ninja, and about 40 seconds on two cores. What was compiled is kept,
    by the content of the header, of the files that it includes by a path from its folder, and the versions of rnnfast
    and torch, and loaded again at once. Of several processes that ask for one cell at a time one compiles it.

    Args:
        header: the file of equations.
        struct: the name of the cell's struct in it; None: the only struct there is.
        step: the same equations in plain PyTorch, ``step(igates, hgates, *states) -> states`` as in
            :mod:`rnnfast.reference`; igates and hgates are ``[B, G*H]``, a state ``[B, H]``. With it there are also
            derivatives of third order and ``backend="reference"``; without it these raise NotImplementedError. It is
            the formula of all classes of that header, and held against the compiled cell at random numbers.
        directory: where it is compiled and kept; None: where torch.utils.cpp_extension does so,
            ``$TORCH_EXTENSIONS_DIR`` or ``~/.cache/torch_extensions``.

    Raises:
        FileNotFoundError: there is no such header.
        ValueError: the header has no struct, or several and none is named, or none of that name, or its file name is no
            name for an operator; step computes something else than the header.
        TypeError: header is no path, or step no function.
        OSError: nothing can be written to the directory, where the cell is not there already.
        RuntimeError: it does not compile; the message is the compiler's, with the header's lines. Or there is no
            compiler, or the package has no extension itself.
    """
    if _extension.extension is None:
        raise RuntimeError(_extension.error)
    if not isinstance(header, (str, os.PathLike)):
        raise TypeError(f"header: expected the path of a file, got {type(header).__name__}")
    if step is not None and not callable(step):
        raise TypeError(f"step: expected a function of igates, hgates and the states, got {type(step).__name__}")
    header = Path(header).resolve()
    files = _find_files(header)
    name = header.stem.lower()
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"header: expected a file named by letters, digits and _, got {header.name}")
    if name == "reference":
        raise ValueError("header: expected another name than that of the formula's operators, got reference")
    struct = _find_struct(header, files, struct)
    instruction_set = str(_extension.extension.instruction_set())

    no_cuda = _no_cuda()
    archs = "" if no_cuda else _cuda_archs()
    facts = [struct, instruction_set, archs, __version__, str(torch.__version__)]
    facts += [part for path, text in files.items() for part in (os.path.relpath(path, header.parent), text)]
    key = hashlib.sha256(repr(facts).encode())
    for source in sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")):
        key.update(source.read_bytes())
    library = f"rnnfast_{name}_{key.hexdigest()[:16]}"
    cell = f"{library}::{name}"
    with _one_thread:
        if cell not in reference.OWN_CELLS:
            folder = _build_root(directory) / library
            product, complete = folder / f"{library}.so", folder / "complete"
            if not complete.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with _one_process(folder):
                    if not complete.exists():  # meanwhile
                        _write_sources(folder, header, files, struct, library, name, instruction_set)
                        _check(folder, header)
                        _load(folder, library, header, instruction_set, archs)
                        complete.touch()
            torch.ops.load_library(product)
            gates, states, saved, diagonal = _sizes(product)
            form = reference.Cell(gates, states, _no_formula, layer_norm=False, diagonal=bool(diagonal))
            ops.register_own_cell(cell, saved, form, no_cuda)
    form = reference.OWN_CELLS[cell]
    if step is not None:
        _check_step(header, cell, form, step)
        reference.OWN_CELLS[cell] = form._replace(step=step)
    members = {
        "cell": cell,
        "gates": form.gates,
        "instruction_set": instruction_set,
        "no_cuda": no_cuda,
        "__doc__": _doc(header, struct),
    }
    name = struct.rpartition("::")[2]
    return type(name.removesuffix("Cell") or name, (OwnLayers,), members)


def _no_cuda() -> str:
    """Why a cell is compiled for the CPU alone; empty if it is not."""
    nvcc = _build.find_nvcc_version() if torch.version.cuda else None
    with_cuda, reason = _build.choose_cuda(torch.version.cuda, nvcc, os.environ)
    return "" if with_cuda else f"the cell was compiled for the CPU alone: {reason}"


def _cuda_archs() -> str:
    built_for = _extension.extension.build_info()["cuda_archs"] if _extension.extension is not None else ""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or built_for or _build.DEFAULT_CUDA_ARCHS


def _no_formula(*_arguments: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "a compiled cell has no formula in plain PyTorch, which third derivatives and backend='reference' take: give "
        "rnnfast.compile_cell one as step="
    )


def _check_step(header: Path, cell: str, form: reference.Cell, step: Step) -> None:
    """Raise ValueError unless a step of the formula gives what one of the compiled cell does."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    rows, units = 4, 3
    igates = draw(1, rows, form.gates * units)
    h, *c = (draw(1, rows, units) for _ in range(form.states))
    w_hh = draw(form.gates * units) if form.diagonal else draw(form.gates * units, units)
    hgates = h[0].repeat(1, form.gates) * w_hh if form.diagonal else h[0] @ w_hh.T
    w_ih = torch.eye(form.gates * units, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        _, *compiled, _ = ops.layer(cell, igates, h, c[0] if c else None, [w_ih, w_hh], backend="auto")
        formula = step(igates[0], hgates, *(state[0] for state in (h, *c)))
    # Constants of a header may be of less than double precision.
    close = partial(torch.allclose, rtol=1e-4, atol=1e-4, equal_nan=True)
    given = len(formula) == form.states and all(state.shape == (rows, units) for state in formula)
    if not given or not all(close(state, kernel[0]) for state, kernel in zip(formula, compiled, strict=False)):
        raise ValueError(f"step: expected the equations of {header.name}, got others")


def _doc(header: Path, struct: str) -> str:
    takes = "what :class:`rnnfast.GRU` takes, but for proj_size, layer_norm and reset_after"
    return f"A layer of the cell {struct} of {header.name}; takes {takes}."


def _find_files(header: Path) -> dict[Path, str]:
    """The text of the header, and of what it includes by a path from its folder, and what that includes."""
    files: dict[Path, str] = {}
    waiting = [header]
    while waiting:
        path = waiting.pop()
        # Comments may be of any encoding.
        text = files[path] = path.read_text(encoding="utf-8", errors="surrogateescape")
        for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', text, re.MULTILINE):
            beside = (Path(os.path.normpath(folder / name)) for folder in (path.parent, header.parent))
            found = next((path for path in beside if path.is_file()), None)
            if found is not None and found not in files and _SOURCES not in found.parents:
                waiting.append(found)
    return files


def _find_struct(header: Path, files: dict[Path, str], struct: str | None) -> str:
    """The struct's name as it was given, or that of the header's only one."""
    code = {path: re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL) for path, text in files.items()}
    structs = re.findall(r"\bstruct\s+(\w+)\s*(?:final\s*)?(?::[^{;]*)?\{", code[header])
    if struct is None and len(structs) == 1:
        return str(structs[0])
    # A name may be an alias's, with a namespace and arguments of a template, in a file that the header includes.
    name = re.match(r"(?:\w*::)*([a-zA-Z_]\w*)", struct) if isinstance(struct, str) else None
    if struct is None or name is None or not any(re.search(rf"\b{name[1]}\b", text) for text in code.values()):
        found = ", ".join(structs) or "none"
        raise ValueError(f"struct: expected the name of one of {header.name}'s structs ({found}), got {struct!r}")
    return struct


def _build_root(directory: str | os.PathLike[str] | None) -> Path:
    from torch.utils import cpp_extension  # a third of a second

    if directory is not None:
        return Path(directory).resolve()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles in ``folder``."""
    import fcntl  # of Unix alone

    with open(folder / "compiling", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # which ends with its process, unlike torch's own lock
        (folder / "lock").unlink(missing_ok=True)
        yield


def _write_sources(
    folder: Path, header: Path, files: dict[Path, str], struct: str, library: str, name: str, instruction_set: str
) -> None:
    # Copies, so that what is compiled is what the key was made of; the compiler's messages name the files. They have a
    # folder of their own, where none is taken for one of the package's of the same name.
    for path, text in files.items():
        relative = os.path.relpath(path, header.parent)
        if not relative.startswith(os.pardir):
            quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
            _write(folder / "own" / relative, f'#line 1 "{quoted}"\n{text}')
    _write(
        folder / "rnnfast_own_cell.h",
        "// The list of cells of csrc/cell/cell_list.h.\n"
        f"#define RNNFAST_LIBRARY {library}\n"
        f"#define RNNFAST_OWN_HEADER <own/{header.name}>\n"
        f"#define RNNFAST_OWN_TYPE {struct}\n"
        f"#define RNNFAST_OWN_ISA {instruction_set}\n"
        "#define RNNFAST_FOR_EACH_PERSISTENT_CELL(X)\n"
        f"#define RNNFAST_FOR_EACH_STEPWISE_CELL(X) X({name}, ::rnnfast::OwnCell)\n",
    )


def _write(path: Path, text: str) -> None:
    """Make ``path`` hold ``text``, and leave it alone if it does: what was compiled of it stays up to date."""
    data = text.encode(errors="surrogateescape")
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _include_paths(folder: Path, header: Path) -> list[str]:
    return [str(path) for path in (folder, _SOURCES, _SOURCES / "cell", header.parent)]


def _check(folder: Path, header: Path) -> None:
    """Compile the header alone, for messages that are about it."""
    compiler = os.environ.get("CXX", "c++").split()
    includes = (f"-I{path}" for path in _include_paths(folder, header))
    source = str(_SOURCES / "own_cell" / "check.cpp")
    command = [*compiler, "-std=c++20", "-fsyntax-only", *_FLAGS, *includes, source]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{header.name} cannot be compiled: no C++ compiler was found ({error})") from None
    if done.returncode:
        raise RuntimeError(f"{header.name} does not compile:\n{done.stderr}")


def _load(folder: Path, library: str, header: Path, instruction_set: str, archs: str) -> None:
    """archs: of CUDA, as torch writes them; empty for the CPU alone."""
    from torch.utils import cpp_extension

    # After a compilation that failed, of a full disk or without ninja, torch would not try again in this process.
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(library, None)
    sources = [_SOURCES / "own_cell" / "operators.cpp", _SOURCES / "cpu" / f"engine_{instruction_set}.cpp"]
    flags = [*_FLAGS, "-DRNNFAST_WITH_CUDA"] if archs else _FLAGS
    sources += cuda_sources() if archs else []
    headers, libraries = _build.complete_toolkit(folder / "toolkit") if archs else ([], [])
    try:
        with _architectures(archs):
            cpp_extension.load(
                library,
                [str(path) for path in sources],
                extra_cflags=[*_build.CXX_FLAGS, *flags],
                extra_cuda_cflags=[*_build.NVCC_FLAGS, *flags],
                extra_include_paths=[*_include_paths(folder, header), *headers],
                extra_ldflags=[*_build.openmp_library(), *(shlex.quote(f"-L{path}") for path in libraries)],
                build_directory=str(folder),
                with_cuda=bool(archs),
                is_python_module=False,
            )
    except RuntimeError as error:
        output = getattr(error.__cause__, "output", b"") or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else str(output)
        # Ninja repeats the commands.
        lines = [line for line in text.splitlines() if not re.match(r"\[\d+/\d+\]|FAILED:|ninja:|\S*c\+\+ ", line)]
        raise RuntimeError(f"{header.name} cannot be compiled:\n" + ("\n".join(lines) or str(error))) from None


@contextmanager
def _architectures(archs: str) -> Iterator[None]:
    """torch.utils.cpp_extension takes them from the environment."""
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    try:
        if archs:
            os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        yield
    finally:
        if before is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before
        elif archs:
            del os.environ["TORCH_CUDA_ARCH_LIST"]


def cuda_sources() -> list[Path]:
    """The engine of CUDA that runs any cell, step by step."""
    return [path for path in sorted((_SOURCES / "cuda").glob("*.cu")) if not path.name.startswith("persistent_")]


def _sizes(product: Path) -> list[int]:
    """The cell's gates, states and saved values, and whether its recurrence is diagonal."""
    sizes = (ctypes.c_int * 4)()
    ctypes.CDLL(str(product)).rnnfast_own_cell(sizes)
    return list(sizes)
