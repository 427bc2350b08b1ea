"""The order of training samples, what is read of them, and how errors and ends surface."""

import collections
import itertools
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

from head3d.run.errors import ConfigError, DataError
from reconstructor.batches import BatchStream, Blocks
from reconstructor.order import BatchConfig, ItemOrder

SIDE, RAYS, CHANNELS, POINTS, VIEWS = 8, 4, 5, 6, 3
ALL = frozenset({"opacity", "depth", "foreground", "background", "identity.background", "points", "point_features"})
LABELLED = ("label", "json", *(f"rgb.{view}" for view in range(VIEWS)), *sorted(ALL))


class Frame(NamedTuple):
    key: str
    shard: int
    identity: int
    motion: int
    kind: str
    split: str
    views: int
    members: tuple = LABELLED
    dataset: int = 0


def make_frames(static=6, dynamic=5, motions=3, per_shard=4, views=VIEWS):
    rows = [(identity, 0, "static") for identity in range(static)]
    rows += [(static + identity, motion, "dynamic") for identity in range(dynamic) for motion in range(motions)]
    rows += [(99, motion, "dynamic") for motion in range(motions)]
    return [
        Frame(
            f"{n // per_shard:06d}{n % per_shard:04d}", n // per_shard, identity, motion, kind, "test" if identity == 99 else "train", views
        )
        for n, (identity, motion, kind) in enumerate(rows)
    ]


class FakeDataset:
    """Arrays that say which frame and view they come from; remembers what was read."""

    def __init__(self, frames, broken=None, delay=0.0):
        self.frames, self.broken, self.delay, self.dataset_count = frames, broken, delay, 1
        self.asked = collections.Counter()
        self._lock = threading.Lock()

    def fetch_ahead(self, wanted, shards):
        return None

    def read(self, entry, members, view=None):
        with self._lock:
            self.asked.update(members)
        time.sleep(self.delay)
        number = self.frames.index(entry)
        if number == self.broken:
            raise DataError(f"frames/{entry.shard:06d}.tar: sample {entry.key} is damaged")
        views = np.arange(entry.views, dtype=np.float32)
        label = np.zeros((entry.views, 437), np.float32)
        label[:, 25] = entry.identity
        label[:, 325] = entry.motion
        label[:, 3] = views
        arrays = {
            "label": label,
            "opacity": np.ones((entry.views, RAYS, RAYS), np.float32) * views[:, None, None],
            "depth": np.ones((entry.views, RAYS, RAYS), np.float32) * (views[:, None, None] + number),
            "foreground": np.ones((entry.views, CHANNELS, RAYS, RAYS), np.float32) * views[:, None, None, None],
            "background": np.full((RAYS, RAYS, 3), 255, np.uint8),
            "identity.background": np.full((CHANNELS, RAYS, RAYS), 0.75, np.float32),
            "points": np.ones((entry.views, POINTS, 3), np.float32) * views[:, None, None],
            "point_features": np.ones((entry.views, POINTS, CHANNELS), np.float32) * views[:, None, None],
        }
        for other in range(entry.views):
            arrays[f"rgb.{other}"] = np.full((SIDE, SIDE, 3), number * 5 + other, np.uint8)
        by_view = {"label", "opacity", "depth", "foreground", "points", "point_features"} if view is not None else set()
        return {name: arrays[name][view] if name in by_view else arrays[name] for name in members}


def stream(dataset, size=8, members=ALL, seed=3, share=0.5, threads=2, swap=0.0, **settings):
    config = BatchConfig(size=size, static_share=share, swap_probability=swap, shuffle_window=2, threads=threads, prefetch=2)
    return BatchStream(dataset, config, seed, lambda seen: members, **settings)


def take(dataset, count, **settings):
    with stream(dataset, **settings) as batches:
        return [next(batches) for _ in range(count)]


def test_memory_is_used_again_once_nobody_holds_a_tensor_of_it():
    blocks = Blocks()
    array = blocks.empty((4, 3), np.dtype(np.float32))
    place, tensor = array.ctypes.data, torch.from_numpy(array)
    tensor[...] = 7
    del array
    held = blocks.empty((4, 3), np.dtype(np.float32))
    assert held.ctypes.data != place and tensor.eq(7).all(), "the tensor is still there"
    other_form = blocks.empty((3, 4), np.dtype(np.float32))
    del tensor
    assert blocks.empty((4, 3), np.dtype(np.float32)).ctypes.data == place != other_form.ctypes.data


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_that_is_kept_does_not_change_while_others_come(threads):
    with stream(FakeDataset(make_frames()), threads=threads) as batches:
        kept = [next(batches) for _ in range(3)]
        before = [one.image.clone() for one in kept]
        for _ in range(12):
            next(batches)
    assert all(torch.equal(one.image, image) for one, image in zip(kept, before, strict=True))


def test_every_batch_holds_an_exact_half_of_each_kind_and_the_switch_travels_with_the_sample():
    dataset = FakeDataset(make_frames())
    static_identities = set(range(6))
    for batch in take(dataset, 12):
        assert batch.motion_scale.tolist().count(0.0) == 4
        for scale, identity in zip(batch.motion_scale.tolist(), batch.identity.tolist(), strict=True):
            assert (scale == 0.0) == (identity in static_identities)


def test_static_items_share_the_motion_and_differ_in_the_view_and_dynamic_items_differ_in_the_motion():
    order = ItemOrder(make_frames(), BatchConfig(size=8), seed=1)
    seen_views = set()
    for position in range(400):
        item = order.item(position)
        source, target = order.frames[item.source], order.frames[item.target]
        assert source.identity == target.identity and target.split == "train"
        if item.static:
            assert source is target and item.source_view != item.target_view
        else:
            assert source.motion != target.motion
            seen_views.add((item.source_view, item.target_view))
    assert len(seen_views) == VIEWS * VIEWS


def test_swapped_samples_reconstruct_a_dynamic_target_s_own_frame_and_leave_all_other_items_as_they_are():
    frames = make_frames()
    plain, swapping = (ItemOrder(frames, BatchConfig(size=8, static_share=0.0, swap_probability=p), seed=1) for p in (0.0, 0.25))
    swapped = 0
    for position in range(2000):
        before, item = plain.item(position), swapping.item(position)
        assert (item.target, item.target_view, item.static) == (before.target, before.target_view, False)
        if item.motion_scale == 0:
            swapped += 1
            assert item.source == item.target and item.source_view != item.target_view
        else:
            assert item == before
    assert 420 <= swapped <= 580  # 500 expected, deviation 19
    batch = take(FakeDataset(frames), 1, share=0.0, threads=0, swap=1.0)[0]
    assert batch.motion_scale.tolist() == [0.0] * 8 and torch.equal(batch.source_motion, batch.driving_motion)
    assert set(batch.identity.tolist()) <= {6, 7, 8, 9, 10}  # the dynamic identities


def test_without_the_switch_the_samples_are_the_same_and_the_scale_is_one_everywhere():
    frames = make_frames()
    with_switch, without = (ItemOrder(frames, BatchConfig(size=8, switch=switch), seed=1) for switch in (True, False))
    for position in range(200):
        item = with_switch.item(position)
        assert item.motion_scale == (0.0 if item.static else 1.0)
        assert without.item(position) == item._replace(motion_scale=1.0)


def test_swapping_needs_a_second_view_of_every_dynamic_frame():
    frames = make_frames(views=1)
    ItemOrder(frames, BatchConfig(size=8, static_share=0.0), seed=1)
    with pytest.raises(ConfigError, match=r"swap_probability is 0.5, but a dynamic frame.*has one view.*--recipe.dynamic_views"):
        ItemOrder(frames, BatchConfig(size=8, static_share=0.0, swap_probability=0.5), seed=1)


def test_other_splits_are_never_drawn():
    assert all(99 not in batch.identity.tolist() for batch in take(FakeDataset(make_frames()), 20))
    held_out = take(FakeDataset(make_frames()), 2, share=0.0, split="test")
    assert {identity for batch in held_out for identity in batch.identity.tolist()} == {99}


def test_an_epoch_of_each_kind_visits_every_frame_once_and_the_next_in_another_order():
    frames = make_frames()
    order = ItemOrder(frames, BatchConfig(size=8), seed=1)
    targets = {kind: [order.item(n).target for n in range(4000) if order.item(n).static is kind] for kind in (True, False)}
    for kind, count in ((True, 6), (False, 15)):
        first, second = targets[kind][:count], targets[kind][count : 2 * count]
        assert len(set(first)) == count and set(first) == set(second) and first != second


def test_the_order_is_a_pure_function_of_seed_and_position():
    frames = make_frames()
    forward, backward = (ItemOrder(frames, BatchConfig(size=8), seed=1) for _ in range(2))
    expected = [forward.item(n) for n in range(300)]
    assert [backward.item(n) for n in reversed(range(300))] == expected[::-1]
    assert [ItemOrder(frames, BatchConfig(size=8), seed=2).item(n) for n in range(300)] != expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resume_at_any_position_with_any_number_of_ranks_and_threads_gives_the_same_batches(world_size):
    dataset = FakeDataset(make_frames())
    whole = take(dataset, 5)
    parts = [take(dataset, 2, samples_seen=24, rank=r, world_size=world_size, threads=r % 3) for r in range(world_size)]
    for step in range(2):
        expected = whole[3 + step]
        for rank in range(world_size):
            got, wanted = parts[rank][step], expected.select(slice(rank, None, world_size))
            assert len(got) == 8 // world_size
            assert torch.equal(got.image, wanted.image) and torch.equal(got.source_image, wanted.source_image)
            assert torch.equal(got.label, wanted.label) and torch.equal(got.motion_scale, wanted.motion_scale)
            assert got.motion_scale.sum() == 4 / world_size  # both kinds on every rank


def test_the_state_counts_what_was_handed_out_and_not_what_was_decoded_ahead():
    with stream(FakeDataset(make_frames())) as batches:
        next(batches)
        assert batches.samples_seen == 8


def test_a_sample_holds_the_labels_of_the_target_view_in_the_units_of_training():
    dataset = FakeDataset(make_frames())
    batch = take(dataset, 1, driver_image=True)[0]
    for n in range(len(batch)):
        view = batch.label[n, 3].item()
        pixel = round((batch.image[n, 0, 0, 0].item() + 1) * 127.5)
        number = pixel // 5
        assert pixel % 5 == view and dataset.frames[number].identity == batch.identity[n]
        assert batch.depth[n].unique().tolist() == [number + view] and batch.depth[n].shape == (1, RAYS, RAYS)
        assert batch.opacity[n].unique().tolist() == [view]
        assert batch.foreground[n].unique().tolist() == [view] and batch.foreground[n].shape == (CHANNELS, RAYS, RAYS)
        assert batch.points[n].unique().tolist() == [view] and batch.point_features[n].unique().tolist() == [view]
        driver = round((batch.driver_image[n, 0, 0, 0].item() + 1) * 127.5) // 5
        assert driver == number
        assert batch.driving_motion[n, 0] == batch.label[n, 325] == dataset.frames[number].motion
        source = round((batch.source_image[n, 0, 0, 0].item() + 1) * 127.5) // 5
        assert batch.source_motion[n, 0] == dataset.frames[source].motion
    assert batch.background.unique().tolist() == [1.0] and batch.background_features.unique().tolist() == [0.5]


def test_only_the_members_asked_for_are_read():
    dataset = FakeDataset(make_frames())
    batch = take(dataset, 1, members=frozenset({"opacity"}), threads=0)[0]
    assert {name for name in dataset.asked if not name.startswith("rgb.")} == {"label", "opacity"}
    assert sum(count for name, count in dataset.asked.items() if name.startswith("rgb.")) == 16  # source and target, 8 samples
    assert batch.depth is None and batch.foreground is None and batch.points is None


def test_the_members_may_change_on_the_way():
    config = BatchConfig(size=8, threads=2, prefetch=3)
    with BatchStream(FakeDataset(make_frames()), config, 0, lambda seen: {"depth"} if seen < 16 else set()) as batches:
        assert [next(batches).depth is None for _ in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_sample_is_an_error_of_its_own_batch_and_closing_still_works(threads):
    dataset = FakeDataset(make_frames(), broken=2)
    batches = stream(dataset, size=2, threads=threads)
    with pytest.raises(DataError, match="is damaged"):
        list(itertools.islice(batches, 100))
    batches.close()
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_sample_may_be_replaced_by_another_of_its_kind_and_is_counted_while_all_others_stay(threads, capsys):
    frames, settings = make_frames(), {"size": 4, "threads": threads, "members": frozenset({"opacity"})}
    whole = take(FakeDataset(frames), 8, **settings)

    def replacing(count, samples_seen=0):
        config = BatchConfig(size=4, shuffle_window=2, threads=threads, prefetch=2, damaged="replace")
        with BatchStream(FakeDataset(frames, broken=2), config, 3, lambda seen: {"opacity"}, samples_seen=samples_seen) as batches:
            return [next(batches) for _ in range(count)], batches.replaced

    found, replaced = replacing(8)
    others = [
        (ours.motion_scale[n] == theirs.motion_scale[n]).item()
        for ours, theirs in zip(found, whole, strict=True)
        for n in range(4)
        if not torch.equal(ours.image[n], theirs.image[n])
    ]
    damaged = [round((image + 1) * 127.5) // 5 == 2 for batch in whole for image in batch.image[:, 0, 0, 0].tolist()]  # frame 2 is static
    assert all(others) and len(others) == replaced == sum(damaged) == 3
    assert all(round((image + 1) * 127.5) // 5 != 2 for batch in found for image in batch.image[:, 0, 0, 0].tolist())
    again, _ = replacing(4, samples_seen=16)
    assert all(torch.equal(ours.image, theirs.image) for ours, theirs in zip(again, found[4:], strict=True))
    assert capsys.readouterr().err.count("another sample is taken") == 2, "each damaged place is named once by each stream"


def test_a_set_of_which_nothing_can_be_read_is_an_error_also_where_samples_may_be_replaced():
    dataset = FakeDataset([frame for frame in make_frames(dynamic=0) if frame.identity == 2], broken=0)
    config = BatchConfig(size=2, static_share=1.0, damaged="replace", threads=0)
    with pytest.raises(DataError, match="is damaged. Neither could 8 samples"), BatchStream(dataset, config, 0, lambda seen: ()) as batches:
        next(batches)
    assert dataset.asked["label"] == 1 + 8


def test_decoding_ahead_is_bounded():
    dataset = FakeDataset(make_frames())
    with stream(dataset, members=frozenset()) as batches:
        next(batches)
        time.sleep(0.1)
        assert dataset.asked["label"] <= 2 * 8 * 2  # two batches of eight, two reads at most a sample


def test_impossible_settings_are_refused_with_the_remedy():
    frames = make_frames()
    with pytest.raises(ConfigError, match="whole numbers"):
        ItemOrder(frames, BatchConfig(size=3), seed=0)
    with pytest.raises(ConfigError, match="not divisible by 3 ranks"):
        stream(FakeDataset(frames), world_size=3)
    with pytest.raises(ConfigError, match="no frame of the split 'train' is of kind 'static'"):
        ItemOrder(make_frames(static=0), BatchConfig(size=8), seed=0)
    with pytest.raises(ConfigError, match="no identity of the split 'train' is dynamic and has two motions"):
        ItemOrder(make_frames(motions=1), BatchConfig(size=8), seed=0)
    with pytest.raises(DataError, match="no frame of the split 'val'"):
        ItemOrder(frames, BatchConfig(size=8), seed=0, split="val")


# Frames with and without labels -----------------------------------------------------------------------------------------------


def test_while_labels_are_needed_targets_are_the_frames_that_have_them_and_all_frames_later():
    """The first two shards carry depth; the clock decides, so the state is still one integer."""
    frames = [frame._replace(members=LABELLED if frame.shard < 2 else ("label", "opacity", "rgb.0")) for frame in make_frames()]
    labelled = {index for index, frame in enumerate(frames) if frame.shard < 2}
    dataset, config = FakeDataset(frames), BatchConfig(size=4, threads=0)

    def members(seen):
        return {"depth", "opacity"} if seen < 40 else {"opacity"}

    def seen_after(start, batches):
        with BatchStream(dataset, config, 0, members, samples_seen=start) as stream:
            return [next(stream) for _ in range(batches)]

    first = seen_after(0, 30)
    early = torch.cat([batch.depth.amax((1, 2, 3)) - batch.label[:, 3] for batch in first[:10]])  # the frame's number
    assert set(early.int().tolist()) == labelled and all(batch.depth is None for batch in first[10:])
    late = torch.cat([batch.identity for batch in first[10:]])
    assert set(late.tolist()) == {frame.identity for frame in frames if frame.split == "train"}
    again = seen_after(36, 3)
    for one, other in zip(again, first[9:12], strict=True):
        assert torch.equal(one.label, other.label)


def test_labels_that_every_frame_has_change_no_order():
    frames = make_frames()
    plain, asking = ItemOrder(frames, BatchConfig(size=8), seed=1), ItemOrder(frames, BatchConfig(size=8), seed=1, members=ALL)
    assert [plain.item(n) for n in range(100)] == [asking.item(n) for n in range(100)]


def test_frames_that_lack_what_is_needed_are_named():
    frames = [frame._replace(members=("label",)) for frame in make_frames()]
    with pytest.raises(DataError, match="no frame of the split 'train' that has depth, opacity; generate"):
        ItemOrder(frames, BatchConfig(size=8), seed=0, members={"opacity", "depth"})
    half = [frame._replace(members=LABELLED if frame.kind == "dynamic" else ("label",)) for frame in make_frames()]
    with pytest.raises(ConfigError, match="no frame of the split 'train' that has depth is of kind 'static'"):
        ItemOrder(half, BatchConfig(size=8), seed=0, members={"depth"})


def test_motion_rich_frames_are_used_only_when_asked_for_and_by_their_weight():
    frames = make_frames() + [frame._replace(kind="motion-rich", identity=50, shard=9) for frame in make_frames(static=0, dynamic=1)]
    rich = {index for index, frame in enumerate(frames) if frame.kind == "motion-rich" and frame.split == "train"}
    for weights, expected, share in (((), set(), 0), ((1,), rich, 2)):
        order = ItemOrder(frames, BatchConfig(size=8, motion_rich_weights=weights), seed=1)
        items = [order.item(n) for n in range(200)]
        used = {item.target for item in items} | {item.source for item in items}
        assert used & rich == expected and not any(item.static and item.target in rich for item in items)
        assert sum(item.target in rich for item in items[:8]) == share
