"""Shows what changed between two result files of run.py: for every row in both, rnnfast's time and the ratio.

    python benchmarks/compare.py before.json after.json

The baseline's own change stands beside it: where torch.nn moved as much, it was the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

SHOWN = 5  # of the rows that are in one file alone


def read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {path} cannot be read: {error}") from None
    return content


def change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=5.0, metavar="PERCENT", help="a change; default: %(default)s"
    )
    args = parser.parse_args()

    results = {"before": read(args.before), "after": read(args.after)}
    for key in ("machine", "versions"):
        if results["before"][key] != results["after"][key]:
            print(f"another {key}: {results['before'][key]} before, {results['after'][key]} after")
    before, after = ({row["key"]: row for row in result["rows"]} for result in results.values())
    # At other numbers of time steps neither the times nor quite the ratios mean the same.
    common = [key for key in before if key in after and before[key]["steps"] == after[key]["steps"]]
    rescaled = [key for key in before if key in after and before[key]["steps"] != after[key]["steps"]]

    lines = []
    factors = {key: after[key]["rnnfast_seconds"] / before[key]["rnnfast_seconds"] for key in common}
    for key in sorted(common, key=factors.__getitem__):
        old, new = before[key], after[key]
        relative = factors[key] / (new["baseline_seconds"] / old["baseline_seconds"])
        slower, faster = 1 + args.threshold / 100, 1 / (1 + args.threshold / 100)
        mark = "SLOWER" if relative > slower else "faster" if relative < faster else ""
        lines.append(
            [
                key,
                f"{old['rnnfast_seconds'] * 1e6:.1f}",
                f"{new['rnnfast_seconds'] * 1e6:.1f}",
                change(old["rnnfast_seconds"], new["rnnfast_seconds"]),
                change(old["baseline_seconds"], new["baseline_seconds"]),
                f"{old['ratio']:.2f}",
                f"{new['ratio']:.2f}",
                mark,
            ]
        )
    headers = ["", "us before", "us after", "change", "baseline's", "ratio before", "ratio after", ""]
    print(tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 6, "left")))
    if common:
        ratios = [after[key]["ratio"] / before[key]["ratio"] for key in common]
        print(
            f"{len(common)} rows; the ratio changed by a factor of {statistics.geometric_mean(ratios):.3f} in the mean"
        )
    for title, keys in (
        ("measured with another number of time steps", rescaled),
        ("only before", before.keys() - after.keys()),
        ("only after", after.keys() - before.keys()),
    ):
        if keys:
            shown = sorted(keys)[:SHOWN]
            print(f"{title}: {len(keys)} rows, {', '.join(shown)}{', ...' if len(keys) > len(shown) else ''}")


if __name__ == "__main__":
    main()
