"""Training batches of (source, driver, target), streamed from shards by byte offsets.

The order is endless and a pure function of (frames, seed, position): position n is static or dynamic by an even pattern, so every
global batch holds an exact share of each; each of the two kinds runs through its frames epoch by epoch, shards permuted, frames
permuted inside windows of shards. The state of the stream is therefore one integer, the samples seen; ranks, threads and prefetch
may change between save and resume. Targets are frames that have what the batch compares with: while exact labels are needed, the
labelled share of a data set; later, all of it.

    dynamic  source = frame A, view i;  driver = motion B;  target = frame B, view j     one identity, A != B, motion scale 1
    static   source = frame A, view i;  driver = motion A;  target = frame A, view j     i != j,               motion scale 0

Two settings serve the paper's ablation alone: `swap_probability` makes static samples of dynamic ones, and without `switch` the motion
scale is 1 everywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import fractions
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from datagen.cache import FetchAhead
from head3d.labels import MOTION_VECTOR_SIZE, unpack_label
from head3d.run.config import Fraction, NonNegativeInt, PositiveInt
from head3d.run.errors import ConfigError, DataError
from head3d.run.seeding import numpy_generator


class Frame(Protocol):
    """What the order needs to know of a `datagen.index.FrameEntry`."""

    key: str
    shard: int
    identity: int
    motion: int
    kind: str  # static, dynamic or motion-rich
    split: str  # train, val or test
    views: int
    members: Container[str]  # names that can be read


class FrameSource(Protocol):
    """What is read: a `datagen.reading.ShardDataset`."""

    frames: Sequence[Frame]

    def read(self, entry: Frame, members: Sequence[str]) -> dict[str, np.ndarray]: ...

    def fetch_ahead(self, wanted: Iterable[tuple[int, Frame, frozenset[str]]], shards: int) -> FetchAhead | None: ...


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How batches are drawn and decoded. Defaults are the published run."""

    size: PositiveInt = 32  # samples a training step, over all ranks
    static_share: Fraction = 0.5  # of a batch: same motion, cross-attention off; the rest is reenactment
    swap_probability: Fraction = 0.0  # of a dynamic sample: its source is another view of the target's frame, cross-attention off
    switch: bool = True  # where source and target are of one frame the cross-attention is off; false: it never is
    motion_rich: bool = False  # dynamic samples come from motion-rich identities too; false: those frames are not used
    shuffle_window: PositiveInt = 8  # shards whose frames are shuffled together
    threads: NonNegativeInt = 2  # decoding threads a rank; 0 decodes in the training loop
    prefetch: PositiveInt = 3  # batches decoded ahead, a rank


class Item(NamedTuple):
    """One sample by indices into the frames."""

    source: int
    source_view: int
    target: int
    target_view: int
    driver_view: int  # another one than the target's, where there is another
    static: bool  # of the static share
    motion_scale: float  # the disentangling switch


@dataclasses.dataclass(frozen=True)
class Batch:
    """B samples. Pictures and features are in [-1, 1] unless said otherwise; absent members are None."""

    source_image: Tensor  # [B, 3, H, W]
    source_motion: Tensor  # [B, D] motion vector of the source: FLAME's (109) as read; see `motion_vectors.py`
    driving_motion: Tensor  # [B, D] of the target
    motion_scale: Tensor  # [B] the disentangling switch: 0 reconstruction, 1 reenactment
    label: Tensor  # [B, 437] of the target; its shape is the source's too (one identity)
    identity: Tensor  # [B] int64
    image: Tensor  # [B, 3, H, W] target picture
    driver_image: Tensor | None = None  # [B, 3, H, W] the target's motion from another camera, if there is one; where it is needed
    opacity: Tensor | None = None  # [B, 1, R, R] in [0, 1]
    depth: Tensor | None = None  # [B, 1, R, R] ray distance, scene units
    foreground: Tensor | None = None  # [B, C, R, R] in [0, 1], before the background is added
    background: Tensor | None = None  # [B, 3, R, R] background colours
    background_features: Tensor | None = None  # [B, C, R, R]
    points: Tensor | None = None  # [B, N, 3] posed space, scene units
    point_features: Tensor | None = None  # [B, N, C] of the generator's planes at those points

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda value: value.to(device, non_blocking=True))

    def select(self, index: slice | Tensor) -> Batch:
        return self._map(lambda value: value[index])

    def __len__(self) -> int:
        return self.source_image.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else function(value) for name, value in values.items()})


class _Pool:
    """The frames of one kind, in an order that is a pure function of (seed, position)."""

    def __init__(self, frames: Sequence[Frame], indices: Sequence[int], seed: int, name: str, window: int) -> None:
        self.count, self._seed, self._name, self._window = len(indices), seed, name, window
        shards: dict[int, list[int]] = {}
        for index in indices:
            shards.setdefault(frames[index].shard, []).append(index)
        self._shards = [np.asarray(shards[shard]) for shard in sorted(shards)]
        self._epochs: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def frame(self, position: int) -> int:
        """Safe from two threads: who fetches shards ahead asks for later positions than who reads them."""
        epoch, place = divmod(position, self.count)
        order = self._epochs.get(epoch)
        if order is None:
            order = self._epochs[epoch] = self._epoch(epoch)
            while len(self._epochs) > 3:  # prefetch may straddle two
                self._epochs.popitem(last=False)
        return int(order[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = numpy_generator(self._seed, "order", self._name, epoch)
        shards = [self._shards[i] for i in rng.permutation(len(self._shards))]
        windows = [np.concatenate(shards[i : i + self._window]) for i in range(0, len(shards), self._window)]
        return np.concatenate([rng.permutation(window) for window in windows])


def usable_frames(frames: Sequence[Frame], config: BatchConfig, split: str, members: Iterable[str] = ()) -> list[int]:
    """Numbers of the frames of a split that batches may be made of and that have all of `members`."""
    return [
        index
        for index, frame in enumerate(frames)
        if frame.split == split and (config.motion_rich or frame.kind != "motion-rich") and all(name in frame.members for name in members)
    ]


class ItemOrder:
    """The endless order of items. `item(n)` is a pure function; nothing is remembered but caches.

    members: what frames must have to be used.
    """

    def __init__(self, frames: Sequence[Frame], config: BatchConfig, seed: int, split: str = "train", members: Iterable[str] = ()) -> None:
        self.frames, self._seed, self._size = frames, seed, config.size
        self._swap_probability, self._switch = config.swap_probability, config.switch
        self._share = fractions.Fraction(config.static_share).limit_denominator(1000)
        if (self._share * config.size).denominator != 1:
            raise ConfigError(
                f"batches.static_share {config.static_share} of batches.size {config.size} is {float(self._share * config.size):g} "
                "samples; choose a size for which both shares are whole numbers"
            )
        members = sorted(members)
        where = f"the split '{split}'" + (f" that has {', '.join(members)}" if members else "")
        chosen = usable_frames(frames, config, split, members)
        if not chosen:
            raise DataError(f"the shards hold no frame of {where}; generate more identities or labels, or another split rule")
        self._by_identity: dict[int, list[int]] = {}
        for index in chosen:
            self._by_identity.setdefault(frames[index].identity, []).append(index)
        static = [i for i in chosen if frames[i].kind == "static" and frames[i].views > 1]
        dynamic = [i for i in chosen if frames[i].kind != "static" and len(self._by_identity[frames[i].identity]) > 1]
        if self._share > 0 and not static:
            raise ConfigError(
                f"batches.static_share is {config.static_share}, but no frame of {where} is of kind 'static' with two "
                "views or more; generate static identities, or set --batches.static_share 0"
            )
        if self._share < 1 and not dynamic:
            raise ConfigError(
                f"batches.static_share is {config.static_share}, but no identity of {where} has two motions; "
                "generate dynamic identities, or set --batches.static_share 1"
            )
        if self._share < 1 and self._swap_probability > 0 and any(frames[i].views < 2 for i in dynamic):
            raise ConfigError(
                f"batches.swap_probability is {config.swap_probability}, but a dynamic frame of {where} has one view, and no other "
                "for the source; generate two views or more (--recipe.dynamic_views), or set --batches.swap_probability 0"
            )
        self._pools = {
            True: _Pool(frames, static, seed, "static", config.shuffle_window),
            False: _Pool(frames, dynamic, seed, "dynamic", config.shuffle_window),
        }

    def target(self, position: int) -> tuple[int, bool]:
        """The target frame of an item, and whether it is static. Its source is of the same identity, and so in the same shard."""
        before, after = (position * self._share).__floor__(), ((position + 1) * self._share).__floor__()
        static = after > before
        return self._pools[static].frame(before if static else position - before), static

    def item(self, position: int) -> Item:
        target, static = self.target(position)
        rng = numpy_generator(self._seed, "views", position)
        views = self.frames[target].views
        target_view = int(rng.integers(views))
        driver_view = _other_view(target_view, views, rng) if views > 1 else target_view
        one_frame = static or self._is_swapped(position)
        if one_frame:
            source = target
            source_view = _other_view(target_view, views, rng)
        else:
            others = [index for index in self._by_identity[self.frames[target].identity] if index != target]
            source = others[int(rng.integers(len(others)))]
            source_view = int(rng.integers(self.frames[source].views))
        return Item(source, source_view, target, target_view, driver_view, static, 0.0 if one_frame and self._switch else 1.0)

    def _is_swapped(self, position: int) -> bool:
        """Whether a dynamic item reconstructs its target's frame from another view: the published `swapping_prob` (portrait4d, 6.7)."""
        if self._swap_probability == 0:
            return False
        return bool(numpy_generator(self._seed, "swap", position).random() < self._swap_probability)

    def batch(self, samples_seen: int, rank: int = 0, world_size: int = 1) -> list[Item]:
        """The items of `rank` in the global batch that starts at `samples_seen`: static ones first, every world_size-th item."""
        items = [self.item(position) for position in range(samples_seen, samples_seen + self._size)]
        return sorted(items, key=lambda item: not item.static)[rank::world_size]


def _other_view(view: int, views: int, rng: np.random.Generator) -> int:
    """One of the other `views` - 1 >= 1."""
    return (view + 1 + int(rng.integers(views - 1))) % views


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1.0


def read_item(dataset: FrameSource, item: Item, members: Iterable[str], driver_image: bool = False) -> dict[str, np.ndarray]:
    """Read and decode one sample; only the members named (see `losses.TERM_MEMBERS`) and what every sample needs.

    Returns arrays by the field names of `Batch`. Raises DataError (from the reader) if a member is missing or damaged.
    """
    source, target, members = dataset.frames[item.source], dataset.frames[item.target], set(members)
    picture, seen, driver = f"rgb.{item.target_view}", f"rgb.{item.source_view}", f"rgb.{item.driver_view}"
    wanted = {picture, "label", *members} | ({driver} if driver_image else set()) | ({seen} if item.source == item.target else set())
    data = dataset.read(target, sorted(wanted))
    other = data if item.source == item.target else dataset.read(source, [seen, "label"])
    view = item.target_view
    label, source_label = data["label"][view], other["label"][item.source_view]
    vectors = [unpack_label(torch.from_numpy(np.array(one))[None]).motion.vector()[0].numpy() for one in (source_label, label)]
    assert vectors[0].shape == (MOTION_VECTOR_SIZE,)
    sample = {
        "source_image": as_picture(other[seen]),
        "source_motion": vectors[0],
        "driving_motion": vectors[1],
        "motion_scale": np.float32(item.motion_scale),
        "label": label,
        "identity": np.int64(target.identity),
        "image": as_picture(data[picture]),
    }
    if driver_image:
        sample["driver_image"] = as_picture(data[driver])
    if "opacity" in members:
        sample["opacity"] = data["opacity"][view][None]
    if "depth" in members:
        sample["depth"] = data["depth"][view][None]
    if "background" in members:
        sample["background"] = as_picture(data["background"])
    if "identity.background" in members:
        sample["background_features"] = data["identity.background"] * 2 - 1
    for name in members & {"foreground", "points", "point_features"}:
        sample[name] = data[name][view]
    return sample


def collate(samples: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stack samples that hold the same fields."""
    return Batch(**{name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]})


class BatchStream:
    """Iterate over batches of one rank, decoded ahead by threads. Use as a context manager, or call `close`.

    members: label members to read in the batch that starts at a given number of samples seen; its frames are those that have them.
    An error while reading is raised by the `next` that would have returned that batch, after all earlier batches.
    """

    def __init__(
        self,
        dataset: FrameSource,
        config: BatchConfig,
        seed: int,
        members: Callable[[int], Iterable[str]],
        *,
        samples_seen: int = 0,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        driver_image: bool = False,
    ) -> None:
        if config.size % world_size:
            raise ConfigError(
                f"batches.size {config.size} is not divisible by {world_size} ranks; every rank must get equally many samples"
            )
        self._orders: dict[frozenset[str], ItemOrder] = {}
        self._seed, self._split = seed, split
        self.samples_seen = samples_seen  # of all ranks, in the batches handed out so far
        self._dataset, self._config, self._members = dataset, config, members
        self._rank, self._world_size, self._driver_image = rank, world_size, driver_image
        self._ahead = samples_seen
        self._pending: collections.deque[list[Future]] = collections.deque()
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="decode") if config.threads else None
        self._fetcher = dataset.fetch_ahead(self._wanted(), shards=2 * config.shuffle_window)  # a window of each of the two kinds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._threads is None:
            samples = [self._read(item, members) for item, members in self._plan()]
        else:
            while len(self._pending) < self._config.prefetch:
                self._pending.append([self._threads.submit(self._read, item, members) for item, members in self._plan()])
            samples = [future.result() for future in self._pending.popleft()]
        self.samples_seen += self._config.size
        if self._fetcher is not None:
            self._fetcher.passed(self.samples_seen)
        return collate(samples)

    def _plan(self) -> list[tuple[Item, frozenset[str]]]:
        order, members = self._order(self._ahead)
        items = order.batch(self._ahead, self._rank, self._world_size)
        self._ahead += self._config.size
        return [(item, members) for item in items]

    def _order(self, samples_seen: int) -> tuple[ItemOrder, frozenset[str]]:
        """The order of the batch that starts there, and the label members that are read in it."""
        members = frozenset(self._members(samples_seen))
        if members not in self._orders:
            self._orders[members] = ItemOrder(self._dataset.frames, self._config, self._seed, self._split, members)
        return self._orders[members], members

    def _wanted(self) -> Iterator[tuple[int, Frame, frozenset[str]]]:
        """What all ranks will read: number of the sample, its target frame, the members."""
        for seen in itertools.count(self.samples_seen, self._config.size):
            order, members = self._order(seen)
            for position in range(seen, seen + self._config.size):
                yield position, self._dataset.frames[order.target(position)[0]], members | {"rgb.0", "label"}

    def _read(self, item: Item, members: frozenset[str]) -> dict[str, np.ndarray]:
        return read_item(self._dataset, item, members, self._driver_image)

    def close(self) -> None:
        """Stop the threads; batches decoded ahead are dropped. Calling it twice is fine."""
        if self._fetcher is not None:
            self._fetcher.close()
        self._pending.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
