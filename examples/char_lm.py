"""A character language model, trained on any text by truncated backpropagation through time.

    python examples/char_lm.py                          the English text that comes with every Python
    python examples/char_lm.py --text FILE --compare    beside torch.nn: same model, seed and data
    python examples/char_lm.py --text FILE --online     one update a character, see below
    torchrun --nproc-per-node=N examples/char_lm.py     the batch divided among N processes

With --online it repeats a published experiment (SimonThomine/CoursDeepLearning, "05_Rnn"): the first 50,000 characters
of Molière's dialogues, 90 % of them for training; the one-hot character joined with the state goes through one sigmoid
Elman layer of 128 units and a linear read-out; plain SGD at 0.1 after every character; the state is carried, but no
gradient goes back through it; ten passes. With --compare the loop as it was published runs beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import (
    Run,
    mean_over_processes,
    pick_device,
    plot_curves,
    positive,
    print_reports,
    processes,
    rate,
    recurrent,
    seed_everything,
    synchronize,
    train,
    training_arguments,
)
from tabulate import tabulate
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rnnfast

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_sigmoid")
DEMO = {"cell": "gru", "hidden": 128, "embedding": 64, "epochs": 5, "compare": True, "out": Path("runs/demo")}

ONLINE = {
    "cell": "rnn_sigmoid",
    "hidden": 128,
    "layers": 1,
    "embedding": 0,
    "epochs": 10,
    "batch": 1,
    "lr": 0.1,
    "out": Path("runs/online"),
}
ONLINE_CHARACTERS = 50_000
PUBLISHED_TEXT = 2572355315  # crc32 of the characters that the published losses belong to
PUBLISHED_LOSSES = (2.6395, 2.1646, 2.0085, 1.9167, 1.8444, 1.7899, 1.7492, 1.7171, 1.6879, 1.6622)


# ------------------------------------------------------------------------------------------------------------- text


class Text:
    """Characters as numbers: the first 90 % for training, the rest held out."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocabulary = sorted(set(characters))
        self.index = {character: i for i, character in enumerate(self.vocabulary)}
        codes = self.encode(characters)
        self.train, self.held_out = codes.split([int(0.9 * len(codes)), len(codes) - int(0.9 * len(codes))])

    def encode(self, characters: str) -> Tensor:
        return torch.tensor([self.index[character] for character in characters])

    def decode(self, codes: Sequence[int]) -> str:
        return "".join(self.vocabulary[code] for code in codes)


def read_text(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        # In a fixed shuffled order, so that the held-out topics are no other kind of text than the rest.
        return "\n".join(topics[name] for name in sorted(topics, key=lambda name: zlib.crc32(name.encode())))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: --text {path} cannot be read: {error}") from None


def columns(codes: Tensor, batch: int) -> Tensor:
    """Cuts a text [N] into ``batch`` consecutive pieces side by side: [N // batch, batch]."""
    length = len(codes) // batch
    return codes[: length * batch].view(batch, length).t().contiguous()


def windows(codes: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The consecutive windows of at most ``steps`` rows of columns [L, B], each with the characters to predict."""
    for begin in range(0, len(codes) - 1, steps):
        end = min(begin + steps, len(codes) - 1)
        yield codes[begin:end], codes[begin + 1 : end + 1]


# ------------------------------------------------------------------------------------------------------------ model


class SigmoidRNN(nn.RNN):
    """What torch.nn leaves one to write for a sigmoid: the Elman recurrence as a loop over steps and layers."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = list(input.new_zeros(self.num_layers, input.size(1), self.hidden_size) if hx is None else hx)
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.all_weights):
            outputs = []
            for gates in F.linear(input, w_ih, b_ih):
                state[layer] = torch.sigmoid(gates + F.linear(state[layer], w_hh, b_hh))
                outputs.append(state[layer])
            input = torch.stack(outputs)
        return input, torch.stack(state)


class CharModel(nn.Module):
    """Embedding (0: one-hot), recurrent layers, linear read-out: characters [T, B] -> logits [T, B, V], the state."""

    def __init__(
        self, library: ModuleType, cell: str, vocabulary: int, embedding: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        one_hot = nn.Embedding.from_pretrained(torch.eye(vocabulary))
        self.embedding = nn.Embedding(vocabulary, embedding) if embedding else one_hot
        if cell == "rnn_sigmoid" and library is nn:
            self.rnn: nn.Module = SigmoidRNN(embedding or vocabulary, hidden, layers)
        else:
            self.rnn = recurrent(library, cell, embedding or vocabulary, hidden, layers)
        self.readout = nn.Linear(hidden, vocabulary)

    def forward(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(self.embedding(codes), state)
        return self.readout(output), state


def detach(state: Any) -> Any:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def held_out_bits(model: CharModel, codes: Tensor) -> float:
    """The loss on columns [L, B] in bits per character, the state carried from window to window."""
    total, state = 0.0, None
    for inputs, targets in windows(codes, 256):
        logits, state = model(inputs, state)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / (len(codes) - 1) / codes.size(1) / math.log(2)


@torch.no_grad()
def sample(model: CharModel, prompt: Tensor, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Continues ``prompt`` [N] endlessly: a character drawn from the ``top_k`` likeliest (0: all) is the next step."""
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(prompt.unsqueeze(1))
    while True:
        scores = logits[-1, 0].float().cpu() / temperature
        if top_k:
            scores = scores.masked_fill(scores < scores.topk(min(top_k, len(scores))).values[-1], -math.inf)
        code = int(torch.multinomial(scores.softmax(0), 1, generator=generator))
        yield code
        logits, state = model(prompt.new_tensor([[code]]), state)


def sample_side_by_side(
    samplers: Mapping[str, Iterator[int]], length: int, device: torch.device
) -> tuple[list[int], dict[str, float]]:
    """``length`` characters of each in turns: those of the first, and every one's characters per second."""
    codes: dict[str, list[int]] = {name: [next(sampler)] for name, sampler in samplers.items()}  # reads the prompt
    seconds = dict.fromkeys(samplers, 0.0)
    for _ in range(length - 1):
        for name, sampler in samplers.items():
            start = time.perf_counter()
            codes[name].append(next(sampler))
            synchronize(device)
            seconds[name] += time.perf_counter() - start
    return next(iter(codes.values())), {name: (length - 1) / max(seconds[name], 1e-9) for name in samplers}


# --------------------------------------------------------------------------------------------------------- training


class WindowRun(Run):
    """Truncated backpropagation: one update a window of ``steps`` characters of every column, the state carried on.

    Of several processes each has columns of its own, and gradients are their mean.
    """

    def __init__(
        self, model: CharModel, codes: Tensor, held_out: Tensor, steps: int, epochs: int, learning_rate: float
    ) -> None:
        self.windows = list(windows(codes, steps))
        self.held_out = held_out
        self.replica = DistributedDataParallel(model) if processes()[1] > 1 else model
        characters = (len(codes) - 1) * codes.size(1) * processes()[1] / len(self.windows)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        super().__init__(model, epochs * len(self.windows), characters, optimizer)

    def update(self) -> Tensor:
        window = self.updates % len(self.windows)
        inputs, targets = self.windows[window]
        logits, state = self.replica(inputs, self.state if window else None)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.descend(loss)
        self.state = detach(state)
        return mean_over_processes(loss.detach())

    def evaluate(self) -> dict[str, float]:
        return {"held_out": held_out_bits(self.model, self.held_out)}


# ----------------------------------------------------------------------------------------------- one update a character


class OnlineRun(Run):
    """The published experiment on rnnfast's operators.

    Autograd's graph of a single step costs several times what the step does. So this calls the layer's forward and
    backward operators itself; what remains, the gradient of a softmax, is the probabilities less the one-hot target.
    """

    slice_updates = 500

    def __init__(self, model: CharModel, codes: Tensor, held_out: Tensor, passes: int, learning_rate: float) -> None:
        if not hasattr(torch.ops.rnnfast, "rnn_sigmoid"):
            raise SystemExit(f"error: --online calls rnnfast's operators, which are not here:\n{rnnfast.show_config()}")
        self.length = len(codes) - 1
        self.held_out = held_out
        super().__init__(model, passes * self.length, 1)
        # The published layer has one bias. Of our two, b_hh stays zero: a second one would double the learning rate.
        nn.init.zeros_(model.rnn.bias_hh_l0)
        # It also drew its weights as one matrix [H, V + H], so from a narrower range than a recurrent layer's own.
        bound = 1 / math.sqrt(model.rnn.input_size + model.rnn.hidden_size)
        for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0, model.rnn.bias_ih_l0):
            nn.init.uniform_(weight, -bound, bound)
        self.weights = [weight.detach() for weight in model.rnn.all_weights[0]]  # the parameters' memory, without graph
        self.readout = model.readout.weight.detach(), model.readout.bias.detach()
        self.one_hot = model.embedding(codes).unsqueeze(1).unbind(0)  # [1, V] each
        self.targets = codes.tolist()
        self.learning_rate = learning_rate
        self.forward = torch.ops.rnnfast.rnn_sigmoid.default
        self.backward = torch.ops.rnnfast.rnn_sigmoid_backward.default

    def update(self) -> Tensor:
        position = self.updates % self.length
        input = self.one_hot[position].unsqueeze(0)
        h0 = self.state if position else input.new_zeros(1, 1, self.model.rnn.hidden_size)
        sequence = (None, None, None)  # batch_sizes, lengths, reset
        output, h_n, _, c, saved = self.forward(input, h0, None, self.weights, *sequence, save=2)

        readout_weight, readout_bias = self.readout
        log_probabilities = F.linear(output[0], readout_weight, readout_bias).log_softmax(1)
        grad_logits = log_probabilities.exp().sub_(self.one_hot[position + 1])
        grad_output = (grad_logits @ readout_weight).unsqueeze(0)
        grad_states, wanted = (None, None, None), [False, False, False, True]  # only the weights' gradients
        layer = (input, h0, None, self.weights, *sequence)
        *_, grad_weights = self.backward(grad_output, *grad_states, *layer, output, c, saved, wanted)

        readout_weight.addmm_(grad_logits.t(), output[0], alpha=-self.learning_rate)
        readout_bias.add_(grad_logits[0], alpha=-self.learning_rate)
        for weight, gradient in zip(self.weights[:3], grad_weights, strict=False):
            weight.add_(gradient, alpha=-self.learning_rate)
        self.state = h_n
        return -log_probabilities[0, self.targets[position + 1]]

    def evaluate(self) -> dict[str, float]:
        return {"held_out": held_out_bits(self.model, self.held_out)}


class PublishedModel(nn.Module):
    """The model as it was published: character and state joined, one linear layer over both."""

    def __init__(self, like: CharModel) -> None:
        super().__init__()
        vocabulary, hidden = like.rnn.input_size, like.rnn.hidden_size
        self.hidden = nn.Linear(vocabulary + hidden, hidden)
        self.readout = nn.Linear(hidden, vocabulary)
        self.hidden.weight.data = torch.cat((like.rnn.weight_ih_l0, like.rnn.weight_hh_l0), dim=1).detach()
        self.hidden.bias.data.copy_(like.rnn.bias_ih_l0)
        self.readout.load_state_dict(like.readout.state_dict())

    def forward(self, code: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = F.one_hot(code, self.readout.out_features).float()
        state = torch.sigmoid(self.hidden(torch.cat((one_hot, state))))
        return self.readout(state), state.detach()


class PublishedRun(Run):
    """The published loop in plain PyTorch, from the same initial weights as ``like``."""

    def __init__(self, like: CharModel, codes: Tensor, passes: int, learning_rate: float) -> None:
        self.codes = codes
        model = PublishedModel(like)
        super().__init__(model, passes * (len(codes) - 1), 1, torch.optim.SGD(model.parameters(), lr=learning_rate))

    def update(self) -> Tensor:
        position = self.updates % (len(self.codes) - 1)
        self.optimizer.zero_grad()
        state = self.state if position else self.codes.new_zeros(self.model.hidden.out_features, dtype=torch.float32)
        logits, self.state = self.model(self.codes[position], state)
        loss = F.cross_entropy(logits, self.codes[position + 1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


# ----------------------------------------------------------------------------------------------------------- pictures


def plot(path: Path, runs: dict[str, Run], published: Sequence[float]) -> None:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, run in runs.items():
        characters = [report["items"] for report in run.reports]
        curves[f"{name}, training"] = characters, [report["loss"] / math.log(2) for report in run.reports]
        if "held_out" in run.reports[-1]:
            curves[f"{name}, held out"] = characters, [report["held_out"] for report in run.reports]
    if published:
        curves["published, training"] = (
            curves["rnnfast, training"][0][: len(published)],
            [loss / math.log(2) for loss in published],
        )
    plot_curves(path, curves, "characters trained on", "bits per character")


def print_passes(ours: Run, plain: Run | None, published: Sequence[float]) -> None:
    """The mean training loss of every pass, beside the published ones if the text is theirs, and what updates took."""
    columns: dict[str, Sequence[str]] = {
        "pass": [str(number) for number in range(1, len(ours.reports) + 1)],
        "training\nloss": [f"{report['loss']:.4f}" for report in ours.reports],
    }
    if published:
        columns["\npublished"] = [f"{loss:.4f}" for loss in published]
        differences = [report["loss"] - loss for report, loss in zip(ours.reports, published, strict=False)]
        columns["\ndifference"] = [f"{difference:+.4f}" for difference in differences]
    columns["held out,\nbits/char"] = [f"{report['held_out']:.3f}" for report in ours.reports]
    columns["us/update\nrnnfast"] = [f"{1e6 / report['speed']:.1f}" for report in ours.reports]
    if plain:
        columns["us/update\nplain loop"] = [f"{1e6 / report['speed']:.1f}" for report in plain.reports]
    print(tabulate(columns, headers="keys", disable_numparse=True, stralign="right"))
    print(f"rnnfast: {ours.updates:,} updates in {ours.seconds():.1f} s, {1e6 / ours.speed():.1f} us each")
    if plain:
        loss = sum(report["loss"] * report["updates"] for report in plain.reports) / plain.updates
        print(
            f"plain loop: the published code in plain PyTorch from the same weights, the first pass only, a part of it "
            f"after each of rnnfast's passes:\n{plain.updates:,} updates in {plain.seconds():.1f} s, "
            f"{1e6 / plain.speed():.1f} us each; mean loss {loss:.4f}\n"
            f"rnnfast takes {plain.speed() / ours.speed():.2f} of the plain loop's time"
        )


# --------------------------------------------------------------------------------------------------------- programme


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; default: the topics of Python's help()")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--demo", action="store_true", help="a small GRU with --compare: under a minute on 2 cores")
    preset.add_argument("--online", action="store_true", help="the published experiment: one update a character")

    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=CELLS, default="lstm", help="default: %(default)s")
    model.add_argument("--hidden", type=positive, default=256, metavar="N", help="hidden units; default: %(default)s")
    model.add_argument("--layers", type=positive, default=1, metavar="N", help="default: %(default)s")
    model.add_argument(
        "--embedding",
        type=int,
        default=64,
        metavar="N",
        help="features of a character, 0: one-hot; default: %(default)s",
    )

    model.add_argument(
        "--steps", type=positive, default=64, metavar="N", help="that a gradient goes back; default: %(default)s"
    )
    training_arguments(parser, "char_lm", epochs=10, batch=32, lr=3e-3)

    sampling = parser.add_argument_group("sample")
    sampling.add_argument(
        "--prompt", metavar="TEXT", help="what the sample continues; default: the held-out text's start"
    )
    sampling.add_argument("--sample", type=positive, default=400, metavar="N", help="characters; default: %(default)s")
    sampling.add_argument("--temperature", type=rate, default=0.8, help="default: %(default)s")
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest only, 0: from all; default: 0"
    )

    args = parser.parse_args(argv)
    if args.demo or args.online:  # a preset changes the defaults; what is given on the command line still counts
        parser.set_defaults(**(DEMO if args.demo else ONLINE))
        args = parser.parse_args(argv)
    if args.online and any(getattr(args, name) != ONLINE[name] for name in ("cell", "layers", "embedding", "batch")):
        parser.error(
            "--online has one sigmoid layer, one-hot input and no batch: drop --cell, --layers, --embedding, --batch"
        )
    if args.embedding < 0 or args.top_k < 0:
        parser.error("--embedding and --top-k take 0 or more")
    return args


def load_text(args: argparse.Namespace) -> Text:
    characters = read_text(args.text)
    if args.online:
        characters = characters[:ONLINE_CHARACTERS]
    if not characters:
        raise SystemExit(f"error: --text {args.text} is empty")
    needed = 20 * args.batch  # two characters of held-out text in every column
    if len(characters) < needed:
        raise SystemExit(
            f"error: --text {args.text} has {len(characters)} characters; --batch {args.batch} takes {needed} or more"
        )
    text = Text(characters)
    unknown = set(args.prompt or "") - set(text.vocabulary)
    if unknown:
        raise SystemExit(f"error: --prompt has characters that the text has not: {''.join(sorted(unknown))}")
    return text


def make_model(library: ModuleType, text: Text, args: argparse.Namespace) -> CharModel:
    seed_everything(args.seed)
    model = CharModel(library, args.cell, len(text.vocabulary), args.embedding, args.hidden, args.layers)
    return model.to(args.device)


def prepare(args: argparse.Namespace) -> tuple[dict[str, Run], dict[str, Any], Text]:
    """The runs, the settings that a checkpoint must share with them, and the text."""
    text = load_text(args)
    device = pick_device(args.device)
    codes, held_out = (columns(part, args.batch).to(device) for part in (text.train, text.held_out))
    process, count = processes()
    if args.batch % count or (args.online and count > 1):
        takes = "no --online" if args.online else f"a --batch that they divide, got {args.batch}"
        raise SystemExit(f"error: {count} processes take {takes}")
    codes = codes[:, process::count].contiguous()
    ours = make_model(rnnfast, text, args)
    runs: dict[str, Run]
    if args.online:
        runs = {"rnnfast": OnlineRun(ours, codes[:, 0], held_out, args.epochs, args.lr)}
        if args.compare:
            runs["plain loop"] = PublishedRun(ours, codes[:, 0], 1, args.lr)
    else:
        runs = {"rnnfast": WindowRun(ours, codes, held_out, args.steps, args.epochs, args.lr)}
        if args.compare:
            theirs = make_model(nn, text, args)
            runs["torch.nn"] = WindowRun(theirs, codes, held_out, args.steps, args.epochs, args.lr)
    keys = ("online", "compare", "cell", "hidden", "layers", "embedding", "epochs", "batch", "steps", "lr", "seed")
    settings = {key: getattr(args, key) for key in keys} | {"text": zlib.crc32(text.characters.encode())}
    settings["processes"] = count
    print(
        f"{len(text.characters):,} characters, {len(text.vocabulary)} distinct; "
        f"{args.cell}, {args.layers} x {args.hidden} units on {device}"
    )
    return runs, settings, text


def print_sample(ours: CharModel, text: Text, args: argparse.Namespace) -> None:
    """What the model writes, and how fast, beside torch.nn with the same weights."""
    theirs = make_model(nn, text, args)
    theirs.load_state_dict(ours.state_dict())
    prompt = args.prompt or text.decode(text.held_out[:20].tolist())
    codes = text.encode(prompt).to(args.device)
    samplers = {
        name: sample(model, codes, args.temperature, args.top_k, args.seed)
        for name, model in (("rnnfast", ours), ("torch.nn", theirs))
    }
    continuation, speeds = sample_side_by_side(samplers, args.sample, codes.device)
    print(f"\nsample, after {prompt!r}:\n{prompt}{text.decode(continuation)}\n")
    speed = ", ".join(f"{name} {characters:,.0f} characters/s" for name, characters in speeds.items())
    print(f"drawn in single steps: {speed}\n")


@contextmanager
def started_by_torchrun(args: argparse.Namespace) -> Iterator[None]:
    """Where torchrun started several processes: they meet, each on a GPU of its own, and the first one speaks.

    Each keeps its own checkpoint, for the state that it carries is that of its columns.
    """
    if not distributed.is_torchelastic_launched():
        yield
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        process = distributed.get_rank()
        if process == 0:
            yield
        else:
            args.out /= f"process{process}"
            with redirect_stdout(None):
                yield
    finally:
        distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with started_by_torchrun(args):
        runs, settings, text = prepare(args)
        train(runs, args.epochs, settings, args.resume, args.out)
        if processes()[0] == 0:
            report(runs, settings, text, args)


def report(runs: dict[str, Run], settings: dict[str, Any], text: Text, args: argparse.Namespace) -> None:
    print_sample(runs["rnnfast"].model, text, args)
    published = PUBLISHED_LOSSES[: args.epochs] if args.online and settings["text"] == PUBLISHED_TEXT else ()
    plot(args.out / "loss.png", runs, published)
    print(f"{args.out / 'loss.png'}: the loss curve; {args.out / 'checkpoint.pt'}: the trained model\n")
    if args.online:
        print_passes(runs["rnnfast"], runs.get("plain loop"), published)
    else:
        print("loss: mean training loss in nats per character; held out: loss in bits per character")
        print_reports(runs, {"loss": ".4f", "held_out": ".3f"})


if __name__ == "__main__":
    main()
