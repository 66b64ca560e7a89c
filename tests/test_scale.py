"""Many processes, workers and threads; training that saves memory; checkpoints; mixed precision."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from sample_inputs import flatten
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import rnnfast

LAYERS = ("RNN", "LSTM", "GRU")
each_layer = pytest.mark.parametrize("name", LAYERS)
PROCESSES, BATCH, STEPS = 2, 4, 6


class Model(nn.Module):
    """Every kind of layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([rnnfast.RNN(5, 8), rnnfast.LSTM(8, 8, bidirectional=True), rnnfast.GRU(16, 8, 2)])
        self.last = nn.Linear(8, 1)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = layer(input)[0]
        return self.last(input)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        yield torch.randn(STEPS, BATCH * PROCESSES, 5, generator=generator)


def train(model: nn.Module, mine: Callable[[Tensor], Tensor], mean: Callable[[Tensor], Tensor]) -> list[float]:
    """Losses of a few steps: ``mine`` takes a process's part of a batch, ``mean`` is over all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = (model(mine(batch)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(mean(loss.detach())))
    return losses


# ---------------------------------------------------------------------------------------------------- processes
def a_process(rank: int, store: str, wrap: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model: nn.Module = Model()
    if wrap == "DistributedDataParallel":
        model = DistributedDataParallel(model)
    else:
        # Sums in the order of one process: gradients are reduced in float32, which is the parameters' dtype, too.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def mine(batch: Tensor) -> Tensor:
        return batch[:, rank * BATCH : (rank + 1) * BATCH]

    def mean(loss: Tensor) -> Tensor:
        dist.all_reduce(loss)
        return loss / PROCESSES

    losses = train(model, mine, mean)
    if rank == 0:
        results.extend(losses)
    dist.barrier()
    # Without clean-up: the destructor of gloo's process group waits for a thread that may wait for Python's lock, which
    # whoever destroys it holds.
    os._exit(0)


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_as_one(wrap: str, tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.list()
        torch.multiprocessing.spawn(a_process, (str(tmp_path / "store"), wrap, results), nprocs=PROCESSES)
        losses = list(results)
    torch.manual_seed(0)
    expected = train(Model(), lambda batch: batch, lambda loss: loss)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


class Windows(Dataset[Tensor]):
    """Data that a layer makes, as feature extractors do in workers."""

    def __init__(self) -> None:
        self.layer = rnnfast.GRU(5, 8)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            return self.layer(torch.randn(STEPS, 5, generator=generator))[0]


def test_workers_of_a_data_loader() -> None:
    """Forked after the parent has run layers on all of its threads."""
    rnnfast.GRU(128, 128)(torch.randn(50, 32, 128))
    data = Windows()
    rows = [
        row for batch in DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork") for row in batch
    ]
    torch.testing.assert_close(rows, [data[index] for index in range(len(data))], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ threads
@each_layer
def test_threads_call_one_module(name: str, device: str) -> None:
    """At once, forward and backward: every thread has the gradient of its own input."""
    module = getattr(rnnfast, name)(5, 32, 2, bidirectional=True, device=device)
    inputs = [torch.randn(STEPS, 1 + index % 3, 5, device=device) for index in range(24)]

    def run(input: Tensor) -> list[Tensor]:
        input = input.clone().requires_grad_()
        output = module(input)[0]
        return [output, *torch.autograd.grad(output.square().sum(), [input, *module.parameters()])]

    expected = [run(input) for input in inputs]
    with ThreadPoolExecutor(8) as pool:
        torch.testing.assert_close(list(pool.map(run, inputs)), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- memory
@each_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(name: str, use_reentrant: bool, device: str) -> None:
    """The layer runs again in backward, with the dropout it had."""
    module = getattr(rnnfast, name)(5, 8, 2, dropout=0.5, device=device)
    input = torch.randn(STEPS, BATCH, 5, device=device, requires_grad=True)

    def gradients(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        output = run(input)
        module.zero_grad()
        input.grad = None
        output.square().sum().backward()
        return (output, *(leaf.grad.clone() for leaf in (input, *module.parameters())))

    got = gradients(lambda x: checkpoint(lambda y: module(y)[0], x, use_reentrant=use_reentrant))
    torch.testing.assert_close(got, gradients(lambda x: module(x)[0]), rtol=0, atol=0)


@each_layer
def test_optimizer_in_backward(name: str, device: str) -> None:
    """Each parameter is stepped as soon as it has its gradient, which is then dropped."""
    torch.manual_seed(0)
    usual, stepped = (getattr(rnnfast, name)(5, 8, 2, device=device) for _ in range(2))
    stepped.load_state_dict(usual.state_dict())
    input = torch.randn(STEPS, BATCH, 5, device=device)
    optimizer = torch.optim.SGD(usual.parameters(), lr=0.1)
    usual(input)[0].square().sum().backward()
    optimizer.step()

    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in stepped.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in stepped.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    stepped(input)[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in stepped.parameters())
    torch.testing.assert_close(list(stepped.parameters()), list(usual.parameters()), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- checkpoints
@each_layer
def test_saved_and_loaded(name: str, tmp_path: Path, device: str) -> None:
    """torch.save of module and state_dict, and safetensors; into ours and into torch.nn's."""
    module = getattr(rnnfast, name)(5, 8, 2, bidirectional=True, device=device)
    input = torch.randn(STEPS, BATCH, 5, device=device)
    expected = flatten(module(input))
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    safetensors.torch.save_model(module, str(tmp_path / "model.safetensors"))

    whole = torch.load(tmp_path / "module.pt", weights_only=False)
    torch.testing.assert_close(flatten(whole(input)), expected, rtol=0, atol=0)
    for package in (rnnfast, nn):
        for load in (
            lambda other: other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)),
            lambda other: safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"), device=device),
        ):
            other = getattr(package, name)(5, 8, 2, bidirectional=True, device=device)
            load(other)
            torch.testing.assert_close(list(other.parameters()), list(module.parameters()), rtol=0, atol=0)
            torch.testing.assert_close(flatten(other(input)), expected)


# ---------------------------------------------------------------------------------------------- mixed precision
@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_training(name: str, dtype: torch.dtype, device: str) -> None:
    """Float32 master weights, autocast and a GradScaler: the losses fall as in float32, and gradients are float32."""
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([getattr(rnnfast, name)(5, 16, device=device), nn.Linear(16, 1, device=device)])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler(device, enabled=enabled and dtype == torch.float16, init_scale=2.0**8)
        input = torch.randn(STEPS, BATCH, 5, device=device)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=enabled):
                output = model[1](model[0](input)[0])
            loss = (output.float() - input[..., :1]).square().mean()
            scaler.scale(loss).backward()
            assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_gradscaler_skips_a_step_that_overflows(device: str) -> None:
    """Infinite gradients in float16 are seen by the scaler and leave the weights alone."""
    module = rnnfast.LSTM(5, 8, device=device)
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    with torch.autocast(device, torch.float16):
        output = module(torch.randn(STEPS, BATCH, 5, device=device))[0]
    scaler.scale(output.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**24
    torch.testing.assert_close(list(module.parameters()), before, rtol=0, atol=0)
