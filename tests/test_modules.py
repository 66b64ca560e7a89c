"""RNN, LSTM and GRU against torch.nn's, and what they do beyond them."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import pkgutil
import subprocess
import sys
import typing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_inputs import LAYERS, MODULE_GRID, ModuleCase, each_backend, each_layer, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast


def result_and_gradients(module: nn.Module, input: Any, hx: Any, leaves: list[Tensor]) -> list[Tensor]:
    """All tensors of a call, and the gradients of a weighted sum of them by every leaf and parameter."""
    results = flatten(module(input, hx))
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)).sum()
        for result in results
    )
    return [*results, *torch.autograd.grad(loss, [*leaves, *module.parameters()], retain_graph=True)]


def check_parity(case: ModuleCase, device: str, backend: str) -> None:
    theirs, ours = case.pair(rnnfast, device=device, backend=backend)
    input, hx, leaves = case.inputs(device=device)
    torch.testing.assert_close(
        result_and_gradients(ours, input, hx, leaves), result_and_gradients(theirs, input, hx, leaves)
    )


@each_backend
@pytest.mark.parametrize("case", MODULE_GRID, ids=lambda case: case.id)
def test_grid(case: ModuleCase, device: str, backend: str) -> None:
    check_parity(case, device, backend)


@each_layer
def test_every_argument_by_position(name: str) -> None:
    """In the order in which torch.nn's classes take them, which for RNN and GRU their signatures do not tell."""
    nonlinearity = ("relu",) if name == "RNN" else ()
    arguments = (3, 4, 2, *nonlinearity, False, True, 0.0, True, 0, "cpu", torch.float64)
    theirs, ours = getattr(nn, name)(*arguments), getattr(rnnfast, name)(*arguments)
    assert ours.extra_repr() == theirs.extra_repr()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@st.composite
def module_cases(draw: st.DrawFn) -> ModuleCase:
    name = draw(st.sampled_from(LAYERS))
    hidden_size = draw(st.integers(1, 20))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if name == "LSTM":
        options["proj_size"] = draw(st.integers(0, hidden_size - 1))
    return ModuleCase(
        name,
        tuple(options.items()),
        form=draw(st.sampled_from(["batched", "unbatched", "packed", "packed_unsorted"])),
        hx=draw(st.booleans()),
        steps=draw(st.integers(1, 12)),
        batch=draw(st.integers(1, 18)),
        input_size=draw(st.integers(1, 20)),
        hidden_size=hidden_size,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=module_cases(), backend=st.sampled_from(["auto", "reference"]))
def test_random_configurations(case: ModuleCase, backend: str) -> None:
    check_parity(case, "cpu", backend)


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout(name: str, batch_first: bool, packed: bool) -> None:
    """The same generator gives torch.nn's masks on the CPU, dropout = 1 included, and none in eval mode."""
    for probability in (0.5, 1.0):
        options = (("num_layers", 3), ("dropout", probability), ("batch_first", batch_first))
        case = ModuleCase(name, options, "packed" if packed else "batched", hx=True)
        theirs, ours = case.pair(rnnfast)
        input, hx, _ = case.inputs()
        outputs = []
        for module, training in itertools.product((theirs, ours), (True, False)):
            module.train(training)
            torch.manual_seed(5)
            outputs.append(flatten(module(input, hx)))
        torch.testing.assert_close(outputs[2:], outputs[:2])
        assert not torch.equal(outputs[0][0], outputs[1][0])


@each_layer
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False, "dtype": torch.half}])
def test_same_seed_same_weights(name: str, options: dict[str, Any]) -> None:
    modules = []
    for namespace in (nn, rnnfast):
        torch.manual_seed(11)
        modules.append(getattr(namespace, name)(4, 6, **options))
    theirs, ours = (list(module.named_parameters()) for module in modules)
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    for (_, ours_weight), (_, theirs_weight) in zip(ours, theirs, strict=True):
        assert ours_weight.dtype == theirs_weight.dtype
        torch.testing.assert_close(ours_weight, theirs_weight, rtol=0, atol=0)
    for module in modules:
        torch.manual_seed(12)
        module.reset_parameters()
    torch.testing.assert_close(list(modules[1].parameters()), list(modules[0].parameters()), rtol=0, atol=0)


@each_layer
def test_torch_interface(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.25}
    theirs, ours = getattr(nn, name)(4, 6, **options), getattr(rnnfast, name)(4, 6, **options)
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, type(theirs))  # torch.compile breaks the graph at these
    assert repr(ours) == repr(theirs)
    for attribute in (
        *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
        *("proj_size", "_flat_weights_names", "_all_weights"),
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert [[tuple(w.shape) for w in ws] for ws in ours.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in theirs.all_weights
    ]
    assert all(weight is parameter for weight, parameter in zip(ours._flat_weights, ours.parameters(), strict=True))
    before = [parameter.data_ptr() for parameter in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [parameter.data_ptr() for parameter in ours.parameters()] == before


@each_layer
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_public_attributes_and_methods_are_torchs(name: str, options: dict[str, Any]) -> None:
    theirs, ours = getattr(nn, name)(4, 6, **options), getattr(rnnfast, name)(4, 6, **options)
    names = {attribute for attribute in dir(theirs) if not attribute.startswith("_")}
    assert names - set(dir(ours)) == set()
    for attribute in names:
        expected, got = getattr(theirs, attribute), getattr(ours, attribute)
        if isinstance(expected, (int, float, str)):  # bool is an int
            assert got == expected, attribute
        elif callable(expected):
            taken = list(inspect.signature(got).parameters)
            assert taken[: len(inspect.signature(expected).parameters)] == list(inspect.signature(expected).parameters)
        else:
            assert type(got) is type(expected), attribute

    slots, batch = (4, 5) if options else (1, 3)
    input, order = torch.randn(5, 3, 4), torch.tensor([2, 0, 1])
    state, short = torch.randn(slots, batch, 6), torch.randn(slots, batch, 5)
    hx, wrong = ((state, state + 1), (state, short)) if name == "LSTM" else (state, short)
    assert ours.get_expected_hidden_size(input, None) == theirs.get_expected_hidden_size(input, None)
    if name == "LSTM":
        assert ours.get_expected_cell_size(input, None) == theirs.get_expected_cell_size(input, None)
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order), rtol=0, atol=0)
    assert ours.permute_hidden(hx, None) is hx
    messages = []
    for module in (theirs, ours):
        module.check_forward_args(input, hx, None)
        for bad in ((input, wrong, None), (input[..., :2], hx, None), (input[0], hx, None)):
            with pytest.raises(RuntimeError) as caught:
                module.check_forward_args(*bad)
            messages.append(str(caught.value))
    assert messages[3:] == messages[:3]


@each_layer
def test_a_subclass_with_a_forward_of_its_own(name: str) -> None:
    """As people take it from torch.nn: zero states made, checked and put in another order by torch.nn's methods."""

    def define() -> type[nn.RNNBase]:
        class Shuffled(getattr(nn, name)):  # type: ignore[misc]
            def forward(self, input: Tensor, order: Tensor) -> Any:
                shapes = [self.get_expected_hidden_size(input, None)]
                if name == "LSTM":
                    shapes.append(self.get_expected_cell_size(input, None))
                states = tuple(torch.linspace(-1, 1, math.prod(shape)).view(shape) for shape in shapes)
                hx = states if name == "LSTM" else states[0]
                self.check_forward_args(input, hx, None)
                output, hx = super().forward(input[:, order], self.permute_hidden(hx, order))
                return output[:, order.argsort()], self.permute_hidden(hx, order.argsort())

        return Shuffled

    options = {"proj_size": 2} if name == "LSTM" else {}
    theirs = define()(4, 6, **options)
    with rnnfast.patch_torch():
        ours = define()(4, 6, **options)
    assert isinstance(ours, getattr(rnnfast, name))
    ours.load_state_dict(theirs.state_dict())
    input, order = torch.randn(5, 3, 4), torch.tensor([2, 0, 1])
    torch.testing.assert_close(flatten(ours(input, order)), flatten(theirs(input, order)))
    unshuffled = flatten(theirs(input, torch.arange(3)))
    torch.testing.assert_close(flatten(ours(input, order)), unshuffled)


def public_callables() -> list[Any]:
    """Functions and classes of the package whose names are public, and the methods that these classes have from it."""
    found: dict[str, Any] = {}
    for module in (importlib.import_module(f"rnnfast.{info.name}") for info in pkgutil.iter_modules(rnnfast.__path__)):
        if module.__name__ in ("rnnfast._C", "rnnfast.__main__"):  # no Python; a command
            continue
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            found[f"{module.__name__}.{name}"] = value
            for part, method in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
                if method.__module__.startswith("rnnfast"):  # some are torch.nn's
                    found[f"{module.__name__}.{name}.{part}"] = method
    return [pytest.param(value, id=name) for name, value in found.items() if callable(value)]


@pytest.mark.parametrize("value", public_callables())
def test_type_hints_can_be_read(value: Any) -> None:
    typing.get_type_hints(value)


def test_type_hints_are_those_of_the_interface() -> None:
    names = {parameter.id for parameter in public_callables()}
    assert names >= {"rnnfast.functional.recurrent", "rnnfast.modules.LSTM.forward", "rnnfast.own_cell.compile_cell"}
    hints = typing.get_type_hints(rnnfast.LSTM.forward)
    assert hints["hx"] == Tensor | tuple[Tensor, Tensor] | None


@pytest.mark.parametrize(
    ("name", "positional"),
    [
        ("RNN", (4, 6, 2, "relu", False, True, 0.0, True)),
        ("LSTM", (4, 6, 2, False, True, 0.0, True, 3)),
        ("GRU", (4, 6, 2, False, True, 0.0, True)),
        ("RNNCell", (4, 6, False, "relu")),
        ("LSTMCell", (4, 6, False)),
        ("GRUCell", (4, 6, False)),
    ],
)
def test_positional_arguments(name: str, positional: tuple[Any, ...]) -> None:
    theirs, ours = getattr(nn, name)(*positional), getattr(rnnfast, name)(*positional)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert "nonlinearity" not in ours.__dict__ or ours.nonlinearity == theirs.nonlinearity


def test_extra_repr_of_what_torch_lacks() -> None:
    for nonlinearity in ("sigmoid", "identity", "leaky_relu"):
        assert repr(rnnfast.RNN(1, 2, nonlinearity=nonlinearity)) == f"RNN(1, 2, nonlinearity={nonlinearity})"
    assert repr(rnnfast.RNN(1, 2, nonlinearity="relu")) == repr(nn.RNN(1, 2, nonlinearity="relu"))
    assert repr(rnnfast.GRU(1, 2, backend="reference")) == "GRU(1, 2, backend=reference)"


@each_backend
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sigmoid_is_a_tanh_in_disguise(device: str, backend: str, bidirectional: bool) -> None:
    """sigmoid(a) = (1 + tanh(a / 2)) / 2 turns torch.nn's tanh network into the sigmoid one."""
    options = {"bidirectional": bidirectional, "device": device, "dtype": torch.float64}
    ours = rnnfast.RNN(3, 5, nonlinearity="sigmoid", backend=backend, **options)
    theirs = nn.RNN(3, 5, **options)
    with torch.no_grad():
        for weight, name in zip(theirs.parameters(), theirs._flat_weights_names, strict=True):
            weight.copy_(ours.get_parameter(name) / (4 if "weight_hh" in name else 2))
        for name in ("l0_reverse", "l0")[1 - bidirectional :]:
            theirs.get_parameter(f"bias_hh_{name}").add_(ours.get_parameter(f"weight_hh_{name}").sum(1) / 4)
    input = torch.randn(7, 2, 3, device=device, dtype=torch.float64)
    hx = torch.rand(1 + bidirectional, 2, 5, device=device, dtype=torch.float64)
    expected = [(1 + result) / 2 for result in theirs(input, 2 * hx - 1)]
    torch.testing.assert_close(list(ours(input, hx)), expected)


@each_layer
@each_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_no_steps(name: str, device: str, backend: str, batch_first: bool) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True), ("batch_first", batch_first)), "batched", True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    _, hx, leaves = case.inputs(device=device)
    input = torch.zeros((4, 0, 3) if batch_first else (0, 4, 3), device=device, dtype=torch.float64)
    output, state = module(input, hx)
    assert output.shape == (*input.shape[:2], 10)
    torch.testing.assert_close(flatten(state), leaves[1:], rtol=0, atol=0)
    assert all(result is not given for result, given in zip(flatten(state), leaves[1:], strict=True))
    gradients = torch.autograd.grad(sum(part.sum() for part in flatten(state)), leaves[1:])
    assert all((gradient == 1).all() for gradient in gradients)


@each_layer
@each_backend
@pytest.mark.parametrize("form", ["batched", "batch_first", "unbatched", "packed"])
def test_reset_equals_pieces(name: str, device: str, backend: str, form: str) -> None:
    """A reset of all rows at one step is two calls, the second from zero."""
    options = (("num_layers", 2), ("batch_first", form == "batch_first"))
    case = ModuleCase(name, options, "batched" if form == "batch_first" else form, True)
    theirs, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, _ = case.inputs(device=device)
    dim = 1 if form == "batch_first" else 0
    rows = input.data if form == "packed" else input
    if form == "packed":
        first_piece, second_piece = input.data.split([8, 10])
        sizes = input.batch_sizes.tolist()
        assert sizes == [4, 4, 4, 3, 2, 1]
        first = theirs(PackedSequence(first_piece, input.batch_sizes[:2]), hx)
        second = theirs(PackedSequence(second_piece, input.batch_sizes[2:]))
        expected = [torch.cat([first[0].data, second[0].data])]
    else:
        first_piece, second_piece = rows.split([2, 4], dim)
        first, second = theirs(first_piece, hx), theirs(second_piece)
        expected = [torch.cat([first[0], second[0]], dim)]
    reset = torch.zeros(rows.shape[:-1], dtype=torch.bool, device=device)
    if form == "packed":
        reset[8:12] = True
    else:
        reset.narrow(dim, 2, 1).fill_(True)
    results = module(input, hx, reset=reset)
    torch.testing.assert_close(flatten(results), expected + flatten(second[1]))
    if form == "packed":
        as_packed = module(input, hx, reset=PackedSequence(reset, input.batch_sizes))
        torch.testing.assert_close(flatten(as_packed), flatten(results), rtol=0, atol=0)


@each_layer
@each_backend
def test_backward_in_eval_mode(name: str, device: str, backend: str) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("dropout", 0.5)), "batched", True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    module.eval()
    input, hx, leaves = case.inputs(device=device)
    flatten(module(input, hx))[0].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (*leaves, *module.parameters()))


@each_layer
def test_many_steps(name: str, device: str) -> None:
    """65,536 steps, where cuDNN stops."""
    module = getattr(rnnfast, name)(1, 2, device=device)
    with torch.no_grad():
        output, state = module(torch.ones(65_536, 1, device=device))
    assert output.shape == (65_536, 2)
    torch.testing.assert_close(output[-1], flatten(state)[0][0])
    torch.testing.assert_close(output[-1], output[30_000])  # the fixed point


@each_layer
@each_backend
def test_inputs_are_left_alone(name: str, device: str, backend: str) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True)), "batched", True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, leaves = case.inputs(device=device)
    lengths = torch.tensor([2, 6, 0, 4], device=device)
    reset = torch.rand(6, 4, device=device) < 0.5
    given = [*leaves, *module.parameters(), lengths, reset]
    before = [tensor.detach().clone() for tensor in given]
    sum(part.sum() for part in flatten(module(input, hx, lengths=lengths, reset=reset))).backward()
    torch.testing.assert_close([tensor.detach() for tensor in given], before, rtol=0, atol=0)


@each_layer
@each_backend
def test_non_contiguous_input(name: str, device: str, backend: str) -> None:
    case = ModuleCase(name, (), "batched", True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, _ = case.inputs(device=device)
    expected = flatten(module(input, hx))
    strided = torch.stack([input, -input], -1)[..., 0]
    states = [state.transpose(1, 2).contiguous().transpose(1, 2) for state in flatten(hx)]
    assert not strided.is_contiguous()
    results = module(strided, (states[0], states[1]) if name == "LSTM" else states[0])
    torch.testing.assert_close(flatten(results), expected)


@each_layer
def test_one_operator_call_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    layer = rnnfast.ops.layer
    monkeypatch.setattr(rnnfast.ops, "layer", lambda *args, **kwargs: calls.append(args[0]) or layer(*args, **kwargs))
    getattr(rnnfast, name)(3, 4, num_layers=3, bidirectional=True)(torch.randn(9, 2, 3))
    assert len(calls) == 3


@each_layer
def test_signature_has_torchs_arguments(name: str) -> None:
    """In the order by position; the overloads of torch's RNN and GRU leave proj_size out, but it counts there too."""
    ours = list(inspect.signature(getattr(rnnfast, name).__init__).parameters)
    base = list(inspect.signature(nn.RNNBase.__init__).parameters)
    base.remove("mode")
    if name == "RNN":
        base.insert(base.index("bias"), "nonlinearity")
    assert ours[: len(base)] == base


def test_meta_device() -> None:
    with torch.device("meta"):
        module = rnnfast.LSTM(3, 4, num_layers=2)
        output, _ = module(torch.empty(5, 2, 3))
    assert output.shape == (5, 2, 4)
    assert output.is_meta


def test_import_is_light() -> None:
    """Importing the package pulls in nothing that the core does not need."""
    code = "import sys, rnnfast; print([m for m in ('matplotlib', 'hypothesis', 'ninja') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
