"""One shard: a plain function of (generator, folder, plan, shard number). It knows no engine and shares nothing with other shards."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datagen.labels import SampleError
from datagen.members import FAMILIES, Family, encode_sample
from datagen.plan import Plan, versions
from datagen.recipes import IdentityRecipe, draw_identity
from datagen.render import RenderedIdentity, render_identity, reproducible
from datagen.shards import ShardWriter, sample_key, write_shard
from datagen.storage import Storage
from genhead.generator import GenHead, load_genhead
from head3d.head_model import HeadModel, load_head_model
from head3d.rasterize import Backend, check_backend
from head3d.run.checkpoint import exported_hash
from head3d.run.errors import AssetError, ConfigError, DataError

AHEAD = 2  # identities that may wait to be encoded and written: a renderer never waits for a JPEG, and memory stays bounded


class ShardReport(NamedTuple):
    """What was made, and by whom."""

    shard: int
    frames: int
    pictures: int  # views of all frames
    bytes: int
    seconds: float
    stages: dict[str, float]  # seconds of draw, render, pack (encode, hash and write, beside rendering) and commit (flush, rename, record)
    ended: float  # seconds since 1970
    worker: str  # host:process


def make_shard(genhead: GenHead, out: Storage, plan: Plan, shard: int) -> ShardReport:
    """Render, encode and commit one shard: identities and labels first, frames last. The bytes depend on plan and shard alone.

    One thread encodes and writes identities in their order while the next ones are rendered. Raises SampleError if a frame cannot be
    used, DataError if it cannot be written; then nothing of this shard's frames is committed.
    """
    started, families = time.monotonic(), plan.families(shard)
    facts = plan.sidecar_facts(shard) | {"versions": versions(plan.device, plan.rasterizer)}
    spent = dict.fromkeys(("draw", "render", "pack", "commit"), 0.0)
    with reproducible(), contextlib.ExitStack() as stack:
        # A stack closes in reverse order: frames are entered before the other families and committed last.
        writers = {family: stack.enter_context(write_shard(out, family, shard, facts)) for family in FAMILIES if family in families}
        with OrderedThread(AHEAD) as thread:
            for index, identity in enumerate(plan.shard_identities(shard)):
                with _clock(spent, "draw"):
                    recipe = draw_identity(plan.recipe, plan.seed, identity)
                with _clock(spent, "render"):
                    rendered = render_identity(genhead, recipe, plan.render)
                thread.put(_pack, spent, writers, plan, shard, index, recipe, rendered)
        packed = time.perf_counter()
    spent["commit"] = time.perf_counter() - packed
    return ShardReport(
        shard=shard,
        frames=len(writers["frames"].samples),
        pictures=sum(sample["views"] for sample in writers["frames"].samples),
        bytes=sum(writer.size for writer in writers.values()),
        seconds=time.monotonic() - started,
        stages={stage: round(seconds, 4) for stage, seconds in spent.items()},
        ended=round(time.time(), 3),
        worker=_own_name(),
    )


class Introduction(NamedTuple):
    """What a worker says of itself before it gets a shard."""

    name: str  # host:process
    versions: dict[str, str]  # of what it renders with


class ShardMaker:
    """A worker process: makes shards on request. The first request loads the generator, so what is wrong with it is that call's error."""

    def __init__(self, out: Storage, plan: Plan, generator: Path) -> None:
        self.out, self.plan, self.generator = out, plan, generator
        self.genhead: GenHead | None = None

    def introduce(self, probe: str | None) -> Introduction:
        """Who this is. Raises ConfigError if the GPU or the rasteriser that is asked for is missing, and DataError if the file `probe`,
        which another process has put beside the shards, cannot be seen from here."""
        if self.plan.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device: cuda is asked for, but torch finds no GPU on {socket.gethostname()}; look at its driver, or set --device cpu"
            )
        if probe is not None and self.out.size(probe) is None:
            raise DataError(
                f"{self.out.where()}: {socket.gethostname()} does not see what another machine has written there, so it is not one folder; "
                "give --out on a file system that all nodes share, or a URL (s3://bucket/name, ...)"
            )
        check_backend(self.plan.rasterizer)
        return Introduction(_own_name(), versions(self.plan.device, self.plan.rasterizer))

    def make(self, shard: int) -> ShardReport:
        if self.genhead is None:
            self.genhead = load_planned_generator(self.plan, self.generator, self.plan.device, self.plan.rasterizer)
        return make_shard(self.genhead, self.out, self.plan, shard)


def _own_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def load_planned_generator(plan: Plan, folder: Path, device: str, rasterizer: Backend = "torch") -> GenHead:
    """The generator of a plan. Raises AssetError if the folder holds other weights or names another head model."""
    weights = exported_hash(folder)
    if weights != plan.generator.hash:
        raise AssetError(
            f"{folder}: expected generator weights {plan.generator.hash}, got {weights}; give the export that the data set was made with"
        )
    genhead = load_genhead(folder, device, rasterizer)
    if genhead.head_model.content_hash != plan.generator.head_hash:
        raise AssetError(
            f"{folder}: expected a head model with hash {plan.generator.head_hash}, got {genhead.head_model.content_hash}; "
            f"the data set was made with {plan.generator.head_model}"
        )
    return genhead


def load_planned_head(plan: Plan, head_model: str) -> HeadModel:
    """The head model in a file, or "procedural". Raises AssetError if it is not that of the plan's generator."""
    head = load_head_model(head_model)
    if head.content_hash != plan.generator.head_hash:
        raise AssetError(
            f"head_model {head_model}: expected the head of the shards (hash {plan.generator.head_hash}), got {head.content_hash}; "
            f"give the file that the generator was trained with ({plan.generator.head_model})"
        )
    return head


def _pack(
    spent: dict[str, float],
    writers: dict[Family, ShardWriter],
    plan: Plan,
    shard: int,
    index: int,
    recipe: IdentityRecipe,
    rendered: RenderedIdentity,
) -> None:
    """Encode and write one identity, number `index` of its shard. Every family has all its samples, some of them without members."""

    def add(family: Family, key: str, values: dict[str, Any], about: dict[str, Any]) -> None:
        if family not in writers:
            return
        try:
            files = encode_sample(plan.members(recipe.kind, family), values, plan.scales, plan.shards)
        except ValueError as error:
            motion = about.get("motion", 0)
            message = f"identity {recipe.identity} of seed {plan.seed}, motion {motion}: {error}"
            raise SampleError(message, recipe.identity, motion) from error
        writers[family].add(key, files, about)

    with _clock(spent, "pack"):
        add("identities", sample_key(shard, index), rendered.shared, {"identity": recipe.identity})
        for motion, frame in enumerate(rendered.frames):
            key = sample_key(shard, len(writers["frames"].samples))
            about = {"identity": recipe.identity, "motion": motion, "kind": recipe.kind, "split": recipe.split, "views": len(frame["rgb"])}
            for family in ("frames", "labels"):
                add(family, key, frame, about)


@contextlib.contextmanager
def _clock(spent: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds of the block to those of a stage."""
    begun = time.perf_counter()
    yield
    spent[stage] += time.perf_counter() - begun


class OrderedThread:
    """One thread that does what it is given, in order, while its owner goes on; at most `ahead` tasks wait. Use as a context manager.

    An error of a task is raised by a later `put`, or at the end of the block; the tasks behind it are then dropped.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._pending: collections.deque[Future] = collections.deque()

    def put(self, task: Callable[..., None], *arguments: Any) -> None:
        """Hand over a task; waits while `ahead` of them are unfinished."""
        while self._pending and (len(self._pending) >= self._ahead or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(task, *arguments))

    def __enter__(self) -> OrderedThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)
