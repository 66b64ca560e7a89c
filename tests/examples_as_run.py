"""Owns: running a file of examples/ as a user runs it. Must not know any of them."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PNG = b"\x89PNG"


class Application:
    """One example, its arguments for a small run, and a directory for what it writes."""

    def __init__(self, name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        torch.set_num_threads(1)  # nothing here is large enough for two
        self.module = importlib.import_module(name)
        self.arguments, self.folder, self.monkeypatch = arguments, folder, monkeypatch

    def run(self, *arguments: str, out: str = "out") -> dict[str, Any]:
        """The runs of the checkpoint that it leaves."""
        self.module.main([*self.arguments, "--out", str(self.folder / out), *arguments])
        return self.runs(out)

    def runs(self, out: str = "out") -> dict[str, Any]:
        runs: dict[str, Any] = torch.load(self.folder / out / "checkpoint.pt", weights_only=True)["runs"]
        return runs

    def check_resuming(self, *arguments: str, slice_updates: int = 1) -> None:
        """A run stopped by Ctrl-C in its first slice and resumed ends exactly as one that was not."""
        runs_class = importlib.import_module("common").Run
        self.monkeypatch.setattr(runs_class, "slice_updates", slice_updates)
        whole = self.run(*arguments, out="whole")
        advance = runs_class.advance

        def interrupted_advance(run: Any, updates: int) -> None:
            signal.raise_signal(signal.SIGINT)
            self.monkeypatch.setattr(runs_class, "advance", advance)
            advance(run, updates)

        self.monkeypatch.setattr(runs_class, "advance", interrupted_advance)
        with pytest.raises(SystemExit) as stop:
            self.run(*arguments, out="parts")
        assert stop.value.code == 130
        interrupted = self.runs("parts")
        resumed = self.run(*arguments, "--resume", out="parts")
        for name in whole:
            assert 0 < interrupted[name]["updates"] < whole[name]["updates"]
            assert figures(resumed[name], "loss") == figures(whole[name], "loss")
            torch.testing.assert_close(resumed[name]["model"], whole[name]["model"], rtol=0, atol=0)

    def is_picture(self, name: str, out: str = "out") -> bool:
        return (self.folder / out / name).read_bytes().startswith(PNG)


def figures(run: dict[str, Any], name: str) -> list[float]:
    """One figure of every report."""
    return [report[name] for report in run["reports"]]
