"""IndRNN, whose recurrent weight is a vector: the module. What holds for any cell is tested by the list of cells."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from sample_inputs import Sample, each_backend, flatten
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import functional, ops, reference

NONLINEARITIES = {"relu": torch.relu, "tanh": torch.tanh}
each_nonlinearity = pytest.mark.parametrize("nonlinearity", NONLINEARITIES)


def by_definition(layer: rnnfast.IndRNN, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
    """The stack on padded rows, time first, by the paper's formula."""
    f = NONLINEARITIES[layer.nonlinearity]
    suffixes = ["", "_reverse"] if layer.bidirectional else [""]
    last = []
    for index in range(layer.num_layers):
        directions = []
        for suffix in suffixes:
            w, u = (getattr(layer, f"weight_{part}_l{index}{suffix}") for part in ("ih", "hh"))
            b = sum(getattr(layer, f"bias_{part}_l{index}{suffix}") for part in ("ih", "hh")) if layer.bias else 0
            h, steps = hx[len(last)], {}
            for t in reversed(range(len(input))) if suffix else range(len(input)):
                steps[t] = h = f(input[t] @ w.T + u * h + b)
            last.append(h)
            directions.append(torch.stack([steps[t] for t in sorted(steps)]))
        input = torch.cat(directions, -1)
    return input, torch.stack(last)


@each_nonlinearity
@each_backend
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_of_the_paper(nonlinearity: str, backend: str, bias: bool, device: str) -> None:
    layer = rnnfast.IndRNN(4, 7, 3, nonlinearity, bias, bidirectional=True, device=device, dtype=torch.float64)
    layer.backend = backend
    input = torch.randn(9, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(6, 3, 7, device=device, dtype=torch.float64, requires_grad=True)
    sides = []
    for run in (layer, lambda *arguments: by_definition(layer, *arguments)):
        output, h_n = run(input, hx)
        loss = output.sin().sum() + h_n.cos().sum()
        sides.append([output, h_n, *torch.autograd.grad(loss, [input, hx, *layer.parameters()])])
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-10, atol=1e-11)


def test_parameters() -> None:
    layer = rnnfast.IndRNN(3, 500, num_layers=2, bidirectional=True)
    assert isinstance(layer, nn.RNNBase)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert list(shapes) == [name for name, _ in nn.RNN(3, 500, 2, bidirectional=True).named_parameters()]
    assert shapes["weight_ih_l1"] == (500, 1000)
    assert shapes["bias_hh_l1_reverse"] == (500,)
    for name, parameter in layer.named_parameters():
        low, high = (0.0, 1.0) if name.startswith("weight_hh") else (-(500**-0.5), 500**-0.5)
        assert low <= parameter.min() < low + 0.05 * (high - low), name
        assert high - 0.05 * (high - low) < parameter.max() <= high, name
        if name.startswith("weight_hh"):
            assert parameter.shape == (500,)
    before = layer.weight_hh_l0.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight_hh_l0, before)
    assert 0 <= layer.weight_hh_l0.min() < layer.weight_hh_l0.max() <= 1


def test_units_do_not_see_each_other(device: str) -> None:
    layer = rnnfast.IndRNN(2, 5, nonlinearity="tanh", device=device, dtype=torch.float64)
    input = torch.randn(4, 1, 2, device=device, dtype=torch.float64)
    h0 = torch.randn(1, 1, 5, device=device, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda h: layer(input, h)[1], h0).view(5, 5)
    assert jacobian.diagonal().abs().min() > 0
    assert torch.equal(jacobian, jacobian.diagonal().diag())


@each_nonlinearity
def test_forms_of_input(nonlinearity: str, device: str) -> None:
    """Packed, with lengths, unbatched and in pieces it is the same layer."""
    layer = rnnfast.IndRNN(3, 20, 2, nonlinearity, batch_first=True, device=device, dtype=torch.float64)
    x = torch.randn(3, 6, 3, device=device, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4])
    packed, h_packed = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    padded, h_padded, states = layer(x, lengths=lengths.to(device), return_states=True)
    torch.testing.assert_close(h_packed, h_padded)
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    torch.testing.assert_close(unpacked, padded)
    torch.testing.assert_close(states.h[1], padded)
    for row, length in enumerate(lengths.tolist()):
        alone, h_alone = layer(x[row, :length])
        torch.testing.assert_close(alone, padded[row, :length])
        torch.testing.assert_close(h_alone, h_padded[:, row])
    first, h = layer(x[:, :4])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 4:], h)[0]], 1), layer(x)[0])


@pytest.mark.parametrize("shape", [(40, 1, 96, 4096), (12, 40, 64, 128), (6, 3, 20, 2070)], ids=str)
def test_equal_bits_on_any_number_of_threads(shape: tuple[int, int, int, int]) -> None:
    """Sizes for which the engine divides the units, without waiting at a step, and the rows."""
    steps, batch, inputs, hidden = shape
    layer = rnnfast.IndRNN(inputs, hidden, nonlinearity="tanh", recurrent_dropout=0.2, zoneout=0.1)
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        output, h_n = layer(x, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *layer.parameters()])
        results.append([output, h_n, *grads])
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_long_sums_of_the_weight_gradient(device: str) -> None:
    """Over 10000 rows float32 loses no more than a pairwise sum."""
    layer = rnnfast.IndRNN(4, 24, nonlinearity="tanh", device=device)
    double = copy.deepcopy(layer).double()
    x = torch.randn(500, 20, 4, device=device)
    grads = []
    for run, input in ((layer, x), (double, x.double())):
        (grad,) = torch.autograd.grad(run(input)[0].sum(), run.weight_hh_l0)
        grads.append(grad.double())
    assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[1].norm()


def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"^nonlinearity: expected one of 'relu', 'tanh', got 'sigmoid'$"):
        rnnfast.IndRNN(2, 3, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match=r"^proj_size: expected 0"):
        rnnfast.IndRNN(2, 3, proj_size=2)
    (_, x, h0, _, weights), _ = Sample("indrnn_relu", hidden_size=6).arguments()
    with pytest.raises(ValueError, match=r"^num_heads: expected 1 for a diagonal cell.* got 2$"):
        functional.recurrent("indrnn_relu", x, None, [weights], num_heads=2)
    matrix = [weights[0], torch.zeros(6, 6, dtype=torch.float64), *weights[2:]]
    with pytest.raises(RuntimeError, match=r"weights: expected w_hh .* for a diagonal cell"):
        reference.layer("indrnn_relu", x, h0, None, matrix)
    projected = [*weights, torch.zeros(2, 6, dtype=torch.float64)]
    with pytest.raises(RuntimeError, match=r"weights: expected w_hh .* and no projection"):
        reference.layer("indrnn_relu", x, h0, None, projected)


@pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no operators")
def test_what_the_operator_does_not_take() -> None:
    (_, x, h0, _, weights), _ = Sample("indrnn_relu", hidden_size=6).arguments()
    operator = torch.ops.rnnfast.indrnn_relu.default
    for w_hh, message in (
        (torch.zeros(6, 6), r"w_hh \[6, 6\], they take \[1\*H, I\] and \[1\*H\]"),
        (torch.zeros(5), r"w_hh has shape \[5\], it takes \[G\*H\] = \[6\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(x, h0, None, [weights[0], w_hh.double(), *weights[2:]], None, None, None, 0)
    with pytest.raises(RuntimeError, match="a projection is for cells with two states and a matrix w_hh"):
        operator(x, h0, None, [*weights, torch.zeros(2, 6, dtype=torch.float64)], None, None, None, 0)


def test_a_layer_as_the_others() -> None:
    layer = rnnfast.IndRNN(3, 4, num_layers=2, nonlinearity="tanh", zoneout=0.1)
    assert repr(layer) == "IndRNN(3, 4, num_layers=2, zoneout=0.1, nonlinearity=tanh)"
    assert repr(rnnfast.IndRNN(3, 4)) == "IndRNN(3, 4)"
    x = torch.randn(5, 2, 3)
    layer.eval()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(flatten(copied(x)), flatten(layer(x)))
    twin = rnnfast.IndRNN(3, 4, num_layers=2, nonlinearity="tanh", zoneout=0.1).eval()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(flatten(twin(x)), flatten(layer(x)))
    with pytest.raises(ValueError, match=r"got rnn with an independent recurrence$"):
        rnnfast.to_torch(nn.ModuleDict({"rnn": layer, "gru": rnnfast.GRU(2, 3)}))


def test_it_compiles_in_one_graph() -> None:
    layer = rnnfast.IndRNN(3, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    sides = []
    for run in (layer, compiled):
        output, h_n = run(x)
        sides.append([output, *torch.autograd.grad(output.sum() + h_n.sum(), list(layer.parameters()))])
    torch.testing.assert_close(sides[0], sides[1])


@pytest.mark.skipif(ops.extension is None, reason="the plan is in the extension")
def test_explain_says_why_it_runs_stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.extension is not None
    device = {"capability": 90, "multiprocessors": 132, "shared_bytes": 232448, "registers": 65536}
    extension = SimpleNamespace(
        build_info=lambda: {"no_cuda_reason": ""},
        cuda_device=lambda _index: {**device, "cooperative": True, "clusters": [8] * 16},
        tf32_allowed=lambda: False,
        plan=ops.extension.plan,
        cuda_engines=ops.extension.cuda_engines,
    )
    monkeypatch.setattr(ops, "extension", extension)
    layer = rnnfast.IndRNN(3, 4)
    with FakeTensorMode():
        layer.weight_ih_l0 = nn.Parameter(torch.empty(4, 3, device="cuda"))
    (explained,) = rnnfast.explain(layer).layers
    assert explained.engine == "cuda stepwise"
    assert explained.reason.startswith("persistent_cta: it has no kernels for this cell; ")
