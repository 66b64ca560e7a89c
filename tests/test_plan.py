"""The plan of CUDA engines: a pure function of a layer's shape and of a device, so these devices are made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sample_inputs import CELLS, PERSISTENT_CELLS, STEPWISE_CELLS

from rnnfast import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the plan is in the extension")


def clusters_of(parts: list[int]) -> list[int]:
    """How many clusters of 1, 2, .. 16 blocks run at once on parts of so many multiprocessors, each in one part."""
    return [sum(part // blocks for part in parts) for blocks in range(1, 17)]


HOPPER = {
    "capability": 90,
    "multiprocessors": 132,
    "shared_bytes": 232448,
    "registers": 65536,
    "cooperative": True,
    "clusters": clusters_of([16] * 6 + [18] * 2),
}
AMPERE = {**HOPPER, "capability": 80, "multiprocessors": 108, "shared_bytes": 166912, "clusters": [0] * 16}
TURING = {**AMPERE, "capability": 75, "shared_bytes": 65536}
SMALL_AMPERE = {**AMPERE, "capability": 86, "multiprocessors": 28, "shared_bytes": 101376}


def plan(cell: str = "lstm", **changes: Any) -> dict[str, Any]:
    problem = {
        "cell": cell,
        "dtype": "bfloat16",
        "steps": 100,
        "batch": 16,
        "hidden_size": 128,
        "directions": 1,
        "projection": False,
        "tf32": False,
        "backward": False,
        "noise": False,
        "layer_norm": False,
        "device": HOPPER,
    }
    assert ops.extension is not None
    result: dict[str, Any] = ops.extension.plan(**{**problem, **changes})
    return result


def test_a_block_holds_a_small_layer() -> None:
    made = plan(batch=17, directions=2)
    assert made["engine"] == "persistent_cta"
    tile = made["tile"]
    assert (tile["blocks"], tile["threads"], tile["units"], tile["rows"]) == (6, 256, 128, 8)
    assert tile["shared_bytes"] == 2 * 8 * 128 * 2  # all of W_hh lies in registers
    assert "persistent_cta" not in made["against"]
    assert made["against"]["stepwise"] == "persistent_cta can run it"


def test_the_size_of_a_layer_and_of_shared_memory_decide() -> None:
    most = {"lstm": 192, "gru": 192, "rnn_tanh": 256, "rnn_relu": 256, "rnn_sigmoid": 256}
    assert set(most) == set(PERSISTENT_CELLS)
    for cell, hidden_size in most.items():
        assert plan(cell, hidden_size=hidden_size)["engine"] == "persistent_cta"
        against = plan(cell, hidden_size=hidden_size + 1)["against"]["persistent_cta"]
        assert against == (
            f"a block holds {hidden_size} hidden units of this cell and dtype, the layer has {hidden_size + 1}"
        )
    wide = {"hidden_size": 192, "backward": True}
    assert plan(**wide)["engine"] == "persistent_cta"
    for device in (AMPERE, SMALL_AMPERE):
        against = plan(**wide, device=device)["against"]["persistent_cta"]
        assert against == f"a block needs 221184 bytes of shared memory, the device gives {device['shared_bytes']}"
    assert plan(hidden_size=128, device=SMALL_AMPERE)["engine"] == "persistent_cta"


def test_float32_takes_more_memory() -> None:
    size = {"hidden_size": 112}
    narrow, tf32 = plan(dtype="float32", **size), plan(dtype="float32", tf32=True, **size)
    assert narrow["engine"] == tf32["engine"] == "persistent_cta"
    assert narrow["tile"]["shared_bytes"] > tf32["tile"]["shared_bytes"] > plan(**size)["tile"]["shared_bytes"]
    assert plan(dtype="float32", tf32=True, hidden_size=128)["engine"] == "persistent_cta"
    for backward, engine in ((False, "persistent_cta"), (True, "persistent_cluster")):
        assert plan(dtype="float32", hidden_size=128, backward=backward)["engine"] == engine
    assert plan(dtype="float32", hidden_size=129)["engine"] != "persistent_cta"


def test_a_cluster_holds_a_larger_layer() -> None:
    made = plan(hidden_size=512, directions=2)
    assert made["engine"] == "persistent_cluster"
    tile = made["tile"]
    # 16 blocks, the most of a cluster, with 32 units each; a cluster for 8 rows of a direction
    assert (tile["blocks"], tile["threads"], tile["units"], tile["rows"]) == (64, 256, 32, 8)
    assert plan(hidden_size=768)["engine"] == "persistent_cluster"
    assert "bytes of shared memory, the device gives 232448" in plan(hidden_size=1024)["against"]["persistent_cluster"]
    assert plan(hidden_size=512, batch=2048)["against"]["persistent_cluster"] == (
        "2048 rows of 512 hidden units in 1 direction are more than the clusters that run at once have in 4 waves"
    )


@pytest.mark.usefixtures("unforced")
def test_a_cluster_has_two_blocks_at_least() -> None:
    """A block alone cannot store asynchronously."""
    reason = "it divides the hidden units among 2 blocks at least, of 16 each, the layer has 16"
    with ops.cuda_engine("persistent_cluster"):
        assert plan(hidden_size=17)["tile"]["blocks"] == 2 * plan(hidden_size=17, batch=8)["tile"]["blocks"]
        with pytest.raises(RuntimeError, match=reason):
            plan(hidden_size=16)
    alone = plan(hidden_size=256, device={**HOPPER, "clusters": [132] + [0] * 15})
    assert alone["against"]["persistent_cluster"].startswith("it needs clusters of blocks")


def spread(made: dict[str, Any]) -> tuple[int, int, int]:
    """Unit tiles of a block, row tiles of a team, parts of k: csrc/spread.h."""
    tile = made["tile"]
    units = tile["units"] // 16
    return units, tile["rows"] // 8, tile["threads"] // 32 // units


def test_one_wave_is_faster_than_two_that_move_as_much() -> None:
    """A step costs time that does not shrink with what it moves, and a second wave pays it again. Teams of 8 rows move
    half as much in a step as teams of 16, and would need two waves."""
    made = plan(hidden_size=512, batch=96, device={**HOPPER, "clusters": [8] * 16})
    assert made["engine"] == "persistent_cluster"
    assert (made["tile"]["blocks"], spread(made)) == (96, (2, 2, 4))  # 6 of 8 clusters of 16 blocks
    # Over both waves these 8 teams of 3 parts of k would move less than 4 teams of 4 parts in one.
    made = plan(hidden_size=384, batch=128, device={**HOPPER, "clusters": [4] * 16})
    assert (made["tile"]["blocks"], spread(made)) == (48, (2, 4, 4))


def test_the_more_clusters_run_at_once_the_fewer_rows_has_each() -> None:
    """Devices with equally many multiprocessors may differ in it."""
    for at_once, rows in ((8, 8), (7, 16), (4, 16), (3, 24), (2, 32)):
        made = plan(hidden_size=512, batch=64, device={**HOPPER, "clusters": [at_once] * 16})
        assert made["engine"] == "persistent_cluster"
        assert (made["tile"]["blocks"], made["tile"]["rows"]) == (16 * -(-64 // rows), rows)
    made = plan(hidden_size=512, batch=160, device={**HOPPER, "clusters": [1] * 16})
    assert made["engine"] == "persistent_grid"
    assert made["against"]["persistent_cluster"] == (
        "160 rows of 512 hidden units in 1 direction are more than the clusters that run at once have in 4 waves"
    )


def test_the_backward_of_a_cluster_keeps_what_it_exchanges() -> None:
    """Of several gates sums, of float: from each of 16 blocks for 32 units and 8 rows, twice. Beside them lie the
    gradients of the block's own gates, twice, W_hh beyond the registers, and two mbarriers. Of one gate the gates of
    all units, as forward keeps h."""
    layer = {"hidden_size": 512, "batch": 64, "backward": True}
    received = 2 * 16 * 32 * 8 * 4
    for cell, gates, dtype, element, spilled in (
        ("lstm", 4, "bfloat16", 2, 2 * 4 * 8),
        ("gru", 3, "float16", 2, 0),
        ("lstm", 4, "float32", 4, 10 * 4 * 8),
    ):
        made = plan(cell, **layer, dtype=dtype, tf32=True)
        assert (made["engine"], spread(made)) == ("persistent_cluster", (2, 1, 4))
        assert made["tile"]["shared_bytes"] == 2 * gates * 32 * 8 * element + received + spilled * 512 + 2 * 8
    forward, backward = (plan("rnn_tanh", **{**layer, "backward": backward}) for backward in (False, True))
    assert forward["tile"] == backward["tile"]


@pytest.mark.parametrize(
    ("layer", "chosen"),
    [
        # More rows for a team would read weights and sums more often, and receive more.
        ({"hidden_size": 256, "batch": 512, "dtype": "float32"}, (4, 1, 1)),
        # A warp reads its block's gates once for each group of 4 unit tiles: 6 with 4 tiles once, 5 with 5 twice.
        ({"hidden_size": 384, "batch": 96, "directions": 2}, (6, 1, 1)),
        # Likewise 6 with 4 of the team's 20 tiles, where 4 would have 5.
        ({"hidden_size": 320, "batch": 8, "dtype": "float32"}, (2, 1, 3)),
        # Of 8 blocks one receives less than of 16, for its own sums cost nothing.
        ({"hidden_size": 256, "batch": 8}, (2, 1, 2)),
    ],
)
def test_backward_in_a_cluster_takes_the_spread_that_moves_least(
    layer: dict[str, Any], chosen: tuple[int, int, int]
) -> None:
    """Each is chosen because of a part of the cost that another spread has more of."""
    made = plan("gru", **{"tf32": True, "backward": True, **layer})
    assert (made["engine"], spread(made)) == ("persistent_cluster", chosen)


def test_neighbours_share_the_way_to_other_multiprocessors() -> None:
    """A block receives as much whatever its size, so 16 teams do with 8 blocks each, one for a multiprocessor; of 4
    teams all have that with 16 blocks, which move less through their own shared memory."""
    assert spread(plan(hidden_size=256, batch=32)) == (1, 1, 2)
    assert spread(plan(hidden_size=256, batch=128)) == (2, 1, 2)


def test_a_size_of_cluster_that_is_not_offered_is_not_chosen() -> None:
    every = [16] * 16
    for missing, blocks in (((), 16), ((16,), 8), ((16, 8), 4)):  # of each of two teams
        offered = [0 if size in missing else count for size, count in enumerate(every, start=1)]
        made = plan(hidden_size=256, device={**HOPPER, "clusters": offered})
        assert (made["engine"], made["tile"]["blocks"]) == ("persistent_cluster", 2 * blocks)
    for most in (2, 4):
        device = {**HOPPER, "clusters": every[:most] + [0] * (16 - most)}
        assert plan(hidden_size=128 * most + 1, device=device)["against"]["persistent_cluster"] == (
            f"its blocks hold {128 * most} hidden units at most, the layer has {128 * most + 1}"
        )


def test_small_blocks_of_clusters_share_a_multiprocessor() -> None:
    def made(hidden_size: int, batch: int, at_once: int, **device: int) -> dict[str, Any]:
        on = {**HOPPER, **device, "clusters": [at_once] * 16}
        return plan(hidden_size=hidden_size, batch=batch, device=on)

    # Four blocks of 64 threads fill the registers, so that 16 clusters run at once.
    four = made(256, 128, 4)
    assert (four["tile"]["blocks"], spread(four)) == (256, (1, 1, 2))
    # Two fill this shared memory, so that 16 teams of 8 rows take 4 waves, the most.
    two = made(256, 128, 2, shared_bytes=24000)
    assert (two["tile"]["blocks"], spread(two)) == (256, (1, 1, 2))
    # Neighbours share the bandwidth of shared memory: 8 teams of 8 rows in a wave would move more than 4 of 16 rows.
    assert spread(made(320, 64, 4)) == (2, 2, 3)


def test_blocks_of_a_grid_share_no_multiprocessor() -> None:
    """All of them must run at once: none counts on room beside another."""
    made = plan(hidden_size=512, batch=256, device=AMPERE)
    assert made["engine"] == "stepwise"
    assert made["against"]["persistent_grid"] == (
        "256 rows of 512 hidden units in 1 direction are more than 108 blocks that run at once have"
    )


def test_the_whole_gpu_holds_what_a_cluster_cannot() -> None:
    made = plan(hidden_size=1024)
    assert made["engine"] == "persistent_grid"
    assert (made["tile"]["blocks"], made["tile"]["units"], made["tile"]["rows"]) == (128, 16, 8)
    old = plan(hidden_size=512, device=AMPERE)
    assert old["engine"] == "persistent_grid"
    against = old["against"]["persistent_cluster"]
    assert against == "it needs clusters of blocks (sm_90 and later, and code made for that), the device is sm_80"
    alone = plan(hidden_size=512, device={**AMPERE, "cooperative": False})
    assert alone["engine"] == "stepwise"
    assert alone["against"]["persistent_grid"] == "the device has no cooperative launches"
    assert plan(hidden_size=1024, batch=2048)["against"]["persistent_grid"] == (
        "2048 rows of 1024 hidden units in 1 direction are more than 132 blocks that run at once have"
    )
    assert plan(hidden_size=20000)["against"]["persistent_grid"] == (
        "its blocks hold 16896 hidden units at most, the layer has 20000"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": TURING}, "it needs sm_80, the device is sm_75"),
        ({"device": {**AMPERE, "registers": 32768}}, "it needs 65536 registers a multiprocessor, the device has 32768"),
        ({"dtype": "float64"}, "it has no float64"),
        ({"projection": True}, "it has no projections (proj_size)"),
        ({"noise": True}, "it has no recurrent dropout or zoneout"),
        ({"layer_norm": True}, "it has no layer normalisation"),
        ({"batch": 2**31}, "it counts steps and rows in 32 bits"),
        *(({"cell": cell}, "it has no kernels for this cell") for cell in STEPWISE_CELLS),
    ],
)
def test_what_no_persistent_engine_runs(changes: dict[str, Any], reason: str) -> None:
    made = plan(**changes)
    assert made["engine"] == "stepwise"
    assert set(made["against"].values()) == {reason}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL_AMPERE, TURING], ids=lambda d: f"sm_{d['capability']}")
def test_every_plan_keeps_to_the_device(cell: str, device: dict[str, Any]) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for hidden_size in (1, 16, 100, 128, 144, 192, 250, 256, 512, 1024):
            for backward in (False, True):
                made = plan(cell, dtype=dtype, hidden_size=hidden_size, backward=backward, device=device)
                tile = made["tile"]
                assert tile["shared_bytes"] <= device["shared_bytes"]
                assert tile["threads"] <= 1024
                if made["engine"] != "stepwise":
                    assert tile["threads"] % 32 == 0
                    assert tile["blocks"] > 0
                if made["engine"] == "persistent_grid":
                    assert tile["blocks"] <= device["multiprocessors"]
                if made["engine"] == "persistent_cluster":
                    teams = -(-16 // tile["rows"])
                    assert tile["blocks"] // teams > 1
                    assert device["clusters"][tile["blocks"] // teams - 1] > 0


# ------------------------------------------------------------------------------------------------ forced engines
@pytest.fixture
def unforced() -> Iterator[None]:
    yield
    assert ops.extension is not None
    ops.extension.force_cuda_engine(None)


@pytest.mark.usefixtures("unforced")
def test_a_forced_engine_runs_or_says_why_not() -> None:
    with ops.cuda_engine("stepwise"):
        assert plan()["engine"] == "stepwise"
        with ops.cuda_engine("persistent_cta"):
            assert plan()["engine"] == "persistent_cta"
            limit = "a block holds 192 hidden units of this cell and dtype, the layer has 500"
            with pytest.raises(RuntimeError, match=f"persistent_cta was forced and cannot run this lstm: {limit}"):
                plan(hidden_size=500)
        assert plan()["engine"] == "stepwise"
    assert plan()["engine"] == "persistent_cta"


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of persistent_cta, .*, got 'fast'"), ops.cuda_engine("fast"):
        pass
    assert plan()["engine"] == "persistent_cta"
