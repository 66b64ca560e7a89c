"""examples/char_lm.py, run as a user runs it, on a text of a few hundred characters."""

import importlib
import signal
import subprocess
import sys
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch

import rnnfast

EXAMPLES = Path(__file__).parent.parent / "examples"
SENTENCE = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. "
SMALL = ["--hidden", "12", "--embedding", "6", "--batch", "4", "--steps", "16", "--sample", "30"]


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.set_num_threads(1)  # nothing here is large enough for two
    return importlib.import_module("char_lm")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 12)
    return path


@pytest.fixture
def run(char_lm, text, tmp_path):
    """Runs the example with its output in a directory of the test; returns the runs of its checkpoint."""

    def run(*arguments, out="out"):
        char_lm.main(["--text", str(text), "--out", str(tmp_path / out), *arguments])
        return torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["runs"]

    return run


def losses(run):
    return [report["loss"] for report in run["reports"]]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_sigmoid"])
def test_trains_beside_torch(run, capsys, cell):
    """Same seed, data and model: the same losses in both columns, and they fall."""
    runs = run(*SMALL, "--cell", cell, "--epochs", "3", "--compare")
    ours, theirs = runs["rnnfast"], runs["torch.nn"]
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)
    assert len(losses(ours)) == 3
    assert losses(ours)[-1] < losses(ours)[0] - 0.1
    held_out = [[report["held_out"] for report in side["reports"]] for side in (ours, theirs)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)

    lines = capsys.readouterr().out.splitlines()
    assert "times the speed of torch.nn" in lines[-1]
    header = next(index for index, line in enumerate(lines) if line.split() == ["rnnfast", "torch.nn"] * 3)
    rows = [line.split() for line in lines[header + 2 : header + 5]]
    assert [float(row[1]) for row in rows] == pytest.approx(losses(ours), abs=1e-4)
    assert [float(row[2]) for row in rows] == pytest.approx(losses(theirs), abs=1e-4)


def test_two_processes_train_as_one(run, text, tmp_path):
    """Half of the columns each, and the same losses; a second call goes on from both checkpoints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(EXAMPLES / "char_lm.py")]
    arguments = ["--text", str(text), *SMALL, "--out", str(tmp_path / "two"), "--epochs", "2"]
    for resume in ([], ["--resume"]):
        done = subprocess.run([*torchrun, *arguments, *resume], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["runs"]
    one = run(*SMALL, "--epochs", "2")
    assert losses(two["rnnfast"]) == pytest.approx(losses(one["rnnfast"]), rel=1e-4)
    states = [
        torch.load(path, weights_only=True)["runs"]["rnnfast"]["state"] for path in (tmp_path / "two").rglob("*.pt")
    ]
    assert [tuple(h.shape) for h, _ in states] == [(1, 2, 12)] * 2

    odd = [*torchrun, *arguments, "--batch", "3"]
    done = subprocess.run(odd, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: 2 processes take a --batch that they divide, got 3" in done.stderr


def test_leaves_a_curve_and_a_sample(run, tmp_path, capsys):
    run(*SMALL, "--epochs", "1", "--layers", "2", "--prompt", "the dog")
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    sample = capsys.readouterr().out.split("sample, after 'the dog':\n")[1]
    assert sample.startswith("the dog")
    assert len(sample.split("\n\n")[0]) == len("the dog") + 30


def test_samples_in_single_steps_beside_torch(run, capsys):
    run(*SMALL, "--epochs", "1", "--embedding", "0", "--layers", "2", "--cell", "gru")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("drawn in single steps"))
    assert "rnnfast" in line
    assert line.count("characters/s") == 2


def test_sampling_draws_what_one_pass_over_the_text_would(char_lm):
    """Every drawn character is among the likeliest that the model gives after all before it; one of one is greedy."""
    model = char_lm.CharModel(rnnfast, "lstm", 9, 0, 8, 2)
    prompt = torch.tensor([1, 2, 3])
    for top_k in (1, 3, 0):
        codes = list(islice(char_lm.sample(model, prompt, 1.5, top_k, seed=4), 40))
        logits, _ = model(torch.cat((prompt, torch.tensor(codes)))[:, None])
        ranks = [int((step > step[code]).sum()) for step, code in zip(logits[2:-1, 0], codes, strict=True)]
        assert max(ranks) < (top_k or 9)
        if top_k != 1:
            assert max(ranks) > 0
        if not top_k:
            assert max(ranks) > 3
    cold = list(islice(char_lm.sample(model, prompt, 1e-4, 0, seed=4), 40))
    assert cold == list(islice(char_lm.sample(model, prompt, 1.0, 1, seed=5), 40))


def test_held_out_loss_is_that_of_a_plain_loop(char_lm):
    """Bits per character over columns, in windows with the state carried, equal one pass over each column alone."""
    torch.manual_seed(0)
    model = char_lm.CharModel(torch.nn, "gru", 7, 3, 5, 1)
    codes = torch.randint(7, (600, 2))
    expected = 0.0
    for column in codes.t():
        logits, _ = model(column[:-1, None])
        expected -= logits[:, 0].log_softmax(1).gather(1, column[1:, None]).sum().item()
    expected /= 2 * 599 * torch.log(torch.tensor(2.0)).item()
    assert char_lm.held_out_bits(model, codes) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "mode", [[*SMALL, "--epochs", "4", "--compare"], ["--online", "--hidden", "8", "--epochs", "2"]]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(run, char_lm, tmp_path, monkeypatch, capsys, mode):
    monkeypatch.setattr(char_lm.Run, "slice_updates", 5)  # in the middle of the text
    monkeypatch.setattr(char_lm.OnlineRun, "slice_updates", 100)
    whole = run(*mode, out="whole")

    advance = char_lm.Run.advance

    def interrupted_advance(self, updates):
        signal.raise_signal(signal.SIGINT)  # in the first slice
        monkeypatch.setattr(char_lm.Run, "advance", advance)
        advance(self, updates)

    monkeypatch.setattr(char_lm.Run, "advance", interrupted_advance)
    with pytest.raises(SystemExit) as stop:
        run(*mode, out="parts")
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().err
    interrupted = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["runs"]
    resumed = run(*mode, "--resume", out="parts")

    for name in whole:
        assert 0 < interrupted[name]["updates"] < whole[name]["updates"]
        assert losses(resumed[name]) == losses(whole[name])
        torch.testing.assert_close(resumed[name]["model"], whole[name]["model"], rtol=0, atol=0)


def test_online_does_what_the_published_loop_does(run, capsys):
    runs = run("--online", "--compare", "--hidden", "8", "--epochs", "2")
    ours, plain = runs["rnnfast"], runs["plain loop"]
    characters = int(0.9 * len(SENTENCE) * 12) - 1
    assert (ours["updates"], plain["updates"]) == (2 * characters, characters)
    first_pass = sum(report["loss"] * report["updates"] for report in plain["reports"]) / characters
    assert losses(ours)[0] == pytest.approx(first_pass, rel=1e-4)
    assert losses(ours)[1] < losses(ours)[0]
    out = capsys.readouterr().out
    assert "of the plain loop's time" in out
    assert "difference" not in out  # from the published losses, which belong to another text


def test_online_shows_the_published_losses_of_their_text(run, char_lm, text, monkeypatch, capsys):
    monkeypatch.setattr(char_lm, "PUBLISHED_TEXT", zlib.crc32(text.read_bytes()))
    run("--online", "--hidden", "8", "--epochs", "2")
    out = capsys.readouterr().out
    assert "difference" in out
    assert f"{char_lm.PUBLISHED_LOSSES[1]:.4f}" in out


def test_presets_give_way_to_what_is_said(char_lm):
    demo = char_lm.parse_arguments(["--demo", "--hidden", "7"])
    assert (demo.compare, demo.hidden, demo.epochs) == (True, 7, char_lm.DEMO["epochs"])


def test_default_text(char_lm):
    assert len(char_lm.read_text(None)) > 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"too short", "9 characters; --batch 32 takes 640"),
        (b"\xff\xfe\xfa", "cannot be read"),
    ],
)
def test_unusable_text(char_lm, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        char_lm.main(["--text", str(path), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "ÖÄ"], "ÄÖ"),
        (["--resume"], "there is no checkpoint"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_unusable_arguments(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*SMALL, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--online", "--cell", "gru"], ["--batch", "0"], ["--lr", "-1"], ["--top-k", "-1"], ["--demo", "--online"]],
)
def test_impossible_arguments(char_lm, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        char_lm.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused(run):
    run(*SMALL, "--epochs", "1")
    with pytest.raises(SystemExit, match="hidden was 12, is 13"):
        run(*SMALL, "--epochs", "1", "--resume", "--hidden", "13")


def test_a_checkpoint_that_is_none_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"", b"no checkpoint", b"PK\x03\x04"):
        (tmp_path / "out/checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="is not a checkpoint"):
            run(*SMALL, "--resume")
    torch.save([1], tmp_path / "out/checkpoint.pt")
    with pytest.raises(SystemExit, match="is not a checkpoint"):
        run(*SMALL, "--resume")
