"""Fused recurrent layers for PyTorch, with torch.nn's interface."""

from . import functional, reference
from ._config import show_config
from ._version import __version__
from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN
from .ops import backend

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "backend",
    "functional",
    "reference",
    "show_config",
]
