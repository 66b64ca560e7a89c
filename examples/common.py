"""What the examples share: arguments, checkpoints, pictures, Ctrl-C, training several models side by side.

Knows no data set and no whole model.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import matplotlib
import torch
from tabulate import tabulate
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot

# ------------------------------------------------------------------------------------------------ arguments and device


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes 1 or more, got {number}")
    return number


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"takes more than 0, got {text}")
    return number


def fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"takes 0 or more and less than 1, got {text}")
    return number


def training_arguments(parser: argparse.ArgumentParser, name: str, epochs: int, batch: int, lr: float) -> None:
    """Adds what every example called ``name`` takes, with its own defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--compare", action="store_true", help="train the same model with torch.nn, slice by slice")
    group.add_argument("--epochs", type=positive, default=epochs, metavar="N", help="default: %(default)s")
    group.add_argument("--batch", type=positive, default=batch, metavar="N", help="side by side; default: %(default)s")
    group.add_argument("--lr", type=rate, default=lr, help="learning rate of Adam; default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    out = Path("runs", name)
    group.add_argument("--out", type=Path, default=out, metavar="DIR", help="for what is left; default: %(default)s")
    group.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")


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


# ------------------------------------------------------------------------------------------------------------ processes


def processes() -> tuple[int, int]:
    """The number of this process and how many there are that train together."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def mean_over_processes(value: Tensor) -> Tensor:
    if processes()[1] > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value /= processes()[1]
    return value


# ---------------------------------------------------------------------------------------------------------- checkpoints


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
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        saved = content["settings"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
        raise SystemExit(f"error: --resume: {path} is not a checkpoint, or not a whole one") from None
    differences = [
        f"{key} was {saved.get(key)!r}, is {settings[key]!r}" for key in settings if saved.get(key) != settings[key]
    ]
    if differences:
        raise SystemExit(f"error: --resume: {path} was made with other settings: {'; '.join(differences)}")
    return content


# ------------------------------------------------------------------------------------------------------------- pictures


def save_figure(path: Path, figure: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_curves(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
) -> None:
    """Draws each (x, y) of ``curves`` under its name into a PNG."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    first = next(iter(curves)).split(",")[0]
    for name, (x, y) in curves.items():
        # Curves that should coincide stay visible: those of later runs are dashed over those of the first.
        axes.plot(x, y, label=name, linestyle="-" if name.startswith(first) else "--", marker="." * (len(x) < 20))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(path, figure)


def plot_confusion(path: Path, truth: Tensor, predicted: Tensor, names: Sequence[str]) -> None:
    """Draws into a PNG what part of each true class was predicted as which, in per cent; numbers where they fit."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = 100 * confusion_matrix(truth, predicted, labels=range(len(names)), normalize="true")
    size = min(10.0, 3 + 0.45 * len(names))
    figure, axes = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    few = len(names) <= 30
    display = ConfusionMatrixDisplay(matrix, display_labels=names)
    display.plot(ax=axes, cmap="Blues", include_values=few, values_format=".0f", xticks_rotation="vertical")
    if not few:
        axes.tick_params(labelsize=5)
    axes.set_title("predicted, in % of the true class", fontsize=10)
    save_figure(path, figure)


# --------------------------------------------------------------------------------------------------------------- layers


def recurrent(library: ModuleType, cell: str, *sizes: int, **options: Any) -> nn.Module:
    """The recurrent layers of ``library``, rnnfast or torch.nn: one import is all that differs."""
    cell, _, nonlinearity = cell.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity
    layer: nn.Module = {"lstm": library.LSTM, "gru": library.GRU, "rnn": library.RNN}[cell](*sizes, **options)
    return layer


def last_state(layer: nn.Module, state: Any) -> Tensor:
    """The final state of the last layer, its directions side by side: [B, D*H]."""
    h = state[0] if isinstance(state, tuple) else state
    return h[-2 if layer.bidirectional else -1 :].transpose(0, 1).flatten(1)


def pack(input: Tensor, lengths: Tensor) -> PackedSequence:
    """Rows [T, B, ...] of any order without their padding."""
    return pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)


# ------------------------------------------------------------------------------------------------------------- training


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

    unit = "char"  # of what is counted
    measures: tuple[str, ...] = ("loss",)  # what an update returns
    slice_updates = 10  # about what runs take turns in, and Ctrl-C waits for

    def __init__(
        self, model: nn.Module, total: int, items_per_update: float, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model = model
        self.total = total  # updates
        self.items_per_update = items_per_update
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.updates = 0
        self.state: Any = None
        self.sums = torch.zeros(len(self.measures), dtype=torch.float64, device=self.device)  # of this report, as are:
        self.report_updates = 0
        self.report_seconds = 0.0
        self.reports: list[dict[str, float]] = []

    def update(self) -> Tensor:
        """Does one update; returns each of ``measures``, before it, as a mean over its items."""
        raise NotImplementedError

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer, the gradient clipped to norm 1."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def advance(self, updates: int) -> None:
        """Goes on until ``updates`` updates are done."""
        begin, start = self.updates, time.perf_counter()
        while self.updates < updates:
            self.sums += self.update()
            self.updates += 1
        synchronize(self.device)
        self.report_seconds += time.perf_counter() - start
        self.report_updates += self.updates - begin

    def evaluate(self) -> dict[str, float]:
        """What is measured on held-out data."""
        return {}

    def measured(self) -> dict[str, float]:
        """The measures' means over this report, or over the last where this one is only beginning."""
        if not self.report_updates:
            return {name: self.reports[-1][name] for name in self.measures}
        return dict(zip(self.measures, (self.sums / self.report_updates).tolist(), strict=True))

    def close_report(self) -> None:
        items = self.report_updates * self.items_per_update
        self.reports.append(
            {
                "updates": self.report_updates,
                "items": self.updates * self.items_per_update,
                **self.measured(),
                **self.evaluate(),
                "speed": items / self.report_seconds,
                "seconds": self.report_seconds,
            }
        )
        self.sums.zero_()
        self.report_updates, self.report_seconds = 0, 0.0

    def seconds(self) -> float:
        """In training, over everything so far."""
        return self.report_seconds + sum(report["seconds"] for report in self.reports)

    def speed(self) -> float:
        """Items per second, over everything so far."""
        return self.updates * self.items_per_update / self.seconds()

    _progress = ("updates", "state", "sums", "report_updates", "report_seconds", "reports")

    def state_dict(self) -> dict[str, Any]:
        content = {"model": self.model.state_dict(), **{name: getattr(self, name) for name in self._progress}}
        if self.optimizer:
            content["optimizer"] = self.optimizer.state_dict()
        return content

    def load_state_dict(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        for name in self._progress:
            setattr(self, name, content[name])
        if self.optimizer:
            self.optimizer.load_state_dict(content["optimizer"])


class EpochRun(Run):
    """Batches of a number of rows, in an order drawn anew every epoch; what an epoch leaves over waits for the next.

    Order and dropout depend on the seed and the number of the update alone: several runs draw the same, and a resumed
    run what it would have drawn.
    """

    def __init__(self, model: nn.Module, rows: int, args: argparse.Namespace) -> None:
        self.rows, self.seed = rows, args.seed
        self.batch = min(args.batch, rows)
        self.updates_per_epoch = rows // self.batch
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
        super().__init__(model, args.epochs * self.updates_per_epoch, self.batch, optimizer)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def draw(self, generator: torch.Generator) -> Tensor:
        """An order of the rows: those of one batch stand together."""
        return torch.randperm(self.rows, generator=generator)

    def losses(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The measures of a batch; the first is what training minimizes."""
        raise NotImplementedError

    def update(self) -> Tensor:
        epoch, position = divmod(self.updates, self.updates_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self.draw(torch.Generator().manual_seed(self.seed + epoch))
        torch.manual_seed(self.seed + self.updates)
        measures = self.losses(self._order[1][position * self.batch :][: self.batch])
        self.descend(measures[0])
        return torch.stack([measure.detach() for measure in measures])


def train(runs: Mapping[str, Run], reports: int, settings: dict[str, Any], resume: bool, out: Path) -> None:
    """Trains all of ``runs`` in turns, a slice each, so that whatever else the machine does slows all of them alike."""
    checkpoint = out / "checkpoint.pt"
    reports = min(reports, *(run.total for run in runs.values()))
    longest, shortest = max(runs.values(), key=lambda run: run.total), min(run.total for run in runs.values())
    # Every run has updates in every slice.
    slices = reports * max(1, min(longest.total // longest.slice_updates, shortest) // reports)
    done = 0
    if resume:
        content = load_checkpoint(checkpoint, settings, longest.device)
        done = content["slices"]
        for name, run in runs.items():
            run.load_state_dict(content["runs"][name])

    def save() -> None:
        progress = {name: run.state_dict() for name, run in runs.items()}
        save_checkpoint(checkpoint, {"settings": settings, "slices": done, "runs": progress})

    unit, total = longest.unit, sum(run.total * run.items_per_update for run in runs.values())
    with (
        Interrupt() as interrupt,
        tqdm(total=round(total), unit=unit, unit_scale=True, mininterval=0.5, disable=processes()[0] > 0) as bar,
    ):
        # All processes stop at the same slice, or those that go on would wait for the others' gradients.
        while done < slices and not mean_over_processes(
            torch.tensor(float(interrupt.requested), device=longest.device)
        ):
            done += 1
            for run in runs.values():
                run.advance(run.total * done // slices)
            if done % (slices // reports) == 0:
                for run in runs.values():
                    run.close_report()
                save()
            now = []
            for name, run in runs.items():
                figures = [f"{measure} {value:.3f}" for measure, value in run.measured().items()]
                now.append(f"{name} {', '.join(figures)}, {run.speed():,.0f} {unit}/s")
            bar.set_postfix_str("; ".join(now), refresh=False)
            bar.update(round(sum(run.updates * run.items_per_update for run in runs.values())) - bar.n)
    if done < slices:
        save()
        print(f"interrupted; saved to {checkpoint}: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)


def plot_reports(path: Path, runs: Mapping[str, Run], names: Mapping[str, str], ylabel: str) -> None:
    """Draws how the figures of the reports went, those called ``names``, over what was trained on."""
    curves = {
        f"{name}, {names[key]}": ([report["items"] for report in run.reports], [report[key] for report in run.reports])
        for name, run in runs.items()
        for key in names
        if key in run.reports[0]
    }
    plot_curves(path, curves, f"{next(iter(runs.values())).unit}s trained on", ylabel)


def print_reports(runs: Mapping[str, Run], formats: Mapping[str, str]) -> None:
    """Every report of every run, side by side, and what the whole training took; ``formats``: of the figures shown."""
    unit = next(iter(runs.values())).unit
    reports = list(zip(*(run.reports for run in runs.values()), strict=True))
    columns = {f"{unit}s": [f"{row[0]['items']:,.0f}" for row in reports]}
    for key, form in {**formats, "speed": ",.0f"}.items():
        title = f"{unit}/s" if key == "speed" else key.replace("_", " ")
        for index, name in enumerate(runs):
            if key in reports[0][index]:
                columns[f"{title}\n{name}"] = [format(row[index][key], form) for row in reports]
    print(tabulate(columns, headers="keys", disable_numparse=True, stralign="right"))
    ours, *others = runs
    for name, run in runs.items():
        print(f"{name}: {run.seconds():.1f} s of training, {run.speed():,.0f} {unit}/s")
    for other in others:
        print(f"{ours} trains at {runs[ours].speed() / runs[other].speed():.2f} times the speed of {other}")
