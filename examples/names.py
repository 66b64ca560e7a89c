"""The language of a surname, read letter by letter.

    python examples/names.py                              surnames of 18 languages from the Faker package
    python examples/names.py --data FOLDER --compare      one file a language, beside torch.nn
    python examples/names.py --baseline                   beside one name at a time through a cell written in Python
    python examples/names.py --resume --predict Dubois    the trained model's three likeliest languages

A folder has one text file a language, LANGUAGE.txt, with a name a line.
"""

from __future__ import annotations

import argparse
import string
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from common import (
    EpochRun,
    Run,
    fraction,
    last_state,
    pack,
    pick_device,
    plot_confusion,
    plot_reports,
    positive,
    print_reports,
    recurrent,
    seed_everything,
    train,
    training_arguments,
)
from faker import Faker
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

LETTERS = string.ascii_letters + " '-"
LOCALES = {
    "Azerbaijani": "az_AZ",
    "Croatian": "hr_HR",
    "Czech": "cs_CZ",
    "Dutch": "nl_NL",
    "English": "en_GB",
    "Estonian": "et_EE",
    "Finnish": "fi_FI",
    "French": "fr_FR",
    "German": "de_DE",
    "Indonesian": "id_ID",
    "Irish": "ga_IE",
    "Italian": "it_IT",
    "Latvian": "lv_LV",
    "Polish": "pl_PL",
    "Slovene": "sl_SI",
    "Spanish": "es_ES",
    "Swedish": "sv_SE",
    "Zulu": "zu_ZA",
}
BASELINE_NAMES = 1000

# ------------------------------------------------------------------------------------------------------------- names


def to_ascii(name: str) -> str:
    """Letters without their accents; whatever is no letter, space, apostrophe or hyphen even then is left out."""
    decomposed = unicodedata.normalize("NFKD", name.replace("ß", "ss").translate(str.maketrans("łŁøØđĐı", "lLoOdDi")))
    return "".join(letter for letter in decomposed if letter in LETTERS).strip()


def read_names(folder: Path | None) -> dict[str, list[str]]:
    """Every language's names in ASCII, each once: a name on both sides of a split would be no test."""
    raw: dict[str, list[str]] = {}
    if folder is None:
        for language, locale in LOCALES.items():
            fake = Faker(locale)
            fake.seed_instance(0)
            raw[language] = [fake.last_name() for _ in range(4000)]
    else:
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise SystemExit(f"error: --data {folder} has no file LANGUAGE.txt, or is no folder")
        for path in files:
            try:
                raw[path.stem] = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SystemExit(f"error: --data: {path} cannot be read: {error}") from None
    names = {language: sorted(set(map(to_ascii, lines)) - {""}) for language, lines in raw.items()}
    for language, distinct in names.items():
        if len(distinct) < 5:
            raise SystemExit(f"error: --data {folder}: {language} has {len(distinct)} distinct names; takes 5 or more")
    if len(names) < 2:
        raise SystemExit(f"error: --data {folder} has one language only: {next(iter(names))}")
    return names


class Names:
    """Names as numbers: codes [T, rows], 0 past a name's end, lengths [rows], on the CPU, and languages [rows]."""

    def __init__(self, names: Sequence[str], languages: Sequence[int], device: torch.device) -> None:
        codes = [torch.tensor([LETTERS.index(letter) + 1 for letter in name]) for name in names]
        self.codes = nn.utils.rnn.pad_sequence(codes).to(device)
        self.lengths = torch.tensor([len(name) for name in names])
        self.languages = torch.tensor(languages, device=device)


def split(names: dict[str, list[str]], device: torch.device) -> tuple[Names, Names]:
    """Four fifths of every language for training, the rest to test."""
    languages = [i for i, distinct in enumerate(names.values()) for _ in distinct]
    everything = [name for distinct in names.values() for name in distinct]
    parts = train_test_split(everything, languages, test_size=0.2, random_state=0, stratify=languages)
    return Names(parts[0], parts[2], device), Names(parts[1], parts[3], device)


# ------------------------------------------------------------------------------------------------------------- model


class NameModel(nn.Module):
    """Codes [T, B] and lengths [B] -> logits [B, languages], read off the state after each name's last letter."""

    def __init__(self, library: ModuleType, languages: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.takes_lengths = library is rnnfast
        self.embedding = nn.Embedding(len(LETTERS) + 1, args.embedding)
        self.rnn = recurrent(library, args.cell, args.embedding, args.hidden, num_layers=args.layers)
        self.dropout = nn.Dropout(args.dropout)
        self.readout = nn.Linear(args.hidden, languages)

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        input = self.embedding(codes)
        if self.takes_lengths:
            _, state = self.rnn(input, lengths=lengths.to(codes.device))
        else:
            _, state = self.rnn(pack(input, lengths))
        return self.readout(self.dropout(last_state(self.rnn, state)))


class NameRun(EpochRun):
    """Rare languages count as much as frequent ones: their names weigh more in the loss."""

    unit = "name"

    def __init__(self, model: NameModel, training: Names, test: Names, args: argparse.Namespace) -> None:
        super().__init__(model, len(training.lengths), args)
        self.training, self.test = training, test
        languages = training.languages.cpu().numpy()
        weights = compute_class_weight("balanced", classes=numpy.unique(languages), y=languages)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def losses(self, rows: Tensor) -> tuple[Tensor, ...]:
        names, lengths = self.training, self.training.lengths[rows]
        logits = self.model(names.codes[: int(lengths.max()), rows], lengths)
        return (F.cross_entropy(logits, names.languages[rows], self.weights),)

    @torch.no_grad()
    def test_logits(self) -> Tensor:
        self.model.eval()
        logits = self.model(self.test.codes, self.test.lengths)
        self.model.train()
        return logits

    def evaluate(self) -> dict[str, float]:
        logits, truth = self.test_logits(), self.test.languages
        return {
            "test_loss": F.cross_entropy(logits, truth, self.weights).item(),
            "accuracy": accuracy_score(truth.cpu(), logits.argmax(1).cpu()),
            "mean_recall": balanced_accuracy_score(truth.cpu(), logits.argmax(1).cpu()),
        }


class PlainModel(nn.Module):
    """The cell as one writes it first: letter and state joined, one linear layer for the state, one for the answer."""

    def __init__(self, languages: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(LETTERS) + 1 + hidden, hidden)
        self.readout = nn.Linear(hidden, languages)

    def forward(self, letters: Tensor) -> Tensor:
        state = letters.new_zeros(1, self.hidden.out_features)
        for letter in letters.split(1):
            state = torch.tanh(self.hidden(torch.cat((letter, state), 1)))
        return self.readout(state)


class BaselineRun(Run):
    """One name at a time through ``PlainModel``, plain SGD."""

    unit = "name"

    def __init__(self, names: Names, languages: int, hidden: int) -> None:
        self.names = names
        model = PlainModel(languages, hidden).to(names.codes.device)
        super().__init__(model, BASELINE_NAMES, 1, torch.optim.SGD(model.parameters(), lr=0.005))

    def update(self) -> Tensor:
        row = torch.randint(len(self.names.lengths), (), generator=torch.Generator().manual_seed(self.updates))
        codes = self.names.codes[: int(self.names.lengths[row]), row]
        loss = F.cross_entropy(
            self.model(F.one_hot(codes, len(LETTERS) + 1).float()), self.names.languages[row].view(1)
        )
        self.descend(loss)
        return loss.detach()


# --------------------------------------------------------------------------------------------------------- programme


def print_recalls(run: NameRun, predicted: Tensor, languages: Sequence[str]) -> None:
    truth = run.test.languages.cpu()
    recalls = recall_score(truth, predicted, average=None)
    counts = run.training.languages.bincount().tolist(), truth.bincount().tolist()
    rows = zip(languages, *counts, (f"{recall:.3f}" for recall in recalls), strict=True)
    print(tabulate(rows, ["language", "trained on", "tested on", "recall"], disable_numparse=True))


@torch.no_grad()
def print_predictions(model: NameModel, names: Sequence[str], languages: Sequence[str], device: torch.device) -> None:
    model.eval()
    rows = Names([to_ascii(name) for name in names], [0] * len(names), device)
    for name, probabilities in zip(names, model(rows.codes, rows.lengths).softmax(1), strict=True):
        likeliest = probabilities.topk(min(3, len(languages)))
        guesses = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        print(f"{name}: " + ", ".join(f"{languages[i]} {probability:.0%}" for i, probability in guesses))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of LANGUAGE.txt; default: Faker's surnames")
    parser.add_argument("--predict", nargs="+", metavar="NAME", help="then print the three likeliest languages of each")
    parser.add_argument(
        "--baseline", action="store_true", help=f"beside it, {BASELINE_NAMES} names one at a time in plain Python"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="default: %(default)s")
    model.add_argument("--layers", type=positive, default=1, metavar="N", help="default: %(default)s")
    model.add_argument("--hidden", type=positive, default=64, metavar="N", help="units; default: %(default)s")
    model.add_argument("--embedding", type=positive, default=32, metavar="N", help="features; default: %(default)s")
    model.add_argument("--dropout", type=fraction, default=0.5, metavar="P", help="of features; default: %(default)s")
    training_arguments(parser, "names", epochs=12, batch=128, lr=5e-3)
    args = parser.parse_args(argv)
    unreadable = [name for name in args.predict or () if not to_ascii(name)]
    if unreadable:
        parser.error(f"--predict takes names with Latin letters, got {', '.join(unreadable)}")
    return args


def prepare(args: argparse.Namespace) -> tuple[dict[str, Run], dict[str, Any], list[str]]:
    """The runs, the settings that a checkpoint must share with them, and the languages."""
    device = pick_device(args.device)
    names = read_names(args.data)
    training, test = split(names, device)

    def run(library: ModuleType) -> NameRun:
        seed_everything(args.seed)
        return NameRun(NameModel(library, len(names), args).to(device), training, test, args)

    runs: dict[str, Run] = {"rnnfast": run(rnnfast)}
    if args.compare:
        runs["torch.nn"] = run(nn)
    if args.baseline:
        runs["one at a time"] = BaselineRun(training, len(names), args.hidden)
    others = ("data", "out", "resume", "device", "predict")
    settings = {key: value for key, value in vars(args).items() if key not in others}
    settings["names"] = zlib.crc32(repr(names).encode())
    print(
        f"{len(training.lengths):,} names, {len(test.lengths):,} to test, {len(names)} languages; "
        f"{args.cell}, {args.layers} x {args.hidden} units on {device}"
    )
    return runs, settings, list(names)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, settings, languages = prepare(args)
    train(runs, args.epochs, settings, args.resume, args.out)

    ours = runs["rnnfast"]
    predicted = ours.test_logits().argmax(1).cpu()
    plot_reports(args.out / "loss.png", runs, {"loss": "training", "test_loss": "test"}, "cross-entropy, weighted")
    plot_confusion(args.out / "confusion.png", ours.test.languages.cpu(), predicted, languages)
    print(f"\n{args.out}: loss.png, confusion.png, and the trained model in checkpoint.pt\n")
    print_recalls(ours, predicted, languages)
    print("\nmean recall: over the languages")
    print_reports(runs, {"loss": ".4f", "test_loss": ".4f", "accuracy": ".3f", "mean_recall": ".3f"})
    if args.predict:
        print()
        print_predictions(ours.model, args.predict, languages, ours.device)


if __name__ == "__main__":
    main()
