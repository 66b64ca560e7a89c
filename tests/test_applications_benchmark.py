"""benchmarks/applications.py: rows as compare.py and plot.py read them, and no time for sides that differ."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark_module(monkeypatch):
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("applications")


@pytest.fixture
def options(tmp_path):
    torch.save((torch.randn(10, 12, 4, 2).cumsum(1), torch.randn(4, 12, 4, 2)), tmp_path / "data.pch")
    return argparse.Namespace(device="cpu", budget=0.0, forecast=[str(tmp_path / "data.pch")])


def test_a_row(benchmark_module, options, monkeypatch):
    monkeypatch.setitem(benchmark_module.APPLICATIONS, "forecast", (("--data",), ["--window", "6", "--epochs", "99"]))
    row = benchmark_module.measure("forecast", "gru", 1, options)
    assert row["key"] == "forecast (data.pch) gru training float32 cpu 1 against torch.nn"
    assert row["ratio"] == row["baseline_seconds"] / row["rnnfast_seconds"]
    assert len(row["baseline_samples"]) == len(row["rnnfast_samples"]) == 3
    assert (row["steps"], row["items"], row["unit"]) == (1, 32, "season")  # of 40 rows, in batches of 32
    assert row["rnnfast_loss"] == pytest.approx(row["baseline_loss"], rel=1e-3)
    importlib.import_module("run").verdict(row["ratio"])
    benchmark_module.print_table([row])


def test_sides_that_differ_are_not_timed(benchmark_module, options, monkeypatch):
    monkeypatch.setitem(benchmark_module.APPLICATIONS, "forecast", (("--data",), ["--window", "6"]))
    prepare = benchmark_module.prepare

    def prepare_other_weights(*arguments):
        runs, epoch = prepare(*arguments)
        torch.nn.init.zeros_(runs["torch.nn"].model.readout.weight)
        return runs, epoch

    monkeypatch.setattr(benchmark_module, "prepare", prepare_other_weights)
    with pytest.raises(importlib.import_module("measure").Mismatch, match="over the first 10 updates"):
        benchmark_module.measure("forecast", "gru", 1, options)
