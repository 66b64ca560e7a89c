"""explain names the engine of every layer, and why it is not a faster one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from rnnfast import ops


@pytest.fixture
def model(device: str) -> nn.Module:
    parts = {"encoder": rnnfast.LSTM(3, 4, num_layers=2), "head": nn.Linear(4, 2), "cell": rnnfast.GRUCell(2, 2)}
    return nn.ModuleDict(parts).to(device)


def test_reference_and_its_cause(model: nn.Module) -> None:
    with rnnfast.backend("reference"):
        layers = rnnfast.explain(model).layers
    assert [layer.name for layer in layers] == ["encoder (LSTM) layer 0", "encoder (LSTM) layer 1", "cell (GRUCell)"]
    assert {(layer.engine, layer.reason) for layer in layers} == {("reference", "backend 'reference' was chosen")}


def test_a_module_s_own_backend_counts() -> None:
    explanation = rnnfast.explain(rnnfast.GRU(3, 4, backend="reference"), torch.zeros(5, 2, 3))
    assert str(explanation) == "GRU layer 0: reference (backend 'reference' was chosen)"


@pytest.mark.skipif(ops.extension is None, reason="the extension is not built, so there are no instruction sets")
def test_instruction_set_that_runs_the_layer_s_dtype() -> None:
    """avx512_bf16 is compiled for bfloat16 alone."""
    before = ops.extension.instruction_set()
    try:
        for name in ops.extension.instruction_sets():
            ops.extension.set_instruction_set(name)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                runs = name if dtype == torch.bfloat16 else name.removesuffix("_bf16")
                assert str(rnnfast.explain(rnnfast.GRU(3, 4, dtype=dtype))) == f"GRU layer 0: cpu ({runs})"
    finally:
        ops.extension.set_instruction_set(before)


def test_operators(model: nn.Module, device: str) -> None:
    engine = rnnfast.explain(model).layers[0].engine
    with ops.backend("auto"):
        active, _ = ops.active_backend()
    if active == "reference":
        assert engine == "reference"
    else:
        assert engine.startswith(device)
        assert engine != device  # the instruction set, or the engine's name


def test_without_an_extension(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "extension", None)
    monkeypatch.setattr(ops, "extension_error", "the extension rnnfast._C was not built: no compiler")
    assert (
        str(rnnfast.explain(model["cell"]))
        == "GRUCell: reference (the extension rnnfast._C was not built: no compiler)"
    )


def on_cuda(module: nn.Module) -> nn.Module:
    """No GPU is needed: fake tensors have any device."""
    name, weight = next(module.named_parameters())
    with FakeTensorMode():
        setattr(module, name, nn.Parameter(torch.empty(weight.shape, device="cuda", dtype=torch.bfloat16)))
    return module


def lstm_on_cuda(hidden_size: int, **options: Any) -> nn.Module:
    return on_cuda(rnnfast.LSTM(3, hidden_size, **options))


def test_cuda_needs_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "extension", SimpleNamespace(build_info=lambda: {"no_cuda_reason": "no nvcc was found"}))
    cause = "a call would raise: the extension rnnfast._C was built without CUDA kernels: no nvcc was found"
    assert str(rnnfast.explain(lstm_on_cuda(4))) == f"LSTM layer 0: none ({cause})"


@pytest.mark.skipif(ops.extension is None, reason="the plan is in the extension")
def test_cuda_engines_and_what_speaks_against_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.extension is not None
    hopper = {"capability": 90, "multiprocessors": 132, "shared_bytes": 232448, "registers": 65536}
    extension = SimpleNamespace(
        build_info=lambda: {"no_cuda_reason": ""},
        cuda_device=lambda _index: {**hopper, "cooperative": True, "clusters": [8] * 16},
        tf32_allowed=lambda: False,
        plan=ops.extension.plan,
        cuda_engines=ops.extension.cuda_engines,
    )
    monkeypatch.setattr(ops, "extension", extension)
    assert str(rnnfast.explain(lstm_on_cuda(4))) == "LSTM layer 0: cuda persistent_cta"
    (layer,) = rnnfast.explain(lstm_on_cuda(4, proj_size=2), torch.empty(5, 3, 3)).layers
    assert layer.engine == "cuda stepwise"
    assert layer.reason.startswith("persistent_cta: it has no projections (proj_size)")
    assert layer.reason.count("persistent_cta") == 1  # forward and backward say the same
    for num_heads, engine in ((1, "cuda persistent_cluster"), (8, "cuda persistent_cta, 8 heads in 4 calls")):
        (layer,) = rnnfast.explain(lstm_on_cuda(256, num_heads=num_heads)).layers
        assert layer.engine == engine
    for option in ("recurrent_dropout", "zoneout"):
        module = lstm_on_cuda(4, **{option: 0.5})
        (layer,) = rnnfast.explain(module).layers
        assert layer.engine == "cuda stepwise"
        assert layer.reason.startswith("persistent_cta: it has no recurrent dropout or zoneout")
        (layer,) = rnnfast.explain(module.eval()).layers
        assert (layer.engine == "cuda persistent_cta") == (option == "recurrent_dropout")
    for option, value, reason in (
        ("zoneout", 0.5, "persistent_cta: it has no recurrent dropout or zoneout"),
        ("layer_norm", True, "persistent_cta: it has no layer normalisation"),
        ("layer_norm", False, ""),
    ):
        (layer,) = rnnfast.explain(on_cuda(rnnfast.LSTMCell(3, 4, **{option: value}))).layers
        assert layer.engine == ("cuda stepwise" if reason else "cuda persistent_cta")
        assert layer.reason.startswith(reason)


def test_heads_and_their_calls() -> None:
    with rnnfast.backend("reference"):
        for module, expected in (
            (rnnfast.LSTM(3, 64, num_heads=4), ", 4 heads in one call"),
            (rnnfast.LSTM(3, 256, num_heads=8), ", 8 heads in 4 calls"),
            (rnnfast.LSTM(3, 64, num_heads=4, zoneout=0.1), ", 4 heads in one call"),
            (rnnfast.RNN(3, 64, nonlinearity="relu", num_heads=4), ", 4 heads in 4 calls"),
            (rnnfast.LSTM(3, 64), ""),
        ):
            (layer,) = rnnfast.explain(module).layers
            assert layer.engine == f"reference{expected}"


def test_other_devices_have_no_engine() -> None:
    layer = rnnfast.explain(rnnfast.LSTM(3, 4, device="meta")).layers[0]
    expected = ("none", "there are no kernels for meta")
    assert (layer.engine, layer.reason) == (expected if ops.extension else ("reference", ops.extension_error))


@pytest.mark.skipif(ops.extension is None, reason="the reference formula takes what torch does")
def test_a_dtype_without_kernels() -> None:
    layer = rnnfast.LSTM(3, 4, dtype=torch.complex64)
    (account,) = rnnfast.explain(layer).layers
    assert account.engine == "none"
    assert account.reason == "a call would raise: there are no kernels for torch.complex64"
    with pytest.raises(ValueError, match="dtype"):
        layer(torch.randn(2, 1, 3, dtype=torch.complex64))
    assert all(rnnfast.explain(rnnfast.LSTM(3, 4, dtype=dtype)).layers[0].engine != "none" for dtype in ops.DTYPES)


def test_torchs_layers_are_named() -> None:
    class Mine(nn.LSTM):
        pass

    model = nn.ModuleDict(
        {"mine": Mine(2, 3), "theirs": nn.GRU(2, 3, 2), "cell": nn.LSTMCell(2, 3), "no": nn.Linear(2, 2)}
    )
    before = {layer.name: layer for layer in rnnfast.explain(model).layers}
    assert {layer.engine for layer in before.values()} == {"torch.nn"}
    assert "leaves subclasses alone" in before["mine (Mine)"].reason
    assert "rnnfast.convert makes it one" in before["theirs (GRU)"].reason
    after = rnnfast.explain(rnnfast.convert(model)).layers
    assert [layer.name for layer in after if layer.engine == "torch.nn"] == ["mine (Mine)"]
    assert {"theirs (GRU) layer 1", "cell (LSTMCell)"} < {layer.name for layer in after}


def test_nothing_to_explain() -> None:
    assert str(rnnfast.explain(nn.Linear(2, 2))) == "no recurrent layer or cell"
