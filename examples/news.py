"""The topic of a news item: words are embedded, a recurrent network reads them, its last state or mean is classified.

    python examples/news.py                                      paragraphs of documentation: which library's?
    python examples/news.py --train FILE --test FILE --compare   AG News, beside torch.nn: same model, seed and data
    python examples/news.py --cell rnn --pool mean --rows padded an Elman network, the mean over all steps

A CSV file has no header and three columns: class, title, description. Without files the texts are the first paragraphs
of the docstrings of four libraries that the examples need anyway.
"""

from __future__ import annotations

import argparse
import ast
import functools
import html
import importlib.util
import re
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
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

import rnnfast

AG_NEWS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
LIBRARIES = {"Matplotlib": "matplotlib", "NumPy": "numpy", "pandas": "pandas", "scikit-learn": "sklearn"}
ENTITY = re.compile(r"[\s&]?(#\d+|quot|amp|lt|gt);")  # most in AG News have lost the & before them, and gained a space
TAG = re.compile(r"<[^>]*>")

# ------------------------------------------------------------------------------------------------------------- texts


def read_csv(option: str, path: Path) -> pandas.DataFrame:
    """The class and the text of every row."""
    try:
        table = pandas.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise SystemExit(f"error: {option} {path} cannot be read: {error}") from None
    if table.shape[1] != 3:
        raise SystemExit(f"error: {option} {path} has {table.shape[1]} columns; takes 3: class, title, description")
    text = table[1] + " " + table[2].str.replace("\\", " ")
    text = text.map(lambda text: TAG.sub(" ", html.unescape(ENTITY.sub(r"&\1;", text))))
    return pandas.DataFrame({"topic": table[0], "text": text})


@functools.cache
def docstrings() -> pandas.DataFrame:
    """The first paragraphs of the libraries' docstrings, without the libraries' names."""
    names = re.compile("|".join(LIBRARIES.values()) + "|scikit|mpl", re.IGNORECASE)
    rows: dict[str, str] = {}
    for topic, library in LIBRARIES.items():
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise SystemExit(f"error: {library} is not installed; give --train and --test")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if {"tests", "testing", "_vendor"} & set(path.relative_to(Path(spec.origin).parent).parts):
                continue
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                    if len(paragraph.split()) >= 6:
                        rows.setdefault(names.sub("", paragraph), topic)
    return pandas.DataFrame({"topic": rows.values(), "text": rows.keys()})


@dataclass
class Texts:
    """Rows of words as numbers, 0 for a word outside the vocabulary and for padding."""

    codes: Tensor  # [rows, words]
    lengths: Tensor  # [rows], on the CPU
    topics: Tensor  # [rows]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [T, B], T being the longest row's length, lengths [B], topics [B]."""
        lengths = self.lengths[rows]
        return self.codes[rows, : int(lengths.max())].t(), lengths, self.topics[rows]


def encode(table: pandas.DataFrame, words: CountVectorizer, topics: Sequence[str], limit: int, device: Any) -> Texts:
    analyze, index = words.build_analyzer(), words.vocabulary_
    rows = [[index.get(word, -1) + 1 for word in analyze(text)[:limit]] or [0] for text in table["text"]]
    codes = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    labels = torch.tensor([topics.index(topic) for topic in table["topic"]])
    return Texts(codes.to(device), torch.tensor([len(row) for row in rows]), labels.to(device))


def load(args: argparse.Namespace) -> tuple[Texts, Texts, CountVectorizer, list[str], int]:
    """Training and test texts, the vocabulary, the topics, and a fingerprint of all."""
    if args.train:
        tables = [read_csv("--train", args.train), read_csv("--test", args.test)]
    else:
        table = docstrings()
        tables = train_test_split(table, test_size=0.2, random_state=0, stratify=table["topic"])
    topics = sorted(set(tables[0]["topic"]))
    unknown = set(tables[1]["topic"]) - set(topics)
    if unknown:
        raise SystemExit(f"error: --test {args.test} has classes that --train has not: {', '.join(sorted(unknown))}")
    if len(topics) < 2:
        raise SystemExit(f"error: --train {args.train} has one class only: {topics[0]}")
    words = CountVectorizer(max_features=args.vocabulary, token_pattern=r"\w+|[$!?]")
    try:
        words.fit(tables[0]["text"])
    except ValueError as error:
        raise SystemExit(f"error: --train {args.train} has no words: {error}") from None
    device = pick_device(args.device)
    training, test = (encode(table, words, topics, args.words, device) for table in tables)
    fingerprint = zlib.crc32("\n".join([*tables[0]["text"], *tables[1]["text"]]).encode())
    return training, test, words, topics, fingerprint


# ------------------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Codes [T, B] and lengths [B] -> logits [B, topics]."""

    def __init__(self, library: ModuleType, vocabulary: int, topics: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.rows, self.pool = args.rows, args.pool
        if library is nn and self.rows == "lengths":
            self.rows = "packed"  # which is how torch.nn is told of lengths
        self.embedding = nn.Embedding(vocabulary, args.embedding)
        options = {"num_layers": args.layers, "bidirectional": args.bidirectional}
        self.rnn = recurrent(library, args.cell, args.embedding, args.hidden, **options)
        self.word_dropout = nn.Dropout1d(args.dropout)
        self.dropout = nn.Dropout(args.dropout)
        self.readout = nn.Linear(args.hidden * (2 if args.bidirectional else 1), topics)

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        embedded = self.word_dropout(self.embedding(codes))
        if self.rows == "packed":
            output, state = self.rnn(pack(embedded, lengths))
        elif self.rows == "lengths":
            output, state = self.rnn(embedded, lengths=lengths.to(codes.device))
        else:
            output, state = self.rnn(embedded)
            lengths = torch.full_like(lengths, len(codes))  # it reads the padding like words
        if self.pool == "last":
            features = last_state(self.rnn, state)
        else:
            output = pad_packed_sequence(output)[0] if self.rows == "packed" else output
            features = output.sum(0) / lengths.to(output.device).unsqueeze(1)
        return self.readout(self.dropout(features))


class NewsRun(EpochRun):
    unit = "text"
    measures = ("loss", "training_accuracy")

    def __init__(self, model: Classifier, training: Texts, test: Texts, args: argparse.Namespace) -> None:
        super().__init__(model, len(training.lengths), args)
        self.training, self.test = training, test

    def losses(self, rows: Tensor) -> tuple[Tensor, ...]:
        codes, lengths, topics = self.training.batch(rows)
        logits = self.model(codes, lengths)
        return F.cross_entropy(logits, topics), (logits.argmax(1) == topics).double().mean()

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """The topic of every test text."""
        self.model.eval()
        predicted = [
            self.model(*self.test.batch(rows)[:2]).argmax(1) for rows in torch.arange(len(self.test.lengths)).split(256)
        ]
        self.model.train()
        return torch.cat(predicted)

    def evaluate(self) -> dict[str, float]:
        return {"test_accuracy": (self.predictions() == self.test.topics).double().mean().item()}


# --------------------------------------------------------------------------------------------------------- programme


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="CSV", help="default: paragraphs of documentation")
    parser.add_argument("--test", type=Path, metavar="CSV", help="goes with --train")

    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="default: %(default)s")
    model.add_argument("--pool", choices=("last", "mean"), default="last", help="state or mean; default: %(default)s")
    model.add_argument(
        "--rows",
        choices=("packed", "lengths", "padded"),
        default="packed",
        help="how a batch is handed over: as a PackedSequence, padded with lengths= (torch.nn packs), "
        "or padded without a word on lengths; default: %(default)s",
    )
    model.add_argument("--bidirectional", action="store_true")
    model.add_argument("--layers", type=positive, default=1, metavar="N", help="default: %(default)s")
    model.add_argument("--hidden", type=positive, default=64, metavar="N", help="units; default: %(default)s")
    model.add_argument("--embedding", type=positive, default=64, metavar="N", help="features; default: %(default)s")
    model.add_argument(
        "--dropout", type=fraction, default=0.4, metavar="P", help="of words and features; default: %(default)s"
    )
    model.add_argument(
        "--vocabulary", type=positive, default=20_000, metavar="N", help="the most frequent words; default: %(default)s"
    )
    model.add_argument("--words", type=positive, default=100, metavar="N", help="of a text; default: %(default)s")
    training_arguments(parser, "news", epochs=10, batch=32, lr=3e-3)

    args = parser.parse_args(argv)
    if (args.train is None) != (args.test is None):
        parser.error("--train and --test go together")
    return args


def prepare(args: argparse.Namespace) -> tuple[dict[str, NewsRun], dict[str, Any], list[str]]:
    """The runs, the settings that a checkpoint must share with them, and the topics."""
    training, test, words, topics, fingerprint = load(args)
    vocabulary = len(words.vocabulary_) + 1

    def run(library: ModuleType) -> NewsRun:
        seed_everything(args.seed)
        return NewsRun(
            Classifier(library, vocabulary, len(topics), args).to(training.codes.device), training, test, args
        )

    runs = {"rnnfast": run(rnnfast)}
    if args.compare:
        runs["torch.nn"] = run(nn)
    others = ("train", "test", "out", "resume", "device")
    settings = {key: value for key, value in vars(args).items() if key not in others} | {"texts": fingerprint}
    print(
        f"{len(training.lengths):,} texts, {len(test.lengths):,} to test; {len(topics)} topics, {vocabulary:,} words; "
        f"{args.cell}, {args.layers} x {args.hidden} units on {training.codes.device}"
    )
    return runs, settings, topics


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, settings, topics = prepare(args)
    train(runs, args.epochs, settings, args.resume, args.out)

    names = [AG_NEWS[topic] for topic in topics] if topics == list(AG_NEWS) else topics
    ours = runs["rnnfast"]
    truth, predicted = ours.test.topics.cpu(), ours.predictions().cpu()
    parts = {"training_accuracy": "training", "test_accuracy": "test"}
    plot_reports(args.out / "accuracy.png", runs, parts, "accuracy")
    plot_confusion(args.out / "confusion.png", truth, predicted, names)
    print(f"\n{args.out}: accuracy.png, confusion.png, and the trained model in checkpoint.pt\n")
    labels = range(len(names))
    print(classification_report(truth, predicted, labels=labels, target_names=names, digits=3, zero_division=0))
    print_reports(runs, {"loss": ".4f", "training_accuracy": ".3f", "test_accuracy": ".3f"})


if __name__ == "__main__":
    main()
