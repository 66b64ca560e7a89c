"""A cell from outside the package: compiled once for all of these tests, from the header of examples/own_cell.py."""

from __future__ import annotations

import fcntl
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from examples_as_run import EXAMPLES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import ops, own_cell, reference

ROOT = Path(__file__).resolve().parents[1]
HEADER = EXAMPLES / "minimal_gated_unit.h"

pytestmark = pytest.mark.skipif(ops.extension is None, reason="a cell is compiled beside the extension")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.set_num_threads(1)
    return importlib.import_module("own_cell")


@pytest.fixture
def mgu(example: Any) -> type[own_cell.OwnLayers]:
    return rnnfast.compile_cell(HEADER, step=example.step)


@pytest.fixture
def without_formula(mgu: type[own_cell.OwnLayers], monkeypatch: pytest.MonkeyPatch) -> type[own_cell.OwnLayers]:
    form = reference.OWN_CELLS[mgu.cell]
    monkeypatch.setitem(reference.OWN_CELLS, mgu.cell, form._replace(step=own_cell._no_formula))
    return mgu


def both(layer: torch.nn.Module, *arguments: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the kernels, and of the formula."""
    sides = []
    for backend in ("auto", "reference"):
        with rnnfast.backend(backend):
            output, h_n = layer(*arguments, **options)
        output = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
        grads = torch.autograd.grad((output.sin().sum() + h_n.cos().sum()), list(layer.parameters()))
        sides.append([output, h_n, *grads])
    return sides[0], sides[1]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_kernels_do_what_the_formula_does(mgu: Any, form: str, recompute: bool) -> None:
    layer = mgu(5, 19, num_layers=2, bidirectional=True, recompute=recompute, dtype=torch.float64)
    x, lengths = torch.randn(7, 3, 5, dtype=torch.float64), torch.tensor([7, 4, 1])
    hx = torch.randn(4, 3, 19, dtype=torch.float64)
    input = pack_padded_sequence(x, lengths) if form == "packed" else x
    reset = torch.rand(12 if form == "packed" else (7, 3)) < 0.3 if form == "packed" else torch.rand(7, 3) < 0.3
    ours, theirs = both(layer, input, hx, reset=reset, lengths=lengths if form == "lengths" else None)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_dtype(mgu: Any, dtype: torch.dtype) -> None:
    layer = mgu(24, 40, dtype=dtype)
    ours, theirs = both(layer, torch.randn(6, 5, 24, dtype=dtype))
    tolerance = 16 * torch.finfo(dtype).eps
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


def test_recurrent_dropout_and_zoneout(mgu: Any) -> None:
    layer = mgu(5, 19, bidirectional=True, recurrent_dropout=0.3, zoneout=0.2, dtype=torch.float64)
    x, lengths = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([7, 4, 1])
    for training in (True, False):
        layer.train(training)
        results = []
        for backend in ("auto", "reference"):
            with rnnfast.backend(backend):
                output, h_n = layer(x, lengths=lengths, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(output.sin().sum() + h_n.cos().sum(), [x, *layer.parameters()])
            results.append([output, h_n, *grads])
        torch.testing.assert_close(results[0], results[1])


def test_derivatives_without_a_formula(without_formula: Any) -> None:
    """First and second ones are kernels; the header has no tangent, so that of forward comes from dual numbers."""
    layer = without_formula(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *weights: Tensor) -> Any:
        lengths = torch.tensor([4, 2])
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,), {"lengths": lengths})

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)


def test_what_takes_the_formula_says_so_without_one(without_formula: Any) -> None:
    layer = without_formula(3, 4)
    with rnnfast.backend("reference"), pytest.raises(NotImplementedError, match=r"no formula in plain PyTorch.*step="):
        layer(torch.randn(2, 1, 3))
    x = torch.randn(2, 1, 3, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no formula in plain PyTorch"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def test_transforms_and_compilation(mgu: Any) -> None:
    layer = mgu(3, 4, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(5, 6, 3, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, weights, (x,))[0]
        return output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, x.unsqueeze(2))
    for name, whole in torch.func.grad(loss)(weights, x).items():
        torch.testing.assert_close(per_sample[name].sum(0), whole)
    _, along = torch.func.jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, torch.func.grad(loss, 1)(weights, x).sum())

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_a_formula_is_that_of_the_header(mgu: Any, example: Any) -> None:
    """Another one is refused, and leaves the one that was given; one in other words takes its place."""
    of_mgu = reference.OWN_CELLS[mgu.cell].step

    def other(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
        (new,) = example.step(igates, hgates, h)
        return (new + 0.01 * h,)

    def two(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (new,) = example.step(igates, hgates, h)
        return new, new

    def narrow(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
        return (example.step(igates, hgates, h)[0][:1],)

    for step in (other, two, narrow):
        with pytest.raises(ValueError, match=r"step: expected the equations of minimal_gated_unit\.h, got others"):
            rnnfast.compile_cell(HEADER, step=step)
        assert reference.OWN_CELLS[mgu.cell].step is of_mgu
    rnnfast.compile_cell(HEADER, step=lambda *gates: example.step(*gates))
    assert reference.OWN_CELLS[mgu.cell].step is not of_mgu


@pytest.fixture
def diagonal(example: Any, tmp_path: Path) -> type[own_cell.OwnLayers]:
    """The same unit with a vector for each gate's recurrent weights."""
    header = tmp_path / "a folder" / "diagonal_unit.h"
    header.parent.mkdir()
    header.write_text(
        GOOD.replace(
            "  static constexpr int kGates", "  static constexpr bool kDiagonal = true;\n  static constexpr int kGates"
        )
    )
    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "a folder"
    return rnnfast.compile_cell(header, step=example.step, directory=directory)


SIX_GATES = """#pragma once
#include "activations.h"
struct SixGates {  // h' = the mean of the gates' tanh
  static constexpr int kGates = 6, kStates = 1, kSaved = 6;
  static constexpr bool kSplitGates = false;
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V*, V* state, V* saved) {
    V sum(0);
    for (int g = 0; g < kGates; ++g) {
      saved[g] = tanh(igates[g] + hgates[g]);
      sum = sum + saved[g];
    }
    state[0] = sum * V(1.0f / kGates);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V* saved, const V*, const V*, const V* grad_state, V* grad_igates,
                                           V* grad_hgates, V* grad_prev) {
    for (int g = 0; g < kGates; ++g) {
      grad_igates[g] = grad_state[0] * V(1.0f / kGates) * rnnfast::Tanh::derivative(saved[g]);
      grad_hgates[g] = grad_igates[g];
    }
    grad_prev[0] = V(0);
  }
};
"""


def test_a_cell_with_many_gates(example: Any, tmp_path: Path) -> None:
    """Units of which all gates of a block would not fit into what the engine has for them."""
    header = tmp_path / "six_gates.h"
    header.write_text(SIX_GATES)

    def step(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
        return ((igates + hgates).tanh().unflatten(-1, (6, -1)).mean(-2),)

    cell = rnnfast.compile_cell(header, step=step, directory=Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "six gates")
    for hidden_size in (64, 200):
        for recompute in (False, True):
            layer = cell(8, hidden_size, recompute=recompute)
            for mine, other in zip(*both(layer, torch.randn(5, 70, 8)), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_diagonal_recurrence(diagonal: Any, recompute: bool) -> None:
    layer = diagonal(5, 300, num_layers=2, bidirectional=True, recompute=recompute, dtype=torch.float64)
    assert layer.weight_hh_l1_reverse.shape == (600,)
    x, lengths = torch.randn(9, 3, 5, dtype=torch.float64), torch.tensor([9, 4, 0])
    hx, reset = torch.randn(4, 3, 300, dtype=torch.float64), torch.rand(9, 3) < 0.3
    for threads in (1, 4):  # four divide the units
        torch.set_num_threads(threads)
        torch.testing.assert_close(*both(layer, x, hx, reset=reset, lengths=lengths))
    with pytest.raises(ValueError, match=r"^num_heads: expected 1 for a diagonal cell.* got 2"):
        diagonal(5, 4, num_heads=2)


def test_derivatives_of_a_diagonal_recurrence(diagonal: Any) -> None:
    layer = diagonal(3, 4, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *weights: Tensor) -> Any:
        options = {"lengths": torch.tensor([4, 2])}
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,), options)

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)


def test_a_layer_as_the_packages_own(mgu: Any) -> None:
    layer = mgu(5, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
    assert repr(layer) == "MinimalGatedUnit(5, 8, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True)"
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes["weight_ih_l1_reverse"] == (16, 16)
    assert shapes["bias_hh_l0"] == (16,)
    assert all(0 < parameter.abs().max() <= 8**-0.5 for parameter in layer.parameters())
    twin = mgu(5, 8, num_layers=2, bidirectional=True, batch_first=True)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer.eval()(x), twin(x))
    assert isinstance(layer, torch.nn.RNNBase)
    assert str(rnnfast.explain(mgu(5, 8))) == f"MinimalGatedUnit layer 0: cpu ({mgu.instruction_set})"
    on_cuda = mgu(5, 8)
    with FakeTensorMode():
        on_cuda.weight_ih_l0 = torch.nn.Parameter(torch.empty(16, 5, device="cuda"))
    if mgu.no_cuda:
        cause = f"none (a call would raise: {mgu.no_cuda})"
    else:
        cause = "cuda stepwise (a cell of its own has no persistent kernels)"
    assert str(rnnfast.explain(on_cuda)) == f"MinimalGatedUnit layer 0: {cause}"
    with pytest.raises(ValueError, match=r"got rnn with a cell of its own, MinimalGatedUnit$"):
        rnnfast.to_torch(torch.nn.ModuleDict({"rnn": layer, "gru": rnnfast.GRU(2, 3)}))
    with pytest.raises(RuntimeError, match=r"rnnfast\.minimal_gated_unit: h0 has shape \[1, 1, 7\]"):
        ops.layer(mgu.cell, x, torch.zeros(1, 1, 7), None, list(mgu(5, 8).parameters()))


def test_it_is_compiled_once(mgu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: pytest.fail("compiled again"))
    copy = tmp_path / HEADER.name
    copy.write_text(HEADER.read_text())
    assert rnnfast.compile_cell(copy).cell == mgu.cell

    class Compiles(Exception):
        pass

    def load(name: str, *_: Any, **__: Any) -> None:
        raise Compiles(name)

    monkeypatch.setattr(cpp_extension, "load", load)
    copy.write_text(HEADER.read_text() + "// another\n")
    with pytest.raises(Compiles) as compiles:
        rnnfast.compile_cell(copy, directory=tmp_path)
    assert str(compiles.value) != mgu.cell.partition("::")[0]


GOOD = HEADER.read_text()
LINE = 1 + GOOD[: GOOD.index("saved[2] = hgates[1];")].count("\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("saved[2] = hgates[1];", "saved[2] = hgate[1];"), rf"broken\.h:{LINE}:16: error: .*hgate"),
        (GOOD.replace("V(1) - f", "V(1) % f"), r"broken\.h:\d+:\d+: error: no match for .*operator%"),
        (GOOD.replace("  static constexpr int kSaved = 3;", ""), "error: .*kSaved.* is not a member of"),
        (GOOD.replace("kStates = 1;", "kStates = 3;"), "kStates: a cell has one state, h, or two, h and c"),
        (GOOD.replace("V* grad_prev) {", ") {"), "broken.h:.*error"),
    ],
    ids=["a name", "an operation", "a member", "states", "a function"],
)
def test_a_mistake_is_shown_where_it_is(tmp_path: Path, text: str, message: str) -> None:
    header = tmp_path / "broken.h"
    assert text != GOOD
    header.write_text(text)
    with pytest.raises(RuntimeError, match=message) as error:
        rnnfast.compile_cell(header, directory=tmp_path)
    assert str(error.value).startswith("broken.h does not compile:\n")
    assert len(str(error.value).splitlines()) < 60


class Compiles(Exception):
    """A cell's library would be compiled now."""


@pytest.fixture
def library_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], str]:
    """The name of the library that would be compiled of a header, which stands for what it is made of."""
    from torch.utils import cpp_extension

    def load(name: str, *_: Any, **__: Any) -> None:
        raise Compiles(name)

    def library(header: Path) -> str:
        with pytest.raises(Compiles) as compiles:
            rnnfast.compile_cell(header, directory=tmp_path / "libraries")
        return str(compiles.value)

    monkeypatch.setattr(cpp_extension, "load", load)
    return library


def test_what_a_header_includes_is_part_of_it(library_of: Callable[[Path], str], tmp_path: Path) -> None:
    """What one includes from beside itself, also where the package has a file of that name."""
    names = ("unit.h", "params.h", "a/b.h", "a/c.h", "../up.h")
    header, *included = (tmp_path / "cells" / name for name in names)
    included[1].parent.mkdir(parents=True)
    includes = '#include "params.h"\n  #  include "../up.h"\n#include <cmath>\n'
    header.write_text(f"{includes}static_assert(kBeside + kBelow + kAbove == 6);\n{GOOD}")
    texts = (
        '#pragma once\n#include "a/b.h"\nconstexpr int kBeside = 1;\n',
        '#include "../params.h"\n#include "c.h"\n',
        "constexpr int kBelow = 2;\n",
        "constexpr int kAbove = 3;\n",
    )
    for path, text in zip(included, texts, strict=True):
        path.write_text(text)
    libraries = [library_of(header)]
    for path in included:
        path.write_text(path.read_text() + "// another\n")
        libraries.append(library_of(header))
    assert len(set(libraries)) == 5
    assert library_of(header) == libraries[4]
    included[2].write_text("constexpr int kBelow = 2;\nmistake\n")
    with pytest.raises(RuntimeError, match=r"cells/a/c\.h:2:1: error"):
        rnnfast.compile_cell(header, directory=tmp_path / "libraries")


def test_comments_in_any_encoding(library_of: Callable[[Path], str], tmp_path: Path) -> None:
    header = tmp_path / "unit.h"
    header.write_bytes(GOOD.encode() + "// für\n".encode("latin-1"))
    assert library_of(header)


def test_a_failure_is_not_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a full disk: who asks again in the same process, compiles again."""
    from torch.utils import cpp_extension

    asked = []

    def build(**options: Any) -> None:
        asked.append(options["name"])
        raise RuntimeError("no space left")

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
    header = tmp_path / "unit.h"
    header.write_text(GOOD)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"unit\.h cannot be compiled:\nno space left"):
            rnnfast.compile_cell(header, directory=tmp_path)
    assert len(asked) == 2
    assert len(set(asked)) == 1


def test_one_process_compiles_at_a_time(tmp_path: Path) -> None:
    """The others wait, and what a process that was killed had locked is free."""
    (tmp_path / "lock").touch()  # of torch.utils.cpp_extension, which would wait for ever
    order, started = [], threading.Event()

    def compile_too() -> None:
        started.set()
        with own_cell._one_process(tmp_path):
            order.append("this one")

    with open(tmp_path / "compiling", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=compile_too)
        thread.start()
        started.wait()
        thread.join(0.2)
        order.append("the other")
    thread.join()
    assert order == ["the other", "this one"]
    assert not (tmp_path / "lock").exists()


def test_what_another_process_compiled_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded, not compiled again."""

    @contextmanager
    def one_process(folder: Path) -> Iterator[None]:
        (folder / "complete").touch()
        yield

    loaded = []

    def load_library(product: Path) -> None:
        loaded.append(product)
        raise Compiles

    monkeypatch.setattr(own_cell, "_one_process", one_process)
    monkeypatch.setattr(own_cell, "_load", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    header = tmp_path / "unit.h"
    header.write_text(GOOD)
    with pytest.raises(Compiles):
        rnnfast.compile_cell(header, directory=tmp_path)
    assert loaded[0].parent.parent == tmp_path


def test_what_no_compiler_is_asked_about(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.h"):
        rnnfast.compile_cell(tmp_path / "none.h")
    header = tmp_path / "two.h"
    header.write_text("struct One {};\n// struct Comment {};\nstruct Two {};\n")
    with pytest.raises(
        ValueError, match=r"struct: expected the name of one of two\.h's structs \(One, Two\), got None"
    ):
        rnnfast.compile_cell(header)
    for name in ("Three", "Comment", "", 2):
        with pytest.raises(ValueError, match=rf"two\.h's structs \(One, Two\), got {name!r}"):
            rnnfast.compile_cell(header, name)
    with pytest.raises(TypeError, match="header: expected the path of a file, got int"):
        rnnfast.compile_cell(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step: expected a function of igates, hgates and the states, got str"):
        rnnfast.compile_cell(header, "One", step="step")  # type: ignore[arg-type]
    header = tmp_path / "derived.h"
    header.write_text("struct Base {};\ntemplate <class V> struct Derived final : public Base, Other<V> {};\n")
    with pytest.raises(ValueError, match=r"structs \(Base, Derived\)"):
        rnnfast.compile_cell(header)
    header = tmp_path / "reference.h"
    header.write_text(GOOD)
    with pytest.raises(ValueError, match="header: expected another name than that of the formula's operators"):
        rnnfast.compile_cell(header)
    header = tmp_path / "unit.h"
    header.write_text(GOOD)
    with pytest.raises(OSError, match=r"unit\.h"):
        rnnfast.compile_cell(header, directory=header)
    header = tmp_path / "2 cells.h"
    header.write_text(GOOD)
    with pytest.raises(ValueError, match=r"header: expected a file named by letters, digits and _, got 2 cells\.h"):
        rnnfast.compile_cell(header)


def test_an_installed_package_has_the_sources(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path)]
    environment = {"PATH": "/usr/bin:/bin", "RNNFAST_EXTENSION": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (package,) = tmp_path.glob("lib*/rnnfast")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {str(path.relative_to(package)) for path in (package / "csrc").rglob("*.*")} == sources


def test_the_example(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "3", "--batch", "2", "--inputs", "3", "--hidden", "4"]
    example.main([*sizes, "--rounds", "1", "--no-compile"])
    lines = capsys.readouterr().out.splitlines()
    assert "first and second derivatives agree with finite differences" in lines
    assert [line.split()[0:2] for line in lines[-2:]] == [["Python", "loop"], ["compiled", "cell"]]
