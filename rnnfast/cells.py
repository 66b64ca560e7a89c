"""Owns: the cells' parameters and torch.nn's interface to them. Must not know: how a step runs.

A cell is one step of a layer; its parameters, their initial values and the forms of its input are those of the
torch.nn cell of the same name, by way of ``torch.nn.RNNCellBase``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(nn.RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share."""

    backend: str | None
    _gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        functional.check_choice("backend", backend, functional.BACKENDS)
        super().__init__(input_size, hidden_size, bias, self._gates, device, dtype)
        self.backend = backend

    def _weights(self) -> list[Tensor]:
        """The weights as they are now."""
        names = _NAMES if self.bias else _NAMES[:2]
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in names]  # half a microsecond a weight less than an attribute
        except KeyError:  # a parametrization or weight_norm keeps some elsewhere
            return [getattr(self, name) for name in names]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend is None else f", backend={self.backend}")

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take this class's state, or that of the torch.nn cell of the same name."""
        super().__setstate__({"backend": None, **state})  # type: ignore[no-untyped-call]


class RNNCell(_Cell):
    r"""One step of an Elman network: :math:`h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Takes torch.nn.RNNCell's place: same arguments, parameters (``weight_ih`` and so on), initial values and results.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: f: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``, or ``"leaky_relu"`` with slope 0.01.
        device, dtype: of the parameters.
        backend: None for the fastest engine there is, ``"reference"`` for plain PyTorch.
    """

    nonlinearity: str
    _gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        functional.check_choice("nonlinearity", nonlinearity, functional.NONLINEARITIES)
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next hidden state ``[B, hidden_size]`` for ``input [B, input_size]`` and ``hx [B, hidden_size]``.

        Without B both are unbatched. ``hx`` None means zeros. Raises ValueError for a wrong rank, RuntimeError for a
        wrong size, dtype or device.
        """
        return functional.step(f"rnn_{self.nonlinearity}", input, hx, self._weights(), backend=self.backend)  # type: ignore[return-value]


class LSTMCell(_Cell):
    """One step of a long short-term memory, see :class:`rnnfast.LSTM`; takes torch.nn.LSTMCell's place.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: as for :class:`RNNCell`.
    """

    _gates = 4

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the next states ``(h, c)``, each ``[B, hidden_size]``, as :meth:`RNNCell.forward` does its one."""
        return functional.step("lstm", input, hx, self._weights(), backend=self.backend)  # type: ignore[return-value]


class GRUCell(_Cell):
    """One step of a gated recurrent unit, see :class:`rnnfast.GRU`; takes torch.nn.GRUCell's place.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: as for :class:`RNNCell`.
        reset_after: as for :class:`rnnfast.GRU`.
    """

    reset_after: bool = True
    _gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str | None = None,
    ) -> None:
        functional.check_choice("reset_after", reset_after, (True, False))
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)
        self.reset_after = reset_after

    @property
    def cell(self) -> str:
        """The name of its equations in :mod:`rnnfast.reference`."""
        return "gru" if self.reset_after else "gru_reset_before"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next hidden state, as :meth:`RNNCell.forward` does."""
        return functional.step(self.cell, input, hx, self._weights(), backend=self.backend)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")
