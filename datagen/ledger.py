"""failures.jsonl: one line for each time a shard could not be made, with the recipe of the frame to blame. It is no part of the data.

The file is only ever added to, so it outlives every run, and a run that was killed too. What is missing now is told by the shards
themselves; this tells why, and who tried: a machine that fails often stands out, and so does an identity that no worker can render.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any

from datagen.labels import SampleError
from datagen.plan import Plan
from datagen.recipes import draw_identity
from datagen.render import frame_facts
from datagen.storage import Storage

LEDGER = "failures.jsonl"


class Ledger:
    """Adds lines to the file of a data set; a run in which nothing fails leaves it as it is."""

    def __init__(self, plan: Plan, out: Storage) -> None:
        self._plan, self._out = plan, out
        self._open = contextlib.ExitStack()
        self._add: Callable[[str], None] | None = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def record(self, shard: int, attempt: int, worker: str, error: Exception, reason: str, given_up: bool) -> None:
        """Note a failed attempt. If a frame is to blame (SampleError), with the recipe that makes it again."""
        entry: dict[str, Any] = {
            "shard": shard,
            "attempt": attempt,
            "given_up": given_up,
            "worker": worker,
            "reason": reason,
            "identity": None,
            "motion": None,
            "recipe": None,
            "config_hash": self._plan.hash,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if isinstance(error, SampleError):
            recipe = draw_identity(self._plan.recipe, self._plan.seed, error.identity)
            entry |= {"identity": error.identity, "motion": error.motion, "recipe": frame_facts(recipe, error.motion)}
        if self._add is None:
            self._add = self._open.enter_context(self._out.appending(LEDGER))
        self._add(json.dumps(entry))
