"""Times derivatives beyond the first and the transforms of torch.func against torch.nn, or against the loop that they
spare.

    python benchmarks/derivatives.py                    every derivative and cell, on one thread and on all
    python benchmarks/derivatives.py --only "gradient penalty" --cell lstm --json FILE
    python benchmarks/derivatives.py --device cuda

A ratio is the baseline's time by rnnfast's, both measured in turns in one process: 2.00 means half the time. The
results of both are compared before anything is timed. One layer of H = 128 units, float32. Baselines:

    torch.nn    the same call of torch.nn's layer; on CUDA without cuDNN, which has no second derivatives
    the loop    the same thing with rnnfast, one sample or model at a time
    formula     the same call of rnnfast's reference formula, small operators step by step

"at most" is the ratio that a gradient penalty would reach if it took no longer than the matrix products that it cannot
do without, each over all steps at once: the baseline's time by theirs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Mismatch, compare, in_turns
from run import commit, duration, machine
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import rnnfast

HIDDEN = 128
TOLERANCE = 1e-3  # of a result's norm: second derivatives in float32
CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ONLY_OF = {"gradient penalty, projection": ("lstm",)}  # where not of all cells
Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    steps: int
    batch: int
    inputs: int

    def __str__(self) -> str:
        return f"T={self.steps} B={self.batch} I={self.inputs}"


@dataclass(frozen=True)
class Case:
    derivative: str
    cell: str
    size: Size
    threads: int
    device: str = "cpu"


def layer(library: Any, case: Case, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = getattr(library, CELLS[case.cell])(case.size.inputs, HIDDEN, device=case.device, **options)
    return module


def data(case: Case, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*leading, case.size.steps, case.size.batch, case.size.inputs, generator=generator).to(
        case.device
    )


def gradient_penalty(library: Any, case: Case, of: Callable[[Tensor], Tensor], **options: Any) -> Call:
    """The gradient by every parameter of a penalty on the gradient by the input."""
    module, input = layer(library, case, **options), data(case).requires_grad_()
    parameters = list(module.parameters())

    def call() -> Any:
        (by_input,) = torch.autograd.grad(of(module(input)[0]), input, create_graph=True)
        penalty = (by_input.norm(dim=(0, 2)) - 1).square().mean()
        return torch.autograd.grad(penalty, parameters, materialize_grads=True)

    return call


def products(case: Case, through_output: bool) -> Call:
    """What a gradient penalty has to multiply, by torch.mm and into results that are there already.

    Args:
        through_output: whether the penalty also reaches the parameters through the gradient of the output.
    """
    rows, gates, inputs = case.size.steps * case.size.batch, GATES[case.cell] * HIDDEN, case.size.inputs
    draw = partial(torch.randn, device=case.device)
    x, h, g = draw(rows, inputs), draw(rows, HIDDEN), draw(rows, gates)
    w_ih, w_hh = draw(gates, inputs), draw(gates, HIDDEN)
    forward = [(x, w_ih.t()), (h, w_hh.t())]
    by_weights = [(g.t(), x), (g.t(), h)]
    # Forward and backward; the same along the tangent, with two terms of each gradient of a weight.
    every = [*forward, (g, w_hh), (g, w_ih), *forward, (g, w_hh), *by_weights, *by_weights]
    if through_output:
        every += [(g, w_hh), *by_weights]
    results = [torch.mm(*pair) for pair in every]

    def call() -> None:
        for pair, result in zip(every, results, strict=True):
            torch.mm(*pair, out=result)

    return call


def penalties(case: Case, of: Callable[[Tensor], Tensor]) -> tuple[Call, Call, Call]:
    return gradient_penalty(nn, case, of), gradient_penalty(rnnfast, case, of), products(case, of is energy)


def with_projection(case: Case) -> tuple[Call, ...]:
    return tuple(gradient_penalty(library, case, critic, proj_size=HIDDEN // 2) for library in (nn, rnnfast))


def critic(output: Tensor) -> Tensor:
    """A linear head on the last step, as a critic has one."""
    return output[-1].sum()


def energy(output: Tensor) -> Tensor:
    return output.square().sum()


def forward_mode(module: nn.Module, case: Case) -> Call:
    input, tangent = data(case), data(case).flip(0)
    return lambda: jvp(lambda x: module(x)[0], (input,), (tangent,))


def loss_of(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, input: functional_call(module, parameters, (input,))[0].square().mean()


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def per_sample_gradients(case: Case) -> tuple[Call, Call]:
    """The gradient of each row of the batch by every parameter."""
    module, input = layer(rnnfast, case), data(case)
    parameters, loss = detached(module), loss_of(module)

    def looped() -> list[Tensor]:
        each = [list(grad(loss)(parameters, row.unsqueeze(1)).values()) for row in input.unbind(1)]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    return looped, lambda: list(vmap(grad(lambda p, x: loss(p, x.unsqueeze(1))), (None, 1))(parameters, input).values())


def over_inputs(case: Case) -> tuple[Call, Call]:
    module, inputs = layer(rnnfast, case), data(case, 8)

    def looped() -> Tensor:
        with torch.no_grad():
            return torch.stack([module(input)[0] for input in inputs])

    def mapped() -> Any:
        with torch.no_grad():
            return vmap(lambda x: module(x)[0])(inputs)

    return looped, mapped


def over_weights(case: Case) -> tuple[Call, Call]:
    modules, input = [layer(rnnfast, case) for _ in range(8)], data(case)
    with torch.no_grad():
        for index, module in enumerate(modules):
            for parameter in module.parameters():
                parameter += 0.01 * index
    parameters, buffers = (
        {name: value.detach() for name, value in part.items()} for part in stack_module_state(modules)
    )

    def looped() -> Tensor:
        with torch.no_grad():
            return torch.stack([module(input)[0] for module in modules])

    return looped, lambda: vmap(lambda p, b: functional_call(modules[0], (p, b), (input,))[0])(parameters, buffers)


def hessian_of(module: nn.Module, case: Case) -> Call:
    """By the inputs of one step."""
    input = data(case)
    return lambda: hessian(lambda x: module(torch.cat([x.view(1, *input.shape[1:]), input[1:]]))[0].square().sum())(
        input[0].flatten()
    )


FULL, NARROW, SMALL = Size(100, 16, HIDDEN), Size(100, 16, 32), Size(20, 2, 16)
# Of each derivative: its baseline, its sizes, and a case's calls: the baseline's, rnnfast's, and that of the products.
DERIVATIVES: dict[str, tuple[str, tuple[Size, ...], Callable[[Case], tuple[Call, ...]]]] = {
    "gradient penalty": ("torch.nn", (FULL, NARROW), lambda case: penalties(case, critic)),
    "gradient penalty, all steps": ("torch.nn", (FULL, NARROW), lambda case: penalties(case, energy)),
    "gradient penalty, projection": ("torch.nn", (FULL, NARROW), with_projection),
    "jvp": (
        "formula",
        (FULL,),
        lambda case: (
            forward_mode(layer(rnnfast, case, backend="reference"), case),
            forward_mode(layer(rnnfast, case), case),
        ),
    ),
    "per-sample gradients": ("the loop", (FULL, NARROW), per_sample_gradients),
    "vmap over 8 inputs": ("the loop", (FULL,), over_inputs),
    "vmap over 8 models": ("the loop", (FULL,), over_weights),
    "hessian": (
        "formula",
        (SMALL,),
        lambda case: (
            hessian_of(layer(rnnfast, case, backend="reference"), case),
            hessian_of(layer(rnnfast, case), case),
        ),
    ),
}


def measure(case: Case, budget: float) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    baseline, _, calls = DERIVATIVES[case.derivative]
    sides = dict(zip(("baseline", "rnnfast", "products"), calls(case), strict=False))
    difference = compare(*(tree_leaves(sides[side]()) for side in ("baseline", "rnnfast")), TOLERANCE)
    samples, seconds = in_turns(sides, case.device, budget)
    return {
        "derivative": case.derivative,
        "cell": case.cell,
        "size": str(case.size),
        "threads": case.threads,
        "device": case.device,
        "baseline": baseline,
        "difference": difference,
        "samples": samples,
        "seconds": seconds,
        "ratio": seconds["baseline"] / seconds["rnnfast"],
    }


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DERIVATIVES, default=list(DERIVATIVES), metavar="NAME")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and all cores; on CUDA 1")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for the samples of one case (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    torch.backends.cudnn.enabled = False  # its layers are differentiated once

    cases = [
        Case(name, cell, size, threads, args.device)
        for name in args.only
        for size in DERIVATIVES[name][1]
        for cell in args.cell
        if cell in ONLY_OF.get(name, CELLS)
        for threads in args.threads or (sorted({1, cores}) if args.device == "cpu" else [1])
    ]
    rows: list[dict[str, Any]] = []
    lines, mismatches = [], []
    results = {
        "commit": commit(),
        "machine": machine(args.device),
        "versions": {"torch": torch.__version__, "rnnfast": rnnfast.__version__},
        "rows": rows,
    }
    for case in tqdm(cases, unit="case", dynamic_ncols=True):
        try:
            row = measure(case, args.budget)
        except Mismatch as error:
            mismatches.append(f"{case}: {error}")
            continue
        rows.append(row)
        if args.json:  # at once, for what comes may not end
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        times = [duration(row["seconds"][side]) for side in ("baseline", "rnnfast")]
        lines.append([row["derivative"], row["cell"], row["size"], case.threads, row["baseline"], *times])
        lines[-1].append(f"{row['ratio']:.2f}")
        products_time = row["seconds"].get("products")
        lines[-1].append(f"{row['seconds']['baseline'] / products_time:.2f}" if products_time else "")
    headers = ["derivative", "cell", "size", "threads", "against", "it takes", "rnnfast", "ratio", "at most"]
    print(tabulate(lines, headers, disable_numparse=True))
    if mismatches:
        raise SystemExit("\n".join(mismatches))


if __name__ == "__main__":
    main()
