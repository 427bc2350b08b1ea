"""Which shard a worker makes next, which it makes again, and when one is given up. Knows no engine, no clock and no file.

A shard fails as a whole: if one of its frames cannot be used, nothing of it is committed. A gap in its place would make its bytes
depend on what happened on the day, and a later run would take it for done. So a set holds only whole shards, each a pure function of
the settings, and calling the same command again makes just what is missing.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable

LOSSES = 10  # of a shard with its machine, after which it counts as a failure: machines come and go, but no shard may take all of them


class Dispatch:
    """The shards of one run that are still to be made. Workers are named "host:process"."""

    def __init__(self, shards: Iterable[int], attempts: int, allowed_failures: int) -> None:
        """attempts: how often a shard may fail; allowed_failures: how many shards may be given up before the run stops."""
        self._waiting = collections.deque(shards)
        self._out: set[int] = set()
        self._failed_by: dict[int, list[str]] = {}
        self._losses: collections.Counter[int] = collections.Counter()
        self._attempts, self._allowed = attempts, allowed_failures
        self.given_up: dict[int, str] = {}  # shard -> the last reason

    @property
    def waiting(self) -> int:
        """Shards that nobody has."""
        return len(self._waiting)

    @property
    def unfinished(self) -> int:
        """Shards that wait or are being made."""
        return len(self._waiting) + len(self._out)

    @property
    def stopped(self) -> bool:
        """Whether more shards than allowed were given up: then no more are handed out."""
        return len(self.given_up) > self._allowed

    def attempt(self, shard: int) -> int:
        """The number of the attempt that is being made: 1, 2, ..."""
        return len(self._failed_by.get(shard, ())) + self._losses[shard] + 1

    def take(self, worker: str, everybody: Collection[str]) -> int | None:
        """The next shard for `worker`, or None if there is none for it now.

        A shard that has failed goes to a worker that has not failed on it, on a machine that has not if there is one; only if all
        of `everybody` (the workers there are) have failed on it alike does it go to any.
        """
        if self.stopped:
            return None
        for shard in self._waiting:
            if shard not in self._failed_by or self._failures(shard, worker) == min(self._failures(shard, other) for other in everybody):
                self._waiting.remove(shard)
                self._out.add(shard)
                return shard
        return None

    def made(self, shard: int) -> None:
        """It is committed."""
        self._out.remove(shard)

    def failed(self, shard: int, worker: str, reason: str) -> bool:
        """It could not be made by this worker, or the worker died of it. Returns whether it is given up; otherwise it is made again."""
        failures = self._failed_by.setdefault(shard, [])
        failures.append(worker)
        return self._again_or_given_up(shard, reason, len(failures) >= self._attempts)

    def lost(self, shard: int, reason: str) -> bool:
        """Its worker went with its machine, which is not held against the shard. Returns whether it is given up all the same."""
        self._losses[shard] += 1
        return self._again_or_given_up(shard, reason, self._losses[shard] >= LOSSES)

    def put_back(self, shard: int) -> None:
        """It was handed out, but its worker never came to it."""
        self._out.remove(shard)
        self._waiting.appendleft(shard)

    def _again_or_given_up(self, shard: int, reason: str, given_up: bool) -> bool:
        if given_up:
            self._out.remove(shard)
            self.given_up[shard] = reason
        else:
            self.put_back(shard)
        return given_up

    def _failures(self, shard: int, worker: str) -> tuple[int, int]:
        """How often the worker, and how often its machine, has failed on the shard."""
        by = self._failed_by[shard]
        return by.count(worker), sum(_host(other) == _host(worker) for other in by)


def _host(worker: str) -> str:
    return worker.rpartition(":")[0]
