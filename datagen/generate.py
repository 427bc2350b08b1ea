"""`headfoundry datagen`: make the shards of a plan that are not there yet, in this process or on a Ray cluster.

    dataset.json -> shards that are missing -> make_shard, each -> index.safetensors

The only file that knows an engine. The same bytes appear for any number of workers, and after any kill and repetition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from datagen.crew import Crew, Post
from datagen.dispatch import Dispatch
from datagen.labels import SampleError
from datagen.ledger import LEDGER, Ledger
from datagen.members import FAMILIES, ShardConfig
from datagen.plan import GeneratorFacts, Plan, check_folder, claim_folder, differences, shard_is_done
from datagen.reading import write_index
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig, dataset_scales
from datagen.report import write_report
from datagen.shards import read_sidecar
from datagen.storage import LocalFolder, Storage, open_storage
from datagen.worker import Introduction, ShardMaker, ShardReport
from genhead.generator import GenHeadExport
from head3d.head_model import load_head_model
from head3d.rasterize import Backend, check_backend
from head3d.run.checkpoint import exported_hash
from head3d.run.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, load_yaml, to_dict
from head3d.run.errors import ConfigError
from head3d.run.files import TEMPORARY_PREFIX
from head3d.run.runlog import progress

FAILURES_SHOWN = 20  # at the end; the ledger has them all


@dataclasses.dataclass(frozen=True)
class DatagenRun:
    """Produce labelled multi-view shards with a trained generator. Defaults are the published distributions."""

    out: str = "runs/datagen"  # data set: a folder or a URL (s3://bucket/name, ...); one that is there is completed or extended
    generator: Path = Path("runs/genhead/export")  # exported generator (made by the genhead command)
    identities: PositiveInt = 10_000  # people; this many fixed ones train as well as endless ones (Lp3D, arXiv:2305.02310)
    seed: NonNegativeInt = 0  # of every draw
    workers: NonNegativeInt | Literal["auto"] = 1  # Ray workers; auto: as many as there is room for, also when nodes join; 0: no Ray
    address: str | None = None  # Ray cluster: "auto", host:port or ray://host:port; none starts a local one for this run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where workers render; auto: on GPUs if there are any
    gpus_per_worker: PositiveFloat = 1.0  # share of a GPU that each worker reserves when it renders on CUDA
    cpu_workers: NonNegativeInt = 0  # workers on CPUs beside those on GPUs; their last bits differ, so this needs mixed
    rasterizer: Backend = "torch"  # what draws masks: plain torch, or pytorch3d or warp where installed; a few edge pixels differ
    mixed: bool = False  # let devices, processors, rasterisers and package versions join that differ from those the set was begun with
    object_store_mb: PositiveInt = 128  # memory of the local Ray's object store; only reports pass through it
    attempts: PositiveInt = 3  # of a shard that fails, each by another worker where there is one, before it is given up
    failure_share: Fraction = 0.05  # of the plan's shards that may be given up; the run stops when there are more
    labels_share: Fraction = 1.0  # of the shards, the first ones, that carry depth, features and plane points
    licence: str = "not stated; the licences of the generator, its head model and its portraits apply"  # written into dataset.json
    page: bool = True  # write index.html at the end: pictures, distributions and outliers of a bounded sample
    recipe: RecipeConfig = RecipeConfig()  # who, which motions, which cameras
    render: RenderConfig = RenderConfig()  # how frames are rendered
    shards: ShardConfig = ShardConfig()  # how they are packed

    def __post_init__(self) -> None:
        if self.cpu_workers and not self.mixed:
            raise ValueError(f"cpu_workers: expected 0 where mixed is false, got {self.cpu_workers}")


def generate(config: DatagenRun) -> int:
    """Make what is missing of the data set. Returns the exit status: 0 if it is complete, 1 if shards have failed.

    Raises ConfigError if the folder holds other settings, DataError if it cannot be written (full disk) or is in use.
    """
    plan = make_plan(config)
    out = open_storage(config.out)
    with out.only_writer(FAMILIES):
        there = check_folder(out, plan)
        plan = plan.as_recorded(there)
        done = [*out.each(functools.partial(shard_is_done, out, plan), range(plan.shard_count))]
        missing = [shard for shard in range(plan.shard_count) if not done[shard]]
        begun_with = there["versions"] if there else read_sidecar(out, "frames", done.index(True))["versions"] if any(done) else None
        gate = _Gate(functools.partial(claim_folder, out, plan, there), begun_with, config.mixed)
        total, to_do = (sum(map(plan.shard_pictures, shards)) for shards in (range(plan.shard_count), missing))
        dispatch, made = Dispatch(missing, config.attempts, math.floor(config.failure_share * plan.shard_count)), 0
        if not missing:
            claim_folder(out, plan, there, begun_with)
        else:
            bar = progress(total, "datagen", unit="picture", initial=total - to_do)
            make = _in_process if config.workers == 0 else _on_ray
            with bar, out.appending("log.jsonl") as log, Ledger(plan, out) as ledger:
                for report in make(config, out, plan, gate, dispatch, ledger):
                    made += 1
                    log(json.dumps(report._asdict()))  # who made what; no part of the data
                    bar.update(report.pictures)
                    bar.set_postfix(shards=f"{plan.shard_count - len(missing) + made}/{plan.shard_count}", failed=len(dispatch.given_up))
        write_index(out)
        if config.page and (made or out.size("index.html") is None):
            write_report(out)
    print(f"{config.out}: {plan.shard_count} shards, {total} pictures of {plan.identities} identities; made {made} shards now")
    if dispatch.given_up:
        _say_failures(dispatch, len(missing) - made, out.where(LEDGER), config.failure_share)
    return 1 if dispatch.given_up else 0


def _say_failures(dispatch: Dispatch, missing: int, ledger: str, share: float) -> None:
    failed = sorted(dispatch.given_up.items())
    for shard, reason in failed[:FAILURES_SHOWN]:
        print(f"  shard {shard:06d} failed: {reason}")
    if len(failed) > FAILURES_SHOWN:
        print(f"  and {len(failed) - FAILURES_SHOWN} more")
    if dispatch.stopped:
        print(f"stopped, because more than {share:.3g} of all shards were given up (failure_share)")
    print(
        f"{missing} shards are missing; {ledger} says who tried and what the frame was. Mend what is named and call the same command "
        "again: it makes only those"
    )


def make_plan(config: DatagenRun) -> Plan:
    """The plan that a run's settings stand for; reads the generator's record and settings, not its weights."""
    if config.address is None:
        check_backend(config.rasterizer)
    weights = exported_hash(config.generator)
    export = load_yaml(GenHeadExport, config.generator / "config.yaml")
    recipe = config.recipe.pinned(export.head_model)
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
        rasterizer=config.rasterizer,
    )


class _Gate:
    """Lets in what renders as the set was begun, or as the first that comes; claims the folder before it gets a shard."""

    def __init__(self, claim: Callable[[dict[str, str]], None], begun_with: dict[str, str] | None, mixed: bool) -> None:
        self._claim, self._begun_with, self._mixed, self._claimed = claim, begun_with, mixed, False

    def __call__(self, worker: Introduction) -> None:
        """Raises ConfigError if the worker would render other last bits and a mixed set was not asked for."""
        begun_with = self._begun_with or worker.versions
        changed = differences(begun_with, worker.versions)
        if changed and not self._mixed:
            raise ConfigError(
                f"worker {worker.name} would not render the last bits of pictures as this set was begun ({', '.join(changed)}); "
                "use machines of one kind with the same packages, or --mixed true: the record of each shard states what rendered it"
            )
        if not self._claimed:
            self._claim(begun_with)
            self._begun_with, self._claimed = begun_with, True


def _in_process(config: DatagenRun, out: Storage, plan: Plan, gate: _Gate, dispatch: Dispatch, ledger: Ledger) -> Iterator[ShardReport]:
    maker = ShardMaker(out, plan, config.generator)
    me = maker.introduce(probe=None)
    gate(me)
    while (shard := dispatch.take(me.name, [me.name])) is not None:
        try:
            report = maker.make(shard)
        except SampleError as error:
            attempt = dispatch.attempt(shard)
            given_up = dispatch.failed(shard, me.name, str(error))
            ledger.record(shard, attempt, me.name, error, str(error), given_up)
        else:
            dispatch.made(shard)
            yield report


def _on_ray(config: DatagenRun, out: Storage, plan: Plan, gate: _Gate, dispatch: Dispatch, ledger: Ledger) -> Iterator[ShardReport]:
    with _ray_session(config) as ray, _probe(out) as probe:
        crew, meter = Crew(ray, _posts(config, out, plan, ray.cluster_resources()), probe, gate), _meter()
        for report in crew.make(dispatch, ledger):
            meter(report, dispatch)
            yield report


def _meter() -> Callable[[ShardReport, Dispatch], None]:
    """Counts for Ray's own metrics, which its dashboard and Prometheus show."""
    from ray.util.metrics import Counter, Gauge

    shards, pictures = Counter("headfoundry_shards", "shards made"), Counter("headfoundry_pictures", "pictures made")
    seconds = Counter("headfoundry_seconds", "seconds of workers, by stage", tag_keys=("stage",))
    unfinished, failed = Gauge("headfoundry_unfinished_shards", "shards to make"), Gauge("headfoundry_failed_shards", "shards given up")

    def count(report: ShardReport, dispatch: Dispatch) -> None:
        shards.inc()
        pictures.inc(report.pictures)
        for stage, spent in report.stages.items():
            if spent > 0:
                seconds.inc(spent, {"stage": stage})
        unfinished.set(dispatch.unfinished)
        failed.set(len(dispatch.given_up))

    return count


def _posts(config: DatagenRun, out: Storage, plan: Plan, resources: dict[str, float]) -> list[Post]:
    """The sorts of workers that are wanted of a cluster with these resources."""
    wanted = None if config.workers == "auto" else config.workers
    device = config.device
    if device == "auto":
        device = "cuda" if resources.get("GPU", 0) >= config.gpus_per_worker else "cpu"
    if config.address is None and device == "cuda" and resources.get("GPU", 0) < config.gpus_per_worker:
        raise ConfigError(
            f"gpus_per_worker: each worker asks for {config.gpus_per_worker:g} GPUs, this machine has {resources.get('GPU', 0):g}; "
            "ask for a share (0.5 lets two workers use one), or set --device cpu"
        )

    def post(device: str, wanted: int | None) -> Post:
        arguments = out.resolved(), dataclasses.replace(plan, device=device), config.generator.resolve()
        return Post(arguments, wanted, cpus=1, gpus=config.gpus_per_worker if device == "cuda" else 0)

    if device == "cpu":
        return [post("cpu", None if wanted is None else wanted + config.cpu_workers)]
    return [post("cuda", wanted)] + ([post("cpu", config.cpu_workers)] if config.cpu_workers else [])


@contextlib.contextmanager
def _probe(out: Storage) -> Iterator[str | None]:
    """A file by which workers can tell that a local folder is the same one everywhere; None where it is the same by its nature."""
    if not isinstance(out, LocalFolder):
        yield None
        return
    name = f"{TEMPORARY_PREFIX}{os.urandom(6).hex()}-probe"  # swept away with other leftovers if this process is killed
    out.write(name, "")
    try:
        yield name
    finally:
        out.delete(name)


@contextlib.contextmanager
def _ray_session(config: DatagenRun) -> Iterator[ModuleType]:
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
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is not None:
        _check_answers(config.address)
        try:
            ray.init(address=config.address, **quiet)
        except (ConnectionError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(_no_cluster(config.address, error)) from error
    else:
        cores = len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers + config.cpu_workers
        try:
            ray.init("local", num_cpus=cores, object_store_memory=config.object_store_mb << 20, include_dashboard=False, **quiet)
        except Exception as error:  # Ray raises all sorts, and the plain one where a busy machine takes too long
            raise ConfigError(
                f"workers: no Ray could be started on this machine ({' '.join(str(error).split())}); call again when it is less busy, "
                "or with --workers 0, which does without"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"address: nothing answers at {address!r} ({error}); start a cluster with `ray start --head`") from error


def _no_cluster(address: str, error: Exception) -> str:
    """Ray does not say why it is refused, so what is most often the reason is said here."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        f"address: the Ray cluster at {address!r} could not be joined: {' '.join(str(error).split())}. If it runs, it asks for a token, as "
        f"new clusters do, or has another version of Ray: set RAY_AUTH_MODE=token (now {mode}) and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, "
        "to what `ray get-auth-token` prints on its head node, the same on every node. If none runs, start one with `ray start --head`, or "
        "leave address out"
    )


def _device(config: DatagenRun) -> str:
    """Where this machine renders. On a cluster each worker says what it found."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and config.address is None and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no GPU on this machine; set --device cpu or auto")
    return config.device
