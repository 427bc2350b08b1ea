"""Train GenHead on portraits: one loop, images seen as the clock, the same command resumes.

portraits (LMDB) -> real pictures, labels
Game.step        -> one update of the generator and one of the discriminator
every so often   -> scalars, pictures, checkpoint; at the end the averaged generator in RUN/export
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genhead.evaluate import GeneratorMeasures, evaluate_generator
from genhead.features import chosen_features
from genhead.game import Game, GameConfig
from genhead.generator import EXPORT_KIND, GenHeadConfig, GenHeadExport
from genhead.losses import RegularizerConfig
from genhead.pool import PortraitPool, PortraitSampling
from genhead.portraits import PortraitSet
from genhead.samples import encoded_pictures, sample_pictures
from head3d.head_model import load_head_model
from head3d.networks.discriminator import DiscriminatorConfig, deviation_group
from head3d.rasterize import Backend
from head3d.run import distributed
from head3d.run.checkpoint import (
    Checkpoint,
    export_model,
    exported_images_seen,
    fill_weights,
    latest_checkpoint,
    load_exported,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from head3d.run.config import NonNegativeInt, PositiveInt, config_hash, to_dict
from head3d.run.errors import ConfigError
from head3d.run.seeding import torch_generator
from head3d.run.training import check_state, is_finished, open_run, part, process_group, refuse_changes, refuse_other_circumstances

FREE_TO_CHANGE = (
    "out",
    "portraits",
    "rasterizer",
    "export_half",
    "total_images",
    "log_every",
    "pictures_every",
    "evaluate_every",
    "measures",
    "checkpoint_every",
    "keep",
    "threads",
)  # on resume
DISCRIMINATOR_KIND, DISCRIMINATOR_FOLDER = "genhead-discriminator", "discriminator"
ENCODER_KIND, ENCODER_FOLDER = "genhead-encoder", "encoder"
ADVICE = "Lower the learning rates or raise game.r1.image and call the same command again"


@dataclasses.dataclass(frozen=True)
class DiscriminatorExport:
    """What config.yaml beside an exported discriminator holds."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # the network


@dataclasses.dataclass(frozen=True)
class EncoderExport:
    """What config.yaml beside an exported encoder of portraits holds."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # whose residual blocks it has
    z_dim: PositiveInt = 512  # latent size of the generator


@dataclasses.dataclass(frozen=True)
class GenHeadRun:
    """Train the head generator. Defaults are the published run at 512 x 512."""

    out: Path = Path("runs/genhead")  # run folder: checkpoints, logs, pictures, export
    portraits: Path = Path("runs/portraits")  # LMDB of portraits (made by the portraits command)
    head_model: str = "procedural"  # path of a FLAME-format file, or "procedural"
    rasterizer: Backend = "torch"  # what draws masks and maps: plain torch, or pytorch3d or warp where installed
    start_from: Path | None = None  # exported generator to go on from, with its discriminator and clock; None = random weights
    export_half: bool = False  # store exported weights as float16
    missing_matte: Literal["refuse", "opaque"] = "refuse"  # portraits without a matte: stop, or take them as opaque everywhere
    seed: NonNegativeInt = 0  # of weights and every draw
    total_images: PositiveInt = 25_000_000  # real pictures shown to the discriminator before the run ends
    log_every: PositiveInt = 4_000  # images between lines of metrics, each the mean since the one before
    pictures_every: PositiveInt = 200_000  # images between picture grids
    evaluate_every: NonNegativeInt = 0  # images between measurements of the average (the first process alone); 0 turns them off
    checkpoint_every: PositiveInt = 200_000  # images between checkpoints
    keep: PositiveInt = 3  # newest checkpoints kept
    threads: NonNegativeInt = 0  # CPU threads of torch; 0 leaves its default
    measures: GeneratorMeasures = GeneratorMeasures()  # how much each measurement takes
    sampling: PortraitSampling = PortraitSampling()  # how often which portrait is shown, mirror images
    game: GameConfig = GameConfig()  # batch, optimisers, schedules
    model: GenHeadConfig = GenHeadConfig()  # the generator
    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # the discriminator
    regularizers: RegularizerConfig = RegularizerConfig()  # the generator's extra losses


def train(config: GenHeadRun) -> int:
    """Train until total_images, a stop signal or divergence. Returns the exit status: 0 unless something failed.

    A finished run is not repeated; a started one goes on from its newest checkpoint, bit for bit on one machine.
    """
    with process_group(config.threads) as process:
        return _train(config, process)


def _train(config: GenHeadRun, process: distributed.Process) -> int:
    game, portraits = build(config, process)
    pool = PortraitPool(portraits, config.sampling, game.generator.head_model)
    around = circumstances(portraits)
    saved = latest_checkpoint(config.out)
    images_seen = restore(config, game, saved, around) if saved else begin(config, game)
    if is_finished(config, images_seen, process):
        return 0
    if process.is_main and pool.mirror_error:
        print(f"{config.out}: {pool.mirror_error}")
    size = config.game.batch
    features = chosen_features(config.measures.inception, process.device) if config.evaluate_every and process.is_main else None
    with open_run("genhead", config, size, ADVICE, saved, images_seen, process) as run:
        while run.goes_on:
            chosen = torch.randint(len(pool), (size,), generator=torch_generator(config.seed, "portraits", run.images_seen))
            scalars = game.step(pool.labels, pool.batch(chosen[game.parts.flatten()]), run.images_seen, run.images_seen // size)
            run.advance(distributed.mean_scalars(scalars, process.device))  # the one time that the step waits for the device
            if run.due(config.log_every):
                means = run.means.take()
                run.log.scalars(run.images_seen, means)
                names = {"D(real)": "discriminator/real_logits", "D(fake)": "discriminator/fake_logits", "rays": "autoencoder/rays"}
                run.bar.set_postfix_str(", ".join(f"{shown}={means[name]:.2f}" for shown, name in names.items() if name in means))
            if process.is_main and run.due(config.pictures_every):
                for name, picture in sample_pictures(game.averaged, pool.labels, config.seed).items():
                    run.log.image(run.images_seen, name, picture)
                if game.encoder is not None:
                    run.log.image(run.images_seen, "portraits", encoded_pictures(game.averaged, game.encoder, pool))
            if features and run.due(config.evaluate_every):
                kept = config.out / "evaluation"  # the portraits' statistics
                arguments = (portraits, features, config.measures, config.seed)
                measured = evaluate_generator(game.averaged, *arguments, cache=kept, show_progress=False)
                run.log.scalars(run.images_seen, measured.scalars())
                run.log.image(run.images_seen, "evaluation", measured.sheet)
            if process.is_main and (run.stopping or run.due(config.checkpoint_every)):
                save(config, game, run.images_seen, {"circumstances": around} | run.state())
    if process.is_main and not run.stopping:
        export(config, game, run.images_seen)
    return 0


def build(config: GenHeadRun, process: distributed.Process) -> tuple[Game, PortraitSet]:
    """The game and the data. Raises ConfigError where settings contradict each other or the portraits."""
    portraits = PortraitSet(config.portraits)
    labelled_for = portraits.metadata.get("head_model", config.head_model)
    if labelled_for != config.head_model:
        raise ConfigError(
            f"head_model is {config.head_model!r} but the labels of {config.portraits} belong to {labelled_for!r}: shape and expression "
            "numbers mean something only with their own head model; change the setting or make other portraits"
        )
    model, discriminator = config.model, config.discriminator
    if portraits.resolution != model.image_resolution:
        raise ConfigError(
            f"model.image_resolution is {model.image_resolution} but {config.portraits} holds {portraits.resolution} px pictures; "
            "make portraits of that resolution or change the setting"
        )
    if discriminator.resolution != model.image_resolution or model.superresolution.output_resolution != model.image_resolution:
        raise ConfigError(
            f"model.image_resolution {model.image_resolution}, discriminator.resolution {discriminator.resolution} and the "
            f"super-resolution's output {model.superresolution.output_resolution} must be equal; change the one that differs"
        )
    parts, group = process.world_size * config.game.accumulation, deviation_group(config.game.batch, discriminator.group_size)
    if config.game.batch % (parts * group):
        raise ConfigError(
            f"game.batch {config.game.batch} must be a multiple of processes x accumulation x the discriminator's group, "
            f"{process.world_size} x {config.game.accumulation} x {group} (the largest divisor of the batch up to discriminator.group_size "
            f"{discriminator.group_size}); change one of them"
        )
    if config.missing_matte == "refuse" and not portraits.has_matte().all():
        count = int((~portraits.has_matte()).sum())
        raise ConfigError(
            f"{config.portraits}: {count} of {len(portraits)} portraits have no matte, so the discriminator would learn that pictures are "
            "opaque everywhere; add NAME_matte.png files and import again, or accept that with --missing_matte opaque"
        )
    head = load_head_model(config.head_model, config.rasterizer)
    game = Game(config.game, model, discriminator, config.regularizers, head, config.seed, process)
    return game, portraits


def begin(config: GenHeadRun, game: Game) -> int:
    """The first step's weights, from `start_from` if it is given. Returns the images seen by them; the schedules go on from there.

    Raises ConfigError if the exported networks are of other settings, AssetError if a file is missing or damaged.
    """
    if config.start_from is None:
        return 0
    model, opponent = config.model, config.discriminator
    start, players = config.start_from, game.networks()
    # what, where, how it was exported, the settings that must be equal, the networks that it fills
    exports = [
        ("model", start, GenHeadExport, EXPORT_KIND, {"model": model}, ("generator", "averaged")),
        (
            "discriminator",
            start / DISCRIMINATOR_FOLDER,
            DiscriminatorExport,
            DISCRIMINATOR_KIND,
            {"discriminator": opponent},
            ("discriminator",),
        ),
    ]
    if game.encoder is not None and (start / ENCODER_FOLDER).is_dir():  # a generator trained without one has none: it begins at random
        equal = {"discriminator": opponent, "z_dim": model.z_dim}
        exports.append(("encoder", start / ENCODER_FOLDER, EncoderExport, ENCODER_KIND, equal, ("encoder",)))
    for name, folder, export_class, kind, equal, filled in exports:
        weights, exported = load_exported(folder, export_class, kind)
        if any(getattr(exported, setting) != own for setting, own in equal.items()):
            raise ConfigError(
                f"start_from: {folder} has other settings of {name} than this run; take them from its config.yaml, or start at random with "
                "--start_from None"
            )
        for player in filled:
            fill_weights(players[player], weights, str(folder))
    return exported_images_seen(config.start_from)


def circumstances(portraits: PortraitSet) -> dict[str, Any]:
    """What a run depends on besides its settings: the record of portraits. The number of processes may change: it only rounds otherwise."""
    return {"portraits": config_hash(portraits.metadata)}


def save(config: GenHeadRun, game: Game, images_seen: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint: `state`, both networks, the average, both optimisers. Draws need no state (they are keyed by images seen).

    Raises Divergence, and writes nothing, if one of them is not finite.
    """
    tensors: dict[str, Tensor] = {}
    state = dict(state)
    for name, network in game.networks().items():
        tensors |= {f"{name}/{key}": value for key, value in network.state_dict().items()}
    for name, optimizer in game.optimizers.items():
        packed, state[name] = pack_optimizer(optimizer, f"optimizer_{name}")
        tensors |= packed
    check_state(tensors, images_seen, config.out, ADVICE)
    return save_checkpoint(config.out, images_seen, tensors, state, config, config.keep)


def restore(config: GenHeadRun, game: Game, saved: Checkpoint, around: dict[str, Any]) -> int:
    """Put a checkpoint back. Raises ConfigError if the run was started with other settings or data. Returns the images seen."""
    refuse_changes(saved, to_dict(config), saved.config, FREE_TO_CHANGE)
    refuse_other_circumstances(saved, around)
    for name, network in game.networks().items():
        fill_weights(network, part(saved.tensors, f"{name}/"), str(saved.folder))
    for name, optimizer in game.optimizers.items():
        unpack_optimizer(optimizer, f"optimizer_{name}", saved.tensors, saved.state[name])
    return saved.images_seen


def export(config: GenHeadRun, game: Game, images_seen: int) -> Path:
    """Write the averaged generator for use, and below it its opponent and its encoder, if any, for going on from there: RUN/export."""
    folder = config.out / "export"
    opponent = DiscriminatorExport(discriminator=config.discriminator)
    weights = game.discriminator.state_dict()
    export_model(folder / DISCRIMINATOR_FOLDER, weights, opponent, DISCRIMINATOR_KIND, images_seen, half=config.export_half)
    if game.encoder is not None:
        about = EncoderExport(discriminator=config.discriminator, z_dim=config.model.z_dim)
        weights = game.encoder.state_dict()
        export_model(folder / ENCODER_FOLDER, weights, about, ENCODER_KIND, images_seen, half=config.export_half)
    settings = GenHeadExport(head_model=config.head_model, head_model_hash=game.averaged.head_model.content_hash, model=config.model)
    return export_model(folder, game.averaged.weights(), settings, EXPORT_KIND, images_seen, half=config.export_half)
