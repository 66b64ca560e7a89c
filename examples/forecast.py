"""Series of several stations and channels: what comes next (many to many), or whose window is it (many to one)?

    python examples/forecast.py                                        a generated series whose noise is known
    python examples/forecast.py --data hzdataset.pch --compare         flows of a metro, beside torch.nn
    python examples/forecast.py --data hzdataset.pch --task classify   the station of a window
    python examples/forecast.py --data FILE.csv --period 24            columns are stations; here a season is 24 rows

Both tasks see every series in seasons, days say, the last of which are kept for testing. To forecast, the model reads
how far each value was from its seasonal mean, and says how far the next ones will be. It has to beat that mean and the
last value; of the generated series the least error that any forecast can have is known and printed beside it.
"""

from __future__ import annotations

import argparse
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import torch
from common import (
    EpochRun,
    last_state,
    pick_device,
    plot_confusion,
    plot_reports,
    positive,
    print_reports,
    pyplot,
    recurrent,
    save_figure,
    seed_everything,
    train,
    training_arguments,
)
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

# ------------------------------------------------------------------------------------------------------------- series

COUPLING = torch.tensor([[0.85, -0.25], [0.25, 0.85]])  # of the generated disturbance with itself one step before
NOISE = 5.0  # standard deviation of what is new in every step


@dataclass
class Series:
    """Values [seasons, T, stations, channels] for training and to test; ``coupling``: of a generated series."""

    training: Tensor
    test: Tensor
    stations: list[str]
    coupling: Tensor | None = None

    def floor(self, ahead: int) -> float:
        """The least root mean square error of a forecast ``ahead`` steps: of the noise that is new until then."""
        powers = [torch.linalg.matrix_power(self.coupling, step) for step in range(ahead)]
        return NOISE * float(torch.stack(powers).square().sum() / len(self.coupling)) ** 0.5


def generate() -> Series:
    """A season of each of 12 stations and 2 channels, and a disturbance that turns and fades, driven by noise."""
    generator = torch.Generator().manual_seed(0)
    steps, stations, channels = 48, 12, 2
    time = torch.arange(steps) * (2 * torch.pi / steps)
    harmonics = torch.stack([torch.sin(k * time + shift) for k in (1, 2, 3) for shift in (0, torch.pi / 2)], 1)
    season = 100 + torch.einsum("th,hsc->tsc", harmonics, 20 * torch.randn(6, stations, channels, generator=generator))
    disturbance, values = torch.zeros(stations, channels), []
    for step in range(101 * steps):
        noise = NOISE * torch.randn(stations, channels, generator=generator)
        disturbance = disturbance @ COUPLING.t() + noise
        values.append(season[step % steps] + disturbance)
    days = torch.stack(values).view(101, steps, stations, channels)[1:]  # the first one only starts the disturbance
    return Series(days[:80], days[80:], [str(i) for i in range(stations)], COUPLING)


def read_tensors(path: Path) -> Series:
    """A file of two tensors, training and test."""
    try:
        training, test = torch.load(path, weights_only=True)
        fits = training.ndim == 4 and test.ndim == 4 and training.shape[1:] == test.shape[1:]
    except OSError as error:
        raise SystemExit(f"error: --data {path} cannot be read: {error}") from None
    except (EOFError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, pickle.UnpicklingError):
        raise SystemExit(f"error: --data {path} is no file of two tensors that torch.save wrote, nor a .csv") from None
    if not fits:
        shapes = f"{tuple(training.shape)} and {tuple(test.shape)}"
        raise SystemExit(f"error: --data {path} has tensors {shapes}; takes [seasons, T, stations, channels] twice")
    return Series(training.float(), test.float(), [str(i) for i in range(training.size(2))])


def read_csv(path: Path, period: int | None) -> Series:
    """The columns of numbers, cut into seasons of ``period`` rows; every fifth part of them, the last, to test."""
    if period is None:
        raise SystemExit(f"error: --data {path}: a CSV takes --period, the rows of a season")
    try:
        table = pandas.read_csv(path).select_dtypes("number")
    except (OSError, UnicodeDecodeError, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise SystemExit(f"error: --data {path} cannot be read: {error}") from None
    if table.empty:
        raise SystemExit(f"error: --data {path} has no column of numbers")
    gaps = table.isna()
    if gaps.any(axis=None):
        column = gaps.any().idxmax()
        raise SystemExit(f"error: --data {path}: no number in column {column}, row {gaps[column].idxmax() + 2}")
    seasons = len(table) // period
    if seasons < 5:
        raise SystemExit(f"error: --data {path} has {seasons} seasons of {period} rows; takes 5 or more")
    values = torch.tensor(table.to_numpy()[: seasons * period], dtype=torch.float32).view(seasons, period, -1, 1)
    return Series(*values.split([seasons - seasons // 5, seasons // 5]), list(table.columns))


def load(args: argparse.Namespace) -> Series:
    if args.data is None:
        series = generate()
    elif args.data.suffix == ".csv":
        series = read_csv(args.data, args.period)
    else:
        series = read_tensors(args.data)
    steps = series.training.size(1)
    if args.horizon >= steps or args.window > steps:
        raise SystemExit(f"error: a season has {steps} steps; --horizon takes less, --window no more")
    return series


# ------------------------------------------------------------------------------------------------------------- models


class Model(nn.Module):
    """Input [T, B, F] -> for every step, or for the last one only, what the read-out makes of the state."""

    def __init__(self, library: ModuleType, inputs: int, outputs: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.rnn = recurrent(library, args.cell, inputs, args.hidden, num_layers=args.layers)
        self.readout = nn.Linear(args.hidden, outputs)
        self.every_step = args.task == "forecast"

    def forward(self, input: Tensor) -> Tensor:
        output, state = self.rnn(input)
        return self.readout(output if self.every_step else last_state(self.rnn, state))


class ForecastRun(EpochRun):
    """Many to many: at every step of a station's season, the next ``horizon`` values."""

    unit = "season"

    def __init__(self, library: ModuleType, series: Series, device: torch.device, args: argparse.Namespace) -> None:
        self.horizon, self.mean = args.horizon, series.training.mean(0)  # [T, stations, channels]
        self.scale = (series.training - self.mean).std((0, 1)).clamp_min(1e-6)  # [stations, channels]
        self.input, self.target = (part.to(device) for part in self.rows(series.training))
        self.test_input, self.test_target = (part.to(device) for part in self.rows(series.test))
        self.test = series.test
        seed_everything(args.seed)
        model = Model(library, self.input.size(2), self.target.size(2), args).to(device)
        super().__init__(model, self.input.size(1), args)

    def ahead(self, values: Tensor) -> Tensor:
        """What follows each step of [..., T, stations, channels]: [..., T - K, stations, K, channels]."""
        return values.unfold(-3, self.horizon, 1)[..., 1:, :, :, :].transpose(-1, -2)

    def rows(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Every station's every season as a row: input [T - K, rows, F], target [T - K, rows, K * channels]."""
        off = (values - self.mean) / self.scale  # by how many standard deviations
        season = ((self.mean - self.mean.mean(0)) / self.mean.std(0).clamp_min(1e-6)).expand_as(off)
        input = torch.cat((off, season), -1)[:, : -self.horizon]
        target = self.ahead(off).flatten(-2)
        return tuple(part.permute(1, 0, 2, 3).flatten(1, 2) for part in (input, target))

    def losses(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (F.mse_loss(self.model(self.input[:, rows]), self.target[:, rows]),)

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """Of the test seasons, in the units of the data: [seasons, T - K, stations, K, channels]."""
        off = self.model(self.test_input).cpu()
        off = off.view(len(off), len(self.test), -1, self.horizon, self.test.size(-1)).transpose(0, 1)
        return off * self.scale.unsqueeze(1) + self.ahead(self.mean)

    def evaluate(self) -> dict[str, float]:
        return {
            "test_loss": F.mse_loss(self.model(self.test_input), self.test_target).item(),
            "rmse": rmse(self.predictions(), self.ahead(self.test)),
        }


class ClassifyRun(EpochRun):
    """Many to one: the station of a window, which begins anywhere in a season."""

    unit = "window"
    measures = ("loss", "training_accuracy")

    def __init__(self, library: ModuleType, series: Series, device: torch.device, args: argparse.Namespace) -> None:
        mean, deviation = series.training.mean((0, 1, 2)), series.training.std((0, 1, 2)).clamp_min(1e-6)
        # [T, rows, channels], the stations of a season side by side
        training, test = (
            ((values - mean) / deviation).permute(1, 0, 2, 3).flatten(1, 2).to(device)
            for values in (series.training, series.test)
        )
        self.values, self.window, self.stations = training, args.window, len(series.stations)
        starts = range(0, len(test) - args.window + 1, max(1, args.window // 4))
        self.test_input = torch.cat([test[start : start + args.window] for start in starts], 1)
        self.truth = torch.arange(self.test_input.size(1), device=device) % self.stations
        seed_everything(args.seed)
        model = Model(library, training.size(2), self.stations, args).to(device)
        super().__init__(model, training.size(1), args)

    def losses(self, rows: Tensor) -> tuple[Tensor, ...]:
        starts = torch.randint(len(self.values) - self.window + 1, rows.shape)
        steps = starts + torch.arange(self.window).unsqueeze(1)  # [window, B]
        logits, truth = self.model(self.values[steps, rows]), (rows % self.stations).to(self.device)
        return F.cross_entropy(logits, truth), (logits.argmax(1) == truth).double().mean()

    @torch.no_grad()
    def predictions(self) -> Tensor:
        return torch.cat([self.model(part).argmax(1) for part in self.test_input.split(1024, 1)])

    def evaluate(self) -> dict[str, float]:
        return {"test_accuracy": (self.predictions() == self.truth).double().mean().item()}


# ------------------------------------------------------------------------------------------------------------ results


def rmse(predicted: Tensor, truth: Tensor) -> float:
    return float((predicted - truth).square().mean().sqrt())


def baselines(run: ForecastRun) -> dict[str, Tensor]:
    """Forecasts without a model, in the form of the run's predictions."""
    truth = run.ahead(run.test)
    last = run.test[:, : -run.horizon].unsqueeze(3).expand_as(truth)
    return {"last value": last, "seasonal mean": run.ahead(run.mean).expand_as(truth)}


def report_forecast(run: ForecastRun, series: Series, out: Path) -> None:
    """The error of every forecast, and pictures of a day of four stations."""
    truth, forecasts = run.ahead(series.test), {"rnnfast": run.predictions(), **baselines(run)}
    columns = {"steps ahead": list(range(1, run.horizon + 1))}
    for name, forecast in forecasts.items():
        columns[name] = [f"{rmse(forecast[:, :, :, k], truth[:, :, :, k]):.3f}" for k in range(run.horizon)]
    if series.coupling is not None:
        columns["least possible"] = [f"{series.floor(k):.3f}" for k in columns["steps ahead"]]
    print("root mean square error on the test seasons, in the data's units")
    print(tabulate(columns, headers="keys", disable_numparse=True, stralign="right"), "\n")

    shown = torch.linspace(0, len(series.stations) - 1, 4).round().int().unique().tolist()
    figure, panels = pyplot.subplots(len(shown), figsize=(8, 2.2 * len(shown)), sharex=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, station in zip(panels[:, 0], shown, strict=True):
        steps = range(run.horizon, run.test.size(1))
        axes.plot(steps, truth[0, :, station, -1, 0], color="black", linewidth=2.5, alpha=0.4, label="truth")
        for name, forecast in forecasts.items():
            style = "-" if name == "rnnfast" else ":"
            axes.plot(steps, forecast[0, :, station, -1, 0], linestyle=style, linewidth=1.2, label=name)
        axes.set_title(f"station {series.stations[station]}, first channel", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8, ncols=4)
    panels[-1, 0].set_xlabel(f"step of the first test season, forecast {run.horizon} before")
    save_figure(out / "forecast.png", figure)


# --------------------------------------------------------------------------------------------------------- programme


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="CSV or two tensors; default: a generated series")
    parser.add_argument("--period", type=positive, metavar="N", help="rows of a season, of a CSV")
    parser.add_argument("--task", choices=("forecast", "classify"), default="forecast", help="default: %(default)s")
    parser.add_argument(
        "--horizon", type=positive, default=1, metavar="N", help="how many values to forecast; default: %(default)s"
    )
    parser.add_argument(
        "--window", type=positive, default=24, metavar="N", help="steps to classify; default: %(default)s"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="default: %(default)s")
    model.add_argument("--layers", type=positive, default=1, metavar="N", help="default: %(default)s")
    model.add_argument("--hidden", type=positive, default=64, metavar="N", help="units; default: %(default)s")
    training_arguments(parser, "forecast", epochs=20, batch=32, lr=5e-3)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[dict[str, ForecastRun | ClassifyRun], dict[str, Any], Series]:
    """The runs, the settings that a checkpoint must share with them, and the data."""
    device = pick_device(args.device)
    series = load(args)
    kind = ForecastRun if args.task == "forecast" else ClassifyRun
    runs = {"rnnfast": kind(rnnfast, series, device, args)}
    if args.compare:
        runs["torch.nn"] = kind(nn, series, device, args)
    others = ("data", "out", "resume", "device")
    settings = {key: value for key, value in vars(args).items() if key not in others}
    settings["series"] = zlib.crc32(series.training.numpy().tobytes())
    seasons, steps, stations, channels = series.training.shape
    print(
        f"{seasons} seasons of {steps} steps, {len(series.test)} to test; {stations} stations, {channels} channels; "
        f"{args.cell}, {args.layers} x {args.hidden} units on {device}"
    )
    return runs, settings, series


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, settings, series = prepare(args)
    train(runs, args.epochs, settings, args.resume, args.out)

    ours = runs["rnnfast"]
    print()
    if args.task == "forecast":
        report_forecast(ours, series, args.out)
        plot_reports(
            args.out / "loss.png", runs, {"loss": "training", "test_loss": "test"}, "mean square error, scaled"
        )
        formats = {"loss": ".4f", "test_loss": ".4f", "rmse": ".3f"}
    else:
        plot_confusion(args.out / "confusion.png", ours.truth.cpu(), ours.predictions().cpu(), series.stations)
        parts = {"training_accuracy": "training", "test_accuracy": "test"}
        plot_reports(args.out / "accuracy.png", runs, parts, "accuracy")
        print(f"by chance {1 / len(series.stations):.3f} of the windows would be given the right station")
        formats = {"loss": ".4f", "training_accuracy": ".3f", "test_accuracy": ".3f"}
    print(f"{args.out}: pictures, and the trained model in checkpoint.pt\n")
    print_reports(runs, formats)


if __name__ == "__main__":
    main()
