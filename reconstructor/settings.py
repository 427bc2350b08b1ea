"""The settings of a training run of the reconstructor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from datagen.cache import CacheConfig
from head3d.networks.stylegan2 import Precision
from head3d.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from head3d.run.errors import ConfigError
from reconstructor.adversary import AdversaryConfig
from reconstructor.frozen_networks import NetworkFiles
from reconstructor.losses import LossConfig
from reconstructor.model import ReconstructorConfig
from reconstructor.order import BatchConfig
from reconstructor.stages import StageConfig, check_stages, largest_weights, stage_at, stage_number, with_weights

FREE_TO_CHANGE = (
    "out",
    "shards",
    "cache",
    "generator",
    "perception",
    "lpips",
    "arcface",
    "total_images",
    "log_every",
    "pictures_every",
    "checkpoint_every",
    "keep",
    "threads",
    "recompute_activations",
    "compile",
)  # on resume
FREE_IN_BATCHES = ("threads", "prefetch")
ADVICE = "Lower learning_rate and start again from there in another --out, or look for damaged labels with the verify command"


GROWTH_STEP = 8  # rays; a picture's side grows by this many at once


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """Rays a picture side over a run: model.render_resolution at first, then linearly more (portrait4d, section 6.8)."""

    resolution: PositiveInt | None = 128  # rays a side at the end; None = model.render_resolution throughout
    since: NonNegativeInt = 1_000_000  # images seen from which they grow
    images: PositiveInt = 1_000_000  # that it takes


@dataclasses.dataclass(frozen=True)
class ReconstructorRun:
    """Train the reconstructor. Defaults are the published run at 512 x 512."""

    out: Path = Path("runs/reconstructor")  # run folder: checkpoints, logs, pictures, export
    shards: str | tuple[str, ...] = "runs/datagen"  # data set, a folder or a URL (made by the datagen command); or several, see batches
    generator: Path | None = None  # exported generator for the warm start; None = the one that the shards record
    head_model: str | None = None  # path of a FLAME-format file, or "procedural"; None = the one that the shards record
    perception: Path | None = None  # exported perception network with role losses: perceptual and identity terms, image motion
    lpips: tuple[Path, ...] = ()  # LPIPS for the perceptual term (published): the authors' vgg.pth and torchvision's VGG-16, or one file
    arcface: Path | None = None  # ArcFace for the identity term (published): a state dict of insightface's IR-ResNet
    missing_networks: Literal["refuse", "drop"] = "refuse"  # perceptual or identity term, and none of those for it: stop, or do without
    warm_start: bool = True  # decoder and super-resolution begin as the generator's; False: at random (published default)
    start_from: Path | None = None  # exported reconstructor to go on from, with discriminator and clock; None = random weights, warm start
    export_half: bool = False  # store exported weights as float16
    seed: NonNegativeInt = 0  # of weights, order and every draw
    total_images: PositiveInt = 15_000_000  # targets shown before the run ends
    learning_rate: PositiveFloat = 1e-4  # Adam
    betas: tuple[float, float] = (0.9, 0.999)  # Adam
    epsilon: PositiveFloat = 1e-5  # Adam
    ema_images: PositiveFloat = 10_000.0  # half-life of the averaged weights, images
    ema_ramp: NonNegativeFloat = 0.05  # half-life is at most this share of the images seen; 0 = no ramp
    micro_batch: PositiveInt = 4  # samples a process takes through the network at once; gradients are averaged over the batch
    precision: Precision = "float32"  # bfloat16: products of architecture and super-resolution; weights, rays and losses stay float32
    recompute_activations: bool = False  # forget what lies inside blocks and compute it again for the gradient: less memory, more work
    compile: bool = False  # run the network's parts through torch.compile (it needs a C++ compiler, on a GPU Triton)
    log_every: PositiveInt = 3_200  # images between lines of metrics, each the mean since the one before
    pictures_every: PositiveInt = 100_000  # images between picture grids
    checkpoint_every: PositiveInt = 100_000  # images between checkpoints
    keep: PositiveInt = 3  # newest checkpoints kept
    threads: NonNegativeInt = 0  # CPU threads of torch; 0 leaves its default
    cache: CacheConfig = CacheConfig()  # where copies of shards behind a URL are kept
    batches: BatchConfig = BatchConfig()  # what a batch holds and how it is read
    losses: LossConfig = LossConfig()  # weights and ranges of the loss terms
    adversary: AdversaryConfig = AdversaryConfig()  # the discriminator of the adversarial term
    stages: tuple[StageConfig, ...] = ()  # one after the other; none = the architecture's own (Portrait4D: everything trains, to the end)
    growth: GrowthConfig = GrowthConfig()  # of the rays
    model: ReconstructorConfig = ReconstructorConfig()  # the network

    @property
    def has_adversary(self) -> bool:
        """Whether the adversarial term ever counts."""
        term = self.losses_of_all_stages().adversarial
        return term.weight > 0 and term.since < self.total_images

    def network_files(self) -> NetworkFiles:
        return NetworkFiles(self.perception, self.lpips, self.arcface)

    def __post_init__(self) -> None:
        check_stages(self.stages, self.losses)
        start, end = self.model.render_resolution, self.growth.resolution
        if end is not None and end < start:
            raise ConfigError(
                f"growth.resolution is {end} rays, fewer than the {start} of model.render_resolution, where it starts; "
                "raise it, or null for no growth"
            )

    def rays_at(self, images_seen: int) -> int:
        """Rays a picture side in the step that starts at `images_seen`."""
        start, end = self.model.render_resolution, self.growth.resolution or self.model.render_resolution
        share = min(max((images_seen - self.growth.since) / self.growth.images, 0.0), 1.0)
        return end if share == 1 else start + int((end - start) * share) // GROWTH_STEP * GROWTH_STEP

    def all_stages(self) -> tuple[StageConfig, ...]:
        """The run's, or where it gives none the architecture's."""
        return self.stages or self.model.architecture.stages

    def losses_at(self, images_seen: int) -> LossConfig:
        """The losses of the step that starts at `images_seen`, by its stage."""
        return with_weights(self.losses, stage_at(self.all_stages(), images_seen).losses)

    def losses_of_all_stages(self) -> LossConfig:
        """Each term with its largest weight in any stage: what labels and networks the run needs."""
        return largest_weights(self.losses, self.all_stages())

    def schedule_at(self, images_seen: int) -> dict[str, float]:
        """For the log: number of the stage (from 0) and rays a side in the step that starts at `images_seen`."""
        return {"schedule/stage": stage_number(self.all_stages(), images_seen), "schedule/rays": self.rays_at(images_seen)}
