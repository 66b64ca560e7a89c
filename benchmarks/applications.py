"""Times the applications' trainings, each update from its batch to the optimizer, with rnnfast and torch.nn in turns.

    python benchmarks/applications.py                       the data that needs no file, about 5 minutes on 2 cores
    python benchmarks/applications.py --only news --news TRAIN.csv TEST.csv --json FILE
    python benchmarks/plot.py FILE picture.png

Both sides start from the same weights, and their losses over the first updates are compared before anything is timed. A
time is that of an epoch, scaled from the median of the slices measured; evaluation is not part of it. A ratio is
torch.nn's time by rnnfast's. The rows are those of run.py: compare.py and plot.py take them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from measure import Mismatch, allow_tf32, clock
from run import commit, results_of, verdict, write
from shapes import CELLS
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

# The option that takes an application's files, their arguments there, and what else it is run with.
APPLICATIONS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "char_lm": (("--text",), ["--hidden", "128"]),
    "news": (("--train", "--test"), ["--rows", "packed"]),
    "names": (("--data",), []),
    "forecast": (("--data",), ["--horizon", "3"]),
}
CHECKED_UPDATES = 10
TOLERANCE = 1e-3  # of the mean loss over the checked updates, relative
SLICE_UPDATES = 5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--threads", nargs="+", type=int, help="on the CPU; default: 1 and the number of cores")
    parser.add_argument("--only", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS), metavar="NAME")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for the samples of a row; default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results, in place of the same rows")
    for name, (options, _) in APPLICATIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs=len(options), metavar="FILE", help=f"data of {name}")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.threads is None or args.device == "cuda":
        args.threads = [1] if args.device == "cuda" else sorted({1, cores})
    return args


def prepare(name: str, cell: str, device: str, files: list[str] | None) -> tuple[dict[str, Any], int]:
    """The application's runs, by library, and the updates of an epoch."""
    module = importlib.import_module(name)
    options, arguments = APPLICATIONS[name]
    for option, file in zip(options, files or (), strict=False):  # all of them, or none
        arguments = [*arguments, option, file]
    cell = "rnn_tanh" if (name, cell) == ("char_lm", "rnn") else cell
    with contextlib.redirect_stdout(io.StringIO()):
        args = module.parse_arguments([*arguments, "--cell", cell, "--device", device, "--compare"])
        runs: dict[str, Any] = module.prepare(args)[0]
    return runs, runs["rnnfast"].total // args.epochs


def check(runs: dict[str, Any]) -> dict[str, float]:
    """The mean loss of each over the first updates; raises Mismatch where they differ."""
    for run in runs.values():
        run.advance(CHECKED_UPDATES)
    losses = {name: run.measured()["loss"] for name, run in runs.items()}
    if not math.isclose(losses["rnnfast"], losses["torch.nn"], rel_tol=TOLERANCE):
        raise Mismatch(f"mean losses over the first {CHECKED_UPDATES} updates: {losses}")
    return losses


def measure(name: str, cell: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one application, cell and number of threads. Raises Mismatch."""
    torch.set_num_threads(threads)
    files: list[str] | None = getattr(args, name)
    runs, epoch = prepare(name, cell, args.device, files)
    losses, seconds = check(runs), clock(args.device)
    samples: dict[str, list[float]] = {library: [] for library in runs}
    start, order = time.perf_counter(), list(runs)
    while len(samples["rnnfast"]) < 3 or time.perf_counter() - start < args.budget:
        if runs["rnnfast"].updates + SLICE_UPDATES > runs["rnnfast"].total:
            break
        for library in order:
            run = runs[library]
            samples[library].append(seconds(lambda run=run: run.advance(run.updates + SLICE_UPDATES), 1))
        order.reverse()

    ours = runs["rnnfast"]
    epochs = {library: [sample / SLICE_UPDATES * epoch for sample in values] for library, values in samples.items()}
    medians = {library: statistics.median(values) for library, values in epochs.items()}
    data = ", ".join(Path(file).name for file in files or ()) or "no file"
    return {
        "key": f"{name} ({data}) {cell} training float32 {args.device} {threads} against torch.nn",
        "shape": f"{name} ({data})",
        "cell": cell,
        "training": True,
        "dtype": "float32",
        "device": args.device,
        "threads": threads,
        "baseline": "torch.nn",
        "steps": epoch,  # updates
        "full_steps": epoch,
        "items": epoch * ours.items_per_update,
        "unit": ours.unit,
        "rnnfast_loss": losses["rnnfast"],
        "baseline_loss": losses["torch.nn"],
        "difference": abs(losses["rnnfast"] / losses["torch.nn"] - 1),
        "baseline_samples": epochs["torch.nn"],
        "rnnfast_samples": epochs["rnnfast"],
        "baseline_seconds": medians["torch.nn"],
        "rnnfast_seconds": medians["rnnfast"],
        "ratio": medians["torch.nn"] / medians["rnnfast"],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            row["shape"],
            row["cell"],
            row["threads"],
            f"{row['rnnfast_loss']:.4f}",
            f"{row['baseline_loss']:.4f}",
            f"{row['rnnfast_seconds']:.2f}",
            f"{row['baseline_seconds']:.2f}",
            f"{row['items'] / row['rnnfast_seconds']:,.0f} {row['unit']}/s",
            verdict(row["ratio"]),
        ]
        for row in rows
    ]
    headers = ["application", "cell", "threads", "loss\nrnnfast", "\ntorch.nn", "s/epoch\nrnnfast", "\ntorch.nn"]
    print(tabulate(lines, [*headers, "\nrnnfast", "ratio"], disable_numparse=True, stralign="right"))


def main() -> None:
    args = parse_arguments()
    results = results_of(args)
    rows = {row["key"]: row for row in results["rows"]}
    todo = [(threads, name, cell) for threads in args.threads for name in args.only for cell in args.cell]
    measured, mismatches, measured_commit = [], [], commit()
    if args.device == "cuda":
        allow_tf32(False)  # torch.nn's layers have it on, rnnfast's off, and both are to train alike
    with tqdm(todo, unit="case", dynamic_ncols=True) as bar:
        for threads, name, cell in bar:
            bar.set_postfix_str(f"{name} {cell}, threads: {threads}", refresh=False)
            try:
                row = measure(name, cell, threads, args)
            except Mismatch as error:
                mismatches.append(f"{name} {cell}: {error}")
                continue
            row |= {"commit": measured_commit, "measured": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            measured.append(row)
            rows[row["key"]] = row
            results["rows"] = list(rows.values())
            if args.json:
                write(args.json, results)
    print_table(measured)
    if mismatches:
        raise SystemExit("\nWRONG RESULTS, not timed:\n" + "\n".join(mismatches))


if __name__ == "__main__":
    main()
