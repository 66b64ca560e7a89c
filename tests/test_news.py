"""examples/news.py, run as a user runs it, on forty texts of a few words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from examples_as_run import Application, figures

import rnnfast

WORDS = {
    "1": "minister border treaty vote embassy",
    "2": "match goal coach season league",
    "3": "shares profit market bank merger",
    "4": "software planet chip probe browser",
}
SMALL = ["--hidden", "8", "--embedding", "8", "--batch", "8", "--dropout", "0.1", "--lr", "0.02"]


def write_csv(path: Path, rows: int, seed: int) -> Path:
    """Texts of 2 to 12 words, four of five from their topic, in the quoting of AG News."""
    draw = random.Random(seed)
    lines = []
    for row in range(rows):
        topic = "1234"[row % 4]
        own, others = WORDS[topic].split(), " ".join(WORDS.values()).split()
        words = [draw.choice(own if draw.random() < 0.8 else others) for _ in range(draw.randint(2, 12))]
        lines.append(f'"{topic}","{words[0]} #39;s, &lt;b&gt;""{words[1]}""","{" ".join(words[2:])}"\n')
    path.write_text("".join(lines))
    return path


@pytest.fixture
def news(tmp_path, monkeypatch):
    files = [write_csv(tmp_path / "train.csv", 40, 1), write_csv(tmp_path / "test.csv", 20, 2)]
    arguments = ["--train", str(files[0]), "--test", str(files[1]), *SMALL]
    return Application("news", arguments, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "variant",
    [
        ["--cell", "rnn", "--pool", "mean", "--rows", "padded"],
        ["--cell", "lstm", "--rows", "packed"],
        ["--cell", "lstm", "--rows", "packed", "--pool", "mean", "--bidirectional"],
        ["--cell", "gru", "--rows", "lengths", "--bidirectional", "--layers", "2"],
    ],
    ids=" ".join,
)
def test_trains_beside_torch(news, capsys, variant):
    """Same seed, data and model, and the same dropout: the same losses in both columns, and they fall."""
    runs = news.run(*variant, "--epochs", "4", "--compare")
    ours, theirs = runs["rnnfast"], runs["torch.nn"]
    assert figures(ours, "loss") == pytest.approx(figures(theirs, "loss"), rel=1e-3)
    assert figures(ours, "loss")[-1] < figures(ours, "loss")[0] - 0.1
    assert figures(ours, "test_accuracy") == figures(theirs, "test_accuracy")
    assert news.is_picture("accuracy.png")
    assert news.is_picture("confusion.png")
    out = capsys.readouterr().out
    assert all(topic in out for topic in ("World", "Sports", "Business", "Sci/Tech", "precision"))
    assert "times the speed of torch.nn" in out


def test_learns_the_topics(news):
    run = news.run("--epochs", "20")["rnnfast"]
    assert figures(run, "training_accuracy")[-1] >= 0.9
    assert figures(run, "test_accuracy")[-1] >= 0.8


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("library", [rnnfast, torch.nn], ids=["rnnfast", "torch.nn"])
def test_a_text_alone_is_classified_as_in_a_batch(news, library, pool):
    """With packed rows and with lengths; and padding that is read like words does change the result."""
    codes, lengths = torch.randint(1, 30, (6, 3)), torch.tensor([6, 1, 3])
    codes[torch.arange(6)[:, None] >= lengths] = 0
    for rows in ("packed", "lengths", "padded"):
        options = [*news.arguments, "--rows", rows, "--pool", pool, "--bidirectional", "--layers", "2"]
        args = news.module.parse_arguments(options)
        torch.manual_seed(0)
        model = news.module.Classifier(library, 30, 4, args).eval()
        together = model(codes, lengths)
        alone = torch.cat([model(codes[:length, [row]], lengths[[row]]) for row, length in enumerate(lengths)])
        assert torch.allclose(together, alone, atol=1e-6) == (rows != "padded")


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(news):
    news.check_resuming("--epochs", "2", "--compare")


def test_ag_news_is_cleaned(news, tmp_path):
    path = tmp_path / "one.csv"
    path.write_text('"4","It #39;s &lt;b&gt;&amp;","a\\b  quot;c, quot;"\n')
    (text,) = news.module.read_csv("--train", path)["text"]
    assert text.split() == ["It's", "&", "a", "b", '"c,"']


def test_default_texts(news, monkeypatch):
    monkeypatch.setattr(news.module, "LIBRARIES", {"Faker": "faker", "tqdm": "tqdm"})
    table = news.module.docstrings()
    assert set(table["topic"]) == {"Faker", "tqdm"}
    assert len(table) > 50
    assert not table["text"].duplicated().any()
    assert not table["text"].str.contains("faker").any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe\xfa,,", "cannot be read"),
        (b'"1","never closed', "cannot be read"),
        (b'"1","title"\n', "has 2 columns"),
        (b'"5","a title","and text"\n', "classes that --train has not: 5"),
    ],
)
def test_unusable_files(news, tmp_path, content, message):
    path = tmp_path / "other.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        news.run("--test", str(path))


@pytest.mark.parametrize(
    ("content", "message"), [('"1","a","b"\n', "one class only"), ('"1","",""\n"2","",""\n', "has no words")]
)
def test_unusable_training_files(news, tmp_path, content, message):
    path = tmp_path / "other.csv"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        news.run("--train", str(path), "--test", str(path))


@pytest.mark.parametrize("arguments", [["--train", "a.csv"], ["--dropout", "1"], ["--hidden", "0"], ["--lr", "0"]])
def test_impossible_arguments(news, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        news.module.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
