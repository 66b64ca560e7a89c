"""Draws the ratios of a result file of run.py or applications.py: every shape and cell, the losses marked.

python benchmarks/plot.py results.json ratios.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from compare import read

matplotlib.use("Agg")

from matplotlib import pyplot, ticker
from shapes import BY_NAME, SHAPES

COLOURS = {"rnn": "#4477aa", "gru": "#228833", "lstm": "#aa7733"}
OFFSETS = {"rnn": -0.25, "gru": 0.0, "lstm": 0.25}
LOSS = "#cc1122"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help="a name that ends in .svg, .png or .pdf")
    parser.add_argument("--threads", type=int, help="default: the most that were measured")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    results = read(args.results)
    against_torch = [row for row in results["rows"] if row.get("baseline") == "torch.nn"]
    rows = [row for row in against_torch if row.get("dtype") == args.dtype]  # other benchmarks' rows have none
    if not rows:
        raise SystemExit(f"error: {args.results} has no rows of run.py or applications.py with dtype {args.dtype}")
    threads = args.threads or max(row["threads"] for row in rows)
    # A single step is measured on one thread only.
    rows = [row for row in rows if row["threads"] == threads or row["full_steps"] == 1]
    measured = list(dict.fromkeys(row["shape"] for row in rows))
    names = [shape.name for shape in SHAPES if shape.name in measured]
    names += [name for name in measured if name not in BY_NAME]  # applications
    modes = sorted({row["training"] for row in rows})

    figure, panels = pyplot.subplots(
        1,
        len(modes),
        sharey=True,
        figsize=(1 + 5 * len(modes), 0.36 * len(names) + 1.8),
        layout="constrained",
        squeeze=False,
    )
    for axes, training in zip(panels[0], modes, strict=True):
        whole = not any(name in BY_NAME for name in names)  # trainings of applications, optimizer and all
        title = "training" if whole else "forward and backward" if training else "forward"
        panel = [row for row in rows if row["training"] == training]
        for row in panel:
            y = names.index(row["shape"]) + OFFSETS[row["cell"]]
            loss = row["ratio"] < 1
            colour = COLOURS[row["cell"]]
            axes.plot([1, row["ratio"]], [y, y], color=LOSS if loss else colour, linewidth=1.5, alpha=0.5, zorder=1)
            axes.scatter(
                row["ratio"], y, s=44 if loss else 26, marker="X" if loss else "o", color=LOSS if loss else colour
            )
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=1)
        low, high = min([0.7, *(row["ratio"] for row in panel)]), max([2.0, *(row["ratio"] for row in panel)])
        axes.set_xlim(low / 1.15, high * 1.2)
        axes.axvspan(low / 1.15, 1, color=LOSS, alpha=0.06, zorder=0)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(axis="x", alpha=0.3)
        losses = sum(row["ratio"] < 1 for row in panel)
        axes.set_title(f"{title}: {len(panel) - losses} wins, {losses} losses", fontsize=10)
    axes = panels[0][0]
    axes.set_yticks(range(len(names)), [label(name) if name in BY_NAME else name for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for cell, colour in COLOURS.items():
        axes.scatter([], [], s=26, color=colour, label=cell.upper())
    axes.scatter([], [], s=60, marker="X", label="loss", facecolors="none", edgecolors=LOSS)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"torch.nn's time by rnnfast's, {args.dtype}, {threads} thread{'s' * (threads > 1)}, "
        f"{results['machine'].get('gpu', results['machine']['cpu'])}, torch {results['versions']['torch']}",
        fontsize=10,
    )
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=130)


def label(name: str) -> str:
    shape = BY_NAME[name]
    kind = " packed" if shape.packed else ""
    layers = f" L{shape.layers}" if shape.layers > 1 else ""
    directions = " bidirectional" if shape.directions == 2 else ""
    return f"{name}{kind}  T{shape.steps} B{shape.batch} I{shape.input_size} H{shape.hidden_size}{layers}{directions}"


if __name__ == "__main__":
    main()
