"""Workers on a Ray cluster: hired as the cluster has room for them, handed shards, replaced when they die.

    hire -> introduce -> (accepted: shards, a few at a time) -> report, or failure -> another worker

A worker that is asked for waits, as an actor that is not placed yet, until the cluster has room: nodes that join during a run get work
at once, an autoscaler sees what is wanted, and of a node that leaves only the shards in its hands are made again. Ray itself restarts
and repeats nothing, so that every failure is seen, counted and written down here. The module `ray` is passed in.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from datagen.dispatch import Dispatch
from datagen.labels import SampleError
from datagen.ledger import Ledger
from datagen.worker import Introduction, ShardMaker, ShardReport
from head3d.run.errors import DataError, FoundryError

IN_FLIGHT = 2  # calls a worker is given at once: it never waits for the driver, and little is repeated when it dies
FALSE_STARTS = 5  # in a row that stop the run
FAILURES_IN_A_ROW = 3  # after which a worker's process is replaced: it may be the process that is broken
PATIENCE_S = 60.0  # without any worker, after which the user is told what is waited for


class Post(NamedTuple):
    """A sort of worker."""

    arguments: tuple[Any, ...]  # of ShardMaker
    wanted: int | None  # how many; None: as many as the cluster has room for, now and later
    cpus: float  # reserved by each
    gpus: float


@dataclasses.dataclass(eq=False)
class _Hand:
    """A worker that was hired."""

    post: Post
    actor: Any
    node: Any  # Ray's id of its node, once introduced
    name: str = ""  # host:process, once introduced
    accepted: bool = False  # gets shards; one that was refused keeps its place, so that the next is not put there
    shards: list[int] = dataclasses.field(default_factory=list)  # in its hands, oldest first: the one that it is making
    lost: tuple[int, Exception] | None = None  # the shard that it was making when it was lost, and how
    failures: int = 0  # in a row


class Crew:
    """The workers of one run."""

    def __init__(self, ray: ModuleType, posts: Sequence[Post], probe: str | None, accept: Callable[[Introduction], None]) -> None:
        """probe: name of a file in the data set's folder that every worker must see; accept raises FoundryError to refuse a worker."""
        self._ray, self._posts, self._probe, self._accept = ray, posts, probe, accept
        self._hands: set[_Hand] = set()  # hired and not known to be dead
        self._arriving: dict[Any, _Hand] = {}  # introduction asked for -> who
        self._flying: dict[Any, tuple[_Hand, int]] = {}  # report asked for -> who, shard
        self._false_starts = 0
        self._made = 0
        self._alone_since: float | None = time.monotonic()  # no worker is accepted; None once it was said, or when there is one

    def make(self, dispatch: Dispatch, ledger: Ledger) -> Iterator[ShardReport]:
        """Reports in the order in which shards are finished, until all are made or given up, or too many are.

        Raises what a worker raised that is no fault of a frame (a full disk, a missing generator, a defect) once it has failed so often
        that the shard is given up; DataError if workers cannot start.
        """
        try:
            while dispatch.unfinished and not dispatch.stopped:
                self._hand_out(dispatch)
                self._hire(dispatch.unfinished)
                ready, _ = self._ray.wait([*self._flying, *self._arriving], num_returns=1, timeout=PATIENCE_S)
                for reference in ready:
                    if reference in self._arriving:
                        self._meet(reference)
                    else:
                        yield from self._receive(reference, dispatch, ledger)
                self._say_what_is_missing()
        finally:
            for hand in self._hands:
                self._ray.kill(hand.actor)

    def _hire(self, unfinished: int) -> None:
        ray = self._ray
        for post in self._posts:
            there = sum(hand.post is post for hand in self._hands)
            working = sum(hand.post is post and hand.accepted for hand in self._hands)
            wanted = 2 * working + 1 if post.wanted is None else post.wanted  # an open number doubles while there is room
            for _ in range(min(wanted, unfinished) - there):
                settings = {"num_cpus": post.cpus, "num_gpus": post.gpus, "max_restarts": 0, "max_task_retries": 0}
                actor = ray.remote(ShardMaker).options(**settings).remote(*post.arguments)
                hand = _Hand(post, actor, node=actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
                self._hands.add(hand)
                self._arriving[actor.introduce.remote(self._probe)] = hand

    def _hand_out(self, dispatch: Dispatch) -> None:
        """Everybody gets one before anybody gets two, and nobody two when there are not enough for all."""
        working = sorted((hand for hand in self._hands if hand.accepted), key=lambda hand: len(hand.shards))
        names = [hand.name for hand in working]
        for most in range(1, IN_FLIGHT + 1):
            for hand in working:
                if len(hand.shards) < most and (most == 1 or dispatch.waiting > len(working)):
                    shard = dispatch.take(hand.name, names)
                    if shard is not None:
                        hand.shards.append(shard)
                        self._flying[hand.actor.make.remote(shard)] = (hand, shard)

    def _meet(self, reference: Any) -> None:
        """A worker has arrived, or died on the way."""
        hand, ray = self._arriving.pop(reference), self._ray
        try:
            introduction, hand.node = ray.get([reference, hand.node])
            hand.name = introduction.name
            self._accept(introduction)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, FoundryError):
                raise
            self._refuse(error.cause)
        except ray.exceptions.RayError as error:
            self._hands.discard(hand)
            self._false_starts += 1
            if self._false_starts >= FALSE_STARTS:
                raise DataError(
                    f"workers: {FALSE_STARTS} in a row died as they started; the last said: {_one_line(error)}. Every node needs this "
                    "program in the same version and enough memory"
                ) from error
        except FoundryError as error:
            self._refuse(error)
        else:
            hand.accepted, self._false_starts, self._alone_since = True, 0, None

    def _refuse(self, error: FoundryError) -> None:
        """At the start of a run it is an error; in its midst the others go on."""
        if not self._made:
            raise error
        tqdm.write(f"a worker that joined gets no shards: {error}", file=sys.stderr)

    def _receive(self, reference: Any, dispatch: Dispatch, ledger: Ledger) -> Iterator[ShardReport]:
        """A shard was made, could not be made, or its worker is gone."""
        (hand, shard), ray = self._flying.pop(reference), self._ray
        making = hand.shards[0]
        hand.shards.remove(shard)
        try:
            report = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # raised by the shard's own code
            cause = error.cause if isinstance(error.cause, FoundryError) else error
            reason, attempt = _one_line(cause), dispatch.attempt(shard)
            given_up = dispatch.failed(shard, hand.name, reason)
            ledger.record(shard, attempt, hand.name, cause, reason, given_up)
            if given_up and not isinstance(cause, SampleError):
                raise cause from None
            hand.failures += isinstance(cause, SampleError) or not isinstance(cause, FoundryError)  # what another process may do better
            if hand.failures >= FAILURES_IN_A_ROW:
                self._part_with(hand)
        except ray.exceptions.RayError as error:  # the process or the machine is gone, or the way to it
            if hand in self._hands:  # news; its other calls tell the same, in any order
                hand.lost = making, error
                self._part_with(hand)
            if hand.lost is not None and shard == hand.lost[0]:
                self._record_loss(hand, dispatch, ledger)
            else:
                dispatch.put_back(shard)
        else:
            hand.failures = 0
            self._made += 1
            dispatch.made(shard)
            yield report

    def _record_loss(self, hand: _Hand, dispatch: Dispatch, ledger: Ledger) -> None:
        """The shard is to blame for the death of a process, but not for that of a machine."""
        shard, error = hand.lost
        reason, attempt = _one_line(error), dispatch.attempt(shard)
        gone = isinstance(error, self._ray.exceptions.ActorUnavailableError) or not self._is_alive(hand.node)
        given_up = dispatch.lost(shard, reason) if gone else dispatch.failed(shard, hand.name, reason)
        ledger.record(shard, attempt, hand.name, error, reason, given_up)

    def _part_with(self, hand: _Hand) -> None:
        """What it still holds comes back as errors of Ray."""
        if hand in self._hands:
            self._hands.remove(hand)
            self._ray.kill(hand.actor)

    def _is_alive(self, node: str) -> bool:
        return any(known["NodeID"] == node and known["Alive"] for known in self._ray.nodes())

    def _say_what_is_missing(self) -> None:
        if any(hand.accepted for hand in self._hands):
            return
        if self._hands and not self._arriving:
            raise DataError("workers: none is left but such that were refused, as is said above")
        if self._alone_since is not None and time.monotonic() - self._alone_since > PATIENCE_S:
            needs = " or ".join(f"{post.cpus:g} CPU and {post.gpus:g} GPU" for post in self._posts)
            has = self._ray.cluster_resources()
            tqdm.write(
                f"still waiting for a first worker: each needs {needs}, the cluster has {has.get('CPU', 0):g} CPU and "
                f"{has.get('GPU', 0):g} GPU in all. If others have them, end what runs there or add nodes; if they are too few, "
                "stop and ask for less",
                file=sys.stderr,
            )
            self._alone_since = None


def _one_line(error: Exception) -> str:
    """What an error says, without its traceback and with at most 1,000 characters."""
    text = " ".join(str(error).split())
    return f"{text if isinstance(error, FoundryError) else f'{type(error).__name__}: {text}'}"[:1000]
