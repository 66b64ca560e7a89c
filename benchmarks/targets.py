"""Owns: what the engines have to reach, and whether rows of measurements reach it. Must not know: how they were made.

A row is what ``measure.measure_case`` returns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A floor under a figure of some rows: under their geometric mean, or under every one of them."""

    what: str
    rows: Callable[[Row], bool]
    forward: float
    training: float
    mean: bool = False
    figure: Callable[[Row], float] = lambda row: row["ratio"]
    ceiling: bool = False  # the figure must not be above, rather than below
    unit: str = "x"


def against_torch(row: Row) -> bool:
    return row["baseline"] == "torch.nn" and row["dtype"] == "float32"


def dense(row: Row) -> bool:
    return against_torch(row) and not row["packed"] and row["full_steps"] > 1


def small(cell: str) -> Callable[[Row], bool]:
    return lambda row: dense(row) and row["cell"] == cell and row["hidden_size"] <= 128


def large(*cells: str) -> Callable[[Row], bool]:
    return lambda row: dense(row) and row["cell"] in cells and row["hidden_size"] >= 256 and row["batch"] >= 32


def one_step(row: Row) -> bool:
    return against_torch(row) and row["full_steps"] == row["batch"] == 1


def roof(row: Row) -> float:
    return float(row["of_brgemm"])


def on_cuda(dtype: str) -> Callable[[Row], bool]:
    return lambda row: row["device"] == "cuda" and row["dtype"] == dtype


def step_of_lstm(hidden_size: int, most_rows: int) -> Callable[[Row], bool]:
    def chosen(row: Row) -> bool:
        sizes = row["hidden_size"] == hidden_size and row["batch"] <= most_rows and row["full_steps"] > 1
        return on_cuda("bfloat16")(row) and row["cell"] == "lstm" and sizes and not row["training"]

    return chosen


def microseconds_a_step(row: Row) -> float:
    return float(row["rnnfast_seconds"] / row["steps"] / row["layers"] * 1e6)


def memory(row: Row) -> float:
    return float(row["rnnfast_peak_bytes"] / row["baseline_peak_bytes"])


CPU_TARGETS = (
    Target("every shape, every cell", against_torch, 1.0, 1.0),
    Target("LSTM, H <= 128", small("lstm"), 2.0, 2.0, mean=True),
    Target("GRU, H <= 128", small("gru"), 6.0, 6.0, mean=True),
    Target("RNN, H <= 128", small("rnn"), 4.0, 4.0, mean=True),
    Target("LSTM, H >= 256, B >= 32", large("lstm"), 1.1, 1.1),
    Target("GRU, H >= 256, B >= 32", large("gru"), 2.0, 1.5),
    Target("one step, H <= 256", one_step, 5.0, 3.0),
    Target(
        "one step, time of a call",
        lambda row: one_step(row) and row["threads"] == 1 and not row["training"],
        20.0,
        float("inf"),
        figure=lambda row: row["rnnfast_seconds"] * 1e6,
        ceiling=True,
        unit=" us",
    ),
    Target("packed, lengths 10 to 100 %", lambda row: against_torch(row) and row["packed"], 5.0, 5.0),
    Target("bfloat16 against float32, H >= 256", lambda row: row["baseline"] == "rnnfast float32", 1.3, 1.2),
    Target(
        "of the brgemm rate, H >= 256, B >= 32",
        lambda row: large("rnn", "gru", "lstm")(row) and "of_brgemm" in row,
        0.85,
        0.85,
        figure=roof,
        unit="",
    ),
)


CUDA_TARGETS = (
    Target("bfloat16", on_cuda("bfloat16"), 3.0, 2.5, mean=True),
    Target("float16", on_cuda("float16"), 1.5, 1.5, mean=True),
    Target("float32 with TF32", on_cuda("float32 with TF32"), 2.0, 1.5, mean=True),
    Target("every shape, every dtype", lambda row: True, 1.0, 1.0),
    Target("packed or bidirectional", lambda row: row["packed"] or row["directions"] == 2, 2.0, 2.0),
    *(
        Target(
            f"LSTM, bfloat16, H = {hidden_size}, B <= {rows}: a layer's step",
            step_of_lstm(hidden_size, rows),
            most,
            float("inf"),
            figure=microseconds_a_step,
            ceiling=True,
            unit=" us",
        )
        for hidden_size, rows, most in ((128, 1024, 0.5), (512, 16, 0.8), (768, 16, 1.0))
    ),
    Target("peak memory, of cuDNN's", lambda row: True, float("inf"), 1.0, figure=memory, ceiling=True, unit="x"),
)

TARGETS = {"cpu": CPU_TARGETS, "cuda": CUDA_TARGETS}


def judge(rows: Iterable[Row], device: str) -> list[list[str]]:
    """One line of text a target that has rows: what, then for forward and training what is wanted, reached, and met."""
    lines = []
    for target in TARGETS[device]:
        line = [target.what + (", geometric mean" if target.mean else "")]
        for training, wanted in ((False, target.forward), (True, target.training)):
            chosen = [row for row in rows if row["training"] == training and target.rows(row)]
            if not chosen:
                line += ["", "", ""]
                continue
            figures = [target.figure(row) for row in chosen]
            worst = (max if target.ceiling else min)(range(len(figures)), key=figures.__getitem__)
            mean = statistics.geometric_mean(figures)
            reached = mean if target.mean else figures[worst]
            met = reached <= wanted if target.ceiling else reached >= wanted
            other = f"worst {figures[worst]:.2f}" if target.mean else f"mean {mean:.2f}"
            where = f"{chosen[worst]['shape']} {chosen[worst]['cell']} {chosen[worst]['threads']} thr"
            sign = "<=" if target.ceiling else ">="
            line += [f"{sign} {wanted:g}{target.unit}", f"{reached:.2f} ({other}; {where})", "met" if met else "MISSED"]
        if any(line[1:]):
            lines.append(line)
    return lines
