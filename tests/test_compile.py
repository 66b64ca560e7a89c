"""Models with rnnfast's layers under torch.compile and torch.export: one graph, any size, the eager results."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import functional, ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the reference formula is a loop, which a graph unrolls")

LAYERS = ("RNN", "LSTM", "GRU")
SIZES = ((6, 7), (8, 9), (11, 10), (5, 31))  # batch and steps, unlike all other sizes and each other


class Model(nn.Module):
    """A stack of two layers between two linear ones, as people build it."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.recurrent = getattr(rnnfast, name)(16, 24, 2, batch_first=True, **options)
        self.last = nn.Linear(24 * (1 + self.recurrent.bidirectional), 3)

    def forward(self, input: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        output, _ = self.recurrent(self.first(input), lengths=lengths, reset=reset)
        return self.last(output)


def inputs(batch: int, steps: int, device: str, sequences: bool) -> tuple[Tensor, ...]:
    input = torch.randn(batch, steps, 12, device=device)
    if not sequences:
        return (input,)
    lengths = torch.randint(0, steps + 1, (batch,), device=device)
    return input, lengths, torch.rand(batch, steps, device=device) < 0.2


def training(model: Callable[..., Tensor], parameters: list[Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    output = model(*arguments)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), parameters)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sequences", [False, True], ids=["plain", "lengths and resets"])
def test_one_recompilation_at_most(name: str, sequences: bool, device: str) -> None:
    """The first size is taken as it is, the second makes sizes dynamic, and every further one finds that graph."""
    torch._dynamo.reset()
    model = Model(name, bidirectional=sequences, recompute=sequences).to(device)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for batch, steps in SIZES:
        arguments = inputs(batch, steps, device, sequences)
        expected = training(model, list(model.parameters()), arguments)
        torch.testing.assert_close(training(compiled, list(model.parameters()), arguments), expected, rtol=0, atol=0)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("whole_units", [functional.WHOLE_UNITS, 0])
def test_heads(device: str, whole_units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which heads share a call depends on neither batch nor steps, so on no compilation: all of them, or pairs."""
    torch._dynamo.reset()
    model = Model("GRU", bidirectional=True, num_heads=4).to(device)
    if not whole_units:
        monkeypatch.setattr(functional, "WHOLE_UNITS", whole_units)
        monkeypatch.setattr(functional, "SHARED_UNITS", model.recurrent.hidden_size // 2)
        assert functional.heads_a_call("gru", model.recurrent.hidden_size, 4) == 2
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    counts = set()
    for batch, steps in SIZES:
        arguments = inputs(batch, steps, device, sequences=False)
        expected = training(model, list(model.parameters()), arguments)
        torch.testing.assert_close(training(compiled, list(model.parameters()), arguments), expected, rtol=0, atol=0)
        counts.add(graphs.frame_count)
    assert len(counts) == 1
    program = exported(model, device, sequences=False, strict=False)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=0, atol=0)


def test_inductor(device: str) -> None:
    torch._dynamo.reset()
    model = Model("LSTM").to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, steps in SIZES[:2]:
        arguments = inputs(batch, steps, device, sequences=True)
        expected = training(model, list(model.parameters()), arguments)
        torch.testing.assert_close(training(compiled, list(model.parameters()), arguments), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(enforce_sorted: bool, device: str) -> None:
    torch._dynamo.reset()
    layer = rnnfast.LSTM(12, 16, bidirectional=True, device=device)

    def run(packed: PackedSequence, reset: PackedSequence) -> Tensor:
        output, (h_n, _) = layer(packed, reset=reset)
        return output[0].sum() + h_n.sum()  # torch 2.12 does not trace .data of a PackedSequence made inside

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    input = torch.randn(7, 3, 12, device=device)
    arguments = [
        pack_padded_sequence(part, torch.tensor([7, 5, 2]), enforce_sorted=enforce_sorted)
        for part in (input, torch.rand(7, 3, device=device) < 0.3)
    ]
    assert torch.equal(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str, device: str) -> None:
    torch._dynamo.reset()
    cell = getattr(rnnfast, name)(12, 16, device=device)

    def run(input: Tensor) -> Any:
        state = None
        for step in input:
            state = cell(step, state)
        return state

    input = torch.randn(3, 5, 12, device=device)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), run(input), rtol=0, atol=0)


def test_dropout_and_states(device: str) -> None:
    """Dropout between the layers draws in the graph what it draws outside, and every state comes out."""
    torch._dynamo.reset()
    layer = rnnfast.GRU(12, 16, 2, dropout=0.5, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input = torch.randn(7, 3, 12, device=device)
    results = []
    for run in (layer, compiled):
        torch.manual_seed(0)
        results.append(run(input, return_states=True))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_autocast(device: str) -> None:
    torch._dynamo.reset()
    model = Model("LSTM").to(device)
    (input,) = inputs(5, 7, device, sequences=False)
    with torch.autocast(device, torch.bfloat16):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(input), model(input))


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_norm": True}, {"recurrent_dropout": 0.3, "zoneout": 0.1}],
    ids=["plain", "layer norm", "noise"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_autograd(name: str, options: dict[str, Any], device: str) -> None:
    """A backward that is compiled, behind a forward that is not: one graph for every size."""
    torch._dynamo.reset()
    model = Model(name, bidirectional=True, **options).to(device)
    graphs = CompileCounterWithBackend("aot_eager")
    for batch, steps in SIZES[:3]:
        arguments = inputs(batch, steps, device, sequences=True)
        found = []
        for compiler in (None, lambda graph: torch.compile(graph, backend=graphs, fullgraph=True, dynamic=True)):
            torch.manual_seed(0)
            model.zero_grad()
            output = model(*arguments).square().sum()
            with compiled_autograd._enable(compiler) if compiler else nullcontext():
                output.backward()
            found.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_autograd_of_a_second_derivative(name: str, device: str) -> None:
    torch._dynamo.reset()
    layer = getattr(rnnfast, name)(12, 16, device=device)
    input = torch.randn(7, 3, 12, device=device, requires_grad=True)
    found = []
    for compiler in (None, lambda graph: torch.compile(graph, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        (grad,) = torch.autograd.grad(layer(input)[0].square().sum(), input, create_graph=True)
        with compiled_autograd._enable(compiler) if compiler else nullcontext():
            grad.square().sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(found[1], found[0])


# ------------------------------------------------------------------------------------------------------- export
def exported(model: nn.Module, device: str, sequences: bool, strict: bool) -> torch.export.ExportedProgram:
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    shapes = ({0: batch, 1: steps}, {0: batch}, {0: batch, 1: steps}) if sequences else ({0: batch, 1: steps},)
    return torch.export.export(model, inputs(5, 7, device, sequences), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize(
    ("name", "sequences", "strict"),
    [("RNN", False, False), ("LSTM", True, False), ("LSTM", False, True), ("GRU", True, True)],
)
def test_export_saves_and_loads(name: str, sequences: bool, strict: bool, device: str) -> None:
    model = Model(name, bidirectional=True).to(device).eval()
    file = io.BytesIO()
    torch.export.save(exported(model, device, sequences, strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, steps in ((3, 11), (1, 1)):
        arguments = inputs(batch, steps, device, sequences)
        assert torch.equal(loaded(*arguments), model(*arguments))


def test_exported_lengths_are_checked(device: str) -> None:
    if device != "cpu":
        pytest.skip("on a GPU lengths are clamped, not checked")
    loaded = exported(Model("GRU").eval(), device, sequences=True, strict=False).module()
    input, _, reset = inputs(2, 4, device, sequences=True)
    with pytest.raises(RuntimeError, match=r"lengths\[1\] is 5, it takes 0 to T = 4"):
        loaded(input, torch.tensor([1, 5]), reset)


def test_aot_inductor(tmp_path: Path, device: str) -> None:
    """A package runs without the Python model, its operators being those of the extension."""
    model = Model("LSTM").to(device).eval()
    with torch.no_grad():
        program = exported(model, device, sequences=False, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for batch, steps in ((3, 11), (1, 2)):
            (input,) = inputs(batch, steps, device, sequences=False)
            torch.testing.assert_close(package(input), model(input))
