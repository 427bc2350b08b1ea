"""`headfoundry datagen`: make the shards of a plan that are not there yet, in this process or on a Ray cluster.

    dataset.json -> shards that are missing -> make_shard, each -> index.json

The only file that knows an engine. The same bytes appear for any number of workers, and after any kill and repetition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from datagen.labels import SampleError
from datagen.members import FAMILIES, ShardConfig
from datagen.plan import GeneratorFacts, Plan, claim_folder, shard_is_done
from datagen.reading import write_index
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig, dataset_scales
from datagen.storage import open_storage
from datagen.worker import ShardMaker, ShardReport
from genhead.generator import GenHeadExport
from head3d.head_model import load_head_model
from head3d.run.checkpoint import exported_hash
from head3d.run.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, load_yaml, to_dict
from head3d.run.errors import ConfigError, FoundryError
from head3d.run.runlog import progress

IN_FLIGHT = 2  # calls a worker is given at once: it never waits for the driver, and little is repeated when it dies
RETRIES = 3  # of a shard whose worker died


@dataclasses.dataclass(frozen=True)
class DatagenRun:
    """Produce labelled multi-view shards with a trained generator. Defaults are the published distributions."""

    out: str = "runs/datagen"  # data set: a folder or a URL (s3://bucket/name, ...); one that is there is completed or extended
    generator: Path = Path("runs/genhead/export")  # exported generator (made by the genhead command)
    identities: PositiveInt = 10_000  # people; this many fixed ones train as well as endless ones (Lp3D, arXiv:2305.02310)
    seed: NonNegativeInt = 0  # of every draw
    workers: NonNegativeInt = 1  # Ray worker processes; 0 renders in this process, without Ray
    address: str | None = None  # Ray cluster: "auto" or host:port; none starts a local one for this run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where workers render; bytes are equal among machines of one kind
    gpus_per_worker: NonNegativeFloat = 1.0  # share of a GPU that each worker reserves when it renders on CUDA
    object_store_mb: PositiveInt = 128  # memory of the local Ray's object store; only reports pass through it
    max_failures: PositiveInt = 10  # stop early once this many shards have failed
    labels_share: Fraction = 1.0  # of the shards, the first ones, that carry depth, features and plane points
    licence: str = "not stated; the licences of the generator, its head model and its portraits apply"  # written into dataset.json
    recipe: RecipeConfig = RecipeConfig()  # who, which motions, which cameras
    render: RenderConfig = RenderConfig()  # how frames are rendered
    shards: ShardConfig = ShardConfig()  # how they are packed


def generate(config: DatagenRun) -> int:
    """Make what is missing of the data set. Returns the exit status: 0 if it is complete, 1 if shards have failed.

    Raises ConfigError if the folder holds other settings, DataError if it cannot be written (full disk) or is in use.
    """
    plan = make_plan(config)
    out = open_storage(config.out)
    with out.only_writer(FAMILIES):
        claim_folder(out, plan)
        done = out.each(functools.partial(shard_is_done, out, plan), range(plan.shard_count))
        missing = [shard for shard, there in enumerate(done) if not there]
        total, to_do = (sum(map(plan.shard_frames, shards)) for shards in (range(plan.shard_count), missing))
        failures: dict[int, str] = {}
        made = 0
        if missing:
            with progress(total, "datagen", unit="frame", initial=total - to_do) as bar, out.appending("log.jsonl") as log:
                reports = _in_process(config, plan, missing, failures) if config.workers == 0 else _on_ray(config, plan, missing, failures)
                for report in reports:
                    made += 1
                    _record(log, report, bar, failures)
        write_index(out)
    print(f"{config.out}: {plan.shard_count} shards, {total} frames of {plan.identities} identities; made {made} shards now")
    for shard, reason in sorted(failures.items()):
        print(f"  shard {shard:06d} failed: {reason}")
    if failures:
        print(f"{len(missing) - made} shards are missing; mend what is named above and call the same command again: it makes only those")
    return 1 if failures else 0


def make_plan(config: DatagenRun) -> Plan:
    """The plan that a run's settings stand for; reads the generator's record and settings, not its weights."""
    weights = exported_hash(config.generator)
    export = load_yaml(GenHeadExport, config.generator / "config.yaml")
    recipe = config.recipe
    if recipe.source == "sample-sets":
        recipe = dataclasses.replace(recipe, sample_sets=recipe.sample_sets.pinned())
    return Plan(
        identities=config.identities,
        seed=config.seed,
        labels_share=config.labels_share,
        recipe=recipe,
        render=config.render,
        shards=config.shards,
        generator=GeneratorFacts(
            folder=str(config.generator),
            hash=weights,
            settings=to_dict(export.model),
            head_model=export.head_model,
            head_hash=load_head_model(export.head_model).content_hash,
        ),
        scales=dataset_scales(recipe, export.model.sampling),
        licence=config.licence,
        device=_device(config),
    )


def _in_process(config: DatagenRun, plan: Plan, shards: list[int], failures: dict[int, str]) -> Iterator[ShardReport]:
    maker = ShardMaker(open_storage(config.out), plan, config.generator, plan.device)
    for shard in shards:
        try:
            yield maker.make(shard)
        except SampleError as error:
            failures[shard] = str(error)
            if len(failures) >= config.max_failures:
                return


def _on_ray(config: DatagenRun, plan: Plan, shards: list[int], failures: dict[int, str]) -> Iterator[ShardReport]:
    """Reports in the order in which shards finish. A worker that dies is started anew and its shards are made again."""
    with _ray_session(config) as ray:
        actor_class = ray.remote(
            num_cpus=1, num_gpus=config.gpus_per_worker if plan.device == "cuda" else 0, max_restarts=-1, max_task_retries=RETRIES
        )(ShardMaker)  # fmt: skip
        arguments = (open_storage(config.out).resolved(), plan, config.generator.resolve(), plan.device)
        actors = [actor_class.remote(*arguments) for _ in range(min(config.workers, len(shards)))]
        queue, flying = iter(shards), {}

        def give(actor: object) -> None:
            shard = next(queue, None)
            if shard is not None:
                flying[actor.make.remote(shard)] = (shard, actor)

        try:
            for actor in actors * IN_FLIGHT:
                give(actor)
            while flying and len(failures) < config.max_failures:
                (done,), _ = ray.wait(list(flying), num_returns=1)
                shard, actor = flying.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayTaskError as error:  # raised by the shard's own code
                    if not isinstance(error.cause, SampleError):
                        _raise_cause(error)
                    failures[shard] = str(error.cause)
                except ray.exceptions.RayError as error:  # the worker died too often
                    failures[shard] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                give(actor)
        finally:
            for actor in actors:
                ray.kill(actor)


def _raise_cause(error: Exception) -> None:
    """Errors for the user as they are; a defect of the program with its remote traceback."""
    if isinstance(error.cause, FoundryError):
        raise error.cause from None
    raise error


@contextlib.contextmanager
def _ray_session(config: DatagenRun) -> Iterator[object]:
    """Ray, connected: to `address`, or to a local cluster that ends with this run; one that the program has already is used and left."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("workers: 1 or more need the package ray, which is not installed; install it or set --workers 0") from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user says so
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.address is not None:
        _check_answers(config.address)
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(_no_cluster(config.address, error)) from error
    else:
        ray.init(
            num_cpus=config.workers,
            object_store_memory=config.object_store_mb << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(_no_cluster(address, error)) from error


def _no_cluster(address: str, error: Exception) -> str:
    return f"address: no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, or leave address out"


def _device(config: DatagenRun) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no GPU on this machine; set --device cpu or auto")
    return config.device


def _record(log: Callable[[str], None], report: ShardReport, bar: tqdm, failures: dict[int, str]) -> None:
    """Move the bar and keep who made what in log.jsonl, which is no part of the data."""
    log(json.dumps(report._asdict()))
    bar.update(report.frames)
    bar.set_postfix(shard=report.shard, failed=len(failures))
