"""examples/names.py, run as a user runs it, on invented names of three languages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from examples_as_run import Application, figures

import rnnfast

ENDINGS = {"Alphan": ["ski", "czyk"], "Betan": ["elli", "ino"], "Gamman": ["sson", "berg"]}
SMALL = ["--hidden", "12", "--embedding", "8", "--batch", "16", "--dropout", "0.1", "--lr", "0.02"]


def write_names(folder: Path) -> Path:
    """The first language has most names, the last the fewest, and every name stands there twice."""
    draw = random.Random(1)
    folder.mkdir()
    for count, (language, endings) in zip((60, 30, 15), ENDINGS.items(), strict=True):
        names = ["".join(draw.choices("aeiouklmnrt", k=draw.randint(1, 6))) for _ in range(count)]
        lines = [name.capitalize() + draw.choice(endings) for name in names]
        (folder / f"{language}.txt").write_text("\n".join(lines * 2) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def names(tmp_path, monkeypatch):
    return Application("names", ["--data", str(write_names(tmp_path / "data")), *SMALL], tmp_path, monkeypatch)


@pytest.mark.parametrize(("cell", "layers"), [("lstm", "1"), ("gru", "2"), ("rnn", "1")])
def test_trains_beside_torch(names, capsys, cell, layers):
    """Lengths here, packed there: the same losses in both columns, and they fall."""
    runs = names.run("--cell", cell, "--layers", layers, "--epochs", "3", "--compare")
    ours, theirs = runs["rnnfast"], runs["torch.nn"]
    for figure in ("loss", "test_loss"):
        assert figures(ours, figure) == pytest.approx(figures(theirs, figure), rel=1e-3)
    assert figures(ours, "loss")[-1] < figures(ours, "loss")[0] - 0.1
    assert names.is_picture("loss.png")
    assert names.is_picture("confusion.png")
    out = capsys.readouterr().out
    assert "times the speed of torch.nn" in out
    recalls = [line.split() for line in out.splitlines() if line.startswith(tuple(ENDINGS))]
    assert [row[0] for row in recalls] == list(ENDINGS)
    mean = sum(float(row[3]) for row in recalls) / 3
    assert mean == pytest.approx(figures(ours, "mean_recall")[-1], abs=1e-3)


def test_learns_the_languages_and_predicts(names, capsys):
    runs = names.run("--epochs", "12", "--baseline", "--predict", "Tomaelli", "Łukarówski")
    assert figures(runs["rnnfast"], "mean_recall")[-1] > 0.9
    assert runs["one at a time"]["updates"] == names.module.BASELINE_NAMES
    assert figures(runs["one at a time"], "loss")[-1] < figures(runs["one at a time"], "loss")[0]
    out = capsys.readouterr().out
    assert "times the speed of one at a time" in out
    predictions = dict(line.split(": ") for line in out.splitlines()[-2:])
    assert predictions["Tomaelli"].startswith("Betan")
    assert predictions["Łukarówski"].startswith("Alphan")
    assert all(line.count("%") == 3 for line in predictions.values())


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(names):
    names.check_resuming("--epochs", "2", "--compare", "--baseline")


def test_names_in_ascii(names):
    assert [names.module.to_ascii(name) for name in ("Ślusàrski", "O'Néàl", "Strauß", "Søndergård", "孙", "Đặng ")] == [
        "Slusarski",
        "O'Neal",
        "Strauss",
        "Sondergard",
        "",
        "Dang",
    ]


def test_no_name_is_on_both_sides_of_the_split(names, tmp_path):
    by_language = names.module.read_names(tmp_path / "data")
    training, test = names.module.split(by_language, torch.device("cpu"))
    assert len(training.lengths) + len(test.lengths) == sum(map(len, by_language.values()))

    def rows(part):
        pairs = zip(part.codes.t().tolist(), part.languages.tolist(), strict=True)
        return {(*codes, language) for codes, language in pairs}

    width = len(training.codes)
    assert len(test.codes) <= width
    test.codes = torch.nn.functional.pad(test.codes, (0, 0, 0, width - len(test.codes)))
    assert not rows(training) & rows(test)
    assert len(rows(training)) == len(training.lengths)
    assert test.languages.bincount().tolist() == pytest.approx([len(n) / 5 for n in by_language.values()], abs=1)


@pytest.mark.parametrize("library", [rnnfast, torch.nn], ids=["rnnfast", "torch.nn"])
def test_a_name_alone_is_classified_as_in_a_batch(names, library):
    args = names.module.parse_arguments(names.arguments)
    model = names.module.NameModel(library, 3, args).eval()
    rows = names.module.Names(["ab", "cdefg", "h"], [0, 1, 2], torch.device("cpu"))
    alone = [names.module.Names([name], [0], torch.device("cpu")) for name in ("ab", "cdefg", "h")]
    expected = torch.cat([model(row.codes, row.lengths) for row in alone])
    torch.testing.assert_close(model(rows.codes, rows.lengths), expected)


def test_default_names(names):
    by_language = names.module.read_names(None)
    assert len(by_language) == 18
    assert sum(map(len, by_language.values())) > 8000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no file LANGUAGE.txt"),
        ({"A.txt": b"\xff\xfe\xfa"}, r"A.txt cannot be read"),
        ({"A.txt": b"a\na\nA\nb\nc\nb\n"}, "A has 4 distinct names"),
        ({"A.txt": b"a\nb\nc\nd\ne\n"}, "one language only"),
    ],
)
def test_unusable_files(names, tmp_path, files, message):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        names.run("--data", str(folder))


@pytest.mark.parametrize("arguments", [["--predict", "孙"], ["--cell", "gated"], ["--epochs", "0"]])
def test_impossible_arguments(names, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        names.module.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
