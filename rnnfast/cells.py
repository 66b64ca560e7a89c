"""Owns: the cells' parameters and torch.nn's interface to them. Must not know: how a step runs.

A cell is one step of a layer; its parameters, their initial values and the forms of its input are those of the
torch.nn cell of the same name, by way of ``torch.nn.RNNCellBase``. A layer's parameter has its cell's name, with the
layer's number behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import functional
from .modules import draw_parameters, new_norm, norm_names, refuse_scripting

# What a torch.nn cell's state, or an old one, may lack.
_DEFAULTS = {"zoneout": 0.0, "layer_norm": False, "backend": None}


class _Cell(nn.RNNCellBase, ABC):
    """What RNNCell, LSTMCell and GRUCell share."""

    zoneout: float | tuple[float, float]
    layer_norm: bool
    backend: str | None
    _gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        *,
        zoneout: float | tuple[float, float],
        layer_norm: bool,
        backend: str | None,
    ) -> None:
        functional.check_sizes(zero=True, input_size=input_size, hidden_size=hidden_size)  # 0 as torch.nn's cells
        zoneout = functional.check_zoneout(self.cell, zoneout)
        functional.check_bools(bias=bias, layer_norm=layer_norm)
        functional.check_options(self.cell, 1, layer_norm)
        functional.check_choice("backend", backend, functional.BACKENDS)
        super().__init__(input_size, hidden_size, bias, self._gates, device, dtype)
        self.zoneout = zoneout
        self.layer_norm = layer_norm
        self.backend = backend
        if layer_norm:
            for name in norm_names(self.cell):
                self.register_parameter(name, new_norm(name, self.weight_ih, hidden_size))
        self._name_weights()

    @property
    @abstractmethod
    def cell(self) -> str:
        """The name of its equations in :mod:`rnnfast.reference`."""

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def _step(self, input: Tensor, hx: functional.State | None, generator: torch.Generator | None) -> Any:
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [parameters[name] for name in self._names]  # half a microsecond a weight less than an attribute
        except KeyError:  # a parametrization or weight_norm keeps some elsewhere
            weights = None
        if weights is None:  # not in the handler, in whose chain of exceptions one of a parametrization would be shown
            weights = [getattr(self, name) for name in self._names]
        # A call of a few microseconds, where keywords count.
        if self.zoneout == 0.0 and not self.layer_norm and generator is None:
            return functional.step(self.cell, input, hx, weights, backend=self.backend)
        return functional.step(
            self.cell,
            input,
            hx,
            weights,
            zoneout=self.zoneout,
            training=self.training,
            layer_norm=self.layer_norm,
            generator=generator,
            backend=self.backend,
        )

    def _noisy(self) -> bool:
        """Whether a call made now has zoneout."""
        return self.zoneout not in (0.0, (0.0, 0.0))

    def _name_weights(self) -> None:
        names = ["weight_ih", "weight_hh"]
        if self.bias:
            names += ["bias_ih", "bias_hh"]
        if self.layer_norm:
            names += norm_names(self.cell)
        self._names = tuple(names)

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn does; norms start from 1, or 0 as a bias, and are not drawn."""
        draw_parameters(self, self.hidden_size)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("zoneout", "layer_norm"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text + ("" if self.backend is None else f", backend={self.backend}")

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take this class's state, or that of the torch.nn cell of the same name, of any age."""
        super().__setstate__({**_DEFAULTS, **state})  # type: ignore[no-untyped-call]
        self._name_weights()


class RNNCell(_Cell):
    r"""One step of an Elman network: :math:`h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Takes torch.nn.RNNCell's place: same arguments, parameters (``weight_ih`` and so on), initial values and results.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: f: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``, or ``"leaky_relu"`` with slope 0.01.
        device, dtype: of the parameters.
        zoneout: as for :class:`rnnfast.RNN`: in training every call draws a mask of its own, in evaluation the state is
            the expectation.
        layer_norm: as for :class:`rnnfast.RNN`, with parameters ``norm_weight_ih`` and ``norm_weight_hh``, of an LSTM
            also ``norm_weight_c`` and ``norm_bias_c``.
        backend: None for what :func:`rnnfast.backend` chose around the call, else ``"auto"``, the fastest engine there
            is, or ``"reference"``, plain PyTorch.

    The weights of a layer load into a cell with the number taken off their names::

        cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})

    There is no ``recurrent_dropout``, nor ``weight_dropout``: they have one mask for a whole sequence, and a step does
    not know where one begins. In evaluation a layer has neither. To train steps with the first, draw a mask where a
    sequence begins and multiply h by it before each call, ``cell(x, mask * h)`` or ``cell(x, (mask * h, c))``: without
    zoneout that is what RNN and LSTM do, while GRU also has h without the mask.

    Raises:
        ValueError: a size below 0, a zoneout outside [0, 1), an unknown nonlinearity or backend.
        TypeError: a size is no int; bias or layer_norm is no bool.
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
        zoneout: float = 0.0,
        layer_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        functional.check_choice("nonlinearity", nonlinearity, functional.NONLINEARITIES)
        self.nonlinearity = nonlinearity  # before the parameters, whose names ask for the cell
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            zoneout=zoneout,
            layer_norm=layer_norm,
            backend=backend,
        )

    @property
    def cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the next hidden state ``[B, hidden_size]`` for ``input [B, input_size]`` and ``hx [B, hidden_size]``.

        Without B both are unbatched. ``hx`` None means zeros; ``generator`` is what the mask of zoneout is drawn from,
        of the weights' device, None torch's default. Raises ValueError for a wrong rank, RuntimeError for a wrong size,
        dtype or device.
        """
        return self._step(input, hx, generator)  # type: ignore[no-any-return]


class LSTMCell(_Cell):
    """One step of a long short-term memory, see :class:`rnnfast.LSTM`; takes torch.nn.LSTMCell's place.

    Args:
        input_size, hidden_size, bias, device, dtype, layer_norm, backend: as for :class:`RNNCell`.
        zoneout: as for :class:`RNNCell`, of h and of c; or two probabilities, of h and of c.

    Raises:
        ValueError: a size below 0, a zoneout outside [0, 1), an unknown backend.
        TypeError: a size is no int; bias or layer_norm is no bool.
    """

    cell = "lstm"
    _gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            zoneout=zoneout,
            layer_norm=layer_norm,
            backend=backend,
        )

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next states ``(h, c)``, each ``[B, hidden_size]``, as :meth:`RNNCell.forward` does its one."""
        return self._step(input, hx, generator)  # type: ignore[no-any-return]


class GRUCell(_Cell):
    """One step of a gated recurrent unit, see :class:`rnnfast.GRU`; takes torch.nn.GRUCell's place.

    Args:
        input_size, hidden_size, bias, device, dtype, zoneout, layer_norm, backend: as for :class:`RNNCell`.
        reset_after: as for :class:`rnnfast.GRU`.

    Raises:
        ValueError: a size below 0, a zoneout outside [0, 1), an unknown backend, layer_norm with ``reset_after=False``.
        TypeError: a size is no int; bias, layer_norm or reset_after is no bool.
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
        zoneout: float = 0.0,
        layer_norm: bool = False,
        reset_after: bool = True,
        backend: str | None = None,
    ) -> None:
        functional.check_bools(reset_after=reset_after)
        self.reset_after = reset_after  # before the parameters, whose names ask for the cell
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            zoneout=zoneout,
            layer_norm=layer_norm,
            backend=backend,
        )

    @property
    def cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def forward(self, input: Tensor, hx: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the next hidden state, as :meth:`RNNCell.forward` does."""
        return self._step(input, hx, generator)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")
