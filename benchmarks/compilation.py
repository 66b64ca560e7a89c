"""Times the first training step of a model under torch.compile: tracing, inductor, the C++ compiler, with empty caches.

    python benchmarks/compilation.py

The model is a recurrent layer on two levels, H = 128, between two linear layers; one graph (fullgraph=True), T = 100,
B = 16. The first compiled function of a process pays for inductor's imports, its probes of the C++ compiler and
precompiled headers, whatever it is. So the model is compiled as the first, and in another process behind a function of
two elementwise operators. What torch.compile takes by itself shows with a linear layer in the recurrent one's place.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn

import rnnfast

LAYERS = ("RNN", "LSTM", "GRU")


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.middle = getattr(rnnfast, name)(64, 128, num_layers=2) if name in LAYERS else nn.Linear(64, 128)
        self.last = nn.Linear(128, 8)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.middle(torch.relu(self.first(input)))
        result: Tensor = self.last(torch.tanh(hidden[0] if isinstance(hidden, tuple) else hidden))
        return result


def step(model: Callable[[Tensor], Tensor], input: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    model(input).square().mean().backward()
    return time.perf_counter() - start


def first_step(function: Callable[[Tensor], Tensor], input: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """The compiled function, and the seconds of its first step."""
    compiled = torch.compile(function, fullgraph=True)
    return compiled, step(compiled, input)


def small(input: Tensor) -> Tensor:
    return torch.relu(2 * input)


@dataclass(frozen=True)
class Seconds:
    small: float | None  # the first step of the small function, where that was compiled before the model
    first: float  # the model's first compiled step
    later: float  # its later ones
    eager: float


def measure(name: str, small_before: bool) -> Seconds:
    model, input = Model(name), torch.randn(100, 16, 32)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        before = first_step(small, torch.randn(8, 8, requires_grad=True))[1] if small_before else None
        compiled, first = first_step(model, input)
        times = [(step(compiled, input), step(model, input)) for _ in range(20)]
    later, eager = (statistics.median(side) for side in zip(*times, strict=True))
    return Seconds(before, first, later, eager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, default="LSTM")
    args = parser.parse_args()
    # A process for each: torch.compile keeps in memory what it found out about the compiler.
    cases = [(name, small_before) for small_before in (False, True) for name in (args.layer, "Linear")]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        recurrent, linear, recurrent_second, linear_second = pool.starmap(measure, cases, chunksize=1)
    rows = [
        ("the process's first compiled function", "", recurrent.first, linear.first),
        ("after another", recurrent_second.small, recurrent_second.first, linear_second.first),
    ]
    headers = ["seconds of the first compiled training step", "the other", f"{args.layer}, 2 layers", "a linear layer"]
    print(tabulate(rows, headers, floatfmt=".1f"))
    print(
        f"{torch.get_num_threads()} threads; later steps of the {args.layer} {1e3 * recurrent.later:.1f} ms, "
        f"eager {1e3 * recurrent.eager:.1f} ms"
    )


if __name__ == "__main__":
    main()
