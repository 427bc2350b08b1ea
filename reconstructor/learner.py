"""What a training run of the reconstructor changes and keeps: networks, average, optimiser; their start, checkpoints and export."""

from __future__ import annotations

import collections
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from datagen.plan import Plan
from datagen.reading import ShardDataset
from datagen.worker import load_planned_generator, load_planned_head
from genhead.generator import GenHead
from head3d.adversarial import Ema
from head3d.run.checkpoint import (
    Checkpoint,
    export_model,
    exported_images_seen,
    load_exported,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from head3d.run.config import config_hash, to_dict
from head3d.run.errors import ConfigError
from head3d.run.seeding import torch_generator, weights_drawn_from
from head3d.run.training import check_state, part, refuse_changes, refuse_other_circumstances
from reconstructor.adversary import Adversary
from reconstructor.frozen_networks import FrozenNetworks, load_frozen_networks
from reconstructor.losses import check_labels
from reconstructor.mixture import Mixture
from reconstructor.model import EXPORT_KIND, Reconstructor, ReconstructorExport
from reconstructor.motion_vectors import MotionVectors, open_motion_vectors
from reconstructor.order import usable_frames
from reconstructor.settings import ADVICE, FREE_IN_BATCHES, FREE_TO_CHANGE, ReconstructorRun
from reconstructor.stages import check_groups, parameter_groups


@dataclasses.dataclass
class Learner:
    """Network, averaged network, optimiser: what a step changes and a checkpoint holds."""

    model: Reconstructor
    averaged: Reconstructor
    ema: Ema
    optimizer: torch.optim.Adam
    frozen: FrozenNetworks  # what some losses ask; never changes
    vectors: MotionVectors  # what the attention is told of motions; never changes
    adversary: Adversary | None  # None where the adversarial term never counts
    head_model: str  # what the networks' head was loaded from


def check_data(config: ReconstructorRun, data: Mixture) -> list[str]:
    """Raise ConfigError where the settings and the shards contradict each other. Returns what is worth knowing before training."""
    notes = []
    training = usable_frames(data.frames, config.batches, "train", datasets=data.dataset_count)
    for number, dataset in enumerate(data.datasets):
        where = dataset.storage.address
        rich = config.batches.weights("motion-rich", data.dataset_count)[number] > 0
        _check_sizes(config, dataset, rich, where)
        members = [entry.members for entry in map(data.frames.__getitem__, training) if entry.dataset == number]
        if not members:
            raise ConfigError(
                f"{where}: no frame of its split 'train' is of a kind that has a weight; give one a weight in batches, or leave the set out"
            )
        available = collections.Counter(name for names in members for name in names)
        notes += [f"{where}: {note}" for note in check_labels(config.losses_of_all_stages(), available, len(members), where)]
    return notes


def _check_sizes(config: ReconstructorRun, dataset: ShardDataset, motion_rich: bool, where: str) -> None:
    """Raise ConfigError unless a data set is complete and what the network makes has the size of what it is compared with."""
    planned = dataset.manifest["plan"]["frames"] - dataset.excluded_count
    if len(dataset.frames) < planned:
        raise ConfigError(
            f"{where}: holds {len(dataset.frames)} of the {planned} frames that it was planned with, and training on it would be another "
            "run; finish it by calling its datagen command again"
        )
    model, losses, stored = config.model, config.losses_of_all_stages(), dataset.manifest["settings"]["generator"]["model"]
    architecture, maps = model.architecture, any(getattr(losses, term).weight for term in ("image", "features", "depth", "opacity"))
    for setting, own, name, needed in (
        ("architecture.image_resolution", architecture.image_resolution, "image_resolution", True),
        ("superresolution (its input, doubled by each block)", model.superresolution.output_resolution, "image_resolution", True),
        ("render_resolution", model.render_resolution, "render_resolution", maps),
        ("feature_channels", model.feature_channels, "feature_channels", losses.features.weight > 0),
        ("architecture.plane_channels", architecture.plane_channels, "plane_channels", losses.points.weight > 0),
    ):
        if needed and own != stored[name]:
            raise ConfigError(
                f"{where}: the shards were made with {name} {stored[name]}, but model.{setting} gives {own}; "
                f"make it {stored[name]}, or give shards of that size"
            )
    rich = dataset.manifest["settings"]["render"]["motion_rich_side"]
    if motion_rich and rich != architecture.image_resolution:
        raise ConfigError(
            f"{where}: batches.motion_rich_weights asks for motion-rich identities, whose pictures are {rich} px, but the others' are "
            f"{architecture.image_resolution} px; generate them with --render.motion_rich_side {architecture.image_resolution}, or give "
            "them no weight"
        )


def build(config: ReconstructorRun, plan: Plan, device: torch.device, fresh: bool) -> Learner:
    """A learner at the start of its life; with `fresh` false, one for `restore`, which needs no weights to start from.

    Raises AssetError if generator or head model are not those of the shards, and what `open_motion_vectors` raises.
    """
    vectors = open_motion_vectors(config.model.architecture.motion, config.perception, device)
    head_model = config.head_model or plan.generator.head_model
    head = load_planned_head(plan, head_model)
    with weights_drawn_from(torch_generator(config.seed, "reconstructor", "weights")):
        model = Reconstructor(config.model, head).to(device)
    folder = config.generator or Path(plan.generator.folder)
    if fresh and config.warm_start and config.start_from is None:
        take_from_generator(model, load_planned_generator(plan, folder, str(device)))
    averaged = copy.deepcopy(model, {id(head): head}).eval().requires_grad_(False)  # one head model for both
    if config.recompute_activations:
        model.recompute_activations()
    if config.compile:
        model.compile_parts()
    ema = Ema(averaged, half_life_images=config.ema_images, ramp=config.ema_ramp)
    optimizer = build_optimizer(config, model)
    frozen = load_frozen_networks(config.network_files(), config.losses_of_all_stages(), model.head_model, device, vectors.network)
    adversary = Adversary(config.adversary, config.seed, folder, config.start_from, device) if config.has_adversary else None
    if fresh and adversary:
        adversary.begin()
    return Learner(model, averaged, ema, optimizer, frozen, vectors, adversary, head_model)


def build_optimizer(config: ReconstructorRun, model: Reconstructor) -> torch.optim.Adam:
    """Adam with a named group of each kind of parameters. Raises ConfigError if a stage names a group that there is not."""
    groups = parameter_groups(model)
    check_groups(config.all_stages(), groups)
    named = [{"params": parameters, "name": name} for name, parameters in groups.items()]
    return torch.optim.Adam(named, config.learning_rate, config.betas, config.epsilon)


def take_from_generator(model: Reconstructor, generator: GenHead) -> None:
    """Begin with the generator's decoder and super-resolution (portrait4d, section 6.8): plane features then mean the same.

    Raises ConfigError if a width differs.
    """
    for name in ("decoder", "superresolution"):
        own, other = getattr(model, name).state_dict(), getattr(generator, name).state_dict()
        differing = [
            key for key in sorted(own.keys() | other.keys()) if key not in own or key not in other or own[key].shape != other[key].shape
        ]
        if differing:
            raise ConfigError(
                f"warm_start: the generator's {name} does not fit the reconstructor's at {', '.join(differing[:3])}; give the {name} "
                "the generator's widths (its config.yaml lies beside its weights), or start at random with --warm_start false"
            )
        getattr(model, name).load_state_dict(other)


def begin(config: ReconstructorRun, learner: Learner) -> int:
    """The first step's weights, from `start_from` if it is given. Returns the images seen by them; the schedules go on from there.

    Raises ConfigError if the exported reconstructor has other settings, AssetError if a file is missing or damaged.
    """
    if config.start_from is None:
        return 0
    weights, exported = load_exported(config.start_from, ReconstructorExport, EXPORT_KIND)
    images_seen = exported_images_seen(config.start_from)
    own = dataclasses.replace(config.model, render_resolution=config.rays_at(images_seen))
    if exported.model != own or exported.motion_encoder_hash != learner.vectors.weights_hash:
        what = "settings of model" if exported.model != own else "motion vectors"
        raise ConfigError(
            f"start_from: {config.start_from} has other {what} than this run; take it from its config.yaml, or start at random with "
            "--start_from None"
        )
    for model in (learner.model, learner.averaged):
        model.load_weights(weights, str(config.start_from))
    return images_seen


def circumstances(data: Mixture, frozen: FrozenNetworks, vectors: MotionVectors) -> dict[str, Any]:
    """What a run depends on beside its settings: frozen networks, and data. A set that grew, lacked shards or excludes others has
    another order."""
    sets = {
        f"data {number + 1}" if number else "data": {
            "config_hash": dataset.manifest["config_hash"],
            "frames": len(dataset.frames),
            "excluded": config_hash(dataset.excluded.entry()),
        }
        for number, dataset in enumerate(data.datasets)
    }
    return sets | {"networks": frozen.weights_hashes() | vectors.weights_hashes()}


def save(config: ReconstructorRun, learner: Learner, images_seen: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint: `state`, network, average, adversary, optimisers. Data and draws need no state: they are keyed by images seen."""
    tensors, optimizer = pack_optimizer(learner.optimizer, "optimizer")
    if learner.adversary:
        packed, own = learner.adversary.pack()
        tensors, state = tensors | packed, state | own
    for name, model in (("model", learner.model), ("averaged", learner.averaged)):
        tensors |= {f"{name}/{key}": value for key, value in model.weights().items()}
    check_state(tensors, images_seen, config.out, ADVICE)
    return save_checkpoint(config.out, images_seen, tensors, state | {"optimizer": optimizer}, config, config.keep)


def restore(config: ReconstructorRun, learner: Learner, saved: Checkpoint, around: dict[str, Any]) -> int:
    """Put a checkpoint back. Raises ConfigError if the run was started with other settings or data. Returns the images seen."""
    refuse_changes(saved, _settings(to_dict(config)), _settings(saved.config), ())
    refuse_other_circumstances(saved, around)
    for name, model in (("model", learner.model), ("averaged", learner.averaged)):
        model.load_weights(part(saved.tensors, f"{name}/"), str(saved.folder))
    unpack_optimizer(learner.optimizer, "optimizer", saved.tensors, saved.state["optimizer"])
    if learner.adversary:
        learner.adversary.restore(saved)
    return saved.images_seen


def _settings(values: dict) -> dict:
    """What must be equal for a resume to be the same run."""
    kept = {key: value for key, value in values.items() if key not in FREE_TO_CHANGE}
    kept["batches"] = {key: value for key, value in values.get("batches", {}).items() if key not in FREE_IN_BATCHES}
    return kept


def export(config: ReconstructorRun, learner: Learner, images_seen: int) -> Path:
    """Write the averaged reconstructor for use, at the rays that it has come to, and below it its opponent, if any, for going on from
    there: RUN/export."""
    folder, vectors = config.out / "export", learner.vectors
    if learner.adversary:
        learner.adversary.export(folder, images_seen, config.export_half)
    model = dataclasses.replace(config.model, render_resolution=config.rays_at(images_seen))
    settings = ReconstructorExport(learner.head_model, str(vectors.folder) if vectors.folder else "", vectors.weights_hash, model)
    return export_model(folder, learner.averaged.weights(), settings, EXPORT_KIND, images_seen, half=config.export_half)
