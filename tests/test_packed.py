"""PackedSequence and lengths: rows of different lengths, in torch.nn's forms and beyond them."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import ModuleCase, each_backend, each_layer, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnfast


@each_layer
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_result_is_packed_as_the_input(name: str, device: str, enforce_sorted: bool, batch_first: bool) -> None:
    options = (("num_layers", 2), ("bidirectional", True), ("batch_first", batch_first))
    theirs, ours = ModuleCase(name, options, "packed", hx=False).pair(rnnfast, device=device)
    rows = [torch.randn(length, 3, device=device, dtype=torch.float64) for length in (6, 5, 5, 1)]
    packed = pack_sequence(rows if enforce_sorted else rows[::-1], enforce_sorted)
    (expected, _), (got, _) = theirs(packed), ours(packed)
    assert isinstance(got, PackedSequence)
    assert (got.sorted_indices is None) == enforce_sorted
    torch.testing.assert_close(tuple(got), tuple(expected))
    padded, lengths = pad_packed_sequence(got, batch_first)
    torch.testing.assert_close(padded, pad_packed_sequence(expected, batch_first)[0])
    assert lengths.tolist() == ([6, 5, 5, 1] if enforce_sorted else [1, 5, 5, 6])


@each_layer
@each_backend
def test_a_row_does_not_depend_on_its_batch(name: str, device: str, backend: str) -> None:
    """Each row of a packed batch is what it is alone, its states included."""
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True)), "packed_unsorted", hx=True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    packed, hx, _ = case.inputs(device=device)
    output, states = module(packed, hx)
    (padded, lengths), (input, _) = pad_packed_sequence(output), pad_packed_sequence(packed)
    for row, length in enumerate(lengths.tolist()):
        own = [state[:, row] for state in flatten(hx)]
        alone = module(input[:length, row], (own[0], own[1]) if name == "LSTM" else own[0])
        torch.testing.assert_close([padded[:length, row], *(s[:, row] for s in flatten(states))], flatten(alone))


@each_layer
@each_backend
@pytest.mark.parametrize("bidirectional", [False, True])
def test_steps_without_rows(name: str, device: str, backend: str, bidirectional: bool) -> None:
    """As torch.nn has them, at the end: they change nothing. A reset is for the rows that there are."""
    case = ModuleCase(name, (("bidirectional", bidirectional),), "packed", True)
    theirs, ours = case.pair(rnnfast, device=device, backend=backend)
    packed, hx, _ = case.inputs(device=device)
    longer = PackedSequence(packed.data, torch.cat([packed.batch_sizes, torch.zeros(2, dtype=torch.int64)]))
    on_cpu = [state.cpu() for state in flatten(hx)]  # cuDNN need not take such steps
    expected = theirs.cpu()(longer.cpu(), tuple(on_cpu) if name == "LSTM" else on_cpu[0])
    torch.testing.assert_close(flatten(ours(longer, hx)), flatten(expected), check_device=False)
    reset = torch.rand(len(packed.data), device=device) < 0.4
    torch.testing.assert_close(
        flatten(ours(longer, hx, reset=reset)), flatten(ours(packed, hx, reset=reset)), rtol=0, atol=0
    )


@each_layer
@each_backend
def test_empty_rows_of_a_packed_batch(name: str, device: str, backend: str) -> None:
    """sorted_indices may name rows beyond batch_sizes[0]: these have no steps and keep their state."""
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True)), "packed", True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    packed, hx, _ = case.inputs(device=device)
    order = torch.tensor([2, 4, 1, 0, 3], device=device)  # row 3 is the empty one
    with_empty = PackedSequence(packed.data, packed.batch_sizes, order, order.argsort())
    states = [torch.randn(4, 5, 5, device=device, dtype=torch.float64) for _ in flatten(hx)]
    full = (states[0], states[1]) if name == "LSTM" else states[0]
    output, final = module(with_empty, full)
    inner = [state[:, order[:4]] for state in states]
    expected, expected_final = module(packed, (inner[0], inner[1]) if name == "LSTM" else inner[0])
    torch.testing.assert_close(output.data, expected.data)
    # The empty row enters every layer with its own initial state, and leaves with it.
    for result, start, rest in zip(flatten(final), states, flatten(expected_final), strict=True):
        torch.testing.assert_close(result[:, 3], start[:, 3], rtol=0, atol=0)
        torch.testing.assert_close(result[:, order[:4]], rest)


@each_layer
@each_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(name: str, device: str, backend: str, batch_first: bool) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True), ("batch_first", batch_first)), "batched", True)
    theirs, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, _ = case.inputs(device=device)
    lengths = torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    expected, expected_state = theirs(packed, hx)
    expected, _ = pad_packed_sequence(expected, batch_first)
    for form in (lengths, lengths.to(device), lengths.to(device, torch.int32)):
        results = module(input, hx, lengths=form)
        torch.testing.assert_close(flatten(results), [expected, *flatten(expected_state)])


@each_layer
def test_equal_lengths_change_nothing(name: str, device: str) -> None:
    case = ModuleCase(name, (("bidirectional", True),), "batched", hx=True)
    _, module = case.pair(rnnfast, device=device)
    input, hx, _ = case.inputs(device=device)
    full = torch.full((4,), 6, device=device)
    torch.testing.assert_close(flatten(module(input, hx, lengths=full)), flatten(module(input, hx)))
    # Unbatched input has one length.
    states = [state[:, 0] for state in flatten(hx)]
    state = (states[0], states[1]) if name == "LSTM" else states[0]
    short = module(input[:4, 0], state)
    masked = module(input[:, 0], state, lengths=torch.tensor(4, device=device))
    torch.testing.assert_close(flatten(masked)[1:], flatten(short)[1:])
    torch.testing.assert_close(masked[0][:4], short[0])
    assert not masked[0][4:].any()


@each_layer
@each_backend
def test_rows_of_length_zero(name: str, device: str, backend: str) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True)), "batched", hx=True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, _ = case.inputs(device=device)
    output, states = module(input, hx, lengths=torch.tensor([3, 0, 6, 0], device=device))
    assert not output[:, [1, 3]].any()
    torch.testing.assert_close([s[:, [1, 3]] for s in flatten(states)], [s[:, [1, 3]] for s in flatten(hx)])


@each_layer
@each_backend
def test_padding_may_be_nan(name: str, device: str, backend: str) -> None:
    case = ModuleCase(name, (("num_layers", 2), ("bidirectional", True)), "batched", hx=True)
    _, module = case.pair(rnnfast, device=device, backend=backend)
    input, hx, _ = case.inputs(device=device)
    lengths = torch.tensor([3, 0, 6, 1], device=device)
    padding = torch.arange(6, device=device).unsqueeze(1) >= lengths
    dirty = input.detach().masked_fill(padding.unsqueeze(-1), float("nan")).requires_grad_()
    results = []
    for given in (input, dirty):
        output = flatten(module(given, hx, lengths=lengths))
        gradients = torch.autograd.grad(sum(part.square().sum() for part in output), [given, *module.parameters()])
        assert not gradients[0][padding].any()
        results.append([*output, *gradients])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_trace_takes_other_numbers_of_rows(enforce_sorted: bool, given_state: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = rnnfast.GRU(4, 6)

        def forward(self, input: Tensor, lengths: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            packed = pack_padded_sequence(input, lengths, enforce_sorted=enforce_sorted)
            output, h = self.gru(packed, h0) if given_state else self.gru(packed)
            return pad_packed_sequence(output)[0], h

    def arguments(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(5, len(lengths), 4), torch.tensor(lengths), torch.randn(1, len(lengths), 6)

    module = Packed()
    traced = torch.jit.trace(module, arguments(5, 4, 2), check_trace=False)  # type: ignore[no-untyped-call]
    for rows in (arguments(5, 1), arguments(5, 4, 3, 1)):
        torch.testing.assert_close(traced(*rows), module(*rows))
