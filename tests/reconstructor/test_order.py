"""Shares of a batch, their pattern, and how well the order shuffles."""

import collections
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from head3d.run.errors import ConfigError
from reconstructor.order import BatchConfig, ItemOrder


class Frame(NamedTuple):
    key: str
    shard: int
    identity: int
    motion: int
    kind: str
    split: str = "train"
    views: int = 2
    members: tuple = ()
    dataset: int = 0


def frames_of(dataset, first, static=0, dynamic=0, rich=0):
    """Identities of each kind, of two motions where they move, one a shard; shards and identities are counted from `first`."""
    kinds = ["static"] * static + ["dynamic"] * dynamic + ["motion-rich"] * rich
    return [
        Frame(f"{number}-{motion}", number, number, motion, kind, dataset=dataset)
        for number, kind in enumerate(kinds, first)
        for motion in range(1 if kind == "static" else 2)
    ]


TWO_SETS = frames_of(0, 0, static=5, dynamic=3) + frames_of(1, 100, dynamic=4, rich=3)
MIXED = BatchConfig(size=16, static_weights=(1, 0), dynamic_weights=(1, 2), motion_rich_weights=(0, 1))


def parts(order, positions):
    """(kind, data set) of the items at some positions."""
    targets = [order.frames[order.item(position).target] for position in positions]
    return [(frame.kind, frame.dataset) for frame in targets]


def test_every_batch_holds_each_kind_of_each_data_set_by_its_weight_and_so_does_every_stretch_nearly():
    order = ItemOrder(TWO_SETS, MIXED, seed=1, datasets=2)
    found = parts(order, range(160))
    shares = {("static", 0): 8, ("dynamic", 0): 2, ("dynamic", 1): 4, ("motion-rich", 1): 2}  # of 16: half static; the rest 1 : 2 : 1
    for start in range(0, 160, 16):
        assert collections.Counter(found[start : start + 16]) == shares
    for length, (part, share) in itertools.product(range(1, 160), shares.items()):
        assert abs(found[:length].count(part) - length * share / 16) <= 1


def test_a_part_that_weighs_little_is_spread_over_the_batch():
    order = ItemOrder(TWO_SETS, BatchConfig(size=8, static_share=0.25, dynamic_weights=(1, 2), static_weights=(1, 0)), seed=1, datasets=2)
    # shares 1/4, 1/4, 1/2: the middles of their stretches lie at 1/2, 1/2 and at 1/4, 3/4; where two coincide the later part comes first
    names = {("static", 0): "s", ("dynamic", 0): "a", ("dynamic", 1): "b"}
    assert "".join(names[part] for part in parts(order, range(8))) == "basbbasb"


def test_items_are_of_one_identity_of_one_data_set_and_the_switch_follows_the_kind():
    order = ItemOrder(TWO_SETS, MIXED, seed=1, datasets=2)
    for item in map(order.item, range(200)):
        source, target = TWO_SETS[item.source], TWO_SETS[item.target]
        assert source.identity == target.identity and source.dataset == target.dataset
        assert item.static == (target.kind == "static") == (source is target)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_a_batch_and_each_gets_its_part_of_every_source(world_size):
    order = ItemOrder(TWO_SETS, BatchConfig(size=32, static_weights=(1, 0), dynamic_weights=(1, 3)), seed=1, datasets=2)
    for start in (0, 32, 320):  # whole: 16 static, 4 and 12 dynamic
        ranks = [order.batch(start, rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*ranks)) == list(range(start, start + 32))
        for positions in ranks:
            assert sorted(collections.Counter(parts(order, positions)).values()) == [4 // world_size, 12 // world_size, 16 // world_size]


def test_a_data_set_of_its_own_keeps_its_order_whatever_else_is_mixed_in():
    alone = ItemOrder([frame for frame in TWO_SETS if frame.dataset == 0], BatchConfig(size=4), seed=1)
    mixed = ItemOrder(TWO_SETS, MIXED, seed=1, datasets=2)
    static = [[t for t, still in map(order.target, range(100)) if still] for order in (alone, mixed)]
    assert static[0] == static[1]


def test_another_attempt_is_another_sample_of_the_same_part_by_position_and_attempt_alone():
    order, again = (ItemOrder(TWO_SETS, MIXED, seed=1, datasets=2) for _ in range(2))
    for position in range(32):
        attempts = [order.item(position, attempt) for attempt in range(12)]
        assert [again.item(position, attempt) for attempt in reversed(range(12))] == attempts[::-1]
        assert len({(TWO_SETS[item.target].kind, TWO_SETS[item.target].dataset) for item in attempts}) == 1
        assert len(set(attempts)) > 3


def test_impossible_mixtures_are_refused_with_the_remedy():
    def order(**settings):
        return ItemOrder(TWO_SETS, BatchConfig(**settings), seed=0, datasets=2)

    with pytest.raises(ConfigError, match="batches.dynamic_weights: expected one weight for each of 2 data sets, got 3"):
        order(dynamic_weights=(1, 2, 3))
    with pytest.raises(ConfigError, match=r"batches.size 8: dynamic samples of data set 1 would be 1.33333 .* size that 6 divides"):
        order(size=8, static_weights=(1, 0), dynamic_weights=(1, 2))
    with pytest.raises(ConfigError, match="no weight; give one in batches.static_weights"):
        order(static_weights=(0, 0))
    with pytest.raises(ConfigError, match="split 'train' in data set 2 of 2 is of kind 'static' .* give none a weight .batches.static_w"):
        order()
    with pytest.raises(ConfigError, match="data set 1 of 2 is motion-rich and has two motions; .* .batches.motion_rich_weights"):
        order(static_weights=(1, 0), motion_rich_weights=(1, 1))


# How good the shuffle is (the numbers that the module's docstring states) ------------------------------------------------------

SHARDS, FRAMES, WINDOW, EPOCHS = 24, 10, 4, 60


@pytest.fixture(scope="module")
def epochs():
    """[EPOCHS, SHARDS * FRAMES] frames in the order of their epochs; frame n is of shard n // FRAMES."""
    frames = [Frame(f"{n}", n // FRAMES, n, 0, "static") for n in range(SHARDS * FRAMES)]
    order = ItemOrder(frames, BatchConfig(size=8, static_share=1.0, shuffle_window=WINDOW), seed=5)
    targets = np.array([order.target(position)[0] for position in range(EPOCHS * len(frames))]).reshape(EPOCHS, -1)
    assert (np.sort(targets, axis=1) == np.arange(len(frames))).all()
    return targets


def test_when_a_sample_comes_says_nothing_about_its_shard(epochs):
    place = np.arange(SHARDS * FRAMES)
    correlation = np.array([np.corrcoef(place, epoch // FRAMES)[0, 1] for epoch in epochs])
    spread = 1 / np.sqrt(SHARDS - 1)  # standard deviation of the correlation of two random orders of the shards
    assert abs(correlation.mean()) < 4 * spread / np.sqrt(EPOCHS) and correlation.std() < 1.3 * spread
    mean_place = np.argsort(epochs, axis=1).reshape(EPOCHS, SHARDS, FRAMES).mean(axis=(0, 2))  # of each shard; uniform: SHARDS * FRAMES / 2
    assert abs(mean_place - place.mean()).max() < 4 * SHARDS * FRAMES / np.sqrt(12 * EPOCHS)


def test_epochs_are_independent(epochs):
    places = np.argsort(epochs, axis=1)
    correlation = np.array([np.corrcoef(*pair)[0, 1] for pair in itertools.pairwise(places)])
    assert abs(correlation.mean()) < 4 / np.sqrt((SHARDS - 1) * EPOCHS)


def test_neighbours_are_of_one_shard_as_rarely_as_the_window_allows(epochs):
    inside = [epoch.reshape(-1, WINDOW * FRAMES) // FRAMES for epoch in epochs]
    same = np.mean([(window[:, 1:] == window[:, :-1]).mean() for window in inside])
    assert same == pytest.approx((FRAMES - 1) / (WINDOW * FRAMES - 1), abs=0.02)
