"""Several data sets read as one: their frames one after another, each with the number of its set, and shards and identities renumbered
so that no number is used twice. How much of a batch each of them gives is said by the weights in `reconstructor.order.BatchConfig`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datagen.cache import FetchAhead, ShardCache
from datagen.index import FrameEntry
from datagen.reading import ShardDataset, fetch_ahead, open_dataset
from head3d.run.errors import ConfigError


def places_of(shards: str | Path | tuple[str, ...]) -> tuple[str | Path, ...]:
    """The data sets that a setting names: one, or several."""
    return shards if isinstance(shards, tuple) else (shards,)


class Mixture:
    """Data sets that are read together; a `FrameSource`. Raises ConfigError if they cannot be parts of one batch."""

    def __init__(self, datasets: Sequence[ShardDataset]) -> None:
        self.datasets, self.dataset_count = list(datasets), len(datasets)
        for dataset in self.datasets[1:]:
            _check_alike(self.datasets[0], dataset)
        self.frames: Sequence[FrameEntry] = _Frames(self.datasets)

    def through(self, caches: Sequence[ShardCache | None]) -> Mixture:
        """The same data, each set read through its cache (none: as it is)."""
        return Mixture([dataset.through(cache) for dataset, cache in zip(self.datasets, caches, strict=True)])

    def read(self, entry: FrameEntry, members: Sequence[str], view: int | None = None) -> dict[str, Any]:
        """As `ShardDataset.read`."""
        return self.datasets[entry.dataset].read(entry, members, view=view)

    def fetch_ahead(self, wanted: Iterable[tuple[int, FrameEntry, frozenset[str]]], shards: int) -> FetchAhead | None:
        """As `ShardDataset.fetch_ahead`, into the caches of all sets together."""
        return fetch_ahead(self.datasets, wanted, shards)


def open_mixture(shards: str | Path | tuple[str, ...]) -> Mixture:
    """Open the data sets that a setting names. Raises DataError if one is not there, ConfigError if they do not fit together."""
    places = places_of(shards)
    if len(set(map(str, places))) < len(places) or not places:
        raise ConfigError(f"shards: expected one data set or different ones, got {', '.join(map(str, places)) or 'none'}")
    return Mixture([open_dataset(place) for place in places])


def _check_alike(first: ShardDataset, other: ShardDataset) -> None:
    """What one network learns from both must mean the same in both."""
    ours, theirs = (dataset.manifest["settings"] for dataset in (first, other))
    model, also = ours["generator"]["model"], theirs["generator"]["model"]
    for what, expected, found in (
        *((f"the generator's {name}", model[name], also[name]) for name in ("image_resolution", "render_resolution")),
        ("the head model", ours["head_model"], theirs["head_model"]),
        ("the generator's weights", ours["generator"]["hash"], theirs["generator"]["hash"]),
        ("render.points", ours["render"]["points"], theirs["render"]["points"]),
    ):
        if found != expected:
            raise ConfigError(
                f"{other.storage.where()}: expected {what} to be {expected}, as of {first.storage.where()}, got {found}; data sets that "
                "are read together must be made with one generator, one head model and one number of points"
            )


class _Frames(Sequence[FrameEntry]):
    """The frames of all sets; an entry is made when it is asked for."""

    def __init__(self, datasets: Sequence[ShardDataset]) -> None:
        plans = [dataset.manifest["plan"] for dataset in datasets]
        self._parts = [dataset.frames for dataset in datasets]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))
        self._shards, self._identities = (
            list(itertools.accumulate((plan[name] for plan in plans), initial=0)) for name in ("shards", "identities")
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> FrameEntry | list[FrameEntry]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        entry = self._parts[number][index - self._ends[number]]  # counted from the end of its part
        return entry._replace(shard=entry.shard + self._shards[number], identity=entry.identity + self._identities[number], dataset=number)
