"""A recurrent cell that the package lacks, at the speed of those it has: a minimal gated unit.

Compiles the equations of minimal_gated_unit.h, which lies beside this file, into a layer, checks its results against
the same equations in a Python loop and its gradient against finite differences, and times the layer, the loop and
torch.compile of the loop.

    python examples/own_cell.py
    python examples/own_cell.py --steps 100 --hidden 256 --no-compile

The first call compiles for 40 seconds on two cores; later ones load what it left.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

HEADER = Path(__file__).resolve().with_name("minimal_gated_unit.h")


def step(igates: Tensor, hgates: Tensor, h: Tensor) -> tuple[Tensor]:
    """The equations of the header: igates and hgates are ``[B, 2*H]``, h is ``[B, H]``."""
    (i_f, i_n), (h_f, h_n) = igates.chunk(2, -1), hgates.chunk(2, -1)
    f = (i_f + h_f).sigmoid()
    n = (i_n + f * h_n).tanh()
    return (h + f * (n - h),)


def loop(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The layer as one would write it without a kernel: ``[T, B, I]`` and ``[B, H]`` to ``[T, B, H]``."""
    outputs = []
    for igates in F.linear(x, w_ih, b_ih).unbind():
        (h,) = step(igates, F.linear(h, w_hh, b_hh), h)
        outputs.append(h)
    return torch.stack(outputs)


def check(layer_class: type[nn.Module]) -> None:
    """Raises unless the layer does what the loop does, and its derivatives are right."""
    layer = layer_class(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    # A parameter counts as an input of gradcheck where functional_call takes it as one.
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)
    print("first and second derivatives agree with finite differences")


def milliseconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def compare(layer: nn.Module, args: argparse.Namespace) -> None:
    """Prints how long forward, and forward with backward, take in every form, measured in turns."""
    x = torch.randn(args.steps, args.batch, args.inputs)
    h = torch.zeros(args.batch, args.hidden)
    weights = list(layer.parameters())
    forms: dict[str, Callable[[], Tensor]] = {
        "Python loop": lambda: loop(x, h, *weights),
        "compiled cell": lambda: layer(x)[0],
    }
    if not args.no_compile:
        compiled = torch.compile(loop)
        forms["torch.compile of the loop"] = lambda: compiled(x, h, *weights)

    def train(form: Callable[[], Tensor]) -> None:
        form().sum().backward()

    @torch.no_grad()
    def infer(form: Callable[[], Tensor]) -> None:
        form()

    expected = forms["Python loop"]().detach()
    preparation = {}
    for name, form in forms.items():
        preparation[name] = milliseconds(lambda form=form: (train(form), infer(form)))  # type: ignore[misc]
        torch.testing.assert_close(form().detach(), expected, rtol=1e-4, atol=1e-5)

    times: dict[tuple[str, Any], list[float]] = {(name, run): [] for name in forms for run in (infer, train)}
    for _ in range(args.rounds):
        for name, form in forms.items():
            for run in (infer, train):
                times[name, run].append(milliseconds(lambda run=run, form=form: run(form)))  # type: ignore[misc]
    median = {key: statistics.median(values) for key, values in times.items()}
    rows = []
    for name in forms:
        forward, training = (
            (median[name, run], median["Python loop", run] / median[name, run]) for run in (infer, train)
        )
        rows.append([name, *forward, *training, preparation[name] / 1e3])
    sizes = f"T={args.steps} B={args.batch} I={args.inputs} H={args.hidden}"
    print(f"\n{sizes}, {torch.get_num_threads()} threads, median of {args.rounds} rounds")
    headers = ["", "forward ms", "times the loop", "training ms", "times the loop", "first call s"]
    print(tabulate(rows, headers, floatfmt=("", ".2f", ".1f", ".2f", ".1f", ".1f")))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=common.positive, default=10, metavar="T", help="default: %(default)s")
    parser.add_argument("--batch", type=common.positive, default=16, metavar="B", help="default: %(default)s")
    parser.add_argument("--inputs", type=common.positive, default=64, metavar="I", help="default: %(default)s")
    parser.add_argument("--hidden", type=common.positive, default=64, metavar="H", help="default: %(default)s")
    parser.add_argument("--rounds", type=common.positive, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which compiles the loop")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    common.seed_everything(args.seed)
    begin = time.perf_counter()
    minimal_gated_unit = rnnfast.compile_cell(HEADER)
    print(f"{HEADER.name} compiled or found in {time.perf_counter() - begin:.1f} s")
    check(minimal_gated_unit)
    compare(minimal_gated_unit(args.inputs, args.hidden), args)


if __name__ == "__main__":
    main()
