"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, pictures; and progress bars."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from head3d.pictures import save_png
from head3d.run.files import write_atomic, write_errors

_METRICS, _PICTURES, _EVENTS, _DIVERGED = "metrics.jsonl", "pictures", "tensorboard", "divergence.txt"


class RunLog:
    """The log of one run, with images seen as its clock.

    Writes FOLDER/metrics.jsonl (one JSON object a line), FOLDER/tensorboard/ and FOLDER/pictures/{images_seen}_{name}.png, and
    FOLDER/divergence.txt for a run that diverged. A run that resumes at `images_seen` drops what a later, lost state had written, so
    the log reads as if nothing had happened.
    With enabled=False (every rank but the first) nothing is written. Raises DataError if the disk refuses.
    """

    def __init__(self, folder: Path | str, images_seen: int, enabled: bool = True):
        self.folder = Path(folder)
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with write_errors(self.folder):
            (self.folder / _PICTURES).mkdir(parents=True, exist_ok=True)
        self._forget_after(images_seen)
        self._metrics = (self.folder / _METRICS).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self.folder / _EVENTS), purge_step=images_seen + 1)

    def scalars(self, images_seen: int, values: Mapping[str, float | Tensor]) -> None:
        """Write numbers under their names ("loss/r1"). NaN and infinities become null in metrics.jsonl."""
        if not self.enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = {"images_seen": images_seen} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with write_errors(self.folder / _METRICS):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        for name, value in numbers.items():
            self._events.add_scalar(name, value, images_seen)

    def image(self, images_seen: int, name: str, picture: np.ndarray) -> None:
        """Write a uint8 [H, W, 3] picture, as a PNG and in TensorBoard."""
        if not self.enabled:
            return
        path = self.folder / _PICTURES / f"{images_seen:09d}_{name.replace('/', '_')}.png"
        save_png(path, picture, {"images_seen": images_seen, "name": name})
        self._events.add_image(name, picture, images_seen, dataformats="HWC")

    def diverged(self, reason: str) -> None:
        """Write down why the run stopped; the note goes when the run goes on."""
        if self.enabled:
            write_atomic(self.folder / _DIVERGED, reason + "\n")
            self._events.add_text("divergence", reason)

    def close(self) -> None:
        if self.enabled:
            with write_errors(self.folder / _METRICS):
                self._metrics.close()
            with write_errors(self.folder / _EVENTS):
                self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _forget_after(self, images_seen: int) -> None:
        (self.folder / _DIVERGED).unlink(missing_ok=True)
        path = self.folder / _METRICS
        if path.exists():
            kept = [line for line in read_metrics(self.folder) if line["images_seen"] <= images_seen]
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        for picture in (self.folder / _PICTURES).glob("*.png"):
            stamp = picture.name.split("_", 1)[0]
            if stamp.isdecimal() and int(stamp) > images_seen:
                picture.unlink()


class Means:
    """Means of a run's numbers over the steps since its last line of metrics; a number counts where it was computed.

    `state` is JSON for the checkpoint, and goes into `Means(state)` on resume, so that no step is lost between two lines.
    """

    def __init__(self, state: Mapping[str, tuple[float, int]] | None = None) -> None:
        self._sums = {name: (total, count) for name, (total, count) in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Take the numbers of one step."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Name -> [sum, number of steps]."""
        return {name: list(entry) for name, entry in self._sums.items()}


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order; [] if there is none. A last line cut short by a kill is left out."""
    path = Path(folder) / _METRICS
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def progress(
    work: Iterable | int,
    description: str,
    unit: str = "it",
    *,
    initial: int = 0,
    enabled: bool = True,
) -> tqdm:
    """A bar over an iterable, or up to a total that the caller moves with `.update(n)`.

    It goes to stderr; into a file it prints every 30 s.
    """
    return tqdm(
        None if isinstance(work, int) else work,
        total=work if isinstance(work, int) else None,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not enabled,
        dynamic_ncols=True,
        smoothing=0.05,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
