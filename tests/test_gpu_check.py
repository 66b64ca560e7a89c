"""benchmarks/gpu_check.py with steps that need no GPU: what fails or hangs is ended and told of, and the rest runs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "GRACE", 0.5)
    return module


def step(gpu_check: ModuleType, name: str, code: str, **options: Any) -> Any:
    return gpu_check.Step(name, (sys.executable, "-c", code), **{"least": 0, "most": 30, **options})


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its new parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def test_what_fails_does_not_stop_the_rest(gpu_check: ModuleType, tmp_path: Path, capsys: Any) -> None:
    steps = [
        step(gpu_check, "first", "print('a word of the first'); raise SystemExit(3)"),
        gpu_check.Step("second", (str(tmp_path / "no such program"),), 0, 30),
        step(gpu_check, "third", "print('a word of the third')"),
        step(gpu_check, "fourth", "", needs=("third",)),
        step(gpu_check, "fifth", "", needs=("first",)),
        step(gpu_check, "sixth", "", needs=("a step that was not chosen",)),
    ]
    outcomes = gpu_check.run_steps(steps, 1, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "passed", "passed", "skipped", "passed"]
    assert outcomes[0].reason == "exit status 3"
    assert "no such program" in outcomes[1].reason
    assert outcomes[4].reason == "it needs first, which failed"
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(row["step"], row["status"]) for row in written] == [(o.step, o.status) for o in outcomes]
    log = (tmp_path / "gpu_check.log").read_text()
    assert log.index("===== first") < log.index("a word of the first") < log.index("a word of the third")
    shown = capsys.readouterr().out
    assert "a word of the first" in shown  # of what passed only the log has the output
    assert "a word of the third" not in shown


def test_a_step_past_its_limit_is_ended_with_its_children(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Even if both do not listen to an interruption."""
    pids = tmp_path / "pids"
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    code = f"""{deaf}
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{deaf} {SLEEP}"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}\\n")
print("begun", flush=True)
{SLEEP}"""
    steps = [step(gpu_check, "hangs", code, most=3), step(gpu_check, "next", "")]
    start = time.monotonic()
    outcomes = gpu_check.run_steps(steps, 1, tmp_path)
    assert time.monotonic() - start < 15
    assert [outcome.status for outcome in outcomes] == ["timed out", "passed"]
    assert outcomes[0].reason == "after 3 s"
    assert "begun" in (tmp_path / "gpu_check.log").read_text()
    both = [int(pid) for pid in pids.read_text().split()]
    assert len(both) == 2
    assert not any(map(alive, both))


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_step_past_its_limit_can_say_where_it_was(gpu_check: ModuleType, tmp_path: Path, background: bool) -> None:
    """Also in the background of a shell, whose jobs ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    try:
        gpu_check.run_steps([step(gpu_check, "hangs", SLEEP, most=8)], 1, tmp_path)  # it has begun by then
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in (tmp_path / "gpu_check.log").read_text()
    assert after == (signal.SIG_IGN if background else signal.default_int_handler)


def test_children_that_a_step_leaves_behind_are_ended(gpu_check: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{SLEEP}"])
open({str(pid)!r}, "w").write(f"{{child.pid}}\\n")"""
    outcomes = gpu_check.run_steps([step(gpu_check, "leaves", code)], 1, tmp_path)
    assert outcomes[0].status == "passed"
    end = time.monotonic() + 10
    while alive(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(int(pid.read_text()))


def test_a_step_that_no_longer_fits_is_left_out(gpu_check: ModuleType, tmp_path: Path) -> None:
    steps = [step(gpu_check, "long", "", least=100), step(gpu_check, "hangs", SLEEP), step(gpu_check, "short", "")]
    start = time.monotonic()
    outcomes = gpu_check.run_steps(steps, 4 / 60, tmp_path)
    assert time.monotonic() - start < 15
    assert [outcome.status for outcome in outcomes] == ["skipped", "timed out", "skipped"]
    assert outcomes[0].reason == "it needs 100 s, of 0.0666667 minutes 3 s are left"
    assert outcomes[2].reason == "it needs 0 s, of 0.0666667 minutes 0 s are left"


MAIN = """
import sys
sys.path.insert(0, "benchmarks")
import gpu_check
gpu_check.architecture = lambda: "9.0"
gpu_check.make_steps = lambda arch, folder: [
    gpu_check.Step("good", (sys.executable, "-c", ""), 0, 30),
    gpu_check.Step("bad", (sys.executable, "-c", "raise SystemExit(1)"), 0, 30),
    gpu_check.Step("hangs", (sys.executable, "-c", {hang!r}), 0, 60),
]
gpu_check.main()
"""


def run_main(tmp_path: Path, *arguments: str, hang: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN.format(hang=hang), *arguments]
    env = {**os.environ, "OUT": str(tmp_path / "results")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("arguments", "status", "summary"),
    [
        (["--only", "good"], 0, "    good: passed"),
        (["--only", "good", "bad"], 1, "    bad: failed, 0 s (exit status 1)"),
        (["--only", "good", "--minutes", "0"], 1, "    good: skipped, 0 s (it needs 0 s, of 0 minutes 0 s are left)"),
        (["--only", "best"], 2, "--only: takes good, bad, hangs, got best"),
    ],
)
def test_exit_status_and_summary(tmp_path: Path, arguments: list[str], status: int, summary: str) -> None:
    process = run_main(tmp_path, *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert summary in output
    assert (tmp_path / "results" / "gpu_check.json").exists() == (status != 2)


def test_the_running_step_ends_with_the_driver(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hang = f"import os; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}\\n'); {SLEEP}"
    process = run_main(tmp_path, "--only", "hangs", hang=hang)
    running = int(wait_for(pid))
    assert alive(running)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not alive(running)


def test_the_steps_name_what_there_is(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Files, engines and shapes; and those tests run in the suite that are no step of their own."""
    from rnnfast import ops

    steps = gpu_check.make_steps("9.0", tmp_path)
    for word in (word for made in steps for word in made.command):
        path = word.removeprefix("--ignore=")
        if path.startswith(("tests/", "benchmarks/")):
            assert (ROOT / path).exists(), path
    shapes = importlib.import_module("shapes")
    assert set(gpu_check.DECIDING) <= set(shapes.BY_NAME)
    if ops.extension is not None:
        assert tuple(ops.extension.cuda_engines) == gpu_check.ENGINES
    names = [made.name for made in steps]
    assert len(set(names)) == len(names)
    for made in steps:
        assert set(made.needs) <= set(names[: names.index(made.name)])
        assert 0 < made.least < made.most
