"""Times the first training step of a model under torch.compile: tracing, inductor, the C++ compiler, with empty caches.

    python benchmarks/compilation.py

The model is a recurrent layer on two levels, H = 128, between two linear layers; one graph (fullgraph=True), T = 100,
B = 16. What torch.compile takes by itself shows with a linear layer in the recurrent one's place.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
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


def measure(name: str) -> tuple[float, float, float]:
    """Seconds of the first compiled step, of later ones, and of an eager one."""
    model, input = Model(name), torch.randn(100, 16, 32)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        compiled = torch.compile(model, fullgraph=True)
        first = step(compiled, input)
        times = [(step(compiled, input), step(model, input)) for _ in range(20)]
    later, eager = (statistics.median(side) for side in zip(*times, strict=True))
    return first, later, eager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, default="LSTM")
    args = parser.parse_args()
    # A process for each: torch.compile keeps in memory what it found out about the compiler.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        linear, recurrent = pool.map(measure, ("Linear", args.layer), chunksize=1)
    print(
        f"{args.layer}, 2 layers, {torch.get_num_threads()} threads: first compiled training step {recurrent[0]:.1f} s "
        f"(a linear layer in its place {linear[0]:.1f} s), later ones {1e3 * recurrent[1]:.1f} ms, "
        f"eager {1e3 * recurrent[2]:.1f} ms"
    )


if __name__ == "__main__":
    main()
