"""Fused recurrent layers for PyTorch, with torch.nn's interface."""

from . import functional, reference
from ._config import show_config
from ._version import __version__
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import convert, patch_torch, to_torch
from .explain import explain
from .functional import States
from .modules import GRU, LSTM, RNN, IndRNN
from .ops import backend
from .own_cell import compile_cell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "IndRNN",
    "LSTMCell",
    "RNNCell",
    "States",
    "__version__",
    "backend",
    "compile_cell",
    "convert",
    "explain",
    "functional",
    "patch_torch",
    "reference",
    "show_config",
    "to_torch",
]
