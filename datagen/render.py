"""Rendering a recipe: planes and background once per identity, pose and deformation once per motion, views in batches.

Everything runs without gradients, and every random number comes from the recipe's own streams, so a frame depends on the recipe,
the generator and `RenderConfig` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datagen.labels import DEFAULT_LABELS, LABELS, Label, LabelName, SampleError, Seen, Values, members_of
from datagen.members import Scales
from datagen.recipes import IdentityRecipe, Kind, RecipeConfig, camera_distances
from genhead.generator import GenHead, GenHeadOutput
from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.labels import Motion, pack_label
from head3d.networks.resample import resize_antialias
from head3d.networks.stylegan2 import Precision
from head3d.pictures import to_uint8
from head3d.rendering import RaySampling
from head3d.run.config import PositiveInt
from head3d.run.seeding import torch_generator

_NOT_FINITE = "the generator's {} holds numbers that are not finite; look at the generator's checkpoint"


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How frames are rendered. Everything here changes bytes."""

    labels: tuple[LabelName, ...] = DEFAULT_LABELS  # what frames carry beside pictures and the 437 numbers
    points: PositiveInt = 4000  # plane points a view, published; for the label planepoints
    jitter: bool = True  # ray samples are jittered, as published; false renders at bin centres
    views_at_once: PositiveInt = 5  # views of a motion in one batch: memory against speed; other batches round differently
    motion_rich_side: PositiveInt = 128  # px, of pictures of motion-rich identities: the final picture, reduced with antialiasing
    motion_rich_labels: tuple[LabelName, ...] = ("opacity",)  # what frames of motion-rich identities carry in the place of `labels`
    precision: Precision = "float32"  # of the convolutions; bfloat16 is faster on processors that have it and about 50 dB from float32

    def __post_init__(self) -> None:
        for name in ("labels", "motion_rich_labels"):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name}: expected each label once, got {' '.join(chosen)}")
            object.__setattr__(self, name, tuple(label for label in LABELS if label in chosen))  # their order decides nothing

    def labels_of(self, kind: Kind) -> tuple[LabelName, ...]:
        """The labels that frames of a kind carry."""
        return self.motion_rich_labels if kind == "motion-rich" else self.labels


def dataset_scales(recipes: RecipeConfig, sampling: RaySampling) -> Scales:
    """Ranges of the 16-bit members: every depth that any camera of these recipes can see lies in them.

    Rays run from |z of the origin| - box/2 to + box/2; the last jittered sample may pass that by one step.
    """
    near, far = camera_distances(recipes)
    half, step = sampling.box_side / 2, sampling.box_side / (sampling.depth_samples - 1)
    return Scales(near=round(near - half, 6), far=round(far + half + step, 6), box_side=sampling.box_side)


class IdentityRenderer:
    """One identity's planes and background, made once; any motion and camera can be rendered from them."""

    @torch.no_grad()
    def __init__(self, genhead: GenHead, recipe: IdentityRecipe, precision: Precision = "float32") -> None:
        self.genhead, self.recipe, self.precision = genhead, recipe, precision
        self.device = next(genhead.parameters()).device
        z = recipe.latent(genhead.config.z_dim).to(self.device)
        self.shape = recipe.shape.to(self.device)
        ws = genhead.map(z, recipe.condition_camera.to(self.device), self.shape, recipe.truncation_psi)
        self.planes = genhead.planes(ws, precision=precision)  # [1, 2, 3, C, P, P]
        self.background = genhead.background(z, precision)  # [1, C, b, b]

    @torch.no_grad()
    def pose(self, motion: Motion) -> PosedHead:
        """Meshes and tables of this identity in one motion [1, ...]."""
        return self.genhead.pose(self.shape, motion.to(self.device))

    @torch.no_grad()
    def render(self, posed: PosedHead, cameras: Tensor, generator: torch.Generator | None = None) -> GenHeadOutput:
        """One pose from V cameras: labels [V, 25] -> a batch of V."""
        views = cameras.shape[0]
        return self.genhead.render(
            self.planes.expand(views, *self.planes.shape[1:]),
            self.background.expand(views, *self.background.shape[1:]),
            posed.expand_views(views),
            Camera.from_label(cameras.to(self.device)),
            generator=generator,
            precision=self.precision,
        )


@dataclasses.dataclass(frozen=True)
class RenderedIdentity:
    """Arrays by the names that readers ask for, pictures uint8; the pictures of all views are `rgb` [V, S, S, 3]."""

    shared: dict[str, np.ndarray]  # what all its pictures share
    frames: list[dict[str, Any]]  # one for each motion


def render_identity(genhead: GenHead, recipe: IdentityRecipe, config: RenderConfig) -> RenderedIdentity:
    """All frames of one identity with their labels. Raises SampleError if a frame cannot be used."""
    renderer = IdentityRenderer(genhead, recipe, config.precision)
    frames = [render_frame(renderer, config, index) for index in range(len(recipe.motions))]
    return RenderedIdentity(shared=render_shared(renderer, config), frames=frames)


@torch.no_grad()
def render_shared(renderer: IdentityRenderer, config: RenderConfig) -> dict[str, np.ndarray]:
    """The identity's own members. Raises SampleError if one cannot be used."""
    recipe, values = renderer.recipe, {}
    for label in _labels(config, recipe):
        if label.compute_shared is not None:
            values |= label.compute_shared(renderer)
    where = f"identity {recipe.identity} of seed {recipe.seed}"
    return _as_arrays(values, lambda problem: SampleError(f"{where}: {problem}", recipe.identity, 0))


def frame_facts(recipe: IdentityRecipe, motion: int) -> dict[str, Any]:
    """What a frame's JSON member says: with the settings in dataset.json, enough to render it again."""
    return {
        "identity": recipe.identity,
        "motion": motion,
        "kind": recipe.kind,
        "split": recipe.split,
        "seed": recipe.seed,
        "truncation_psi": recipe.truncation_psi,
        "condition_camera": recipe.condition_camera[0].tolist(),
        "draws": recipe.motions[motion].draws,
    }


@torch.no_grad()
def render_frame(renderer: IdentityRenderer, config: RenderConfig, index: int) -> dict[str, Any]:
    """One motion of an identity with all its views and labels. Raises SampleError if it cannot be used."""
    recipe, (motion, cameras, _) = renderer.recipe, renderer.recipe.motions[index]
    posed = renderer.pose(motion)
    rays = torch_generator(recipe.seed, "rays", recipe.identity, index, device=renderer.device) if config.jitter else None
    parts = []
    for first in range(0, cameras.shape[0], config.views_at_once):
        chunk = cameras[first : first + config.views_at_once]
        output = renderer.render(posed, chunk, rays)
        where = f"identity {recipe.identity} of seed {recipe.seed}, motion {index}, views {first} to {first + len(chunk) - 1}"
        camera = Camera.from_label(chunk.to(renderer.device))
        parts.append(_views(config, Seen(renderer, index, posed, camera, first, output, config.points, where)))
    varying = {member.asked for member in members_of(config.labels_of(recipe.kind)) if "V" in member.shape} | {"rgb"}
    frame = {name: np.concatenate([part[name] for part in parts]) if name in varying else value[0] for name, value in parts[0].items()}
    views = cameras.shape[0]
    frame["label"] = pack_label(
        Camera.from_label(cameras), recipe.shape.expand(views, -1), motion.repeat_interleave(views)
    ).numpy()  # fmt: skip
    frame["json"] = frame_facts(recipe, index)
    return frame


def _views(config: RenderConfig, seen: Seen) -> dict[str, np.ndarray]:
    """Arrays [V, ...] of some views of one motion."""
    image = seen.output.images.image
    if not torch.isfinite(image).all():
        raise seen.error(_NOT_FINITE.format("picture"))
    if seen.renderer.recipe.kind == "motion-rich":
        image = resize_antialias(image.clamp(-1, 1), config.motion_rich_side)
    values: Values = {"rgb": to_uint8(image)}
    for label in _labels(config, seen.renderer.recipe):
        if label.compute is not None:
            values |= label.compute(seen)
    return _as_arrays(values, seen.error)


def _labels(config: RenderConfig, recipe: IdentityRecipe) -> list[Label]:
    return [LABELS[name] for name in config.labels_of(recipe.kind)]


def _as_arrays(values: Values, error: Callable[[str], SampleError]) -> dict[str, np.ndarray]:
    """On the CPU; raises what `error` makes of a problem if a number is not finite."""
    arrays = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = (value.float() if value.is_floating_point() else value).cpu().numpy()
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise error(_NOT_FINITE.format(name))
        arrays[name] = value
    return arrays


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread and deterministic kernels while the block runs: the same frame is the same bytes in every worker."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only, fill = torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA has a few kernels without a deterministic form
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
