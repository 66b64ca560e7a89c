"""Times what rnnfast's layers do beyond torch.nn's against themselves without it, and weighs training memory.

    python benchmarks/sequences.py                      every shape and cell on one thread and on all, some minutes
    python benchmarks/sequences.py --only rl_small --cell lstm --json FILE

A ratio is the time with by the time without, both measured in turns in one process: 1.10 is 10 % more. "resets" sets
3 % of the mask; "lengths" fills half of the padded steps; "states" returns every layer's states. Memory is the most
that torch's allocator had given out at once in one training step, beyond what it had before: with the gates kept,
with them computed again, and with torch.nn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import clock, peak_memory
from run import commit, duration, machine
from shapes import BY_NAME, CELLS, Shape
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import rnnfast

SHAPES = ("char_lm_batch", "rl_small", "rl_sim_long", "hydrology", "b32_t50_h64", "b32_t100_h256", "diarization")
# Of each feature, the ratio that it must not pass: on the CPU and on CUDA.
LIMITS = {"resets": (1.10, 1.10), "lengths": (1.00, 1.15), "states": (1.05, 1.05)}


@dataclass(frozen=True)
class Case:
    shape: Shape
    cell: str
    training: bool
    device: str
    threads: int


class Layer:
    """One case's module and input, and the calls that are measured."""

    def __init__(self, case: Case, library: Any = rnnfast, **options: Any) -> None:
        shape, self.training = case.shape, case.training
        torch.manual_seed(0)
        self.module: nn.Module = getattr(library, {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[case.cell])(
            shape.input_size,
            shape.hidden_size,
            shape.layers,
            bidirectional=shape.directions == 2,
            device=case.device,
            **options,
        )
        self.input = torch.randn(shape.steps, shape.batch, shape.input_size, device=case.device)
        self.input.requires_grad_(self.training)
        width = shape.hidden_size * shape.directions
        self.grad_output = torch.randn(shape.steps, shape.batch, width, device=case.device)

    def run(self, **arguments: Any) -> None:
        if not self.training:
            with torch.no_grad():
                self.module(self.input, **arguments)
            return
        output = self.module(self.input, **arguments)[0]
        torch.autograd.grad(output, [self.input, *self.module.parameters()], self.grad_output)


def features(case: Case) -> dict[str, dict[str, Tensor | bool]]:
    """The arguments of each feature."""
    steps, batch = case.shape.steps, case.shape.batch
    generator = torch.Generator().manual_seed(0)
    half = torch.linspace(0, steps, batch).round().long()[torch.randperm(batch, generator=generator)]
    return {
        "resets": {"reset": (torch.rand(steps, batch, generator=generator) < 0.03).to(case.device)},
        "lengths": {"lengths": half.to(case.device)},
        "states": {"return_states": True},
    }


def ratio_of(case: Case, arguments: dict[str, Any], budget: float) -> dict[str, Any]:
    """Seconds without and with ``arguments``, medians of samples taken in turns for ``budget`` seconds."""
    torch.set_num_threads(case.threads)
    layer, measure = Layer(case), clock(case.device)
    sides: dict[str, Callable[[], None]] = {"without": layer.run, "with": lambda: layer.run(**arguments)}
    for run in sides.values():
        run()
    repeats = max(1, int(1e-3 / max(measure(layer.run, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    start, order = time.perf_counter(), list(sides)
    while len(samples["with"]) < 3 or (time.perf_counter() - start < budget and len(samples["with"]) < 200):
        for name in order:
            samples[name].append(measure(sides[name], repeats))
        order.reverse()
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return {"seconds": seconds, "ratio": seconds["with"] / seconds["without"], "samples": samples}


def peak_memory_on_cpu(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator gave out at the height of one call, beyond what it had given before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda change: change[0])
    total = peak = 0
    for _, change in changes:
        total += change["Bytes"]
        peak = max(peak, total)
    return peak


def memory_of(case: Case) -> dict[str, int]:
    torch.set_num_threads(case.threads)
    layers = {"gates": Layer(case), "recompute": Layer(case, recompute=True), "torch.nn": Layer(case, nn)}
    peak = peak_memory if case.device == "cuda" else peak_memory_on_cpu
    for layer in layers.values():
        layer.run()
    return {name: peak(layer.run) for name, layer in layers.items()}


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}), help="on the CPU")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for the samples of one ratio (default: 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda":
        args.threads = [1]
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU")
    return args


def main() -> None:
    args = parse_arguments()
    cases = [
        Case(BY_NAME[name], cell, training, args.device, threads)
        for threads in args.threads
        for name in args.only
        for cell in args.cell
        for training in (False, True)
    ]
    rows, lines, memory_lines, over = [], [], [], 0
    for case in tqdm(cases, unit="case", dynamic_ncols=True):
        mode = "training" if case.training else "forward"
        row: dict[str, Any] = {"shape": case.shape.name, "cell": case.cell, "mode": mode, "threads": case.threads}
        line = [case.shape.name, case.cell, mode, str(case.threads)]
        for name, arguments in features(case).items():
            row[name] = ratio_of(case, arguments, args.budget)
            misses = row[name]["ratio"] > LIMITS[name][args.device == "cuda"]
            over += misses
            line += [f"{row[name]['ratio']:.3f}{' OVER' if misses else '     '}"]
        line.insert(4, duration(row["resets"]["seconds"]["without"]))
        lines.append(line)
        if case.training and case.threads == args.threads[-1]:
            row["peak_bytes"] = memory_of(case)
            megabytes = [f"{size / 2**20:.2f}" for size in row["peak_bytes"].values()]
            memory_lines.append([case.shape.name, case.cell, *megabytes])
        rows.append(row)

    limits = [f"{name}\n<= {limit[args.device == 'cuda']:.2f}" for name, limit in LIMITS.items()]
    print(tabulate(lines, ["shape", "cell", "mode", "threads", "without", *limits], disable_numparse=True))
    print(f"{over} of {len(lines) * len(LIMITS)} ratios are over their limit\n\nPeak memory of a training step, MiB")
    print(tabulate(memory_lines, ["shape", "cell", "gates kept", "recompute", "torch.nn"], disable_numparse=True))
    if args.json:
        results = {
            "commit": commit(),
            "machine": machine(args.device),
            "versions": {"torch": torch.__version__, "rnnfast": rnnfast.__version__},
            "limits": LIMITS,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
