"""What the examples share: device, seeds, checkpoints, curves, Ctrl-C, training several models side by side.

Knows no model and no data set.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


def pick_device(name: str) -> torch.device:
    """The device called ``name``, or an exit that says why it cannot be had."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the work queued on ``device`` is done, so that a clock read afterwards is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` so that ``path`` always holds a whole checkpoint, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(content), partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The checkpoint at ``path``, which must have been written with the same ``settings``."""
    if not path.is_file():
        raise SystemExit(f"error: --resume: there is no checkpoint at {path}")
    content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    saved = content["settings"]
    differences = [
        f"{key} was {saved.get(key)!r}, is {settings[key]!r}" for key in settings if saved.get(key) != settings[key]
    ]
    if differences:
        raise SystemExit(f"error: --resume: {path} was made with other settings: {'; '.join(differences)}")
    return content


def plot_curves(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
) -> None:
    """Draws each (x, y) of ``curves`` under its name into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for index, (name, (x, y)) in enumerate(curves.items()):
        # Curves that should coincide stay visible: the later ones are dashed over the earlier.
        axes.plot(x, y, label=name, linestyle="-" if index == 0 else "--", marker="." if len(x) < 20 else None)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Interrupt:
    """Turns the first Ctrl-C inside a ``with`` block into a flag, so that a loop ends between two steps.

    A second Ctrl-C interrupts at once, as usual.
    """

    def __enter__(self) -> Interrupt:
        self.requested = False
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


class Run:
    """One model in training, how far it got, and what it measured on the way; subclasses say what an update is."""

    slice_updates = 10  # about what runs take turns in, and Ctrl-C waits for

    def __init__(self, model: nn.Module, total: int, characters_per_update: float) -> None:
        self.model = model
        self.total = total  # updates
        self.characters_per_update = characters_per_update
        self.device = next(model.parameters()).device
        self.updates = 0
        self.state: Any = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this report, as are:
        self.report_updates = 0
        self.report_seconds = 0.0
        self.reports: list[dict[str, float]] = []

    def update(self) -> Tensor:
        """Does one update; returns the mean loss per character, in nats, before it."""
        raise NotImplementedError

    def advance(self, updates: int) -> None:
        """Goes on until ``updates`` updates are done."""
        begin, start = self.updates, time.perf_counter()
        while self.updates < updates:
            self.loss_sum += self.update()
            self.updates += 1
        synchronize(self.device)
        self.report_seconds += time.perf_counter() - start
        self.report_updates += self.updates - begin

    def evaluate(self) -> float:
        """The held-out loss in bits per character; nan where nothing is held out."""
        return math.nan

    def loss(self) -> float:
        """The mean training loss of this report, or of the last where this one is only beginning."""
        return self.loss_sum.item() / self.report_updates if self.report_updates else self.reports[-1]["loss"]

    def close_report(self) -> None:
        characters = self.report_updates * self.characters_per_update
        self.reports.append(
            {
                "updates": self.report_updates,
                "characters": self.updates * self.characters_per_update,
                "loss": self.loss(),
                "held_out": self.evaluate(),
                "speed": characters / self.report_seconds,
                "seconds": self.report_seconds,
            }
        )
        self.loss_sum.zero_()
        self.report_updates, self.report_seconds = 0, 0.0

    def seconds(self) -> float:
        """In training, over everything so far."""
        return self.report_seconds + sum(report["seconds"] for report in self.reports)

    def speed(self) -> float:
        """Characters per second, over everything so far."""
        return self.updates * self.characters_per_update / self.seconds()

    _progress = ("updates", "state", "loss_sum", "report_updates", "report_seconds", "reports")

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), **{name: getattr(self, name) for name in self._progress}}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        for name in self._progress:
            setattr(self, name, content[name])


def train(runs: dict[str, Run], reports: int, settings: dict[str, Any], resume: bool, out: Path) -> None:
    """Trains all of ``runs`` in turns, a slice each, so that whatever else the machine does slows all of them alike."""
    checkpoint = out / "checkpoint.pt"
    reports = min(reports, *(run.total for run in runs.values()))
    longest, shortest = max(runs.values(), key=lambda run: run.total), min(run.total for run in runs.values())
    # Every run has updates in every slice.
    slices = reports * max(1, min(longest.total // longest.slice_updates, shortest) // reports)
    done = 0
    if resume:
        content = load_checkpoint(checkpoint, settings, next(iter(runs.values())).device)
        done = content["slices"]
        for name, run in runs.items():
            run.load_state_dict(content["runs"][name])

    def save() -> None:
        progress = {name: run.state_dict() for name, run in runs.items()}
        save_checkpoint(checkpoint, {"settings": settings, "slices": done, "runs": progress})

    characters = sum(run.total * run.characters_per_update for run in runs.values())
    with Interrupt() as interrupt, tqdm(total=round(characters), unit="char", unit_scale=True, mininterval=0.5) as bar:
        while done < slices and not interrupt.requested:
            done += 1
            for run in runs.values():
                run.advance(run.total * done // slices)
            if done % (slices // reports) == 0:
                for run in runs.values():
                    run.close_report()
                save()
            now = (f"{name} loss {run.loss():.3f}, {run.speed():,.0f} char/s" for name, run in runs.items())
            bar.set_postfix_str("; ".join(now), refresh=False)
            bar.update(round(sum(run.updates * run.characters_per_update for run in runs.values())) - bar.n)
    if done < slices:
        save()
        print(f"interrupted; saved to {checkpoint}: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)
