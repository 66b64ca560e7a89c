"""What a type checker makes of a call: which tensors and tuples, for each layer and form of input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
from typing import assert_type

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnnfast

gru, lstm, rnn = rnnfast.GRU(3, 4), rnnfast.LSTM(3, 4), rnnfast.RNN(3, 4)


def of_each_form(x: Tensor, packed: PackedSequence, reset: Tensor, flag: bool) -> None:
    output, h = gru.forward(x, reset=reset)
    assert_type(output, Tensor)
    assert_type(h, Tensor)
    output, (h, c) = lstm.forward(x)
    assert_type(c, Tensor)
    output, h = rnn.forward(x, h)
    steps, (h, c) = lstm.forward(packed, (h, c), reset=reset)
    assert_type(steps, PackedSequence)
    output, h, states = gru.forward(x, return_states=True)
    assert_type(states, rnnfast.States)
    result = lstm.forward(packed, return_states=flag)
    assert len(result) == 3
    assert_type(result[1], tuple[Tensor, Tensor])
    assert_type(rnnfast.GRUCell(3, 4).forward(x), Tensor)
    assert_type(rnnfast.LSTMCell(3, 4).forward(x, (h, c)), tuple[Tensor, Tensor])
"""


WRONG = (
    "lstm.forward(x, x)",
    "gru.forward(x, (x, x))",
    "gru.forward(x, lengths=[1, 2])",
    "rnnfast.LSTM(3, 4, nonlinearity='relu')",
)


def test_calls_have_precise_types(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM + "".join(f"    {call}\n" for call in WRONG))
    command = [sys.executable, "-m", "mypy", "--strict", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    first = PROGRAM.count("\n") + 1
    errors = [int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)]
    assert errors == list(range(first, first + len(WRONG))), done.stdout + done.stderr
