"""What the training loops share: their opening, the clock and what it strikes, the stops, and the checks before a resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from head3d.run import distributed
from head3d.run.checkpoint import Checkpoint, newest_checkpoint_folder
from head3d.run.config import save_yaml
from head3d.run.errors import ConfigError, FoundryError
from head3d.run.runlog import Means, RunLog, progress

_MEANS = "means_since_last_line"  # in a checkpoint's state


class Divergence(FoundryError):
    """A loss is not finite."""


@dataclasses.dataclass
class OpenRun:
    """A run while its loop goes round: the clock, and what the loop writes to."""

    images_seen: int
    log: RunLog
    means: Means  # since the last line of metrics
    bar: tqdm
    stop: distributed.StopSignal
    batch: int  # images in a step, over all processes
    config: Any  # the run's settings: out, total_images
    device: torch.device
    advice: str  # when it diverges
    stopping: bool = False  # SIGTERM came to one of the processes

    @property
    def goes_on(self) -> bool:
        return not self.stopping and self.images_seen < self.config.total_images

    def advance(self, scalars: Mapping[str, float]) -> None:
        """A step is done that gave `scalars`, means over all processes. Raises Divergence if one is not finite."""
        self.images_seen += self.batch
        self.bar.update(self.batch)
        check_finite(scalars, self.images_seen, self.config.out, self.advice)
        self.means.add(scalars)
        self.stopping = distributed.any_process(self.stop.requested, self.device)

    def due(self, every: int) -> bool:
        """True when the last step passed a multiple of `every` images, or was the run's last."""
        passed = self.images_seen // every != (self.images_seen - self.batch) // every
        return passed or self.images_seen >= self.config.total_images

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint's state, for `open_run` to take up."""
        return {_MEANS: self.means.state()}


@contextmanager
def process_group(threads: int) -> Iterator[distributed.Process]:
    """This process among those that train together, with so many CPU threads of torch (0 leaves its default)."""
    if threads:
        torch.set_num_threads(threads)
    process = distributed.start()
    try:
        yield process
    finally:
        distributed.stop()


def is_finished(config: Any, images_seen: int, process: distributed.Process) -> bool:
    """Whether the run of `config` (out, total_images) has seen all images and written its export; the first process then says so."""
    finished = images_seen >= config.total_images and (config.out / "export" / "model.json").exists()
    if finished and process.is_main:
        print(f"{config.out}: finished at {images_seen} images, nothing to do")
    return finished


@contextmanager
def open_run(
    name: str, config: Any, batch: int, advice: str, saved: Checkpoint | None, images_seen: int, process: distributed.Process
) -> Iterator[OpenRun]:
    """Write down the settings of `config` (out, total_images) and open log and bar at `images_seen`; SIGTERM becomes a wish.

    A Divergence that ends the block is written into the log on its way; it ends in `advice`.
    """
    if process.is_main:
        save_yaml(config, config.out / "config.yaml")
    log = RunLog(config.out, images_seen, enabled=process.is_main)
    bar = progress(config.total_images, name, unit="img", initial=images_seen, enabled=process.is_main)
    with distributed.StopSignal() as stop, log, bar:
        try:
            means = Means(saved.state.get(_MEANS) if saved else None)
            yield OpenRun(images_seen, log, means, bar, stop, batch, config, process.device, advice)
        except Divergence as error:
            log.diverged(str(error))
            raise


def check_finite(scalars: Mapping[str, float], images_seen: int, run_folder: Path, advice: str) -> None:
    """Raise Divergence naming each quantity that is not finite, the last good checkpoint and what to try."""
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    if bad:
        good = newest_checkpoint_folder(run_folder) or "none yet"
        raise Divergence(f"{run_folder}: {', '.join(bad)} is not finite after {images_seen} images; last good checkpoint: {good}. {advice}")


def check_state(tensors: Mapping[str, Tensor], images_seen: int, run_folder: Path, advice: str) -> None:
    """The same of what a checkpoint would hold, before it takes the place of a good one: a finite loss may have spoilt the weights."""
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    check_finite(dict.fromkeys(broken[:3], math.nan), images_seen, run_folder, advice)


def refuse_changes(saved: Checkpoint, settings: Mapping[str, Any], recorded: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise ConfigError unless a run may go on from `saved`.

    `settings` are the run's, of which those in `free` may differ from `recorded`, the saved ones; a setting that one of the two lacks
    counts as different.
    """
    keys = (settings.keys() | recorded.keys()) - set(free)
    differing = sorted(key for key in keys if key not in settings or key not in recorded or settings[key] != recorded[key])
    if differing:
        raise ConfigError(
            f"{saved.folder}: the run was started with other settings of {', '.join(differing)}; "
            "give them as they were, or another --out for a new run"
        )


def refuse_other_circumstances(saved: Checkpoint, circumstances: Mapping[str, Any]) -> None:
    """Raise ConfigError unless what a run depends on besides its settings (its data, its processes) is as when it was started."""
    recorded = saved.state.get("circumstances", {})
    for name, value in circumstances.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"{saved.folder}: the run was started with {name} {recorded.get(name)!r}, now it is {value!r}, so it would not be the same "
                "run; bring that back, or give another --out for a new run"
            )


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
