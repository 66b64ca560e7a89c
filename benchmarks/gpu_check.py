"""Builds rnnfast for the GPU of this machine, tests it there and times it, in the time there is.

    python benchmarks/gpu_check.py                              all steps, what is worth most first
    python benchmarks/gpu_check.py --only benchmark suite       these, of a build that there is
    python benchmarks/gpu_check.py --list

Each step is a process of its own. One that fails or passes its time limit (a kernel that waits for ever has no other
end) does not keep the others from running, but for those that need what it makes. --minutes is the time for all: a step
that no longer fits is left out. Everything is written as it comes, to the folder of --out: gpu_check.log has what the
steps print, gpu_check.json how each of them ended, cuda.json and derivatives_cuda.json the measurements. The exit
status is 0 if every step passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("persistent_cta", "persistent_cluster", "persistent_grid", "stepwise")
# Those that decide the targets of a GPU (targets.py).
DECIDING = ("b16_t512_h512", "b16_t512_h768", "reference", "rl_sim_long", "basecall_384", "char_lm")
# Need no GPU, compile for minutes, or are steps of their own.
NOT_IN_SUITE = (
    "test_layering.py",
    "test_build.py",
    "test_docs.py",
    "test_cuda_sim.py",
    "test_cuda_sim_spread.py",
    "test_nvcc.py",
    "test_own_cell.py",
    "test_own_cell_cuda.py",
    "test_cuda_hardware.py",
    "test_cuda_engines.py",
    "test_cuda_runtime.py",
)
GRACE = 5.0  # seconds between a step's interruption, at which pytest says where it was, and its end
TAIL = 30  # lines of a failed step's output that are shown at once


@dataclass(frozen=True)
class Step:
    """A command, with its least and its most seconds: with fewer left it is not begun, after so many it is ended."""

    name: str
    command: Sequence[str]
    least: float
    most: float
    needs: Sequence[str] = ()  # steps without which it means nothing
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step ended."""

    step: str
    status: str  # passed, failed, timed out, skipped
    seconds: float = 0.0
    reason: str = ""


def end_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # a session's leader names its group, which outlives it


@contextmanager
def hearing_interrupts() -> Iterator[None]:
    """What is started inside hears interrupts, which the background job of a shell, and all that it starts, ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_step(step: Step, limit: float, log: Path) -> Outcome:
    """Runs a step for ``limit`` seconds at most; nothing that it started is left."""
    start = time.monotonic()
    with log.open("ab") as output:
        try:
            with hearing_interrupts():
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            return Outcome(step.name, "failed", reason=str(error))
        status, reason = "passed", ""
        try:
            code = process.wait(limit)
            if code != 0:
                status, reason = "failed", f"exit status {code}"
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"after {limit:.0f} s"
            end_group(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            end_group(process, signal.SIGKILL)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            reason += "; it does not end, the driver holds it"
    return Outcome(step.name, status, time.monotonic() - start, reason)


def tail(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL:])


def run_steps(steps: Sequence[Step], minutes: float, folder: Path) -> list[Outcome]:
    """Runs the steps in turn; what is known so far is in the folder all the time."""
    folder.mkdir(parents=True, exist_ok=True)
    log, results = folder / "gpu_check.log", folder / "gpu_check.json"
    log.write_bytes(b"")
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for step in steps:
        left = end - time.monotonic() - 2 * GRACE
        ended = {outcome.step: outcome.status for outcome in outcomes}
        missing = [name for name in step.needs if ended.get(name, "passed") != "passed"]
        if missing:
            outcome = Outcome(step.name, "skipped", reason=f"it needs {missing[0]}, which {ended[missing[0]]}")
        elif left < step.least:
            reason = f"it needs {step.least:.0f} s, of {minutes:g} minutes {max(left, 0):.0f} s are left"
            outcome = Outcome(step.name, "skipped", reason=reason)
        else:
            with log.open("a") as output:
                output.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
            begin = log.stat().st_size
            print(f"{step.name} ...", flush=True)
            outcome = run_step(step, min(step.most, left), log)
            if outcome.status != "passed":
                print(tail(log, begin))
        with log.open("a") as output:
            output.write(f"===== {in_words(outcome)}\n")
        print(in_words(outcome), flush=True)
        outcomes.append(outcome)
        results.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def in_words(outcome: Outcome) -> str:
    reason = f" ({outcome.reason})" if outcome.reason else ""
    return f"{outcome.step}: {outcome.status}, {outcome.seconds:.0f} s{reason}"


# ------------------------------------------------------------------------------------------------------------ the steps
def architecture() -> str:
    """Of the GPU that torch sees, as TORCH_CUDA_ARCH_LIST takes it. In a process of its own, so that this one holds no
    GPU."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        raise SystemExit("error: torch does not say within 120 s which GPU there is") from None
    if done.returncode != 0:
        raise SystemExit(f"error: torch sees no GPU: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout.strip()


def make_steps(arch: str, folder: Path) -> list[Step]:
    python = sys.executable
    # A test that hangs says where, before its process is ended.
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-o", "faulthandler_timeout=40")
    benchmark = (python, "benchmarks/run.py", "--device", "cuda", "--limit", "0.1", "--json", str(folder / "cuda.json"))
    derivatives = folder / "derivatives_cuda.json"
    parallel = ("--numprocesses", "8", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    # A kernel that hangs costs its own test alone: the worker ends, and another goes on with the next one.
    one_by_one: tuple[str, ...] = ()
    if parallel and importlib.util.find_spec("pytest_timeout"):
        one_by_one = (
            "--numprocesses",
            "1",
            "--max-worker-restart",
            "4",
            "--timeout",
            "25",
            "--timeout-method",
            "thread",
        )
        parallel += ("--timeout", "60", "--timeout-method", "thread")
    # The interpreter's own ninja: without one, a build takes one file after the other.
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    build_env = {"TORCH_CUDA_ARCH_LIST": arch, "RNNFAST_CUDA": "1", "PATH": path}
    on_cuda = "cuda and not cuda-reference and not reference-cuda"  # plain PyTorch runs on any device alike
    install = ("pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--editable", ".")
    steps = [
        Step("build", (python, "-m", *install), 30, 420, env=build_env),
        Step("self-test", (python, "-m", "rnnfast"), 15, 60, ("build",)),
        Step("hardware", (*pytest, "tests/test_cuda_hardware.py"), 30, 120),
        *(
            Step(
                f"engine-{engine}",
                (*pytest, *one_by_one, "tests/test_cuda_engines.py", "-k", engine),
                20,
                90,
                ("build",),
            )
            for engine in ENGINES
        ),
        Step(
            "deciding-shapes",
            (*benchmark, "--resume", "--dtype", "bfloat16", "float16", "--only", *DECIDING, "--minutes", "2"),
            30,
            150,
            ("build",),
        ),
        Step("runtime", (*pytest, *one_by_one, "tests/test_cuda_runtime.py"), 20, 90, ("build",)),
        Step("benchmark", (*benchmark, "--resume", "--minutes", "2"), 60, 150, ("build",)),
        Step(
            "suite",
            (*pytest, *parallel, "tests", "-k", on_cuda, *(f"--ignore=tests/{name}" for name in NOT_IN_SUITE)),
            60,
            300,
            ("build",),
            {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
        ),
        Step(
            "derivatives",
            (python, "benchmarks/derivatives.py", "--device", "cuda", "--budget", "0.2", "--json", str(derivatives)),
            30,
            90,
            ("build",),
        ),
    ]
    small_call = ("tests/test_cuda_engines.py", "-k", "test_a_small_call")
    steps += [
        Step(
            tool,
            ("compute-sanitizer", "--tool", tool, *quiet, "--error-exitcode", "1", *pytest, *small_call),
            30,
            120,
            ("build",),
        )
        # Libraries ask drivers for what these need not have, and take no for an answer.
        for tool, quiet in (("memcheck", ("--report-api-errors", "no")), ("synccheck", ()))
    ]
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together (default: 8)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps; --list names them")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=default, help="default: $OUT, or else benchmarks/results")
    args = parser.parse_args()

    folder = args.out.resolve()
    steps = make_steps("" if args.list else architecture(), folder)
    if args.list:
        for step in steps:
            print(f"{step.name:<26}{' '.join(step.command)}")
        return
    known = [step.name for step in steps]
    for name in args.only or ():
        if name not in known:
            parser.error(f"--only: takes {', '.join(known)}, got {name}")
    if args.only:
        steps = [step for step in steps if step.name in args.only]
    absent = [] if shutil.which("compute-sanitizer") else [s.name for s in steps if s.command[0] == "compute-sanitizer"]
    steps = [step for step in steps if step.name not in absent]

    # An outer limit's signal takes the running step along, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes = run_steps(steps, args.minutes, folder)
    print("\nSummary")
    for outcome in outcomes:
        print(f"    {in_words(outcome)}")
    for name in absent:
        print(f"    {name}: left out, there is no compute-sanitizer")
    print(f"    in {folder}: gpu_check.log, gpu_check.json, cuda.json, derivatives_cuda.json")
    raise SystemExit(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    main()
