"""One shard: a plain function of (generator, folder, plan, shard number). It knows no engine and shares nothing with other shards."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from datagen.members import FAMILIES, Family, encode_sample
from datagen.plan import Plan, versions
from datagen.recipes import draw_identity
from datagen.render import SampleError, render_identity, reproducible
from datagen.shards import sample_key, write_shard
from datagen.storage import Storage
from genhead.generator import GenHead, load_genhead
from head3d.run.checkpoint import exported_hash
from head3d.run.errors import AssetError


class ShardReport(NamedTuple):
    """What was made, and by whom."""

    shard: int
    frames: int
    bytes: int
    seconds: float
    worker: str  # host:process


def make_shard(genhead: GenHead, out: Storage, plan: Plan, shard: int) -> ShardReport:
    """Render, encode and commit one shard: identities and labels first, frames last. The bytes depend on plan and shard alone.

    Raises SampleError if a frame cannot be used, DataError if it cannot be written; then nothing of this shard's frames is committed.
    """
    started, families = time.monotonic(), plan.families(shard)
    facts = plan.sidecar_facts(shard) | {"versions": versions(plan.device)}
    with reproducible(), contextlib.ExitStack() as stack:
        # A stack closes in reverse order: frames are entered first and committed last.
        writers = {family: stack.enter_context(write_shard(out, family, shard, facts)) for family in FAMILIES if family in families}
        for index, identity in enumerate(plan.shard_identities(shard)):
            recipe = draw_identity(plan.recipe, plan.seed, identity)
            rendered = render_identity(genhead, recipe, plan.render)
            about = {"identity": identity}
            writers["identities"].add(
                sample_key(shard, index), _encode("identities", {"background": rendered.background}, plan, about), about
            )
            for motion, frame in enumerate(rendered.frames):
                key = sample_key(shard, len(writers["frames"].samples))
                about = {"identity": identity, "motion": motion, "kind": recipe.kind, "split": recipe.split, "views": len(frame["rgb"])}
                for family in ("frames", "labels"):
                    if family in writers:
                        writers[family].add(key, _encode(family, frame, plan, about), about)
    return ShardReport(
        shard=shard,
        frames=len(writers["frames"].samples),
        bytes=sum(writer.size for writer in writers.values()),
        seconds=time.monotonic() - started,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )


class ShardMaker:
    """A worker process: makes shards on request. The first request loads the generator, so what is wrong with it is that call's error."""

    def __init__(self, out: Storage, plan: Plan, generator: Path, device: str) -> None:
        self.out, self.plan, self.generator, self.device = out, plan, generator, device
        self.genhead: GenHead | None = None

    def make(self, shard: int) -> ShardReport:
        if self.genhead is None:
            self.genhead = load_planned_generator(self.plan, self.generator, self.device)
        return make_shard(self.genhead, self.out, self.plan, shard)


def load_planned_generator(plan: Plan, folder: Path, device: str) -> GenHead:
    """The generator of a plan. Raises AssetError if the folder holds other weights or names another head model."""
    weights = exported_hash(folder)
    if weights != plan.generator.hash:
        raise AssetError(
            f"{folder}: expected generator weights {plan.generator.hash}, got {weights}; give the export that the data set was made with"
        )
    genhead = load_genhead(folder, device)
    if genhead.head_model.content_hash != plan.generator.head_hash:
        raise AssetError(
            f"{folder}: expected a head model with hash {plan.generator.head_hash}, got {genhead.head_model.content_hash}; "
            f"the data set was made with {plan.generator.head_model}"
        )
    return genhead


def _encode(family: Family, values: dict, plan: Plan, about: dict) -> dict[str, bytes]:
    try:
        return encode_sample(family, values, plan.scales, plan.shards)
    except ValueError as error:
        identity, motion = about["identity"], about.get("motion", 0)
        raise SampleError(f"identity {identity} of seed {plan.seed}, motion {motion}: {error}", identity, motion) from error
