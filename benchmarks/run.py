"""Times rnnfast's layers against torch.nn's, both in one process and in turns, and says where they win and lose.

    python benchmarks/run.py                                    everything, about 10 minutes on 2 cores
    python benchmarks/run.py --quick                            the smaller shapes, about a minute
    python benchmarks/run.py --only char_lm --json FILE         measured again, the rest of the file kept
    python benchmarks/run.py --resume --minutes 5 --json FILE   what the file lacks, as far as time goes

A ratio is torch.nn's time by rnnfast's: 2.00 means half the time, and below 1.00 is a loss. Before a shape is timed,
both sides' outputs, final states and gradients are compared. "forward" runs under no_grad; "training" is forward and
backward, with the gradients of the input and of every parameter. A shape whose run takes longer than --limit is
measured with fewer time steps, and the table says so. Judge on an idle machine: the JSON file has every sample.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from brgemm import Brgemm
from measure import Case, Mismatch, measure_case
from shapes import BY_NAME, CELLS, GROUPS, SHAPES, Shape
from tabulate import tabulate
from targets import Row, judge
from tqdm import tqdm

import rnnfast

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_DTYPES = "float32, and some shapes in bfloat16; on CUDA float32 with TF32 and without, and those of 16 bits"
CUDA_DTYPES = ("tf32", "bfloat16", "float16", "float32")
# What one step of a layer costs at least, in seconds, by what its state moves through: shared memory, that of other
# blocks, the second-level cache.
FLOORS = {"persistent_cta": 0.2e-6, "persistent_cluster": 0.35e-6, "persistent_grid": 1.2e-6}
BFLOAT16_SHAPES = ("reference", "char_lm_batch", "rl_sim_long", "b32_t100_h256")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"default: {DEFAULT_DTYPES}")
    parser.add_argument("--mode", nargs="+", choices=("forward", "training"), default=("forward", "training"))
    parser.add_argument("--threads", nargs="+", type=int, help="on the CPU; default: 1 and the number of cores")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="NAME", help="of " + ", ".join(BY_NAME))
    parser.add_argument("--quick", action="store_true", help="no large shape, all cores only, few samples")
    parser.add_argument("--limit", type=float, help="seconds one run may take; default: 0.5, with --quick 0.05")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results, in place of the same rows")
    parser.add_argument("--resume", action="store_true", help="measure only what the file of --json does not have")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no measurement after so long")
    args = parser.parse_args()
    if args.resume and not args.json:
        parser.error("--resume: needs --json, the file whose rows are not measured again")
    if args.device == "cpu" and "tf32" in (args.dtype or ()):
        parser.error("--dtype tf32: needs --device cuda, the CPU has no TF32")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.threads is None:
        args.threads = [cores] if args.quick else sorted({1, cores})
    if args.device == "cuda":
        args.threads = [1]
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU")
    elif max(args.threads) > cores:
        parser.error(f"--threads: takes at most the {cores} cores of this machine, got {max(args.threads)}")
    if args.limit is None:
        args.limit = 0.05 if args.quick else 0.5
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All that is to be measured. Threads change in the outermost loop, for changing their number costs time."""
    shapes = [BY_NAME[name] for name in args.only] if args.only else SHAPES
    if args.device == "cpu" and not args.only:
        shapes = [shape for shape in shapes if shape not in GROUPS["cuda"]]
    if args.quick and not args.only:
        shapes = [shape for shape in shapes if shape.layers * shape.directions * shape.hidden_size**2 <= 512**2]
    modes = [mode == "training" for mode in args.mode]
    for threads in args.threads:
        for shape in shapes:
            if shape in GROUPS["step"] and threads > 1 and 1 in args.threads:
                continue  # one step is one thread's work
            for cell in args.cell:
                for training in modes:
                    if cell not in shape.cells or (training and not shape.training):
                        continue
                    for dtype in args.dtype or (CUDA_DTYPES if args.device == "cuda" else ("float32",)):
                        tf32 = dtype == "tf32"
                        yield Case(shape, cell, training, DTYPES[dtype], args.device, threads, tf32=tf32)
                    if args.dtype is None and args.device == "cpu" and shape.name in BFLOAT16_SHAPES:
                        yield Case(shape, cell, training, torch.bfloat16, "cpu", threads, "rnnfast float32")


def has_roof(case: Case) -> bool:
    shape = case.shape
    return case.dtype == torch.float32 and not shape.packed and shape.hidden_size >= 256 and shape.batch >= 32


def roof(case: Case, row: Row, brgemm: Brgemm) -> Row:
    """The rate at which rnnfast does its matrix products, as a part of what the micro-kernel alone reaches."""
    flops = case.shape.flops(case.cell, row["steps"]) * (3 if case.training else 1)
    rate = brgemm.rate(case.shape.batch, case.shape.hidden_size, case.threads)
    return {"flops": flops, "brgemm_rate": rate, "of_brgemm": flops / row["rnnfast_seconds"] / rate}


# ---------------------------------------------------------------------------------------------------------- results


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": cpu, "cores": os.cpu_count(), "torch_cpu": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def commit() -> str:
    """The checked-out commit of the benchmark, marked if files differ from it; outside of git what the environment's
    RNNFAST_COMMIT says, or "unknown".
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RNNFAST_COMMIT", "unknown")


def results_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file begins with, and the rows of the older file if there is one."""
    results: dict[str, Any] = {
        "machine": machine(args.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "rnnfast": rnnfast.__version__},
        "flags": {"argv": sys.argv[1:], "torch": torch.__config__.show(), "rnnfast": rnnfast.show_config()},
        "rows": [],
    }
    if args.json and args.json.exists():
        older = json.loads(args.json.read_text())
        for key in ("machine", "versions"):
            if older[key] != results[key]:
                was, now = older[key], results[key]
                raise SystemExit(f"error: --json {args.json} was measured with another {key}: {was}, now {now}")
        results["rows"] = older["rows"]
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """In one go, so that a process that is killed leaves the rows of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    whole.replace(path)


# After one of these nothing runs on the device any more. Older releases of torch raise RuntimeError alone.
DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


class Fatal:
    """The cases that ended a run, by a hang or an error that stays with the device: kept beside the results in
    FILE.fatal, so that ``--resume`` goes on behind them.
    """

    def __init__(self, results: Path | None, resume: bool) -> None:
        self.path = results and results.with_name(results.name + ".fatal")
        self.keys = self.path.read_text().splitlines() if resume and self.path and self.path.exists() else []

    @contextlib.contextmanager
    def unless_it_returns(self, key: str) -> Iterator[None]:
        self._write([*self.keys, key])
        try:
            yield
        except DEVICE_ERRORS:
            raise
        except (Exception, KeyboardInterrupt):
            self._write(self.keys)
            raise
        self._write(self.keys)

    def _write(self, keys: list[str]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(keys))
        if not keys:
            self.path.unlink()


MOST_SECONDS = 30.0  # of a case on CUDA, which takes a few


@contextlib.contextmanager
def watched(device: str) -> Iterator[None]:
    """On CUDA, end the process where a kernel hangs, and raise an error that stays with the device as one that does.

    What a kernel left behind is raised by whoever asks the device next, in its own words.
    """
    if device != "cuda":
        yield
        return
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    try:
        yield
    except RuntimeError:
        torch.cuda.synchronize()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


# ----------------------------------------------------------------------------------------------------------- tables


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def verdict(ratio: float) -> str:
    return f"{ratio:.2f}  LOSS" if ratio < 1 else f"{ratio:.2f}  win "


def on_the_gpu(row: Row) -> str:
    """Microseconds a step of one layer, what part of them the engine's floor is, and both sides' peaks of memory."""
    step = row["rnnfast_seconds"] / row["steps"] / BY_NAME[row["shape"]].layers
    floor = FLOORS.get(row["engine"].split(",")[0])
    part = f", floor {floor / step:.0%}" if floor and not row["training"] else ""
    peak = f"{row['baseline_peak_bytes'] / 2**20:.0f} / {row['rnnfast_peak_bytes'] / 2**20:.0f} MiB"
    return f"{row['engine']}: {step * 1e6:.2f} us/step{part}; {peak}"


def print_tables(rows: list[Row], device: str) -> None:
    """One line a shape, cell and number of threads; another baseline or dtype gets a table of its own."""
    for baseline, dtype in sorted({(row["baseline"], row["dtype"]) for row in rows}, reverse=True):
        group = [row for row in rows if (row["baseline"], row["dtype"]) == (baseline, dtype)]
        lines: dict[tuple[Any, ...], list[str]] = {}
        for row in group:
            shape: Shape = BY_NAME[row["shape"]]
            steps = str(row["steps"]) if row["steps"] == shape.steps else f"{row['steps']} of {shape.steps}"
            sizes = f"{shape.batch},{shape.input_size},{shape.hidden_size},{shape.layers},{shape.directions}"
            line = lines.setdefault(
                (shape.name, row["cell"], row["threads"]),
                [shape.name + (" packed" if shape.packed else ""), sizes, row["cell"], str(row["threads"])] + [""] * 10,
            )
            begin = 9 if row["training"] else 4
            line[begin : begin + 4] = [
                steps,
                duration(row["baseline_seconds"]),
                duration(row["rnnfast_seconds"]),
                verdict(row["ratio"]),
            ]
            if device == "cuda":
                line[begin + 4] = on_the_gpu(row)
            elif "of_brgemm" in row:
                line[begin + 4] = f"{row['of_brgemm']:.0%}"
        columns = [
            "T",
            baseline,
            "rnnfast",
            "ratio",
            "engine: a layer's step; peak" if device == "cuda" else "of brgemm",
        ]
        headers = ["shape", "B,I,H,L,D", "cell", "threads"]
        headers += [f"{mode}\n{column}" for mode in ("forward", "training") for column in columns]
        print(f"\n{dtype}: rnnfast against {baseline}")
        print(tabulate(list(lines.values()), headers, disable_numparse=True, stralign="right"))
        losses = sum(row["ratio"] < 1 for row in group)
        print(f"{len(group) - losses} wins, {losses} losses")


def main() -> None:
    args = parse_arguments()
    results = results_of(args)
    rows = {row["key"]: row for row in results["rows"]}
    chosen = list(cases(args))
    fatal = Fatal(args.json, args.resume)
    failures = [f"{key}: it ended an earlier run, and is not tried again" for key in fatal.keys]
    todo = [case for case in chosen if not (args.resume and case.key in rows) and case.key not in fatal.keys]
    end = time.monotonic() + 60 * args.minutes
    brgemm = None
    if args.device == "cpu":
        try:
            brgemm = Brgemm()
        except (RuntimeError, OSError) as error:
            print(f"the brgemm rate is left out, its code does not build: {error}", file=sys.stderr)

    left = 0
    measured_commit = commit()
    with tqdm(todo, unit="case", dynamic_ncols=True) as bar:
        for case in bar:
            if time.monotonic() > end:
                left += 1
                continue
            bar.set_postfix_str(case.key, refresh=False)
            try:
                with fatal.unless_it_returns(case.key), watched(args.device):
                    row = measure_case(case, args.limit, budget=args.limit)
            except DEVICE_ERRORS as error:  # no later case could run on the device
                failures.append(f"{case.key}: {error}")
                break
            except (Mismatch, RuntimeError) as error:  # one that cannot run leaves the others their turn
                failures.append(f"{case.key}: {error}")
                continue
            if brgemm and has_roof(case):
                row |= roof(case, row, brgemm)
            row |= {"commit": measured_commit, "measured": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            rows[case.key] = row
            results["rows"] = list(rows.values())
            if args.json:
                write(args.json, results)

    measured = [rows[case.key] for case in chosen if case.key in rows]
    print_tables(measured, args.device)
    headers = ["target", "forward", "reached", "", "training", "reached", ""]
    print("\nTargets")
    print(tabulate(judge(measured, args.device), headers, disable_numparse=True))
    if left:
        print(f"\n{left} of {len(chosen)} are left after {args.minutes:g} minutes; --resume goes on with them")
    if failures:
        raise SystemExit("\nWRONG RESULTS or none, not timed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
