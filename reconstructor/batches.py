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
import threading
import weakref
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


def as_picture(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]; written to `out` if that is given."""
    picture = np.divide(pixels.transpose(2, 0, 1), np.float32(127.5), out=out, dtype=np.float32, order="C")
    picture -= 1
    return picture


class Blocks:
    """Memory of batches that nobody holds any more, for later ones: getting fresh memory from the system takes as long as decoding."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = collections.defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with any content. Its memory comes back when the array and every tensor made of it are gone."""
        free = self._free[shape, dtype]
        try:
            block = free.pop()
        except IndexError:  # asking before would be wrong with two threads
            block = np.empty(shape, dtype)
        array = block.view()
        weakref.finalize(array, free.append, block).atexit = False
        return array


class Rows:
    """A batch that threads fill, each the rows of its own samples; its arrays are made when the first sample says of what form."""

    def __init__(self, count: int, blocks: Blocks) -> None:
        self._count, self._blocks, self._arrays, self._lock = count, blocks, {}, threading.Lock()

    def row(self, number: int, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Where sample `number` writes the field `name` of `Batch`. Samples must hold the same fields in the same form."""
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = self._blocks.empty((self._count, *shape), dtype)
        array = self._arrays[name]
        assert array.shape[1:] == shape, f"{name} is {array.shape[1:]} in one sample of a batch and {shape} in another"
        return array[number, ...]

    def batch(self) -> Batch:
        return Batch(**{name: torch.from_numpy(array) for name, array in self._arrays.items()})


def read_item(dataset: FrameSource, item: Item, members: Iterable[str], rows: Rows, number: int, driver_image: bool = False) -> None:
    """Read and decode one sample into row `number`; only the members named (see `losses.TERM_MEMBERS`) and what every sample needs.

    Raises DataError (from the reader) if a member is missing or damaged.
    """
    source, target, members = dataset.frames[item.source], dataset.frames[item.target], set(members)
    picture, seen, driver = f"rgb.{item.target_view}", f"rgb.{item.source_view}", f"rgb.{item.driver_view}"
    data = dataset.read(target, sorted({picture, "label", *members} | ({driver} if driver_image else set())), view=item.target_view)
    other = dataset.read(source, [seen, "label"], view=item.source_view)

    def put(name: str, value: np.ndarray) -> None:
        rows.row(number, name, value.shape, value.dtype)[...] = value

    def put_picture(name: str, pixels: np.ndarray) -> None:
        height, width, channels = pixels.shape
        as_picture(pixels, rows.row(number, name, (channels, height, width), np.dtype(np.float32)))

    put_picture("source_image", other[seen])
    put_picture("image", data[picture])
    for name, one in (("source_motion", other), ("driving_motion", data)):
        vector = flame_motion_vector(unpack_label(torch.from_numpy(np.array(one["label"]))[None]).motion)[0].numpy()
        assert vector.shape == (MOTION_VECTOR_SIZE,)
        put(name, vector)
    put("motion_scale", np.float32(item.motion_scale))
    put("label", data["label"])
    put("identity", np.int64(target.identity))
    if driver_image:
        put_picture("driver_image", data[driver])
    if "background" in members:
        put_picture("background", data["background"])
    for name in members & {"opacity", "depth"}:
        put(name, data[name][None])
    for name in members & {"foreground", "points", "point_features"}:
        put(name, data[name])
    if "identity.background" in members:
        put("background_features", data["identity.background"] * 2 - 1)


class _Place(NamedTuple):
    """A sample that is to be read."""

    order: ItemOrder
    position: int
    members: frozenset[str]
    rows: Rows
    number: int  # its row


class _Ahead(NamedTuple):
    """A batch that is being read."""

    rows: Rows
    samples: list[Future[list[str]]]  # each done when its row is; the result of `_read`


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
        self._ahead, self._blocks = samples_seen, Blocks()
        self._pending: collections.deque[_Ahead] = collections.deque()
        shards = self._order(samples_seen)[0].part_count * config.shuffle_window  # a window of each part
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="decode") if config.threads else None
        self._fetcher = dataset.fetch_ahead(self._wanted(), shards=shards)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._threads is None:
            rows, places = self._plan()
            damages = [self._read(place) for place in places]
        else:
            while len(self._pending) < self._config.prefetch:
                rows, places = self._plan()
                self._pending.append(_Ahead(rows, [self._threads.submit(self._read, place) for place in places]))
            rows, samples = self._pending.popleft()
            damages = [sample.result() for sample in samples]
        self.samples_seen += self._config.size
        if self._fetcher is not None:
            self._fetcher.passed(self.samples_seen)
        for found in damages:
            self._tell(found)
        return rows.batch()

    def _tell(self, damages: list[str]) -> None:
        self.replaced += bool(damages)
        for damage in damages:
            if damage not in self._told and len(self._told) < TOLD:
                self._told.add(damage)
                tqdm.write(f"another sample is taken in the place of a damaged one (batches.damaged replace): {damage}", file=sys.stderr)

    def _plan(self) -> tuple[Rows, list[_Place]]:
        """The next batch, empty, and what goes into it."""
        order, members = self._order(self._ahead)
        positions = order.batch(self._ahead, self._rank, self._world_size)
        self._ahead += self._config.size
        rows = Rows(len(positions), self._blocks)
        return rows, [_Place(order, position, members, rows, number) for number, position in enumerate(positions)]

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

    def _read(self, place: _Place) -> list[str]:
        """Fill a row. Returns what was wrong with the samples in whose place this one was drawn."""
        order, position, members, rows, number = place
        damages: list[str] = []
        while True:
            try:
                read_item(self._dataset, order.item(position, len(damages)), members, rows, number, self._driver_image)
                return damages
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
