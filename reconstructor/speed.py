"""How long the reconstructor takes, by stage and by what a user waits for, with random weights (they do not change the time).

once a source    global and detail encoder, background, de-expression
once a motion    re-enactment, plane decoder, tables of a turned neck; our motion encoder at its default width, where a picture drives
once a view      rays, the neck's part of them, super-resolution
a training step  forward, backward, update, the discriminator's own step
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datagen.render import RenderConfig
from head3d.adversarial import Ema
from head3d.cameras import frontal
from head3d.head_model import HeadModel
from head3d.labels import SHAPE_SIZE, Motion, pack_label
from head3d.run import distributed
from head3d.run.memory import peak_memory_mb
from head3d.run.runlog import progress
from head3d.run.seeding import torch_generator, weights_drawn_from
from reconstructor.adversary import Adversary
from reconstructor.architecture import Driver
from reconstructor.avatar import Avatar
from reconstructor.batches import Batch
from reconstructor.blocks import with_coordinates
from reconstructor.frozen_networks import FrozenNetworks, PerceptualNetwork, arcface_network
from reconstructor.learner import Learner, build_optimizer
from reconstructor.model import Reconstructor, ReconstructorConfig
from reconstructor.motion_vectors import MotionVectors
from reconstructor.perception import Perception, PerceptionConfig
from reconstructor.published_perception import ArcFace, Lpips
from reconstructor.settings import ReconstructorRun
from reconstructor.steps import Stopwatch, step

NECK_RAD = 0.3  # of the motion that is timed; an unturned neck skips its stage

IR_18 = (2, 2, 2, 2)  # blocks of the published ArcFace

Often = Literal["source", "motion", "view", "whole"]


class StageTime(NamedTuple):
    """One line of the table."""

    stage: str
    often: Often  # once a source, motion or view; "whole": what a user waits for, made of stages
    seconds: float  # median over the repeats
    gflop: float  # multiplications and additions of convolutions and matrix products


@torch.no_grad()
def measure_reconstructor(
    config: ReconstructorConfig, head: HeadModel, rays: tuple[int, ...] = (64, 128), repeats: int = 3
) -> list[StageTime]:
    """Seconds of each stage for one picture, then of a driven frame (the source cached), of another view of known planes for each
    number of `rays` a side, and of everything from the picture on."""
    draws = torch_generator(0, "reconstructor speed")
    with weights_drawn_from(draws):
        model = Reconstructor(config, head).eval().requires_grad_(False)
    network, side = model.architecture, config.architecture.image_resolution
    image = torch.rand(1, 3, side, side, generator=draws) * 2 - 1
    vector, always = torch.randn(1, config.architecture.motion_dim, generator=draws), torch.ones(1)
    rest, camera = Motion.neutral(1), frontal()
    turned = rest._replace(neck_pose=torch.tensor([[0.0, NECK_RAD, 0.0]]))
    avatar = Avatar.from_image(model, image, vector=vector)
    with weights_drawn_from(draws):
        perception = Perception(PerceptionConfig()).eval().requires_grad_(False)

    placed, features = with_coordinates(image), network.encode_image(image)
    tokens = network.deexpress(features, vector, always)
    driven = network.reenact_tokens(tokens, network.driving_motion(vector), always)
    straight, shape = avatar.pose(rest, vector), torch.zeros(1, SHAPE_SIZE)
    picture = avatar.view(straight, camera)

    def view(resolution: int) -> Callable[[], object]:
        return lambda: avatar.view(straight, camera, resolution=resolution)

    work: dict[tuple[str, Often], Callable[[], object]] = {
        ("global encoder", "source"): lambda: network.global_encoder(placed),
        ("detail encoder", "source"): lambda: network.detail_encoder(placed),
        ("background", "source"): lambda: network.background(placed),
        ("de-expression", "source"): lambda: network.deexpress(features, vector, always),
        ("re-enactment", "motion"): lambda: network.reenact_tokens(tokens, network.driving_motion(vector), always),
        ("plane decoder", "motion"): lambda: network.decode_planes(driven, features.detail),
        ("neck tables", "motion"): lambda: model.pose(shape, turned),
        ("motion encoder", "motion"): lambda: perception.motion(image),
        ("super-resolution", "view"): lambda: model.superresolution(picture.raw, picture.features),
        ("driven frame, source cached", "whole"): lambda: avatar.drive(rest, camera, vector=vector),
        ("driven frame, neck turned", "whole"): lambda: avatar.drive(turned, camera, vector=vector),
        **{(f"another view, {n} x {n} rays", "whole"): view(n) for n in rays},
        ("picture to frame", "whole"): lambda: model(image, vector, Driver(vector), always, shape, rest, camera),
    }
    rows = []
    for (stage, often), call in progress(work.items(), "bench: reconstructor"):
        gflop = _gflop(call)  # also warms up
        rows.append(StageTime(stage, often, statistics.median(_seconds(call) for _ in range(repeats)), gflop))
    return rows


class TrainingTime(NamedTuple):
    """One training step with one target, each part the median over the repeats."""

    when: str
    rays: int  # a side
    losses: tuple[str, ...]  # that count then
    forward_s: float
    backward_s: float
    update_s: float  # Adam and the averaged weights
    discriminator_s: float  # its own step, without the gradient penalty that one in `r1_every` has; 0 where it does not train
    peak_memory_mb: float  # of the process so far


def moments(config: ReconstructorRun) -> dict[str, int]:
    """Images seen at the steps that are timed: early, with every label; late, when the rays have grown and every network judges."""
    return {"early": 1, "late": config.growth.since + config.growth.images + 1}


def measure_training(config: ReconstructorRun, head: HeadModel, repeats: int = 2) -> list[TrainingTime]:
    """A step at each of `moments`, on made-up data, with networks of the published sizes and random weights: LPIPS, ArcFace (IR-18), the
    discriminator, and our motion encoder where motion is read off pictures. Neither has density smoothness nor the discriminator's
    gradient penalty, which one step in 16 has."""
    one = dataclasses.replace(config.batches, size=1, static_share=0.0)
    alone = dataclasses.replace(config.adversary.discriminator, group_size=1)
    config = dataclasses.replace(
        config, batches=one, micro_batch=1, adversary=dataclasses.replace(config.adversary, discriminator=alone, warm_start=False)
    )
    draws, process = torch_generator(0, "training speed"), distributed.Process(0, 1, torch.device("cpu"), True)
    with weights_drawn_from(draws):
        model = Reconstructor(config.model, head)
        lpips, arcface, perception = (
            network.eval().requires_grad_(False) for network in (Lpips("vgg"), ArcFace(IR_18), Perception(PerceptionConfig()))
        )
    averaged = copy.deepcopy(model, {id(head): head}).requires_grad_(False)
    kind = config.model.architecture.motion
    learner = Learner(
        model=model,
        averaged=averaged,
        ema=Ema(averaged, config.ema_images, config.ema_ramp),
        optimizer=build_optimizer(config, model),
        frozen=FrozenNetworks(PerceptualNetwork("lpips", lpips, ""), arcface_network(arcface, head, "")),
        vectors=MotionVectors(kind, perception if kind == "image" else None),
        adversary=Adversary(config.adversary, config.seed, Path()),
        head_model="",
    )
    batch, rows = made_up_batch(config.model, draws), []
    step(config, learner, batch, 1, process)  # warms up and makes Adam's state
    for when, images_seen in moments(config).items():
        laps = []
        for _ in range(repeats):
            watch = Stopwatch(process.device)
            scalars = step(config, learner, batch, images_seen, process, watch)
            laps.append(watch.take())
        seconds = (statistics.median(lap.get(name, 0.0) for lap in laps) for name in ("forward", "backward", "update", "discriminator"))
        losses = tuple(name.removeprefix("loss/") for name in scalars if name.startswith("loss/") and name != "loss/total")
        rows.append(TrainingTime(when, config.rays_at(images_seen), losses, *seconds, peak_memory_mb()))
    return rows


def made_up_batch(config: ReconstructorConfig, draws: torch.Generator) -> Batch:
    """One sample with every label, drawn at random, as large as those of shards for `config`."""
    side, rays, architecture = config.architecture.image_resolution, config.render_resolution, config.architecture

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, *shape, generator=draws)

    return Batch(
        source_image=uniform(3, side, side) * 2 - 1,
        source_motion=uniform(architecture.motion_dim),
        driving_motion=uniform(architecture.motion_dim),
        motion_scale=torch.ones(1),
        label=pack_label(frontal(), torch.zeros(1, SHAPE_SIZE), Motion.neutral(1)),
        identity=torch.zeros(1, dtype=torch.int64),
        image=uniform(3, side, side) * 2 - 1,
        driver_image=uniform(3, side, side) * 2 - 1,
        opacity=uniform(1, rays, rays),
        depth=uniform(1, rays, rays) + 3.7,
        foreground=uniform(config.feature_channels, rays, rays),
        background=uniform(3, rays, rays) * 2 - 1,
        background_features=uniform(config.feature_channels, rays, rays) * 2 - 1,
        points=(uniform(RenderConfig().points, 3) - 0.5) * config.sampling.box_side,
        point_features=uniform(RenderConfig().points, architecture.plane_channels),
    )


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _gflop(work: Callable[[], object]) -> float:
    def of_linear(features: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        return 2 * features.numel() * weight[0]

    mapping = {torch.ops.mkldnn._linear_pointwise: of_linear} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops() / 1e9
