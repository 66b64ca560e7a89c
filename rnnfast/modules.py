"""Owns: the layers' parameters and torch.nn's interface to them. Must not know: how a layer runs.

The classes derive from ``torch.nn.RNNBase``, which makes the parameters: names, order, shapes and initial values are
torch.nn's by construction. What RNNBase adds for cuDNN, a list of the weights kept beside the parameters, is taken out
here: the parameters are read at every forward, so whatever replaces one takes effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from numbers import Integral, Real
from typing import Any, Generic, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, reference

# What a torch.nn layer's state, or an old one, may lack.
_DEFAULTS = {
    "proj_size": 0,
    "recompute": False,
    "batch_invariant": False,
    "weight_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "num_heads": 1,
    "layer_norm": False,
    "backend": None,
}


StateT = TypeVar("StateT", bound=functional.State)  # hx, and what is returned for it


def refuse_scripting(module: nn.Module) -> NoReturn:
    """What torch.jit.script asks of a module it meets."""
    name = type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script: {name} is not written in TorchScript; script rnnfast.to_torch(model), or torch.jit.trace it"
    )


class _Layers(nn.RNNBase, Generic[StateT]):
    """What RNN, LSTM and GRU share."""

    recompute: bool
    batch_invariant: bool
    weight_dropout: float
    recurrent_dropout: float
    zoneout: float | tuple[float, float]
    num_heads: int
    layer_norm: bool
    backend: str | None

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        *,
        proj_size: int = 0,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        recompute: bool,
        batch_invariant: bool,
        weight_dropout: float,
        recurrent_dropout: float,
        zoneout: float | tuple[float, float],
        num_heads: int = 1,
        layer_norm: bool = False,
        backend: str | None,
    ) -> None:
        functional.check_sizes(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads
        )
        functional.check_heads(num_heads, hidden_size, projection=bool(proj_size))
        functional.check_dropouts(dropout, weight_dropout, recurrent_dropout)
        zoneout = functional.check_zoneout(mode.lower(), zoneout)
        if not isinstance(proj_size, Integral):
            raise TypeError(f"proj_size: expected an int, got {proj_size!r}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size: expected 0 (no projection) to hidden_size - 1 = {hidden_size - 1}, got {proj_size}"
            )
        functional.check_bools(
            bidirectional=bidirectional, recompute=recompute, batch_invariant=batch_invariant, layer_norm=layer_norm
        )
        functional.check_options(mode.lower(), num_heads, layer_norm)
        functional.check_choice("backend", backend, functional.BACKENDS)
        # Of an Elman network RNNBase knows two nonlinearities, of a GRU one form; the parameters of all are the same.
        known_mode = "GRU" if mode.startswith("GRU") else mode if mode in ("LSTM", "RNN_RELU") else "RNN_TANH"
        super().__init__(
            known_mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.mode = mode
        self.recompute = recompute
        self.batch_invariant = batch_invariant
        self.weight_dropout = float(weight_dropout)
        self.recurrent_dropout = float(recurrent_dropout)
        self.zoneout = zoneout
        self.num_heads = num_heads
        self.layer_norm = layer_norm
        self.backend = backend
        self._name_layers()
        if layer_norm:
            self._make_norms()
        form = reference.find_cell(mode.lower())
        if num_heads > 1 or form.diagonal:
            columns = 0 if form.diagonal else slice(hidden_size // num_heads)
            for name in self._flat_weights_names:
                if name.startswith("weight_hh"):
                    setattr(self, name, nn.Parameter(getattr(self, name).detach()[:, columns].clone()))

    @overload
    def forward(
        self,
        input: Tensor,
        hx: StateT | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_states: Literal[False] = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, StateT]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: StateT | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_states: Literal[True],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, StateT, functional.States]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: StateT | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_states: Literal[False] = False,
        generator: torch.Generator | None = None,
    ) -> tuple[PackedSequence, StateT]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: StateT | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_states: Literal[True],
        generator: torch.Generator | None = None,
    ) -> tuple[PackedSequence, StateT, functional.States]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: StateT | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor | PackedSequence, StateT] | tuple[Tensor | PackedSequence, StateT, functional.States]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: functional.State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Run the layers over a sequence.

        Sizes: T steps, B rows, L layers, D directions, H_out = proj_size or hidden_size.

        Args:
            input: ``[T, B, input_size]``, ``[B, T, input_size]`` if batch_first, ``[T, input_size]`` unbatched, or a
                PackedSequence; T may be 0.
            hx: ``[L*D, B, H_out]``, unbatched ``[L*D, H_out]``; for LSTM ``(h_0, c_0)``, c_0 with hidden_size for
                H_out. None means zeros.
            lengths: ``[B]`` integers on the input's device or the CPU, the steps of each row of a padded input. Outputs
                past them are zero, the states returned are the row's last, and a row of length 0 keeps its initial
                state.
            reset: bool, ``[T, B]`` (``[B, T]`` if batch_first, ``[T]`` unbatched, one for each element when packed):
                where set, the state before that step is zero, and no gradient crosses. The backward direction has
                the same boundary, so it starts afresh at the step before.
            return_states: whether to return every layer's states at every step, too.
            generator: what the masks of weight_dropout, recurrent_dropout and zoneout are drawn from, of the weights'
                device; None: torch's default.

        Returns:
            ``(output, h_n)``, for LSTM ``(output, (h_n, c_n))``: the last layer's output at every step, with D * H_out
            features, in the form of the input, and the final states in the form of hx. With ``return_states`` a third
            element, :class:`rnnfast.States`: ``h`` with a tensor ``[T, B, D*H_out]`` a layer, and ``c`` with one
            ``[T, B, D*hidden_size]`` a layer of an LSTM, both in the form of the input.

        The dtypes are float64, float32, bfloat16 and float16, one for all of input, hx and weights; under autocast the
        layers run in its dtype.

        Raises:
            ValueError: input has the wrong rank or another dtype than the weights; lengths with a PackedSequence;
                batch_invariant where it does not hold.
            RuntimeError: an argument has the wrong shape, dtype or device; lengths (on the CPU) are not in 0 .. T.
            TypeError: an argument is of a wrong type.
        """
        return functional.recurrent(
            self.mode.lower(),
            input,
            hx,
            self._layer_weights(),
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            lengths=lengths,
            reset=reset,
            return_states=return_states,
            recompute=self.recompute,
            batch_invariant=self.batch_invariant,
            weight_dropout=self.weight_dropout,
            recurrent_dropout=self.recurrent_dropout,
            zoneout=self.zoneout,
            training=self.training,
            num_heads=self.num_heads,
            layer_norm=self.layer_norm,
            generator=generator,
            backend=self.backend,
        )

    def _noisy(self) -> bool:
        """Whether a call made now has recurrent dropout or zoneout."""
        return self.zoneout not in (0.0, (0.0, 0.0)) or (self.training and self.recurrent_dropout > 0)

    def _layer_weights(self) -> list[list[Tensor]]:
        """Every layer's weights, both directions, as they are now."""
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [[parameters[name] for name in names] for names in self._layer_names]
        except KeyError:  # a parametrization, weight_norm or a replica of DataParallel keeps some elsewhere
            weights = None
        # Not in the handler, in whose chain of exceptions one of a parametrization would be shown.
        return weights or [[getattr(self, name) for name in names] for names in self._layer_names]

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def _name_layers(self) -> None:
        names = ["weight_ih", "weight_hh"]
        if self.bias:
            names += ["bias_ih", "bias_hh"]
        if self.proj_size:
            names += ["weight_hr"]
        if self.layer_norm:
            names += norm_names(self.mode.lower())
        suffixes = ["", "_reverse"] if self.bidirectional else [""]
        self._all_weights = [
            [f"{name}_l{layer}{suffix}" for name in names] for layer in range(self.num_layers) for suffix in suffixes
        ]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        per_layer = len(names) * len(suffixes)
        self._layer_names = [
            tuple(self._flat_weights_names[layer * per_layer : (layer + 1) * per_layer])
            for layer in range(self.num_layers)
        ]

    def _make_norms(self) -> None:
        w_ih: Tensor = self._parameters["weight_ih_l0"]  # type: ignore[assignment]
        for name in self._flat_weights_names:
            if name.startswith("norm"):
                self.register_parameter(name, new_norm(name, w_ih, self.hidden_size))

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn does; norms start from 1, or 0 as a bias, and are not drawn."""
        draw_parameters(self, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Do nothing: the parameters are used where they are."""

    def extra_repr(self) -> str:
        text = super().extra_repr()
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):  # which are not shown by torch.nn
            text += f", nonlinearity={nonlinearity}"
        for name in ("recompute", "batch_invariant", "weight_dropout", "recurrent_dropout", "zoneout", "layer_norm"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        if self.num_heads > 1:
            text += f", num_heads={self.num_heads}"
        if not getattr(self, "reset_after", True):
            text += ", reset_after=False"
        if getattr(self, "forget_bias", None) is not None:
            text += f", forget_bias={self.forget_bias}"
        if self.backend is not None:
            text += f", backend={self.backend}"
        return text

    # RNNBase keeps a second list of the weights, and weak references to them, beside the parameters. Here the list is
    # made when someone asks for it, who sets it sets the parameters, and the methods that keep it in step do nothing.

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take this class's state, or that of the torch.nn layer of the same name, of any age."""
        kept = {
            key: value for key, value in state.items() if not key.startswith("_flat_weight") and key != "all_weights"
        }
        nn.Module.__setstate__(self, {**_DEFAULTS, **kept})
        self._name_layers()


class RNN(_Layers[Tensor]):
    r"""Multi-layer Elman network: :math:`h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`.

    Takes torch.nn.RNN's place: same arguments, parameters, initial values and results. The equations are in
    :mod:`rnnfast.reference`.

    The parameters of layer k, with G gates (1 here), are ``weight_ih_lk [G*H, I]``, ``weight_hh_lk [G*H, H]``,
    ``bias_ih_lk`` and ``bias_hh_lk [G*H]``, H being hidden_size, and I input_size in the first layer and D * H in those
    above it, where D is the number of directions; the backward direction's end in ``_reverse``. They start uniform in
    ±1 / sqrt(H).

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: layers, each fed with the output of the one before.
        nonlinearity: f: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``, or ``"leaky_relu"`` with slope 0.01.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are ``[B, T, features]``; the states are not.
        dropout: probability, in training, of zeroing an element of every layer's output but the last's.
        bidirectional: whether each layer also runs from the end to the beginning.
        device, dtype: of the parameters.
        recompute: whether training keeps the states alone for backward, which computes the gates again from them: less
            memory for more time, the same result.
        batch_invariant: whether a row's output, states and backward must not depend, in a single bit, on what
            else is in the batch. It holds on the CPU at no cost; elsewhere, and with dropout, forward says no.
        weight_dropout: probability, in training, of zeroing an element of every ``weight_hh``, the rest scaled by
            1 / (1 - p). One mask a call, the same at every step (Merity, Keskar and Socher, "Regularizing and
            Optimizing LSTM Language Models", ICLR 2018).
        recurrent_dropout: probability, in training, of zeroing an element of h where it meets ``weight_hh``, the rest
            scaled by 1 / (1 - p). One mask a sequence, layer, direction and call, the same at every step (Gal and
            Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS 2016).
        zoneout: probability, in training, that a unit keeps its last h, for every step anew; in evaluation the state is
            the expectation (Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations",
            ICLR 2017). A sequence that is fed in pieces has other masks in each piece.
        num_heads: n above 1 divides the units into n heads of hidden_size / n neighbours, each of which sees its own
            state alone: W_hh is block-diagonal, and ``weight_hh_l0`` is ``[gates * hidden_size, hidden_size / n]``,
            with initial values as if it were whole (Beck et al., "xLSTM: Extended Long Short-Term Memory", NeurIPS
            2024, for the sLSTM's heads; Hafner et al., "Mastering Diverse Domains through World Models", 2023, for the
            GRU's blocks). The heads of a layer of up to 128 units are one call of the operator, with W_hh written out;
            in a larger one neighbours share a call that have at most 64 units together, and larger heads have a call
            each. So have all with a nonlinearity that does not bound h. In a shared call an infinite or nan weight,
            initial state or gradient of one head makes nan of the others. Not with a projection.
        layer_norm: whether both halves of the gates are normalised over all gates of a row, before b_ih and b_hh are
            added: :math:`W_{ih} x_t` becomes :math:`w_{ih} \odot \mathrm{LN}(W_{ih} x_t)`, and :math:`W_{hh} h_{t-1}`
            likewise, with :math:`\mathrm{LN}(x) = (x - \mathrm{mean}) / \sqrt{\mathrm{variance} + 10^{-5}}`. An LSTM
            normalises c too where h reads it, :math:`h_t = o \tanh(w_c \odot \mathrm{LN}(c_t) + b_c)`, while c goes on
            as it is (Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450, 2016). Parameters behind all
            others: ``norm_weight_ih_l0`` and ``norm_weight_hh_l0 [gates * hidden_size]``, of an LSTM also
            ``norm_weight_c_l0`` and ``norm_bias_c_l0 [hidden_size]``, initially 1 and 0. Not with num_heads.
        backend: None for what :func:`rnnfast.backend` chose around the call, else ``"auto"``, the fastest engine there
            is, or ``"reference"``, plain PyTorch.

    Raises:
        ValueError: a size below 1, a probability outside [0, 1], or for recurrent_dropout and zoneout [0, 1), an
            unknown nonlinearity or backend, a proj_size, num_heads that does not divide hidden_size, layer_norm with
            num_heads.
        TypeError: a size is no int; bias, batch_first, recompute, batch_invariant or layer_norm is no bool.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        batch_invariant: bool = False,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        num_heads: int = 1,
        layer_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        _check_no_projection(proj_size)
        functional.check_choice("nonlinearity", nonlinearity, functional.NONLINEARITIES)
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            batch_invariant=batch_invariant,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            num_heads=num_heads,
            layer_norm=layer_norm,
            backend=backend,
        )
        self.nonlinearity = nonlinearity


class LSTM(_Layers[tuple[Tensor, Tensor]]):
    r"""Multi-layer long short-term memory.

    .. math::
        i, f, o = \sigma(\cdot), \quad g = \tanh(\cdot) \quad \text{of } W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh},
        \qquad c_t = f c_{t-1} + i g, \qquad h_t = o \tanh(c_t)

    Takes torch.nn.LSTM's place: same arguments, parameters, gate order (i, f, g, o), initial values and results. The
    equations and their sources are in :mod:`rnnfast.reference`. The parameters' shapes are those of :class:`RNN` with
    G = 4; with a projection to P features there is ``weight_hr_lk [P, H]``, ``weight_hh_lk`` is ``[4*H, P]``, and I in
    the layers above the first is D * P.

    What is not among these arguments is as for :class:`RNN`.

    Args:
        zoneout: as for :class:`RNN`, of h and of c; or two probabilities, of h and of c.
        proj_size: if not 0, h is projected to so many features, fewer than hidden_size, by ``weight_hr_l0`` and so on.
            Not with num_heads.
        forget_bias: what the forget gates' bias starts from, bias_ih and bias_hh together: 1 helps to remember long
            (Jozefowicz, Zaremba and Sutskever, "An Empirical Exploration of Recurrent Network Architectures", ICML
            2015). None leaves torch.nn's initial values. Not with ``bias=False``.

    Raises:
        ValueError: a size below 1, a probability outside [0, 1], or for recurrent_dropout and zoneout [0, 1), proj_size
            outside 0 .. hidden_size - 1, an unknown backend, a forget_bias that is no number or comes with
            ``bias=False``, num_heads that does not divide hidden_size or comes with proj_size, layer_norm with
            num_heads.
        TypeError: a size is no int; bias, batch_first, recompute, batch_invariant or layer_norm is no bool.
    """

    forget_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        batch_invariant: bool = False,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        num_heads: int = 1,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        backend: str | None = None,
    ) -> None:
        if forget_bias is not None and (not isinstance(forget_bias, Real) or not isfinite(forget_bias) or not bias):
            takes = "a finite number or None" if bias else "None without bias"
            raise ValueError(f"forget_bias: expected {takes}, got {forget_bias!r}")
        self.forget_bias = forget_bias  # before the parameters, whose initial values it changes
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
            recompute=recompute,
            batch_invariant=batch_invariant,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            num_heads=num_heads,
            layer_norm=layer_norm,
            backend=backend,
        )

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn does, then set the forget gates' bias to ``forget_bias``."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("bias"):
                    start = self.forget_bias if name.startswith("bias_ih") else 0.0
                    parameter[self.hidden_size : 2 * self.hidden_size].fill_(start)

    # What RNNBase has for one state torch.nn.LSTM has for two. It reads of a layer what ours has as well.

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the shape of c, as torch.nn.LSTM does."""
        return nn.LSTM.get_expected_cell_size(self, input, batch_sizes)  # type: ignore[arg-type]

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise torch.nn.LSTM's error unless input and states have the layer's sizes."""
        nn.LSTM.check_forward_args(self, input, hidden, batch_sizes)  # type: ignore[arg-type]

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return both states with their rows in the order of ``permutation``, as torch.nn.LSTM does."""
        return nn.LSTM.permute_hidden(self, hx, permutation)  # type: ignore[arg-type]


class GRU(_Layers[Tensor]):
    r"""Multi-layer gated recurrent unit.

    .. math::
        r, z = \sigma(\cdot) \quad \text{of } W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}, \qquad
        n = \tanh(W_{in} x_t + b_{in} + r (W_{hn} h_{t-1} + b_{hn})), \qquad h_t = (1 - z) n + z h_{t-1}

    Takes torch.nn.GRU's place: same arguments, parameters, gate order (r, z, n), initial values and results. The
    equations and their sources are in :mod:`rnnfast.reference`. The parameters' shapes are those of :class:`RNN` with
    G = 3.

    With ``reset_after=False`` the reset gate stands before the matrix product, as it was first described:

    .. math::
        n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r h_{t-1}) + b_{hn})

    What is not among these arguments is as for :class:`RNN`.

    Args:
        reset_after: whether r multiplies what W_hn makes of h, as in torch.nn and cuDNN, or h itself (Cho et al.,
            "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation", EMNLP
            2014). The parameters are the same, but their values mean another layer. Recurrent dropout is where h meets
            W_hh, in both products with one mask.

    Raises:
        ValueError: a size below 1, a probability outside [0, 1], or for recurrent_dropout and zoneout [0, 1), a
            proj_size, an unknown backend, num_heads that does not divide hidden_size, layer_norm with num_heads or with
            ``reset_after=False``.
        TypeError: a size is no int; bias, batch_first, recompute, batch_invariant, layer_norm or reset_after is no
            bool.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        batch_invariant: bool = False,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        num_heads: int = 1,
        layer_norm: bool = False,
        reset_after: bool = True,
        backend: str | None = None,
    ) -> None:
        _check_no_projection(proj_size)
        functional.check_bools(reset_after=reset_after)
        super().__init__(
            "GRU" if reset_after else "GRU_RESET_BEFORE",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            batch_invariant=batch_invariant,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            num_heads=num_heads,
            layer_norm=layer_norm,
            backend=backend,
        )

    @property
    def reset_after(self) -> bool:
        return self.mode == "GRU"


class IndRNN(_Layers[Tensor]):
    r"""Multi-layer independently recurrent network.

    .. math::
        h_t = f(W_{ih} x_t + b_{ih} + w_{hh} \odot h_{t-1} + b_{hh})

    The recurrent weight is a vector: a unit sees its own past alone, and units meet in the next layer. Li, Li, Cook,
    Zhu and Gao, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN", CVPR 2018.

    The parameters of a layer are ``weight_ih_l0 [hidden_size, input_size]``, ``weight_hh_l0 [hidden_size]``, and
    ``bias_ih_l0`` and ``bias_hh_l0 [hidden_size]``, whose sum is the paper's one bias. ``weight_hh`` starts uniform in
    [0, 1], so that some units remember for few steps and some for many; the others start as torch.nn's do. Through T
    steps the gradient grows as w_hh^T, so in training the paper keeps the weights within 2^(1/T) where f is relu:
    ``layer.weight_hh_l0.data.clamp_(-bound, bound)`` behind every update.

    What is not among these arguments is as for :class:`RNN`. There is no ``num_heads``, for each unit is a head, and no
    ``layer_norm``. A layer is called as the others are, see :meth:`forward`.

    Args:
        nonlinearity: f: ``"relu"`` or ``"tanh"``.
        recompute: as for :class:`RNN`; the cell keeps nothing but its states anyway.

    Raises:
        ValueError: a size below 1, a probability outside [0, 1], or for recurrent_dropout and zoneout [0, 1), a
            proj_size, an unknown nonlinearity or backend.
        TypeError: a size is no int; bias, batch_first, recompute or batch_invariant is no bool.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        recompute: bool = False,
        batch_invariant: bool = False,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        _check_no_projection(proj_size)
        functional.check_choice("nonlinearity", nonlinearity, functional.INDRNN_NONLINEARITIES)
        super().__init__(
            f"INDRNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            batch_invariant=batch_invariant,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            backend=backend,
        )
        self.nonlinearity = nonlinearity

    def reset_parameters(self) -> None:
        """Draw the recurrent weights from [0, 1], the other parameters as torch.nn does."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.uniform_(parameter)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "relu" else f", nonlinearity={self.nonlinearity}")


def norm_names(cell: str) -> tuple[str, ...]:
    """The parameters of a cell's layer normalisation, but for the layer's number."""
    of_c = ("norm_weight_c", "norm_bias_c") if reference.find_cell(cell).states == 2 else ()
    return "norm_weight_ih", "norm_weight_hh", *of_c


def new_norm(name: str, w_ih: Tensor, hidden_size: int) -> nn.Parameter:
    """The parameter of that name as it starts, beside ``w_ih [gates * hidden_size, input_size]``."""
    units = hidden_size if name.startswith(("norm_weight_c", "norm_bias_c")) else w_ih.shape[0]
    return nn.Parameter(w_ih.new_full((units,), _initial_norm(name)))


def draw_parameters(module: nn.Module, hidden_size: int) -> None:
    """Draw the parameters as torch.nn does, but for the norms, which start from what they always start from."""
    bound = 1 / sqrt(hidden_size) if hidden_size > 0 else 0.0
    for name, parameter in module.named_parameters():
        if name.startswith("norm"):
            nn.init.constant_(parameter, _initial_norm(name))
        else:
            nn.init.uniform_(parameter, -bound, bound)


def _initial_norm(name: str) -> float:
    return 0.0 if name.startswith("norm_bias") else 1.0


def _check_no_projection(proj_size: int) -> None:
    if proj_size != 0:
        raise ValueError(f"proj_size: expected 0, only LSTM has a projection, got {proj_size}")
