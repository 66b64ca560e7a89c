"""A mistake raises torch.nn's exception type, in words that name the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_inputs import each_backend, each_layer
from torch import Tensor, nn, zeros
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional


def exception_of(call: Callable[[], Any]) -> type[BaseException]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is the result
        call()
    return caught.type


def hx_of(name: str, *shape: int, **options: Any) -> Any:
    state = zeros(*shape, **options)
    return (state, state) if name.startswith("LSTM") else state


# ------------------------------------------------------------------------------------------------- constructors
CONSTRUCTORS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((0, 4), {}, "input_size: expected an int above 0, got 0"),
    ((3, 0), {}, "hidden_size: expected an int above 0, got 0"),
    ((3, -4), {}, "hidden_size: expected an int above 0, got -4"),
    ((1.5, 4), {}, "input_size: expected an int, got 1.5"),
    ((3, "4"), {}, "hidden_size: expected an int, got '4'"),
    ((3, 4, 0), {}, "num_layers: expected an int above 0, got 0"),
    ((3, 4, 1.5), {}, "num_layers: expected an int, got 1.5"),
    ((3, 4), {"dropout": 1.5, "num_layers": 2}, "dropout: expected a probability from 0 to 1, got 1.5"),
    ((3, 4), {"dropout": -0.1, "num_layers": 2}, "dropout: expected a probability from 0 to 1, got -0.1"),
    ((3, 4), {"dropout": float("nan"), "num_layers": 2}, "dropout: expected a probability from 0 to 1, got nan"),
    ((3, 4), {"dropout": True, "num_layers": 2}, "dropout: expected a probability from 0 to 1, got True"),
    ((3, 4), {"dropout": "a", "num_layers": 2}, "dropout: expected a probability from 0 to 1, got 'a'"),
    ((3, 4), {"bias": 1}, "bias should be of type bool, got: int"),
    ((3, 4), {"batch_first": 1}, "batch_first should be of type bool, got: int"),
    ((3, 4), {"dtype": torch.int64}, "floating point"),
    ((3, 4), {"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ((3,), {}, "hidden_size"),
]


@each_layer
@pytest.mark.parametrize(("args", "kwargs", "message"), CONSTRUCTORS, ids=lambda value: str(value)[:60])
def test_constructor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    expected = exception_of(lambda: getattr(nn, name)(*args, **kwargs))
    with pytest.raises(expected, match=message) as caught:
        getattr(rnnfast, name)(*args, **kwargs)
    assert caught.type is expected


@pytest.mark.parametrize("proj_size", [4, 5, -1])
def test_projection_size(proj_size: int) -> None:
    assert exception_of(lambda: nn.LSTM(3, 4, proj_size=proj_size)) is ValueError
    with pytest.raises(ValueError, match=rf"proj_size: expected 0 .* to hidden_size - 1 = 3, got {proj_size}"):
        rnnfast.LSTM(3, 4, proj_size=proj_size)


@pytest.mark.parametrize("proj_size", [1.5, None, "2"])
def test_projection_size_is_an_int(proj_size: Any) -> None:
    assert exception_of(lambda: nn.LSTM(3, 4, proj_size=proj_size)) is TypeError
    with pytest.raises(TypeError, match=f"proj_size: expected an int, got {proj_size!r}"):
        rnnfast.LSTM(3, 4, proj_size=proj_size)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_projection_is_for_lstm(name: str) -> None:
    assert exception_of(lambda: getattr(nn, name)(3, 4, proj_size=2)) is ValueError
    with pytest.raises(ValueError, match="proj_size: expected 0, only LSTM has a projection, got 2"):
        getattr(rnnfast, name)(3, 4, proj_size=2)


@each_layer
def test_bidirectional_is_a_bool(name: str) -> None:
    assert exception_of(lambda: getattr(nn, name)(3, 4, bidirectional="False")(X)) is TypeError
    with pytest.raises(TypeError, match="bidirectional: expected a bool, got 'False'"):
        getattr(rnnfast, name)(3, 4, bidirectional="False")


def test_choices() -> None:
    assert exception_of(lambda: nn.RNN(3, 4, nonlinearity="sin")) is ValueError
    for make in (rnnfast.RNN, rnnfast.RNNCell):
        known = "'tanh', 'relu', 'sigmoid', 'identity', 'leaky_relu'"
        with pytest.raises(ValueError, match=f"nonlinearity: expected one of {known}, got 'sin'"):
            make(3, 4, nonlinearity="sin")
    for make in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU, rnnfast.RNNCell, rnnfast.LSTMCell, rnnfast.GRUCell):
        with pytest.raises(ValueError, match="backend: expected one of None, 'auto', 'reference', got 'gpu'"):
            make(3, 4, backend="gpu")


@each_layer
def test_dropout_in_one_layer_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        getattr(rnnfast, name)(3, 4, dropout=0.5)


# ------------------------------------------------------------------------------------------------------- layers
X = torch.randn(5, 2, 3)
PACKED = pack_padded_sequence(X, torch.tensor([5, 3]))
WIDE_PACKED = pack_padded_sequence(torch.randn(5, 2, 7), torch.tensor([5, 3]))

# What is given to a layer of input_size 3, hidden_size 4 (given its name), and how the message begins.
CALLS: dict[str, tuple[Callable[[str], tuple[Any, ...]], str]] = {
    "1D input": (lambda _: (X[0, 0],), "input: expected 2D .* or 3D .*, got 1D"),
    "4D input": (lambda _: (X[None],), "input: expected 2D .* or 3D .*, got 4D"),
    "features": (lambda _: (zeros(5, 2, 7),), r"input: expected 3 features \(input_size\), got 7"),
    "unbatched features": (lambda _: (zeros(5, 7),), r"input: expected 3 features \(input_size\), got 7"),
    "integers": (lambda _: (X.long(),), "input: expected the weights' dtype torch.float32, got torch.int64"),
    "double": (lambda _: (X.double(),), "input: expected the weights' dtype torch.float32, got torch.float64"),
    "complex": (lambda _: (X.cfloat(),), "input: expected the weights' dtype torch.float32, got torch.complex64"),
    "device": (lambda _: (X.to("meta"),), "input: expected the weights' device cpu, got meta"),
    "2D hx": (lambda n: (X, hx_of(n, 1, 4)), r"hx.*: expected shape \(1, 2, 4\) .*, got \(1, 4\)"),
    "3D hx, unbatched": (lambda n: (X[:, 0], hx_of(n, 1, 1, 4)), r"hx.*: expected shape \(1, 4\) .*, got \(1, 1, 4\)"),
    "hx batch": (lambda n: (X, hx_of(n, 1, 3, 4)), r"hx.*: expected shape \(1, 2, 4\) .*, got \(1, 3, 4\)"),
    "hx features": (lambda n: (X, hx_of(n, 1, 2, 5)), r"hx.*: expected shape \(1, 2, 4\) .*, got \(1, 2, 5\)"),
    "hx layers": (lambda n: (X, hx_of(n, 2, 2, 4)), r"hx.*: expected shape \(1, 2, 4\) .*, got \(2, 2, 4\)"),
    "hx dtype": (
        lambda n: (X, hx_of(n, 1, 2, 4, dtype=torch.float64)),
        "hx.*: expected the input's dtype torch.float32, got torch.float64",
    ),
    "hx device": (
        lambda n: (X, hx_of(n, 1, 2, 4, device="meta")),
        "hx.*: expected the input's device cpu, got meta",
    ),
    "packed features": (lambda _: (WIDE_PACKED,), r"input: expected 3 features \(input_size\), got 7"),
    "packed hx batch": (
        lambda n: (PACKED, hx_of(n, 1, 3, 4)),
        r"hx.*: expected shape \(1, 2, 4\) .*, got \(1, 3, 4\)",
    ),
}


@each_layer
@each_backend
@pytest.mark.parametrize("call", CALLS)
def test_layer_call(name: str, backend: str, call: str) -> None:
    make_args, message = CALLS[call]
    args = make_args(name)
    expected = exception_of(lambda: getattr(nn, name)(3, 4)(*args))
    with pytest.raises(expected, match=message) as caught:
        getattr(rnnfast, name)(3, 4, backend=backend)(*args)
    assert caught.type is expected


def test_the_form_of_the_input_is_that_of_the_layer() -> None:
    for batch_first, form in ((False, r"\[T, B, input_size\]"), (True, r"\[B, T, input_size\]")):
        with pytest.raises(ValueError, match=rf"input: expected 2D \[T, input_size\] or 3D {form}, got 1D"):
            rnnfast.GRU(3, 2, batch_first=batch_first)(torch.zeros(3))


def test_states_of_an_lstm() -> None:
    module, h, c = rnnfast.LSTM(3, 4), zeros(1, 2, 4), zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match=r"hx\[1\]: expected shape \(1, 2, 4\) .*, got \(1, 2, 5\)"):
        module(X, (h, c))
    for hx, got in ((h, "a Tensor"), ((h,), "1 of them"), ((h, h, h), "3 of them")):
        with pytest.raises(RuntimeError, match=rf"hx: expected two states \(h_0, c_0\), got {got}"):
            module(X, hx)
    with pytest.raises(TypeError, match=r"hx: expected two states \(h_0, c_0\), got a int"):
        rnnfast.LSTM(3, 4)(X, 1)
    with pytest.raises(TypeError, match=r"hx\[0\]: expected a Tensor, got NoneType"):
        module(X, (None, None))


def test_states_of_one_state_layers() -> None:
    with pytest.raises(TypeError, match="hx: expected a Tensor, got tuple"):
        rnnfast.GRU(3, 4)(X, (zeros(1, 2, 4), zeros(1, 2, 4)))


@each_layer
@each_backend
@pytest.mark.parametrize("key", ["weight_hh_l0", "bias_ih_l0"])
def test_weights_that_do_not_fit(name: str, backend: str, key: str) -> None:
    """RuntimeErrors, as torch.nn's where it notices: its LSTM reads on past a weight that is too small."""
    for change in (lambda weight: weight.double(), lambda weight: weight[:-1]):
        module = getattr(rnnfast, name)(3, 4, backend=backend)
        setattr(module, key, nn.Parameter(change(getattr(module, key).detach())))
        argument = r"dtype|shape|size" if backend == "reference" else f"{key[0]}_{key.split('_')[1]} has"
        with pytest.raises(RuntimeError, match=argument):
            module(X)


@each_layer
def test_weights_of_another_dtype_raise_torch_s_own_error(name: str) -> None:
    for package in (nn, rnnfast):
        module = getattr(package, name)(3, 4)
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().double())
        with pytest.raises(RuntimeError, match="dtype"):
            module(X)


@each_layer
def test_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match="input: expected a Tensor or a PackedSequence, got list"):
        getattr(rnnfast, name)(3, 4)([1.0, 2.0])


@pytest.mark.parametrize("value", ["no", 1, None])
def test_return_states_is_a_bool(value: object) -> None:
    with pytest.raises(TypeError, match=f"return_states: expected a bool, got {value!r}"):
        rnnfast.GRU(3, 4)(torch.randn(2, 3), return_states=value)


@each_backend
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "IndRNN", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("zoneout", [0.0, 0.1])
def test_generator(name: str, backend: str, zoneout: float) -> None:
    """Also where nothing is drawn from it."""
    module = getattr(rnnfast, name)(3, 4, zoneout=zoneout, backend=backend)
    for generator, got in ((3, "int"), ("cpu", "str")):
        with pytest.raises(TypeError, match=f"generator: expected a torch.Generator or None, got {got}"):
            module(X[0], generator=generator)
    module(X[0], generator=torch.Generator())


@each_layer
def test_packed_by_hand(name: str) -> None:
    module = getattr(rnnfast, name)(3, 4)
    with pytest.raises(RuntimeError, match=r"input: expected a PackedSequence with 2D data .*, got 3D"):
        module(PackedSequence(X, torch.tensor([2, 2])))
    with pytest.raises(RuntimeError, match="input: expected sorted_indices of 2 rows or more, got 1"):
        module(PackedSequence(PACKED.data, PACKED.batch_sizes, torch.tensor([0]), torch.tensor([0])))


@each_layer
@each_backend
@pytest.mark.parametrize("sizes", [[2, 2, 2], [2, 2, 2, 2, 2], [3, 2, 4], [4, 3, 2, -1, 0], [4, 5, -1]], ids=str)
def test_batch_sizes_that_do_not_fit(name: str, backend: str, sizes: list[int]) -> None:
    """8 rows of data: the sizes must decrease, stay positive and sum to 8."""
    with pytest.raises((RuntimeError, ValueError), match="batch_sizes"):
        getattr(rnnfast, name)(3, 4, backend=backend)(PackedSequence(PACKED.data, torch.tensor(sizes)))


@each_layer
@each_backend
def test_batch_sizes_of_another_type(name: str, backend: str) -> None:
    packed = PackedSequence(PACKED.data, PACKED.batch_sizes.int())
    assert issubclass(exception_of(lambda: getattr(nn, name)(3, 4)(packed)), RuntimeError)
    with pytest.raises(ValueError, match=r"batch_sizes.* (got torch\.int32|has dtype Int)"):
        getattr(rnnfast, name)(3, 4, backend=backend)(packed)


# ------------------------------------------------------------------------------------------ lengths and resets
LENGTHS: list[tuple[Any, type[Exception], str]] = [
    # torch.nn.utils.rnn.pack_padded_sequence raises RuntimeError for each of these that it refuses.
    (torch.tensor([5, -1]), RuntimeError, r"lengths: expected values from 0 to 5 \(T\), got -1 to 5"),
    (torch.tensor([6, 1]), RuntimeError, r"lengths: expected values from 0 to 5 \(T\), got 1 to 6"),
    (torch.tensor([5, 1, 1]), RuntimeError, r"lengths: expected shape \(2,\), one for each row, got \(3,\)"),
    (torch.tensor(5), RuntimeError, r"lengths: expected shape \(2,\), one for each row, got \(\)"),
    (torch.tensor([5.0, 1.0]), TypeError, "lengths: expected a Tensor of integers, got torch.float32"),
    (torch.tensor([True, False]), TypeError, "lengths: expected a Tensor of integers, got torch.bool"),
    (torch.tensor([5j, 1j]), TypeError, "lengths: expected a Tensor of integers, got torch.complex64"),
    ([5, 1], TypeError, "lengths: expected a Tensor of integers, got list"),
]


@each_layer
@each_backend
@pytest.mark.parametrize(("lengths", "error", "message"), LENGTHS, ids=lambda value: str(value)[:40])
def test_lengths(name: str, backend: str, lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(rnnfast, name)(3, 4, backend=backend)(X, lengths=lengths)


@each_layer
def test_lengths_with_other_forms(name: str) -> None:
    module = getattr(rnnfast, name)(3, 4)
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        module(PACKED, lengths=torch.tensor([5, 3]))
    with pytest.raises(RuntimeError, match=r"lengths: expected shape \(\), the input being unbatched, got \(1,\)"):
        module(X[:, 0], lengths=torch.tensor([3]))


@each_backend
def test_lengths_of_samples(backend: str) -> None:
    """Of one batch for all samples, and of each."""
    module = rnnfast.GRU(3, 4, backend=backend)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return module(x, lengths=lengths)[0]

    for lengths, dim in ((torch.tensor([1, 6]), None), (torch.tensor([[5, 1], [6, 1]]), 0)):
        with pytest.raises(RuntimeError, match=r"lengths: expected values from 0 to 5 \(T\), got 1 to 6"):
            torch.func.vmap(run, (0, dim))(torch.stack([X, X]), lengths)
        torch.func.vmap(run, (0, dim))(torch.stack([X, X]), lengths - 1)


@each_layer
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_lengths_of_every_integer_type(name: str, dtype: torch.dtype) -> None:
    module = getattr(rnnfast, name)(3, 4)
    lengths = torch.tensor([5, 2])
    assert torch.equal(module(X, lengths=lengths.to(dtype))[0], module(X, lengths=lengths)[0])
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 5"):
        module(X, lengths=torch.tensor([5, 6]).to(dtype))


@pytest.mark.skipif(rnnfast.ops.extension is None, reason="the reference path's operations check for themselves")
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "to_sparse") for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")]
    + [("LSTM", "to_mkldnn")],
)
def test_input_that_is_not_dense(name: str, layout: str) -> None:
    input = getattr(torch.randn(4, 3) if name.endswith("Cell") else torch.randn(5, 4, 3), layout)()
    with pytest.raises(ValueError, match=r"input: expected a dense tensor, of layout torch.strided, got torch\._?\w+"):
        getattr(rnnfast, name)(3, 2)(input)


@each_layer
@pytest.mark.skipif(rnnfast.ops.extension is None, reason="the reference path's operations check for themselves")
def test_one_tensor_on_meta_among_others(name: str) -> None:
    """It brings the call to the kernels without data, whose results have no values."""
    module = getattr(rnnfast, name)(3, 4)
    with pytest.raises(RuntimeError, match="lengths: expected cpu or the input's device cpu, got meta"):
        module(X, lengths=torch.tensor([5, 2], device="meta"))
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.to("meta"))
    with pytest.raises(RuntimeError, match="expected every tensor on the input's device cpu, got one on meta"):
        module(X)


RESETS: list[tuple[Any, Any, type[Exception], str]] = [
    (X, zeros(5, 2), TypeError, "reset: expected a bool Tensor, got torch.float32"),
    (X, [True], TypeError, "reset: expected a bool Tensor, got list"),
    (X, zeros(2, 5).bool(), RuntimeError, r"reset: expected shape \(5, 2\), .*, got \(2, 5\)"),
    (X, zeros(5).bool(), RuntimeError, r"reset: expected shape \(5, 2\), .*, got \(5,\)"),
    (X, zeros(5, 2, device="meta").bool(), RuntimeError, "reset: expected the input's device cpu, got meta"),
    (X[:, 0], zeros(5, 1).bool(), RuntimeError, r"reset: expected shape \(5,\), .*, got \(5, 1\)"),
    (PACKED, zeros(5, 2).bool(), RuntimeError, r"reset: expected shape \(8,\), .*, got \(5, 2\)"),
]


@each_layer
@pytest.mark.parametrize(("input", "reset", "error", "message"), RESETS)
def test_reset(name: str, input: Any, reset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(rnnfast, name)(3, 4)(input, reset=reset)


@each_layer
def test_reset_packed_otherwise(name: str) -> None:
    """The same lengths in another order give the same batch_sizes. No order is that of the rows."""
    layer, mask = getattr(rnnfast, name)(3, 4), zeros(5, 2).bool()
    mask[1, 0] = True

    def packed(part: Tensor, *lengths: int, enforce_sorted: bool = False) -> PackedSequence:
        return pack_padded_sequence(part, torch.tensor(lengths), enforce_sorted=enforce_sorted)

    output, _ = layer(packed(X, 3, 5), reset=packed(mask, 3, 5))
    first, _ = layer(X[1:3, 0])
    torch.testing.assert_close(pad_packed_sequence(output)[0][1:3, 0], first)
    for other in (packed(mask, 5, 3), packed(mask, 5, 3, enforce_sorted=True)):
        with pytest.raises(RuntimeError, match=r"reset: expected the input's order of rows \(sorted_indices\)"):
            layer(packed(X, 3, 5), reset=other)
        output, _ = layer(packed(X, 5, 3, enforce_sorted=True), reset=other)
        torch.testing.assert_close(pad_packed_sequence(output)[0][1:, 0], layer(X[1:, 0])[0])
    with pytest.raises(RuntimeError, match=r"reset: expected the input's order of rows"):
        layer(packed(X, 5, 3, enforce_sorted=True), reset=packed(mask, 3, 5))
    with pytest.raises(RuntimeError, match=r"reset: expected the input's batch_sizes"):
        layer(packed(X, 3, 5), reset=packed(mask, 4, 5))


# --------------------------------------------------------------------------------------------------- functional
def weights_of(name: str, layers: int = 1, **options: Any) -> list[list[Tensor]]:
    return getattr(rnnfast, name)(3, 4, layers, **options)._layer_weights()


PROBABILITY, BELOW_ONE = "expected a probability from 0 to 1", "expected a probability below 1"
OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("GRU", {"num_heads": 3}, ValueError, "num_heads: expected a divisor of hidden_size = 4, got 3"),
    ("GRU", {"num_heads": 0}, ValueError, "num_heads: expected an int above 0, got 0"),
    ("GRU", {"num_heads": -1}, ValueError, "num_heads: expected an int above 0, got -1"),
    ("GRU", {"num_heads": 2.0}, TypeError, "num_heads: expected an int, got 2.0"),
    (
        "GRU",
        {"num_heads": 2},
        RuntimeError,
        r"weights: expected w_hh \[G\*H, H / num_heads\] = \(12, 2\) with num_heads = 2, got \(12, 4\)",
    ),
    ("GRU", {"zoneout": [0.1, 0.2]}, ValueError, rf"zoneout: {BELOW_ONE}, got \[0.1, 0.2\]"),
    ("GRU", {"zoneout": []}, ValueError, rf"zoneout: {BELOW_ONE}, got \[\]"),
    ("GRU", {"zoneout": 1.0}, ValueError, f"zoneout: {BELOW_ONE}, got 1.0"),
    ("GRU", {"zoneout": float("nan")}, ValueError, f"zoneout: {BELOW_ONE}, got nan"),
    ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, ValueError, rf"zoneout: {BELOW_ONE} or two.*, got \(0.1, 0.2, 0.3\)"),
    ("LSTM", {"zoneout": "a"}, ValueError, f"zoneout: {BELOW_ONE} or two.*, got 'a'"),
    ("LSTM", {"dropout": 2.0}, ValueError, f"^dropout: {PROBABILITY}, got 2.0"),
    ("LSTM", {"dropout": 2.0, "training": False}, ValueError, f"^dropout: {PROBABILITY}, got 2.0"),
    ("LSTM", {"dropout": None}, ValueError, f"^dropout: {PROBABILITY}, got None"),
    ("LSTM", {"weight_dropout": -1}, ValueError, f"weight_dropout: {PROBABILITY}, got -1"),
    ("LSTM", {"weight_dropout": True}, ValueError, f"weight_dropout: {PROBABILITY}, got True"),
    ("LSTM", {"recurrent_dropout": 1.0}, ValueError, f"recurrent_dropout: {BELOW_ONE}, got 1.0"),
    ("LSTM", {"recurrent_dropout": "a"}, ValueError, f"recurrent_dropout: {BELOW_ONE}, got 'a'"),
]


@each_backend
@pytest.mark.parametrize(("name", "options", "error", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(backend: str, name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.recurrent(name.lower(), X, None, weights_of(name), backend=backend, **options)


def test_heads_of_a_projection() -> None:
    with pytest.raises(ValueError, match="num_heads: expected 1 with a projection, got 2"):
        functional.recurrent("lstm", X, None, weights_of("LSTM", proj_size=2), num_heads=2)
    with pytest.raises(ValueError, match="num_heads: expected 1 with a projection, got 2"):
        rnnfast.LSTM(3, 4, proj_size=2, num_heads=2)


def test_zoneout_of_a_step() -> None:
    for zoneout in ((0.1, 0.2, 0.3), 1.0, "a", []):
        with pytest.raises(ValueError, match=f"zoneout: {BELOW_ONE} or two, of h and c, got"):
            functional.step("lstm", X[0], None, weights_of("LSTM")[0], zoneout=zoneout)


MATRICES = r"\[w_ih \[G\*H, I\], w_hh and so on\]"
FLAT = r"\[Parameter \[12, 3\], Parameter \[12, 4\], Parameter \[12\], Parameter \[12\]\]"
NO_BIASES = r"\[Parameter \[12, 3\], Parameter \[12, 4\], NoneType, NoneType\]"
WEIGHTS: dict[str, tuple[Callable[[list[list[Tensor]]], Any], str]] = {
    "none": (lambda _: None, "NoneType"),
    "no layers": (lambda _: [], r"\[\]"),
    "a flat list": (lambda layers: layers[0], FLAT),
    "one weight": (lambda layers: [layers[0][:1]], r"\[\[Parameter \[12, 3\]\]\]"),
    "a vector": (lambda layers: [layers[0][2:]], r"\[\[Parameter \[12\], Parameter \[12\]\]\]"),
    "no tensors": (lambda _: [[1, 2]], r"\[\[int, int\]\]"),
    "no biases": (lambda layers: [[*layers[0][:2], None, None]], rf"\[{NO_BIASES}\]"),
    "a layer that is none": (lambda layers: [layers[0], None], rf"\[{FLAT}, NoneType\]"),
}


@each_backend
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind: str, backend: str) -> None:
    make, got = WEIGHTS[kind]
    with pytest.raises(ValueError, match=f"^weights: expected {MATRICES} for each layer, got {got}$"):
        functional.recurrent("gru", X, None, make(weights_of("GRU")), backend=backend)


@pytest.mark.parametrize("options", [{"weight_dropout": 0.5}, {"num_heads": 2}], ids=str)
@pytest.mark.parametrize("layer_above", [None, "no w_hh", "no biases"])
def test_weights_whose_w_hh_changes(options: dict[str, Any], layer_above: str | None) -> None:
    """What is named are the caller's weights."""
    heads = options.get("num_heads", 1)
    w_ih, w_hh, *biases = rnnfast.GRU(3, 4, num_heads=heads)._layer_weights()[0]
    above = {None: None, "no w_hh": [w_ih, None, *biases], "no biases": [w_ih, w_hh, None, None]}[layer_above]
    with pytest.raises(ValueError, match=rf"^weights: expected {MATRICES} for each layer, got .*NoneType.*$") as error:
        functional.recurrent("gru", X, None, [[w_ih, w_hh, *biases], above], **options)
    assert f"Parameter [12, {4 // heads}]" in str(error.value)


@each_backend
def test_weights_of_a_step(backend: str) -> None:
    no_biases = [*weights_of("GRU")[0][:2], None, None]
    for weights, got in (
        ([], r"\[\]"),
        (weights_of("GRU"), rf"\[{FLAT}\]"),
        (None, "NoneType"),
        (no_biases, NO_BIASES),
    ):
        with pytest.raises(ValueError, match=f"^weights: expected {MATRICES}, got {got}$"):
            functional.step("gru", X[0], None, weights, backend=backend)


@each_backend
def test_no_dropout_without_training(backend: str) -> None:
    options: dict[str, Any] = {"dropout": 0.5, "weight_dropout": 0.5, "recurrent_dropout": 0.5}
    weights = weights_of("LSTM", 1) + rnnfast.LSTM(4, 4)._layer_weights()
    with torch.no_grad():
        expected = functional.recurrent("lstm", X, None, weights, backend=backend)[0]
        quiet = functional.recurrent("lstm", X, None, weights, backend=backend, training=False, **options)[0]
        noisy = functional.recurrent("lstm", X, None, weights, backend=backend, **options)[0]
    assert torch.equal(quiet, expected)
    assert not torch.equal(noisy, expected)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_zoneout_set_as_an_attribute(name: str) -> None:
    module = getattr(rnnfast, name)(3, 4)
    results = []
    for zoneout in ((0.4, 0.3), [0.4, 0.3]):
        module.zoneout = zoneout
        results.append(module(X[0], generator=torch.Generator().manual_seed(1))[0])
    assert torch.equal(*results)
    for zoneout in ([0.4, 0.3, 0.2], None, 1.5, []):
        module.zoneout = zoneout
        with pytest.raises(ValueError, match=f"zoneout: {BELOW_ONE} or two, of h and c, got"):
            module(X[0])


# -------------------------------------------------------------------------------------------------------- cells
CELL_CONSTRUCTORS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((-3, 4), ValueError, "input_size: expected 0 or an int above 0, got -3"),
    ((3, -4), ValueError, "hidden_size: expected 0 or an int above 0, got -4"),
    ((3, 4.5), TypeError, "hidden_size: expected an int, got 4.5"),
    ((3, 4, "no"), TypeError, "bias: expected a bool, got 'no'"),
    ((3, 4, 1), TypeError, "bias: expected a bool, got 1"),
]


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize(("args", "error", "message"), CELL_CONSTRUCTORS)
def test_cell_constructor(name: str, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(rnnfast, name)(*args)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)])
def test_cells_without_features_or_units(name: str, sizes: tuple[int, int]) -> None:
    """torch.nn has them, which its layers are not."""
    theirs, ours = getattr(nn, name)(*sizes), getattr(rnnfast, name)(*sizes)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(zeros(2, sizes[0])), theirs(zeros(2, sizes[0])))


CELL_CALLS: dict[str, tuple[Callable[[str], tuple[Any, ...]], str]] = {
    "3D input": (lambda _: (X,), "input: expected 1D .* or 2D .*, got 3D"),
    "0D input": (lambda _: (zeros(()),), "input: expected 1D .* or 2D .*, got 0D"),
    "features": (lambda _: (zeros(2, 7),), r"input: expected 3 features \(input_size\), got 7"),
    "integers": (lambda _: (X[0].long(),), "input: expected the weights' dtype torch.float32, got torch.int64"),
    "double": (lambda _: (X[0].double(),), "input: expected the weights' dtype torch.float32, got torch.float64"),
    "hx batch": (lambda n: (X[0], hx_of(n, 3, 4)), r"hx.*: expected shape \(2, 4\), got \(3, 4\)"),
    "hx features": (lambda n: (X[0], hx_of(n, 2, 5)), r"hx.*: expected shape \(2, 4\), got \(2, 5\)"),
    "3D hx": (lambda n: (X[0], hx_of(n, 1, 2, 4)), r"hx.*: expected shape \(2, 4\), got \(1, 2, 4\)"),
    "1D hx": (lambda n: (X[0], hx_of(n, 4)), r"hx.*: expected shape \(2, 4\), got \(4,\)"),
    "2D hx, unbatched": (lambda n: (X[0, 0], hx_of(n, 1, 4)), r"hx.*: expected shape \(4,\), got \(1, 4\)"),
    "hx dtype": (
        lambda n: (X[0], hx_of(n, 2, 4, dtype=torch.float64)),
        "hx.*: expected the input's dtype torch.float32, got torch.float64",
    ),
    "hx device": (lambda n: (X[0], hx_of(n, 2, 4, device="meta")), "hx.*: expected the input's device cpu, got meta"),
}


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("call", CELL_CALLS)
def test_cell_call(name: str, call: str) -> None:
    make_args, message = CELL_CALLS[call]
    args = make_args(name)
    expected = exception_of(lambda: getattr(nn, name)(3, 4)(*args))
    with pytest.raises(expected, match=message) as caught:
        getattr(rnnfast, name)(3, 4)(*args)
    assert caught.type is expected


@each_layer
@each_backend
def test_a_failed_call_changes_nothing(name: str, backend: str) -> None:
    module = getattr(rnnfast, name)(3, 4, backend=backend)
    expected = module(X)
    given = [X.clone(), zeros(1, 3, 4)]
    hx: Tensor | tuple[Tensor, Tensor] = (given[1], given[1]) if name == "LSTM" else given[1]
    with pytest.raises(RuntimeError):
        module(X, hx)
    torch.testing.assert_close(given[0], X, rtol=0, atol=0)
    assert not given[1].any()
    torch.testing.assert_close(module(X), expected, rtol=0, atol=0)


def test_what_takes_modules() -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got str"):
        rnnfast.explain("lstm")
    for function in (rnnfast.convert, rnnfast.to_torch):
        for model, got in ((5, "int"), (None, "NoneType")):
            with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {got}"):
                function(model)
