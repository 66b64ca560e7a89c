"""examples/forecast.py, run as a user runs it, on small series and, for its noise floor, on the generated one."""

from __future__ import annotations

import math

import pandas
import pytest
import torch
from examples_as_run import Application, figures

SMALL = ["--hidden", "8", "--batch", "8", "--lr", "0.02", "--window", "6"]


@pytest.fixture
def forecast(tmp_path, monkeypatch):
    """The example on 10 + 4 seasons of 12 steps, 4 stations and 2 channels: waves of different height that drift."""
    time, station = torch.arange(12.0), torch.arange(1.0, 5)
    waves = torch.sin(time[:, None, None] * math.pi / 6 + torch.tensor([0, 1.0])) * station[:, None]
    seasons = waves + 0.2 * torch.randn(14, 12, 4, 2).cumsum(1)
    torch.save((seasons[:10], seasons[10:]), tmp_path / "data.pch")
    return Application("forecast", ["--data", str(tmp_path / "data.pch"), *SMALL], tmp_path, monkeypatch)


def make_run(forecast, training, test, *arguments):
    """The run of one task on given seasons."""
    args = forecast.module.parse_arguments([*SMALL, *arguments])
    series = forecast.module.Series(training, test, [str(i) for i in range(training.size(2))])
    kind = forecast.module.ForecastRun if args.task == "forecast" else forecast.module.ClassifyRun
    return kind(torch.nn, series, torch.device("cpu"), args)


@pytest.mark.parametrize("task", ["forecast", "classify"])
@pytest.mark.parametrize(("cell", "layers"), [("lstm", "1"), ("gru", "2"), ("rnn", "1")])
def test_trains_beside_torch(forecast, capsys, task, cell, layers):
    """Same seed, data and model: the same losses in both columns, and they fall."""
    runs = forecast.run("--task", task, "--cell", cell, "--layers", layers, "--epochs", "4", "--compare")
    ours, theirs = runs["rnnfast"], runs["torch.nn"]
    assert figures(ours, "loss") == pytest.approx(figures(theirs, "loss"), rel=1e-3)
    assert figures(ours, "loss")[-1] < figures(ours, "loss")[0] - 0.05
    pictures = ["forecast.png", "loss.png"] if task == "forecast" else ["confusion.png", "accuracy.png"]
    assert all(map(forecast.is_picture, pictures))
    assert "times the speed of torch.nn" in capsys.readouterr().out


def test_knows_the_station_of_a_window(forecast, capsys):
    run = forecast.run("--task", "classify", "--epochs", "40")["rnnfast"]
    assert figures(run, "test_accuracy")[-1] > 0.8
    assert "by chance 0.250" in capsys.readouterr().out


def test_approaches_the_noise_floor(forecast, tmp_path, capsys):
    """On the generated series the error comes within 5 % of the least possible, and neither baseline does."""
    out = tmp_path / "out"
    forecast.module.main(["--hidden", "24", "--epochs", "6", "--lr", "0.01", "--horizon", "2", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if "least possible" in line)
    for line in lines[header + 2 : header + 4]:
        _, ours, last, seasonal, least = map(float, line.split())
        assert 0.98 * least < ours < 1.05 * least
        assert min(last, seasonal) > 1.5 * least


def test_the_noise_floor_is_what_the_true_law_reaches(forecast):
    series = forecast.module.generate()
    for ahead in (1, 2, 5):
        off = series.test - series.training.mean(0)
        expected = off[:, :-ahead] @ torch.linalg.matrix_power(series.coupling, ahead).t()
        assert forecast.module.rmse(expected, off[:, ahead:]) == pytest.approx(series.floor(ahead), rel=0.03)


def test_forecasts_stand_beside_what_they_forecast(forecast):
    """On a ramp that repeats, K steps ahead the last value is K short, the seasonal mean right, and so is the form."""
    ramp = torch.arange(12.0)[:, None, None] + 100 * torch.arange(3.0)[:, None] + 1000 * torch.arange(2.0)
    run = make_run(forecast, ramp.expand(5, -1, -1, -1), ramp.expand(2, -1, -1, -1), "--horizon", "3")
    truth, baselines = run.ahead(run.test), forecast.module.baselines(run)
    assert truth.shape == run.predictions().shape == (2, 12 - 3, 3, 3, 2)
    assert truth[0, 4, 1].tolist() == [[105, 1105], [106, 1106], [107, 1107]]
    for k in range(3):
        assert (truth - baselines["last value"])[..., k, :].unique().tolist() == [k + 1]
    torch.testing.assert_close(baselines["seasonal mean"], truth)


def test_a_right_model_forecasts_right(forecast):
    """Rows, scaling and forms are undone: a model that answers with its targets gives the truth."""
    seasons = torch.randn(9, 12, 3, 2) * torch.tensor([1.0, 50.0]) + 7
    run = make_run(forecast, seasons[:6], seasons[6:], "--horizon", "2")
    run.model = lambda input: run.test_target
    torch.testing.assert_close(run.predictions(), run.ahead(seasons[6:]))


def test_windows_are_their_stations(forecast):
    """Where every value is its station's number, so is every label."""
    seasons = torch.arange(4.0)[:, None].expand(8, 12, 4, 1)
    run = make_run(forecast, seasons[:6], seasons[6:], "--task", "classify")
    deviation = run.values.unique()
    assert [deviation.tolist().index(value) for value in run.test_input[0, :, 0].tolist()] == run.truth.tolist()
    assert len(run.test_input) == 6
    seen = []
    run.model = lambda input: seen.append(input) or torch.zeros(input.size(1), 4, requires_grad=True)
    rows = torch.tensor([0, 5, 10, 23])
    loss, accuracy = run.losses(rows)
    assert [deviation.tolist().index(value) for value in seen[0][0, :, 0].tolist()] == (rows % 4).tolist()
    assert accuracy == 0.25  # of stations 0, 1, 2 and 3, all called 0
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("task", ["forecast", "classify"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(forecast, task):
    forecast.check_resuming("--task", task, "--epochs", "2", "--compare")


def test_csv(forecast, tmp_path):
    path = tmp_path / "data.csv"
    pandas.DataFrame({"time": list("abcdefghijklmnopqrs"), "a": range(19), "b": range(100, 119)}).to_csv(path)
    series = forecast.module.read_csv(path, 3)  # to_csv adds the column of row numbers
    assert (series.training.shape, series.test.shape) == ((5, 3, 3, 1), (1, 3, 3, 1))
    assert series.stations[1:] == ["a", "b"]
    assert series.test[0, :, 2, 0].tolist() == [115, 116, 117]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("no.csv", None, ["--period", "2"], "cannot be read"),
        ("no.csv", b"", ["--period", "2"], "cannot be read"),
        ("no.csv", b"a,b\nx,y\n", ["--period", "2"], "no column of numbers"),
        ("no.csv", b"a,b\n1,2\n3,\n", ["--period", "2"], "no number in column b, row 3"),
        ("no.csv", b"a\n1\n2\n3\n4\n5\n6\n7\n8\n", ["--period", "2"], "has 4 seasons of 2 rows"),
        ("no.csv", b"a\n1\n2\n", [], "takes --period"),
        ("no.pch", None, [], "cannot be read"),
        ("no.pch", b"no tensors", [], "is no file of two tensors"),
        ("data.pch", None, ["--horizon", "12"], "a season has 12 steps"),
        ("data.pch", None, ["--window", "13"], "a season has 12 steps"),
    ],
)
def test_unusable_files(forecast, tmp_path, name, content, arguments, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        forecast.run("--data", str(path), *arguments)


@pytest.mark.parametrize("content", [torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2)), [1, 2, 3], {"a": 1}])
def test_tensors_of_another_form(forecast, tmp_path, content):
    torch.save(content, tmp_path / "no.pch")
    with pytest.raises(SystemExit, match=r"no.pch (is no file of two tensors|has tensors)"):
        forecast.run("--data", str(tmp_path / "no.pch"))


@pytest.mark.parametrize("arguments", [["--task", "guess"], ["--horizon", "0"], ["--lr", "nan"]])
def test_impossible_arguments(forecast, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        forecast.module.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
