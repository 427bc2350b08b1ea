"""The endless order of training samples: a pure function of (frames, settings, seed, position).

A part of the data is one kind of frames of one data set; position n belongs to a part by an even pattern, so every global batch holds
an exact share of each. A part runs through its frames epoch by epoch: its shards are permuted, and its frames are permuted inside
windows of `shuffle_window` of them. Nothing is remembered but caches, so the state of training is one integer, the samples seen; ranks,
threads and prefetch may change between save and resume.

How good the shuffle is: when a shard's turn comes is uniform and independent from epoch to epoch, and inside a window of w shards of n
frames every order is equally likely. So neighbours in a part are of one shard with probability (n - 1) / (w n - 1), about 1 / w, and B
samples in a row are expected to be of w (1 - (1 - 1 / w)^B) shards: of 5.3 where a batch has 8 samples of the part and w is 8.
"""

from __future__ import annotations

import collections
import dataclasses
import fractions
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from head3d.run.config import Fraction, NonNegativeInt, PositiveInt
from head3d.run.errors import ConfigError, DataError
from head3d.run.seeding import numpy_generator

SAME_MOTION, OTHER_MOTION = ("static",), ("dynamic", "motion-rich")  # kinds of frames, by what source and target of an item share


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
    dataset: int  # its number among the data sets; shards and identities have numbers that are not used twice


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How batches are drawn and decoded. Defaults are the published run.

    A weight list has one number for each data set, and says how its kind's share of a batch is divided among them.
    """

    size: PositiveInt = 32  # samples a training step, over all ranks
    static_share: Fraction = 0.5  # of a batch: same motion, cross-attention off; the rest is reenactment
    swap_probability: Fraction = 0.0  # of a dynamic sample: its source is another view of the target's frame, cross-attention off
    switch: bool = True  # where source and target are of one frame the cross-attention is off; false: it never is
    static_weights: tuple[NonNegativeInt, ...] = ()  # of each data set in the static share; none: 1 each
    dynamic_weights: tuple[NonNegativeInt, ...] = ()  # of each data set's dynamic identities in the rest; none: 1 each
    motion_rich_weights: tuple[NonNegativeInt, ...] = ()  # of each data set's motion-rich identities in the rest; none: 0 each
    shuffle_window: PositiveInt = 8  # shards whose frames are shuffled together
    damaged: Literal["stop", "replace"] = "stop"  # a sample that cannot be read: an error, or another one drawn in its place and counted
    threads: NonNegativeInt = 2  # decoding threads a rank; 0 decodes in the training loop
    prefetch: PositiveInt = 3  # batches decoded ahead, a rank

    def weights(self, kind: str, datasets: int) -> tuple[int, ...]:
        """Of each of so many data sets. Raises ConfigError if another number of them is given."""
        name = f"{kind.replace('-', '_')}_weights"
        given = getattr(self, name)
        if given and len(given) != datasets:
            raise ConfigError(f"batches.{name}: expected one weight for each of {datasets} data sets, got {len(given)}")
        return given or (int(kind != "motion-rich"),) * datasets


class Item(NamedTuple):
    """One sample by indices into the frames."""

    source: int
    source_view: int
    target: int
    target_view: int
    driver_view: int  # another one than the target's, where there is another
    static: bool  # of the static share
    motion_scale: float  # the disentangling switch


class _Part:
    """One kind of frames of one data set, in an order that is a pure function of (seed, position)."""

    def __init__(self, frames: Sequence[Frame], indices: Sequence[int], seed: int, kind: str, dataset: int, window: int) -> None:
        self.static, self.count = kind == "static", len(indices)
        self._seed, self._name, self._window = seed, (kind, dataset), window
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
        rng = numpy_generator(self._seed, "order", *self._name, epoch)
        shards = [self._shards[i] for i in rng.permutation(len(self._shards))]
        windows = [np.concatenate(shards[i : i + self._window]) for i in range(0, len(shards), self._window)]
        return np.concatenate([rng.permutation(window) for window in windows])


def usable_frames(frames: Sequence[Frame], config: BatchConfig, split: str, members: Iterable[str] = (), datasets: int = 1) -> list[int]:
    """Numbers of the frames of a split that batches may be made of and that have all of `members`."""
    weights = {kind: config.weights(kind, datasets) for kind in SAME_MOTION + OTHER_MOTION}
    return [
        index
        for index, frame in enumerate(frames)
        if frame.split == split and weights[frame.kind][frame.dataset] and all(name in frame.members for name in members)
    ]


class ItemOrder:
    """The endless order of items. `item(n)` is a pure function; nothing is remembered but caches.

    members: what frames must have to be used; datasets: how many data sets the frames are of. Raises ConfigError for shares that are no
    whole number of samples, and where there are no frames of a kind that is asked for.
    """

    def __init__(
        self, frames: Sequence[Frame], config: BatchConfig, seed: int, split: str = "train", members: Iterable[str] = (), datasets: int = 1
    ) -> None:
        self.frames, self._seed, self._size = frames, seed, config.size
        self._swap_probability, self._switch = config.swap_probability, config.switch
        members = sorted(members)
        where = f"the split '{split}'" + (f" that has {', '.join(members)}" if members else "")
        chosen = usable_frames(frames, config, split, members, datasets)
        if not chosen:
            raise DataError(f"the shards hold no frame of {where}; generate more identities or labels, or another split rule")
        self._by_identity: dict[int, list[int]] = {}
        for index in chosen:
            self._by_identity.setdefault(frames[index].identity, []).append(index)
        found: dict[tuple[str, int], list[int]] = {}
        for index in chosen:
            frame = frames[index]
            if frame.views > 1 if frame.kind == "static" else len(self._by_identity[frame.identity]) > 1:
                found.setdefault((frame.kind, frame.dataset), []).append(index)
        shares = dict(_shares(config, datasets))
        for kind, dataset in shares.keys() - found.keys():
            raise ConfigError(_absent(config, kind, where + (f" in data set {dataset + 1} of {datasets}" if datasets > 1 else "")))
        if config.swap_probability > 0 and any(
            frames[index].views < 2 for part in shares if part[0] in OTHER_MOTION for index in found[part]
        ):
            raise ConfigError(
                f"batches.swap_probability is {config.swap_probability}, but a dynamic frame of {where} has one view, and no other "
                "for the source; generate two views or more (--recipe.dynamic_views), or set --batches.swap_probability 0"
            )
        self._parts = [_Part(frames, found[part], seed, *part, config.shuffle_window) for part in shares]
        self._pattern, self._before = _even_pattern(list(shares.values()))
        self._counts = collections.Counter(self._pattern)

    @property
    def part_count(self) -> int:
        return len(self._parts)

    def target(self, position: int) -> tuple[int, bool]:
        """The target frame of an item, and whether it is static. Its source is of the same identity, and so in the same shard."""
        part, place = self._place(position)
        return part.frame(place), part.static

    def item(self, position: int, attempt: int = 0) -> Item:
        """attempt: 1, 2, ... for other items of the same part, in the place of one that cannot be read."""
        part, place = self._place(position)
        again = ("again", attempt) if attempt else ()
        rng = numpy_generator(self._seed, "views", position, *again)
        target = part.frame(int(rng.integers(part.count)) if attempt else place)
        views = self.frames[target].views
        target_view = int(rng.integers(views))
        driver_view = _other_view(target_view, views, rng) if views > 1 else target_view
        one_frame = part.static or self._is_swapped(position)
        if one_frame:
            source = target
            source_view = _other_view(target_view, views, rng)
        else:
            others = [index for index in self._by_identity[self.frames[target].identity] if index != target]
            source = others[int(rng.integers(len(others)))]
            source_view = int(rng.integers(self.frames[source].views))
        return Item(source, source_view, target, target_view, driver_view, part.static, 0.0 if one_frame and self._switch else 1.0)

    def _is_swapped(self, position: int) -> bool:
        """Whether a dynamic item reconstructs its target's frame from another view: the published `swapping_prob` (portrait4d, 6.7)."""
        if self._swap_probability == 0:
            return False
        return bool(numpy_generator(self._seed, "swap", position).random() < self._swap_probability)

    def batch(self, samples_seen: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Positions of the items of `rank` in the global batch that starts at `samples_seen`: part by part, every world_size-th."""
        positions = range(samples_seen, samples_seen + self._size)
        return sorted(positions, key=lambda position: self._pattern[position % len(self._pattern)])[rank::world_size]

    def _place(self, position: int) -> tuple[_Part, int]:
        """The part that a position belongs to, and how many positions before it do."""
        period, step = divmod(position, len(self._pattern))
        number = self._pattern[step]
        return self._parts[number], period * self._counts[number] + self._before[step]


def _other_view(view: int, views: int, rng: np.random.Generator) -> int:
    """Any of the views but this one; there must be two."""
    return (view + 1 + int(rng.integers(views - 1))) % views


def _shares(config: BatchConfig, datasets: int) -> Iterator[tuple[tuple[str, int], fractions.Fraction]]:
    """The share of a batch of each part that has one, static ones first. Raises ConfigError if it is no whole number of samples."""
    static = fractions.Fraction(config.static_share).limit_denominator(1000)
    for share, kinds in ((static, SAME_MOTION), (1 - static, OTHER_MOTION)):
        weights = {(kind, dataset): weight for kind in kinds for dataset, weight in enumerate(config.weights(kind, datasets))}
        total = sum(weights.values())
        if share and not total:
            names = " and ".join(f"batches.{kind.replace('-', '_')}_weights" for kind in kinds)
            raise ConfigError(f"batches.static_share {config.static_share} leaves a share to what has no weight; give one in {names}")
        for part, weight in weights.items():
            if share and weight:
                own = share * weight / total
                if (own * config.size).denominator != 1:
                    whose = f"{part[0]} samples{f' of data set {part[1] + 1}' if datasets > 1 else ''}"
                    raise ConfigError(
                        f"batches.size {config.size}: {whose} would be {float(own * config.size):g} of a batch, by batches.static_share "
                        f"{config.static_share} and the weights; choose a size that {own.denominator} divides, or other shares, so that "
                        "all are whole numbers"
                    )
                yield part, own


def _even_pattern(shares: Sequence[fractions.Fraction]) -> tuple[list[int], list[int]]:
    """Which part each position of the shortest period is, and how many positions of that part are before it in the period."""
    period = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * period) for share in shares]
    places = [(fractions.Fraction(2 * n + 1, 2 * count), -part) for part, count in enumerate(counts) for n in range(count)]
    pattern = [-part for _, part in sorted(places)]
    return pattern, [pattern[:step].count(part) for step, part in enumerate(pattern)]


def _absent(config: BatchConfig, kind: str, where: str) -> str:
    if kind == "static":
        return (
            f"batches.static_share is {config.static_share}, but no frame of {where} is of kind 'static' with two "
            "views or more; generate static identities, set --batches.static_share 0, or give none a weight (batches.static_weights)"
        )
    return (
        f"batches.static_share is {config.static_share}, but no identity of {where} is {kind} and has two motions; generate {kind} "
        f"identities, set --batches.static_share 1, or give none a weight (batches.{kind.replace('-', '_')}_weights)"
    )
