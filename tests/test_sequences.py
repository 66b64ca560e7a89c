"""Sequences as they come: resets, lengths, the states of every step, recomputation, pieces, and equal bits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sample_inputs import LAYERS, each_backend, each_layer, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import rnnfast
from rnnfast import ops

needs_operators = pytest.mark.skipif(
    ops.extension is None, reason="the extension is not built, and the reference promises no equal bits"
)
T, B, I, H = 7, 4, 3, 5

# Every kind of layer: its class, and the options that change what it computes.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "leaky ReLU": ("RNN", {"nonlinearity": "leaky_relu"}),
    "LSTM": ("LSTM", {}),
    "projected LSTM": ("LSTM", {"proj_size": 2}),
    "GRU": ("GRU", {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options: Any) -> nn.Module:
    name, own = KINDS[kind]
    return getattr(rnnfast, name)(I, H, **{"num_layers": 2, "dtype": torch.float64, **own, **options})


def initial(module: nn.Module, batch: int = B) -> Any:
    """Random initial states, leaves."""
    slots = module.num_layers * (1 + module.bidirectional)
    like = next(module.parameters())
    h0 = torch.randn(slots, batch, module.proj_size or module.hidden_size).to(like).requires_grad_()
    if module.mode != "LSTM":
        return h0
    return h0, torch.randn(slots, batch, module.hidden_size).to(like).requires_grad_()


def map_state(function: Any, *states: Any) -> Any:
    """``function`` of a state's tensor, or of each of its two."""
    return function(*states) if isinstance(states[0], Tensor) else tuple(map(function, *states))


def gradients(results: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the sum of all tensors in ``results``, each with random weights."""
    generator = torch.Generator().manual_seed(7)
    tensors = flatten(results)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]
    return torch.autograd.grad(tensors, leaves, weights, materialize_grads=True)


# ------------------------------------------------------------------------------------------------------- resets
def episodes(reset: list[bool]) -> Iterator[tuple[int, int]]:
    """The steps [begin, end) of each episode of one row."""
    begins = [0, *(t for t, starts in enumerate(reset) if starts and t)]
    return zip(begins, [*begins[1:], len(reset)], strict=True)


@each_kind
@each_backend
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_episodes_are_sequences_of_their_own(
    kind: str, device: str, backend: str, bidirectional: bool, form: str
) -> None:
    """Each episode alone is the same, forward and backward in time: the initial state of the forward direction reaches
    the first one only, that of the backward direction the last one, and a reset at step 0 drops the former.
    """
    module = make(kind, bidirectional=bidirectional, device=device, backend=backend)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64, requires_grad=True)
    hx = initial(module)
    lengths = [T] * B if form == "padded" else [T, 6, 3, 1]
    reset = torch.rand(T, B) < 0.3
    reset[0] = torch.tensor([True, False, False, True])
    leaves = [input, *flatten(hx), *module.parameters()]

    if form == "packed":
        packed, state = module(
            pack_padded_sequence(input, torch.tensor(lengths)),
            hx,
            reset=pack_padded_sequence(reset.to(device), torch.tensor(lengths)),
        )
        output = pad_packed_sequence(packed, total_length=T)[0]
    else:
        given = torch.tensor(lengths, device=device) if form == "lengths" else None
        output, state = module(input, hx, reset=reset.to(device), lengths=given)

    expected, states = [], []
    for row, length in enumerate(lengths):
        pieces = []
        for begin, end in episodes(reset[:length, row].tolist()):
            # Forward slots are even, backward ones odd; of one direction all are forward.
            keep = torch.zeros(len(flatten(hx)[0]), 1, dtype=torch.float64, device=device)
            keep[0 :: 1 + bidirectional] = begin == 0 and not reset[0, row]
            if bidirectional:
                keep[1::2] = end == length
            pieces.append(module(input[begin:end, row], map_state(lambda s: keep * s[:, row], hx)))  # noqa: B023
        first, last = pieces[0][1], pieces[-1][1]
        expected.append(torch.cat([*(piece[0] for piece in pieces), output.new_zeros(T - length, output.shape[2])]))
        if bidirectional:  # the backward direction ends where the sequence begins
            states.append(map_state(lambda a, b: torch.stack([a[0::2], b[1::2]], 1).flatten(0, 1), last, first))
        else:
            states.append(last)
    wanted = [torch.stack(expected, 1), map_state(lambda *rows: torch.stack(rows, 1), *states)]
    assert_close(flatten([output, state]), flatten(wanted))
    assert_close(gradients([output, state], leaves), gradients(wanted, leaves))


@each_kind
@each_backend
def test_no_gradient_crosses_a_reset(kind: str, device: str, backend: str) -> None:
    module = make(kind, bidirectional=True, device=device, backend=backend)
    input = torch.randn(T, 1, I, device=device, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(T, 1, dtype=torch.bool, device=device)
    reset[3] = True
    output, _ = module(input, reset=reset)
    (before,) = torch.autograd.grad(output[:3].square().sum(), input, retain_graph=True)
    (after,) = torch.autograd.grad(output[3:].square().sum(), input)
    assert before[:3].any()
    assert not before[3:].any()
    assert after[3:].any()
    assert not after[:3].any()


@each_kind
@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reset_drops_what_is_not_finite(kind: str, device: str, backend: str, value: float) -> None:
    module = make(kind, device=device, backend=backend)
    input = torch.randn(T, 2, I, device=device, dtype=torch.float64)
    bad = input.clone()
    bad[2, 0] = value
    reset = torch.zeros(T, 2, dtype=torch.bool, device=device)
    reset[3, 0] = True
    hx = initial(module, 2)
    expected, state = module(input, hx, reset=reset)
    output, bad_state = module(bad, hx, reset=reset)
    assert_close(output[3:], expected[3:], rtol=0, atol=0)
    assert_close(flatten(bad_state), flatten(state), rtol=0, atol=0)


@each_layer
@each_backend
def test_a_mask_of_no_reset_changes_no_bit(name: str, device: str, backend: str) -> None:
    module = make(name if name != "RNN" else "tanh", device=device, backend=backend)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    mask = torch.zeros(T, B, dtype=torch.bool, device=device)
    assert_close(flatten(module(input, reset=mask)), flatten(module(input)), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ lengths
@each_kind
@each_backend
@pytest.mark.parametrize("recompute", [False, True])
def test_padding_harms_nothing(kind: str, device: str, backend: str, recompute: bool) -> None:
    """Whatever padding holds, in the input, in the mask and in the gradients that come in."""
    module = make(kind, bidirectional=True, device=device, backend=backend, recompute=recompute)
    lengths = torch.tensor([3, 0, T, 1], device=device)
    padding = torch.arange(T, device=device).unsqueeze(1) >= lengths
    reset = torch.rand(T, B, device=device) < 0.3
    hx = initial(module)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64, device=device)

    def run(clean: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
            if clean or shape[:2] != (T, B):
                return values
            return values.where(~padding.unsqueeze(-1), bad[torch.arange(shape[2]) % 3])

        input = random(T, B, I).requires_grad_()
        mask = reset & ~padding if clean else reset | padding
        results = module(input, hx, lengths=lengths, reset=mask, return_states=True)
        for steps in (results[0], *flatten(results[2])):
            assert not steps[padding].any()
        tensors = flatten(results)
        incoming = [random(*tensor.shape) for tensor in tensors]
        grads = torch.autograd.grad(tensors, [input, *flatten(hx), *module.parameters()], incoming)
        assert not grads[0][padding].any()
        return [*tensors, *grads]

    assert_close(run(clean=False), run(clean=True), rtol=0, atol=0)


@each_layer
@each_backend
def test_lengths_of_nothing_at_all(name: str, device: str, backend: str) -> None:
    """No steps, or no row that has any: the states pass through every layer, and so do their gradients. Those of the
    weights are zero, so that a batch of nothing is a step of training like any other.
    """
    module = make(name if name != "RNN" else "tanh", bidirectional=True, device=device, backend=backend)
    for steps in (0, T):
        hx = initial(module)
        input = torch.randn(steps, B, I, device=device, dtype=torch.float64)
        output, state = module(input, hx, lengths=torch.zeros(B, dtype=torch.int64, device=device))
        assert output.shape == (steps, B, 2 * (module.proj_size or H))
        assert not output.any()
        assert_close(flatten(state), flatten(hx), rtol=0, atol=0)
        leaves = [*flatten(hx), *module.parameters()]
        grads = torch.autograd.grad(sum(s.sum() for s in flatten(state)), leaves)
        assert all((grad == (index < len(flatten(hx)))).all() for index, grad in enumerate(grads))


# -------------------------------------------------------------------------------------------------- every state
@each_kind
@each_backend
def test_states_are_those_of_single_steps(kind: str, device: str, backend: str) -> None:
    module = make(kind, device=device, backend=backend)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64, requires_grad=True)
    hx = initial(module)
    leaves = [input, *flatten(hx), *module.parameters()]
    output, _, states = module(input, hx, return_states=True)
    assert isinstance(states, rnnfast.States)
    assert len(states.h) == 2
    assert len(states.c) == (2 if module.mode == "LSTM" else 0)
    assert_close(states.h[-1], output, rtol=0, atol=0)

    after = []
    for x in input.split(1):
        hx = module(x, hx)[1]
        after.append(flatten(hx))
    wanted = [torch.stack(parts).unbind(1) for parts in zip(*after, strict=True)]
    assert_close(flatten(states), flatten(wanted))
    assert_close(gradients(states, leaves), gradients(wanted, leaves))


@each_kind
@each_backend
@pytest.mark.parametrize("form", ["batch_first", "unbatched", "lengths", "packed"])
def test_states_have_the_form_of_the_output(kind: str, device: str, backend: str, form: str) -> None:
    batch_first = form == "batch_first"
    module = make(kind, bidirectional=True, device=device, backend=backend, batch_first=batch_first)
    plain = make(kind, bidirectional=True, device=device, backend=backend)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    lengths = torch.tensor([T, 5, 2, 1], device=device)
    if form == "batch_first":
        states = module(input.transpose(0, 1), return_states=True)[2]
        wanted = [tensor.transpose(0, 1) for tensor in flatten(plain(input, return_states=True)[2])]
    elif form == "unbatched":
        states = module(input[:, 0], return_states=True)[2]
        wanted = [tensor[:, 0] for tensor in flatten(plain(input[:, :1], return_states=True)[2])]
    elif form == "lengths":
        (output, state, states), wanted = module(input, lengths=lengths, return_states=True), None
        last = (lengths - 1).view(1, B, 1)
        for layer in range(2):
            for steps, final in zip((states.h, states.c), flatten(state), strict=False):
                forward, backward = steps[layer].chunk(2, -1)
                assert_close(forward.gather(0, last.expand(1, -1, forward.shape[2]))[0], final[2 * layer])
                assert_close(backward[0], final[2 * layer + 1])
        assert_close(states.h[-1], output)
        return
    else:
        order = torch.tensor([2, 0, 3, 1], device=device)
        packed = pack_padded_sequence(input, lengths[order].cpu(), enforce_sorted=False)
        output, _, states = module(packed, return_states=True)
        assert all(isinstance(part, PackedSequence) for part in (*states.h, *states.c))
        assert_close(tuple(states.h[-1]), tuple(output))
        states = [pad_packed_sequence(part)[0] for part in (*states.h, *states.c)]
        wanted = flatten(plain(input, lengths=lengths[order], return_states=True)[2])
    assert_close(flatten(states), wanted)


@each_kind
def test_states_without_gradients(kind: str, device: str) -> None:
    """Where nothing is kept for backward, they are the same."""
    module = make(kind, device=device)
    input = torch.randn(T, B, I, device=device, dtype=torch.float64)
    expected = flatten(module(input, return_states=True))
    with torch.no_grad():
        assert_close([t.requires_grad for t in flatten(module(input, return_states=True))], [False] * len(expected))
        assert_close(flatten(module(input, return_states=True)), [t.detach() for t in expected], rtol=0, atol=0)
    assert_close(flatten(module.requires_grad_(False)(input, return_states=True)), [t.detach() for t in expected])


@each_layer
def test_states_come_before_dropout(name: str) -> None:
    module = make(name if name != "RNN" else "tanh", dropout=0.5)
    first = make(name if name != "RNN" else "tanh", num_layers=1)
    first.load_state_dict({key: value for key, value in module.state_dict().items() if "l0" in key})
    input = torch.randn(T, B, I, dtype=torch.float64)
    assert_close(module(input, return_states=True)[2].h[0], first(input)[0], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- recompute
@each_kind
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_recompute_is_a_choice_of_memory(kind: str, device: str, form: str) -> None:
    """The same results and gradients, from less."""
    input = torch.randn(T, B, I, device=device, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([T, 6, 2, 1])
    reset = torch.rand(T, B, device=device) < 0.3
    kept: dict[bool, int] = {}
    results: dict[bool, list[Tensor]] = {}
    for recompute in (False, True):
        torch.manual_seed(3)
        module = make(kind, bidirectional=True, dropout=0.3, device=device, recompute=recompute)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if form == "packed":
                result = module(pack_padded_sequence(input, lengths), reset=pack_padded_sequence(reset, lengths))
            else:
                given = lengths.to(device) if form == "lengths" else None
                result = module(input, reset=reset, lengths=given)
        kept[recompute] = sum(saved.values())
        results[recompute] = [*flatten(result), *gradients(result, [input, *module.parameters()])]
    assert_close(results[True], results[False])
    count = len(flatten(result))
    assert_close(results[True][:count], results[False][:count], rtol=0, atol=0)
    if module.mode in ("LSTM", "GRU") and ops.extension is not None:
        rows = int(lengths.sum()) if form == "packed" else T * B
        gates = 2 * 2 * rows * 4 * H * 8  # layers, directions, the four values a unit that either cell keeps
        assert kept[False] - kept[True] == gates
    else:
        assert kept[False] == kept[True]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize(("steps", "batch", "hidden_size"), [(120, 5, 3), (150, 2, 320)], ids=["rows", "units"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_recompute_of_many_rows(name: str, steps: int, batch: int, hidden_size: int, form: str, device: str) -> None:
    """More rows than are computed again at once; threads divide the rows of the one layer, the units of the other."""
    torch.set_num_threads(2)
    module = getattr(rnnfast, name)(I, hidden_size, bidirectional=hidden_size < 10, device=device, dtype=torch.float64)
    input = torch.randn(steps, batch, I, device=device, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(steps, batch, device=device) < 0.1
    results = []
    for module.recompute in (False, True):
        packed = pack_padded_sequence(input, torch.linspace(steps, 1, batch).long())
        output = module(packed)[0].data if form == "packed" else module(input, reset=reset)[0]
        results.append(gradients([output], [input, *module.parameters()]))
    assert_close(results[1], results[0])


@each_layer
def test_second_derivatives(name: str, device: str) -> None:
    """Of everything at once: lengths, resets, every state, recomputed gates."""
    layer = getattr(rnnfast, name)(2, 2, bidirectional=True, recompute=True, device=device, dtype=torch.float64)
    input = torch.randn(4, 3, 2, device=device, dtype=torch.float64, requires_grad=True)
    options = {
        "lengths": torch.tensor([4, 0, 2], device=device),
        "reset": torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]], device=device).bool(),
        "return_states": True,
    }
    hx = initial(layer, 3)

    def run(input: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(layer(input, hx if len(hx) == 2 else hx[0], **options)))

    assert torch.autograd.gradcheck(run, [input, *flatten(hx)], fast_mode=True)
    assert torch.autograd.gradgradcheck(run, [input, *flatten(hx)], fast_mode=True)


# ---------------------------------------------------------------------------------------- pieces and equal bits
def instruction_sets() -> list[str]:
    return ops.extension.instruction_sets() if ops.extension is not None else []


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the CPU engine's, in use."""
    before = ops.extension.instruction_set()
    ops.extension.set_instruction_set(request.param)
    yield request.param
    ops.extension.set_instruction_set(before)


SIZES = [(1, 1), (5, 7), (16, 64), (33, 100)]  # I, H: below, at, and beyond whole vectors and blocks


def wide(kind: str, input_size: int, hidden_size: int, dtype: torch.dtype, **options: Any) -> nn.Module:
    name, own = KINDS[kind]
    if "proj_size" in own:
        own = {"proj_size": hidden_size // 2}
    return getattr(rnnfast, name)(input_size, hidden_size, num_layers=2, dtype=dtype, **own, **options)


@needs_operators
@each_kind
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pieces_are_the_whole(kind: str, sizes: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """Step by step, or in pieces of any size with the state carried, on any number of threads: the same bits."""
    steps, batch = 20, 6
    module = wide(kind, *sizes, dtype)
    input, hx = torch.randn(steps, batch, sizes[0], dtype=dtype), initial(module, batch)
    reset = torch.rand(steps, batch) < 0.1
    with torch.no_grad():
        whole, final = module(input, hx, reset=reset)
        for piece, threads in ((1, 1), (3, 1), (7, 2), (19, 4)):
            torch.set_num_threads(threads)
            outputs, state = [], hx
            for x, mask in zip(input.split(piece), reset.split(piece), strict=True):
                output, state = module(x, state, reset=mask)
                outputs.append(output)
            assert_close([torch.cat(outputs), *flatten(state)], [whole, *flatten(final)], rtol=0, atol=0)


@needs_operators
@each_kind
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_row_does_not_depend_on_its_batch(
    kind: str, sizes: tuple[int, int], dtype: torch.dtype, instruction_set: str
) -> None:
    """batch_invariant: rows alone, or with others, in another order, on other threads, have the same bits, in the
    gradients of their input and of their initial states too.
    """
    steps, batch = 5, 19
    module = wide(kind, *sizes, dtype, bidirectional=True, batch_invariant=True)
    input, hx = torch.randn(steps, batch, sizes[0]).to(dtype), initial(module, batch)
    lengths, reset = torch.randint(steps + 1, (batch,)), torch.rand(steps, batch) < 0.2
    weights = torch.randn(steps, batch, 2 * (module.proj_size or sizes[1])).to(dtype)

    def run(rows: Tensor, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        x = input[:, rows].requires_grad_()
        start = map_state(lambda s: s.detach()[:, rows].requires_grad_(), hx)
        results = flatten(module(x, start, lengths=lengths[rows], reset=reset[:, rows], return_states=True))
        loss = (results[0] * weights[:, rows]).sum() + sum(part.sum() for part in results[1:])
        return [*results, *torch.autograd.grad(loss, [x, *flatten(start)])]

    expected = run(torch.arange(batch), 1)
    for rows, threads in (([4], 1), ([7, 2], 2), ([9, 3, 0, 1, 12], 4), (list(range(batch))[::-1], 2)):
        assert_close(run(torch.tensor(rows), threads), [part[:, rows] for part in expected], rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
@each_layer
def test_equal_seeds_give_equal_bits(name: str, device: str, threads: int) -> None:
    """Of results and gradients, dropout included."""
    torch.set_num_threads(threads)
    module = getattr(rnnfast, name)(16, 33, 3, dropout=0.4, bidirectional=True, device=device)
    input = torch.randn(30, 9, 16, device=device, requires_grad=True)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        results = module(input)
        return [*flatten(results), *gradients(results, [input, *module.parameters()])]

    first = run(1)
    assert not torch.equal(run(2)[0], first[0])
    for _ in range(3):
        assert_close(run(1), first, rtol=0, atol=0)


PROCESS = """
import hashlib, torch, rnnfast
torch.manual_seed(5)
digest = hashlib.sha256()
for name in ("RNN", "LSTM", "GRU"):
    module = getattr(rnnfast, name)(8, 20, 2, dropout=0.5, bidirectional=True, device="{device}")
    input = torch.randn(12, 6, 8, device="{device}", requires_grad=True)
    output, _ = module(input, lengths=torch.tensor([12, 3, 0, 7, 12, 1], device="{device}"))
    for tensor in (output, *torch.autograd.grad(output.square().sum(), [input, *module.parameters()])):
        digest.update(tensor.detach().cpu().numpy().tobytes())
print(digest.hexdigest())
"""


def test_equal_bits_in_every_process(device: str) -> None:
    digests = set()
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", PROCESS.format(device=device)]
        digests.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest()}


@needs_operators
@each_layer
@pytest.mark.parametrize(("hidden_size", "dtype"), [(H, torch.float64), (256, torch.float32), (256, torch.bfloat16)])
def test_a_step_allocates_its_result_alone(name: str, hidden_size: int, dtype: torch.dtype) -> None:
    module = getattr(rnnfast, name)(hidden_size, hidden_size, dtype=dtype)
    input, hx = torch.randn(1, 1, hidden_size, dtype=dtype), initial(module, 1)
    with torch.no_grad():
        module(input, hx)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = flatten(module(input, hx))
    allocated = [event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty")]
    assert sorted(filter(None, allocated)) == sorted(tensor.untyped_storage().nbytes() for tensor in result)
    [outermost] = [event for event in profile.events() if event.cpu_parent is None and event.cpu_memory_usage]
    assert outermost.name.startswith("rnnfast::")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU waits for is seen on one")
@each_layer
def test_nothing_waits_for_a_cuda_device(name: str) -> None:
    module = getattr(rnnfast, name)(I, H, 2, bidirectional=True, recompute=True, device="cuda")
    input = torch.randn(T, B, I, device="cuda", requires_grad=True)
    lengths = torch.tensor([3, 0, T, 1], device="cuda")
    reset = torch.rand(T, B, device="cuda") < 0.3
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = flatten(module(input, lengths=lengths, reset=reset, return_states=True))
        sum(part.sum() for part in results).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert input.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the CPU lengths out of range are an error")
@each_layer
def test_lengths_out_of_range_are_clamped_on_cuda(name: str) -> None:
    module = getattr(rnnfast, name)(I, H, bidirectional=True, device="cuda")
    input = torch.randn(T, 3, I, device="cuda")
    clamped = module(input, lengths=torch.tensor([T, 0, 2], device="cuda"))
    assert_close(flatten(module(input, lengths=torch.tensor([T + 5, -3, 2], device="cuda"))), flatten(clamped))


# ----------------------------------------------------------------------------------------------------- bad input
@each_layer
@pytest.mark.parametrize("argument", ["recompute", "batch_invariant"])
def test_switches_are_bools(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument}: expected a bool, got 1"):
        getattr(rnnfast, name)(3, 4, **{argument: 1})


@each_layer
def test_where_batch_invariance_does_not_hold(name: str) -> None:
    input = torch.randn(T, B, I)
    with pytest.raises(ValueError, match=r"batch_invariant: .* where the reference formula runs"):
        getattr(rnnfast, name)(I, H, batch_invariant=True, backend="reference")(input)
    with rnnfast.backend("reference"), pytest.raises(ValueError, match=r"batch_invariant: .*backend 'reference' was"):
        getattr(rnnfast, name)(I, H, batch_invariant=True)(input)
    if ops.extension is None:
        return
    with pytest.raises(ValueError, match="batch_invariant: expected False with dropout"):
        getattr(rnnfast, name)(I, H, 2, dropout=0.1, batch_invariant=True)(input)
    evaluated = getattr(rnnfast, name)(I, H, 2, dropout=0.1, batch_invariant=True).eval()
    assert evaluated(input)[0].shape == (T, B, H)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it holds on the CPU")
@each_layer
def test_batch_invariance_does_not_hold_on_cuda(name: str) -> None:
    module = getattr(rnnfast, name)(I, H, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant: expected False on cuda"):
        module.cuda()(torch.randn(T, B, I).cuda())


@each_layer
def test_batch_invariance_under_vmap(name: str) -> None:
    if ops.extension is None:
        return
    module, inputs = getattr(rnnfast, name)(I, H, batch_invariant=True), torch.randn(5, T, I)
    together = torch.func.vmap(lambda x: module(x)[0])(inputs)
    assert torch.equal(together, torch.stack([module(x)[0] for x in inputs]))


@each_layer
def test_resets_that_are_packed_otherwise(name: str) -> None:
    module = getattr(rnnfast, name)(I, H)
    input, reset = torch.randn(T, 2, I), torch.zeros(T, 2, dtype=torch.bool)
    other = pack_padded_sequence(reset, torch.tensor([6, 5]))
    with pytest.raises(RuntimeError, match="reset: expected the input's batch_sizes"):
        module(pack_padded_sequence(input, torch.tensor([T, 4])), reset=other)
    with pytest.raises(TypeError, match="reset: expected a bool Tensor, the input being no PackedSequence"):
        module(input, reset=other)


@each_layer
def test_switches_are_kept(name: str) -> None:
    """By copies, and in what is printed; a state without them, as torch.nn's, means no."""
    module = getattr(rnnfast, name)(I, H, recompute=True, batch_invariant=True)
    assert repr(module) == f"{name}({I}, {H}, recompute=True, batch_invariant=True)"
    converted = rnnfast.to_torch(module)
    assert not hasattr(converted, "recompute")
    assert not hasattr(converted, "batch_invariant")
    back = rnnfast.convert(converted)
    assert back.recompute is back.batch_invariant is False


def test_every_layer_is_tested() -> None:
    assert {name for name, _ in KINDS.values()} == set(LAYERS)
