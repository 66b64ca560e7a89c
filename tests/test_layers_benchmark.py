"""benchmarks/run.py and measure.py: which cases there are, on which numbers they run, what a file of rows is for."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def small_case(benchmark_module: Callable[[str], Any]) -> Any:
    measure, shapes = benchmark_module("measure"), benchmark_module("shapes")
    shape = shapes.Shape("long", 1_000_000, 2, 3, 4, "nobody")
    return measure.Case(shape, "gru", True, torch.float32, "cpu", 1)


def test_float32_on_cuda_is_measured_with_tf32_and_without(benchmark_module: Callable[[str], Any]) -> None:
    run, targets = benchmark_module("run"), benchmark_module("targets")
    args = SimpleNamespace(
        only=["reference"], device="cuda", quick=False, mode=["forward"], threads=[1], cell=["lstm"], dtype=None
    )
    cases = list(run.cases(args))
    labels = [case.arithmetic for case in cases]
    assert labels == ["float32 with TF32", "bfloat16", "float16", "float32"]
    assert [case.tf32 for case in cases] == [True, False, False, False]
    assert cases[0].key == "reference lstm forward float32 with TF32 cuda 1 against torch.nn"
    assert cases[0].tolerance > cases[3].tolerance == 1e-4
    (target,) = (target for target in targets.CUDA_TARGETS if target.what == "float32 with TF32")
    rows = [{"device": "cuda", "dtype": label} for label in labels]
    assert [target.rows(row) for row in rows] == [True, False, False, False]

    args.device = "cpu"
    assert {case.tf32 for case in run.cases(args)} == {False}


def test_tf32_is_allowed_to_both_sides(benchmark_module: Callable[[str], Any]) -> None:
    allow_tf32 = benchmark_module("measure").allow_tf32
    for allowed in (True, False):  # conftest.py puts both settings back
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed  # what csrc/ops reads
        assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize(
    ("dtype", "tf32", "allowed"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, False, True)],
)
def test_a_case_on_cuda_sets_tf32(
    benchmark_module: Callable[[str], Any],
    small_case: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tf32: bool,
    allowed: bool,
) -> None:
    """cuDNN's layers of bfloat16 use tensor cores where its TF32 setting allows that."""
    measure = benchmark_module("measure")
    seen: list[bool] = []
    monkeypatch.setattr(measure, "allow_tf32", seen.append)
    monkeypatch.setattr(measure, "Side", lambda *_: 1 / 0)  # the settings come before anything is made
    with pytest.raises(ZeroDivisionError):
        measure.measure_case(replace(small_case, device="cuda", dtype=dtype, tf32=tf32), limit=1, budget=1)
    assert seen == [allowed]
    with pytest.raises(ZeroDivisionError):
        measure.measure_case(small_case, limit=1, budget=1)
    assert seen == [allowed]  # the CPU has no such setting to change


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_alone_is_inference(benchmark_module: Callable[[str], Any], small_case: Any, training: bool) -> None:
    side = benchmark_module("measure").Side(torch.nn, replace(small_case, training=training), torch.float32, 3)
    assert side.module.training is training


def test_no_more_steps_are_drawn_than_fit(
    benchmark_module: Callable[[str], Any], small_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    drawn: list[int] = []
    draw = measure.draw
    monkeypatch.setattr(measure, "draw", lambda *args: drawn.append(args[3]) or draw(*args))
    row = measure.measure_case(small_case, limit=1e-3, budget=0)
    assert row["steps"] <= max(drawn) < 100_000


def test_a_gpu_is_given_no_more_steps_than_16_bits_count(
    benchmark_module: Callable[[str], Any], small_case: Any
) -> None:
    measure = benchmark_module("measure")
    side = SimpleNamespace(case=replace(small_case, device="cuda"), prepare=lambda steps: None, run=lambda: None)
    assert measure.fit_steps(side, 1.0, lambda call, repeats: 1e-9) == 65_535
    side.case = small_case
    assert measure.fit_steps(side, 1.0, lambda call, repeats: 1e-9) == 1_000_000


def test_the_numbers_are_those_of_a_generator_on_the_device(
    benchmark_module: Callable[[str], Any], small_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    side = measure.Side(torch.nn, small_case, torch.float32, 7)
    for tensor, seed in ((side.input, 0), (side.grad_output, 1)):
        expected = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(tensor.detach(), expected)

    devices: list[str] = []

    def generator(device: str) -> torch.Generator:
        devices.append(device)
        return torch.Generator()

    def randn(*shape: int, generator: torch.Generator, device: str) -> torch.Tensor:
        devices.append(device)
        return torch.randn(*shape, generator=generator)

    monkeypatch.setattr(measure, "torch", SimpleNamespace(Generator=generator, randn=randn))
    measure.draw(replace(small_case, device="cuda"), torch.bfloat16, 0, 2, 3)
    assert devices == ["cuda", "cuda"]


@pytest.fixture
def run_main(
    benchmark_module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Runs run.py with a measurement that costs nothing and, where asked, fails for a cell; which cells it measured."""
    run = benchmark_module("run")
    monkeypatch.setattr(run, "Brgemm", SimpleNamespace)
    monkeypatch.setattr(run, "print_tables", lambda rows, device: None)
    monkeypatch.setattr(run, "judge", lambda rows, device: [])

    def main(*arguments: str, broken: str = "", error: BaseException | None = None) -> list[str]:
        measured = []

        def measure_case(case: Any, limit: float, budget: float) -> dict[str, str]:
            if case.cell == broken:
                raise error or RuntimeError("no memory")
            measured.append(case.cell)
            return {"key": case.key}

        monkeypatch.setattr(run, "measure_case", measure_case)
        fixed = ["--only", "vad", "--mode", "forward", "--threads", "1", "--json", str(tmp_path / "rows.json")]
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *arguments])
        run.main()
        return measured

    return main


def test_what_fails_does_not_keep_the_rest_and_is_measured_when_resumed(
    run_main: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"vad gru forward float32 cpu 1 against torch.nn: no memory"):
        run_main(broken="gru")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["key"].split()[1] for row in rows] == ["rnn", "lstm"]
    assert run_main("--resume") == ["gru"]
    assert run_main("--resume") == []
    assert run_main() == ["rnn", "gru", "lstm"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("illegal access"), SystemExit("killed")], ids=["device", "kill"]
)
def test_what_ends_a_run_is_not_tried_again(
    run_main: Callable[..., list[str]], tmp_path: Path, error: BaseException
) -> None:
    """Not the device that an error has left useless, nor the next run."""
    key = "vad gru forward float32 cpu 1 against torch.nn"
    with pytest.raises(SystemExit):
        run_main(broken="gru", error=error)
    assert (tmp_path / "rows.json.fatal").read_text() == key
    with pytest.raises(SystemExit, match=f"{key}: it ended an earlier run"):
        run_main("--resume")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["key"].split()[1] for row in rows] == ["rnn", "lstm"]
    assert run_main() == ["rnn", "gru", "lstm"]  # anew
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_an_error_that_stays_with_the_device_is_raised_as_one(
    benchmark_module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked the device next had words of its own for it."""
    run = benchmark_module("run")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="no memory"), run.watched("cuda"):
        raise RuntimeError("no memory")

    def synchronize() -> None:
        raise torch.AcceleratorError("illegal access")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError), run.watched("cuda"):
        raise RuntimeError("failed to launch")
    with pytest.raises(RuntimeError, match="no memory"), run.watched("cpu"):
        raise RuntimeError("no memory")


def test_a_kernel_that_hangs_ends_the_process() -> None:
    hang = "import run, time; run.MOST_SECONDS = 0.2\nwith run.watched('cuda'): pass\ntime.sleep(0.5); print('went on')"
    done = run_python(hang)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    done = run_python(hang.replace("pass", "time.sleep(60)"))
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=benchmarks, capture_output=True, text=True, check=False, timeout=120)


def test_an_interrupted_case_is_tried_again(run_main: Callable[..., list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_main(broken="gru", error=KeyboardInterrupt())
    assert run_main("--resume") == ["gru", "lstm"]


def test_time_that_is_up_leaves_the_rest(run_main: Callable[..., list[str]], capsys: pytest.CaptureFixture) -> None:
    assert run_main("--minutes", "0") == []
    assert "3 of 3 are left after 0 minutes; --resume goes on with them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--dtype", "tf32"], "--dtype tf32: needs --device cuda"), (["--resume"], "--resume: needs --json")],
)
def test_arguments_that_do_not_go_together(
    benchmark_module: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    run = benchmark_module("run")
    monkeypatch.setattr(run, "Brgemm", SimpleNamespace)
    monkeypatch.setattr(run, "cases", lambda args: [])
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err
