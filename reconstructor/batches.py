"""Training batches of (source, driver, target), streamed from shards by byte offsets in the order of `reconstructor.order`.

The state of the stream is one integer, the samples seen; every rank gets equally many batches of equal size. Targets are frames that
have what the batch compares with: while exact labels are needed, the labelled share of a data set; later, all of it.

    dynamic  source = frame A, view i;  driver = motion B;  target = frame B, view j     one identity, A != B, motion scale 1
    static   source = frame A, view i;  driver = motion A;  target = frame A, view j     i != j,               motion scale 0

Two settings serve the paper's ablation alone: `swap_probability` makes static samples of dynamic ones, and without `switch` the motion
scale is 1 everywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datagen.cache import FetchAhead
from head3d.labels import MOTION_VECTOR_SIZE, unpack_label
from head3d.run.errors import ConfigError, DataError
from reconstructor.motion import flame_motion_vector
from reconstructor.order import BatchConfig, Frame, Item, ItemOrder

REPLACEMENTS = 8  # samples drawn in the place of one that cannot be read, before it is an error after all
TOLD = 20  # damaged places that are named; the rest is only counted


class FrameSource(Protocol):
    """What is read: a `datagen.reading.ShardDataset`, or several (`reconstructor.mixture.Mixture`)."""

    frames: Sequence[Frame]
    dataset_count: int  # data sets that the frames are of

    def read(self, entry: Frame, members: Sequence[str], view: int | None = None) -> dict[str, np.ndarray]: ...

    def fetch_ahead(self, wanted: Iterable[tuple[int, Frame, frozenset[str]]], shards: int) -> FetchAhead | None: ...


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


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    picture = np.divide(pixels.transpose(2, 0, 1), np.float32(127.5), dtype=np.float32, order="C")
    picture -= 1
    return picture


def read_item(dataset: FrameSource, item: Item, members: Iterable[str], driver_image: bool = False) -> dict[str, np.ndarray]:
    """Read and decode one sample; only the members named (see `losses.TERM_MEMBERS`) and what every sample needs.

    Returns arrays by the field names of `Batch`. Raises DataError (from the reader) if a member is missing or damaged.
    """
    source, target, members = dataset.frames[item.source], dataset.frames[item.target], set(members)
    picture, seen, driver = f"rgb.{item.target_view}", f"rgb.{item.source_view}", f"rgb.{item.driver_view}"
    data = dataset.read(target, sorted({picture, "label", *members} | ({driver} if driver_image else set())), view=item.target_view)
    other = dataset.read(source, [seen, "label"], view=item.source_view)
    vectors = [flame_motion_vector(unpack_label(torch.from_numpy(np.array(one["label"]))[None]).motion)[0].numpy() for one in (other, data)]
    assert vectors[0].shape == (MOTION_VECTOR_SIZE,)
    sample = {
        "source_image": as_picture(other[seen]),
        "source_motion": vectors[0],
        "driving_motion": vectors[1],
        "motion_scale": np.float32(item.motion_scale),
        "label": data["label"],
        "identity": np.int64(target.identity),
        "image": as_picture(data[picture]),
    }
    if driver_image:
        sample["driver_image"] = as_picture(data[driver])
    if "opacity" in members:
        sample["opacity"] = data["opacity"][None]
    if "depth" in members:
        sample["depth"] = data["depth"][None]
    if "background" in members:
        sample["background"] = as_picture(data["background"])
    if "identity.background" in members:
        sample["background_features"] = data["identity.background"] * 2 - 1
    for name in members & {"foreground", "points", "point_features"}:
        sample[name] = data[name]
    return sample


def collate(samples: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stack samples that hold the same fields."""
    return Batch(**{name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]})


class _Read(NamedTuple):
    """A sample, and what was wrong with those in whose place it was drawn."""

    sample: dict[str, np.ndarray]
    damages: list[str]


class BatchStream:
    """Iterate over batches of one rank, decoded ahead by threads. Use as a context manager, or call `close`.

    members: label members to read in the batch that starts at a given number of samples seen; its frames are those that have them.
    An error while reading is raised by the `next` that would have returned that batch, after all earlier batches; with
    `config.damaged` "replace" another sample of the same part is drawn instead, by position and attempt alone.
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
        self.replaced = 0  # samples of this rank, in the batches handed out so far, that were drawn in the place of damaged ones
        self._told: set[str] = set()
        self._dataset, self._config, self._members = dataset, config, members
        self._rank, self._world_size, self._driver_image = rank, world_size, driver_image
        self._ahead = samples_seen
        self._pending: collections.deque[list[Future[_Read]]] = collections.deque()
        shards = self._order(samples_seen)[0].part_count * config.shuffle_window  # a window of each part
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="decode") if config.threads else None
        self._fetcher = dataset.fetch_ahead(self._wanted(), shards=shards)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._threads is None:
            found = [self._read(*place) for place in self._plan()]
        else:
            while len(self._pending) < self._config.prefetch:
                self._pending.append([self._threads.submit(self._read, *place) for place in self._plan()])
            found = [future.result() for future in self._pending.popleft()]
        self.samples_seen += self._config.size
        if self._fetcher is not None:
            self._fetcher.passed(self.samples_seen)
        for read in found:
            self._tell(read.damages)
        return collate([read.sample for read in found])

    def _tell(self, damages: list[str]) -> None:
        self.replaced += bool(damages)
        for damage in damages:
            if damage not in self._told and len(self._told) < TOLD:
                self._told.add(damage)
                tqdm.write(f"another sample is taken in the place of a damaged one (batches.damaged replace): {damage}", file=sys.stderr)

    def _plan(self) -> list[tuple[ItemOrder, int, frozenset[str]]]:
        order, members = self._order(self._ahead)
        positions = order.batch(self._ahead, self._rank, self._world_size)
        self._ahead += self._config.size
        return [(order, position, members) for position in positions]

    def _order(self, samples_seen: int) -> tuple[ItemOrder, frozenset[str]]:
        """The order of the batch that starts there, and the label members that are read in it."""
        members = frozenset(self._members(samples_seen))
        if members not in self._orders:
            dataset = self._dataset
            self._orders[members] = ItemOrder(dataset.frames, self._config, self._seed, self._split, members, dataset.dataset_count)
        return self._orders[members], members

    def _wanted(self) -> Iterator[tuple[int, Frame, frozenset[str]]]:
        """What all ranks will read: number of the sample, its target frame, the members."""
        for seen in itertools.count(self.samples_seen, self._config.size):
            order, members = self._order(seen)
            for position in range(seen, seen + self._config.size):
                yield position, self._dataset.frames[order.target(position)[0]], members | {"rgb.0", "label"}

    def _read(self, order: ItemOrder, position: int, members: frozenset[str]) -> _Read:
        damages: list[str] = []
        while True:
            try:
                return _Read(read_item(self._dataset, order.item(position, len(damages)), members, self._driver_image), damages)
            except DataError as error:
                if self._config.damaged == "stop":
                    raise
                damages.append(str(error))
                if len(damages) > REPLACEMENTS:
                    raise DataError(
                        f"{error}. Neither could {REPLACEMENTS} samples be read that were drawn in its place (batches.damaged replace)"
                    ) from error

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
