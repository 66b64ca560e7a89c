"""Times layers that change something inside the recurrence against the plain layer.

    python benchmarks/variants.py                      every shape and cell, about two minutes
    python benchmarks/variants.py --only b32_t100_h256 --cell lstm --json FILE

A ratio is the variant's time by the plain layer's, both measured in turns in one process: 1.10 is 10 % more. In
training both take gradients of the input and of all weights. Each sample comes behind a call of the same layer, as in
a training loop: the first call behind another layer's takes up to 15 % longer. None may pass 1.5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import clock
from run import commit, duration, machine
from sequences import Case, Layer
from shapes import BY_NAME, CELLS, Shape
from tabulate import tabulate
from tqdm import tqdm

import rnnfast

SHAPES = {
    **BY_NAME,
    "b32_t100_h128": Shape("b32_t100_h128", 100, 32, 128, 128, "what the limit is stated for"),
    "b16_t100_h16": Shape("b16_t100_h16", 100, 16, 16, 16, "so small that every instruction beside the product counts"),
}
DEFAULT = ("b32_t100_h128", "b32_t50_h64", "b32_t100_h256", "rl_small", "b16_t100_h16")
VARIANTS: dict[str, dict[str, Any]] = {
    "weight dropout": {"weight_dropout": 0.2},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "zoneout": {"zoneout": 0.1},
    "both of these": {"recurrent_dropout": 0.2, "zoneout": 0.1},
    "layer norm": {"layer_norm": True},
    "4 heads": {"num_heads": 4},
}
OF_ONE_CELL: dict[str, dict[str, dict[str, Any]]] = {
    "rnn": {"IndRNN": {"library": SimpleNamespace(RNN=rnnfast.IndRNN), "nonlinearity": "tanh"}},
    "gru": {"reset gate before": {"reset_after": False}},
}
NAMES = [*VARIANTS, *(name for variants in OF_ONE_CELL.values() for name in variants)]
LIMIT = 1.5


def variants_of(cell: str) -> dict[str, dict[str, Any]]:
    return {**VARIANTS, **OF_ONE_CELL.get(cell, {})}


def seconds_of(case: Case, budget: float) -> dict[str, float]:
    """Medians of the plain layer and of every variant, of samples taken in turns for ``budget`` seconds each."""
    torch.set_num_threads(case.threads)
    measure = clock(case.device)
    layers = {name: Layer(case, **options) for name, options in {"plain": {}, **variants_of(case.cell)}.items()}
    for layer in layers.values():
        layer.run()
    repeats = max(1, int(1e-3 / max(measure(layers["plain"].run, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in layers}
    start, order = time.perf_counter(), list(layers)
    while len(samples["plain"]) < 5 or time.perf_counter() - start < budget * len(layers):
        for name in order:
            layers[name].run()
            samples[name].append(measure(layers[name].run, repeats))
        order.reverse()
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="on the CPU (default: 1)")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=DEFAULT, metavar="NAME", help=", ".join(DEFAULT))
    parser.add_argument("--budget", type=float, default=0.4, help="seconds for the samples of one time (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    cases = [
        Case(SHAPES[name], cell, training, args.device, threads)
        for threads in args.threads
        for name in args.only
        for cell in args.cell
        for training in (False, True)
    ]
    rows, lines, over = [], [], 0
    for case in tqdm(cases, unit="case", dynamic_ncols=True):
        mode = "training" if case.training else "forward"
        seconds = seconds_of(case, args.budget)
        ratios = {name: seconds[name] / seconds["plain"] for name in variants_of(case.cell)}
        row: dict[str, Any] = {"shape": case.shape.name, "cell": case.cell, "mode": mode, "threads": case.threads}
        rows.append({**row, "seconds": seconds, "ratios": ratios})
        over += sum(ratio > LIMIT for ratio in ratios.values())
        marked = [f"{ratios[n]:.2f}{' OVER' if ratios[n] > LIMIT else '     '}" if n in ratios else "" for n in NAMES]
        lines.append([*map(str, row.values()), duration(seconds["plain"]), *marked])
    print(tabulate(lines, ["shape", "cell", "mode", "threads", "plain", *NAMES], disable_numparse=True))
    print(f"{over} of {sum(len(row['ratios']) for row in rows)} ratios are over {LIMIT}")
    if args.json:
        results = {
            "commit": commit(),
            "machine": machine(args.device),
            "versions": {"torch": torch.__version__, "rnnfast": rnnfast.__version__},
            "limit": LIMIT,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
