"""Trains programs that other people wrote with torch.nn's layers and, under rnnfast.patch_torch(), with rnnfast's.

    pip install --no-build-isolation ".[programs]"
    python benchmarks/programs.py --json FILE

Not a line of them is changed. RecurrentPPO of sb3-contrib learns CartPole with an LSTM policy: single steps when it
plays, sequences that are cut where an episode ends when it trains. DeepAR of GluonTS forecasts a seasonal series with a
stack of LSTMs. Both sides start from one seed and are compared by what they train to before their seconds are told.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import commit, machine
from tabulate import tabulate

import rnnfast

TOLERANCE = 1e-3  # of the numbers trained to, relative: rounding differs, and training lets it grow


@dataclass(frozen=True)
class Run:
    seconds: float  # of training alone
    numbers: list[float]  # what came of it: rewards of episodes, losses of batches
    layers: set[str]  # the modules that the model's recurrent layers come from


def recurrent_ppo(steps: int = 2048) -> Run:
    from sb3_contrib import RecurrentPPO

    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=128, batch_size=128, n_epochs=4, seed=0, device="cpu")
    seconds = timed(lambda: model.learn(steps))
    return Run(seconds, [float(episode["r"]) for episode in model.ep_info_buffer], layers_of(model.policy))


def deepar(epochs: int = 2) -> Run:
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator
    from lightning.pytorch.callbacks import Callback

    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    noise = np.random.default_rng(0)
    hours = np.arange(400)
    series = [10 + 5 * np.sin(hours * 2 * np.pi / 24) + noise.normal(size=len(hours)) for _ in range(20)]
    data = ListDataset([{"start": "2020-01-01", "target": target} for target in series], freq="h")
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  what GluonTS draws from
    random.seed(0)
    losses: list[float] = []
    layers: set[str] = set()

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            layers.update(layers_of(module))

    with tempfile.TemporaryDirectory() as folder:
        estimator = DeepAREstimator(
            freq="h",
            prediction_length=24,
            context_length=96,
            hidden_size=64,
            num_layers=2,
            batch_size=32,
            num_batches_per_epoch=20,
            dropout_rate=0.0,
            trainer_kwargs={
                "max_epochs": epochs,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": False,
                "default_root_dir": folder,
                "callbacks": [Record()],
            },
        )
        seconds = timed(lambda: estimator.train(data))
    return Run(seconds, losses, layers)


PROGRAMS: dict[str, Callable[[], Run]] = {"RecurrentPPO (sb3-contrib)": recurrent_ppo, "DeepAR (GluonTS)": deepar}


def timed(train: Callable[[], Any]) -> float:
    start = time.perf_counter()
    train()
    return time.perf_counter() - start


def layers_of(model: torch.nn.Module) -> set[str]:
    recurrent = (module for module in model.modules() if isinstance(module, torch.nn.RNNBase))
    return {type(module).__module__.partition(".")[0] for module in recurrent}


def both(program: Callable[[], Run]) -> tuple[Run, Run]:
    """The program with torch.nn's layers and with rnnfast's. Raises RuntimeError if it does not train to the same."""
    runs = []
    for patched in (False, True):
        with warnings.catch_warnings(), rnnfast.patch_torch() if patched else nullcontext():
            warnings.simplefilter("ignore")
            runs.append(program())
    theirs, ours = runs
    if (theirs.layers, ours.layers) != ({"torch"}, {"rnnfast"}):
        raise RuntimeError(f"the layers are {theirs.layers} and {ours.layers}, expected torch's and rnnfast's")
    if not theirs.numbers or not np.allclose(ours.numbers, theirs.numbers, rtol=TOLERANCE, atol=0):
        raise RuntimeError(f"training went another way: {ours.numbers} with rnnfast, {theirs.numbers} with torch.nn")
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each program on each side (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1, for the layers are small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, every run's seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for name, program in PROGRAMS.items():
        runs = [both(program) for _ in range(args.repeat)]
        seconds = {"torch.nn": [theirs.seconds for theirs, _ in runs], "rnnfast": [ours.seconds for _, ours in runs]}
        ratio = statistics.median(theirs.seconds / ours.seconds for theirs, ours in runs)
        rows.append({"program": name, "seconds": seconds, "ratio": ratio, "last": runs[0][1].numbers[-1]})
    table = [
        [row["program"], *(statistics.median(row["seconds"][side]) for side in ("torch.nn", "rnnfast")), row["ratio"]]
        for row in rows
    ]
    print(tabulate(table, headers=["program", "torch.nn, s", "rnnfast, s", "ratio"], floatfmt=".2f"))
    if args.json:
        args.json.write_text(
            json.dumps({"commit": commit(), **machine("cpu"), "threads": args.threads, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
