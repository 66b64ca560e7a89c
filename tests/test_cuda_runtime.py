"""What only a GPU shows: captured graphs, streams, several devices. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_inputs import flatten
from torch import Tensor

import rnnfast
from rnnfast import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(ops.missing_kernels("cuda")),
    reason="there is no GPU, or no kernels for it",
)

each_layer = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])


def layer(name: str, device: str = "cuda", **options: Any) -> torch.nn.Module:
    return getattr(rnnfast, name)(12, 32, 2, bidirectional=True, device=device, **options)


def warm_up(run: Any) -> None:
    """Before a capture, on a side stream, as torch.cuda.graph asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_forward(name: str, dtype: torch.dtype) -> None:
    module = layer(name, dtype=dtype)
    input = torch.randn(7, 5, 12, device="cuda", dtype=dtype)
    lengths = torch.tensor([7, 3, 0, 5, 1], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warm_up(lambda: module(input, lengths=lengths))
        with torch.cuda.graph(graph):
            captured = flatten(module(input, lengths=lengths))
        for seed in range(3):
            torch.manual_seed(seed)
            input.copy_(torch.randn_like(input))
            lengths.copy_(torch.randint(0, 8, (5,)))
            graph.replay()
            torch.testing.assert_close(captured, flatten(module(input, lengths=lengths)), rtol=0, atol=0)


@each_layer
def test_a_captured_training_step(name: str) -> None:
    """Forward, backward and the optimizer in one graph train as the same steps without it."""
    torch.manual_seed(0)
    data = torch.randn(6, 7, 5, 12, device="cuda")

    def train(captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = layer(name)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        input = torch.zeros_like(data[0])

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            module(input)[0].square().mean().backward()
            optimizer.step()

        initial = [parameter.detach().clone() for parameter in module.parameters()]
        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), initial, strict=True):
                parameter.copy_(value)
        for batch in data:
            input.copy_(batch)
            graph.replay() if captured else step()
        return [parameter.detach() for parameter in module.parameters()]

    torch.testing.assert_close(train(captured=True), train(captured=False), rtol=0, atol=0)


@each_layer
def test_streams(name: str) -> None:
    """Work is enqueued on the current stream: it waits for what that stream waits for, and for nothing else."""
    module = layer(name)
    input = torch.randn(7, 5, 12, device="cuda")
    expected = flatten(module(input))
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            late = torch.empty_like(input)
            torch.cuda._sleep(10_000_000)  # a layer on another stream would read `late` before it is written
            late.copy_(input)
            results.append(flatten(module(late)))
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@each_layer
def test_pinned_lengths_may_be_filled_again(name: str) -> None:
    """A call has read them when it returns, before the stream comes to it; a graph would read them at each replay."""
    module = layer(name)
    input = torch.randn(7, 5, 12, device="cuda")
    lengths = torch.tensor([7, 3, 0, 5, 1])
    pinned = lengths.pin_memory()
    with torch.no_grad():
        expected = flatten(module(input, lengths=lengths))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        got = flatten(module(input, lengths=pinned))
        pinned.fill_(1 << 40)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

        pinned.copy_(lengths)
        with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(input, lengths=pinned)


@each_layer
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    module = layer(name, device="cuda:1")
    input = torch.randn(7, 5, 12, device="cuda:1", requires_grad=True)
    assert torch.cuda.current_device() == 0
    output = module(input)[0]
    output.sum().backward()
    assert output.device == input.grad.device == torch.device("cuda:1")
    expected = module.to("cuda:0")(input.detach().to("cuda:0"))[0]
    torch.testing.assert_close(output.to("cuda:0"), expected)
