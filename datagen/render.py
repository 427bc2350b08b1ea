"""Rendering a recipe: planes and background once per identity, pose and deformation once per motion, views in batches.

Everything runs without gradients, and every random number comes from the recipe's own streams, so a frame depends on the recipe,
the generator and `RenderConfig` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datagen.members import Scales
from datagen.recipes import IdentityRecipe, RecipeConfig, camera_distances
from genhead.generator import GenHead, GenHeadOutput
from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.labels import Motion, pack_label
from head3d.pictures import to_uint8
from head3d.rendering import HeadImages, RaySampling
from head3d.run.config import NonNegativeInt, PositiveInt
from head3d.run.errors import DataError
from head3d.run.seeding import torch_generator


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How frames are rendered. Everything here changes bytes."""

    points: NonNegativeInt = 4000  # plane points a view, published; 0 leaves them out
    jitter: bool = True  # ray samples are jittered, as published; false renders at bin centres
    views_at_once: PositiveInt = 5  # views of a motion in one batch: memory against speed; other batches round differently


class SampleError(DataError):
    """The generator made a frame that cannot be used, for example one with numbers that are not finite.

    `identity` and `motion` say which; they travel with the error from one process to another.
    """

    def __init__(self, message: str, identity: int, motion: int) -> None:
        super().__init__(message)
        self.identity, self.motion = identity, motion

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), (str(self), self.identity, self.motion)


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
    def __init__(self, genhead: GenHead, recipe: IdentityRecipe) -> None:
        self.genhead, self.recipe = genhead, recipe
        self.device = next(genhead.parameters()).device
        z = recipe.latent(genhead.config.z_dim).to(self.device)
        self.shape = recipe.shape.to(self.device)
        ws = genhead.map(z, recipe.condition_camera.to(self.device), self.shape, recipe.truncation_psi)
        self.planes = genhead.planes(ws)  # [1, 2, 3, C, P, P]
        self.background = genhead.background(z)  # [1, C, b, b]

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
        )


@dataclasses.dataclass(frozen=True)
class RenderedIdentity:
    """Arrays by the names of the member table; maps are floats, pictures uint8."""

    background: np.ndarray  # [C, R, R] features in [0, 1]
    frames: list[dict[str, Any]]  # one for each motion


def render_identity(genhead: GenHead, recipe: IdentityRecipe, config: RenderConfig) -> RenderedIdentity:
    """All frames of one identity with their labels. Raises SampleError if a frame cannot be used."""
    renderer = IdentityRenderer(genhead, recipe)
    frames = [render_frame(renderer, config, index) for index in range(len(recipe.motions))]
    return RenderedIdentity(background=frames[0].pop("background_features"), frames=frames)


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
    """One motion of an identity with all its views; beside the frame's members, `background_features` [C, R, R] of the identity."""
    recipe, (motion, cameras, _) = renderer.recipe, renderer.recipe.motions[index]
    posed = renderer.pose(motion)
    rays = torch_generator(recipe.seed, "rays", recipe.identity, index, device=renderer.device) if config.jitter else None
    parts = []
    for first in range(0, cameras.shape[0], config.views_at_once):
        chunk = cameras[first : first + config.views_at_once]
        parts.append(_render_views(renderer, config, posed, chunk, rays, index, first))
    frame = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    views = cameras.shape[0]
    frame["label"] = pack_label(
        Camera.from_label(cameras), recipe.shape.expand(views, -1), motion.repeat_interleave(views)
    ).numpy()  # fmt: skip
    frame["background"] = frame["background"][0]  # the background does not depend on the camera
    frame["background_features"] = frame["background_features"][0]
    frame["json"] = frame_facts(recipe, index)
    return frame


def _render_views(
    renderer: IdentityRenderer,
    config: RenderConfig,
    posed: PosedHead,
    cameras: Tensor,
    rays: torch.Generator | None,
    motion: int,
    first: int,
) -> dict[str, np.ndarray]:
    """Arrays [V, ...] of some views of one motion; `first` is the number of the first."""
    output = renderer.render(posed, cameras, rays)
    images = output.images
    arrays = {
        "image": images.image,
        "opacity": images.opacity[:, 0],
        "depth": images.depth[:, 0],
        "foreground": images.foreground,
        "background_features": (images.background + 1) / 2,
    }
    recipe = renderer.recipe
    where = f"identity {recipe.identity} of seed {recipe.seed}, motion {motion}, views {first} to {first + len(cameras) - 1}"
    for name, tensor in arrays.items():
        if not torch.isfinite(tensor).all():
            message = f"{where}: the generator's {name} holds numbers that are not finite; look at the generator's checkpoint"
            raise SampleError(message, recipe.identity, motion)
    result = {name: tensor.float().cpu().numpy() for name, tensor in arrays.items() if name != "image"}
    result["rgb"] = to_uint8(images.image)
    result["background"] = to_uint8(images.background[:, :3])
    result["parts"] = _parts(images)
    result["points"], result["point_features"] = _plane_points(renderer, config, posed, output, motion, first, where)
    return result


def _parts(images: HeadImages) -> np.ndarray:
    """Part numbers [V, R, R]: 0 none, 1 skin, 2 eye, 3 mouth, where at least half of a pixel is covered."""
    parts = (images.head_mask >= 0.5).to(torch.uint8)
    parts[images.eye_mask >= 0.5] = 2
    parts[images.mouth_mask >= 0.5] = 3
    return parts[:, 0].cpu().numpy()


def _plane_points(
    renderer: IdentityRenderer, config: RenderConfig, posed: PosedHead, output: GenHeadOutput, motion: int, first: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Points [V, N, 3] on the coarse pass and the head planes' features there [V, N, C] (section 5, "Tri-plane samples").

    As published, points whose part weight (eyes, mouth) is above zero are left out. Unlike there, so are points outside the box:
    tri-planes read zero there. Points are rounded to the 16-bit steps in which they are stored before the features are read.
    """
    views, box = output.images.image.shape[0], renderer.genhead.config.sampling.box_side
    coarse = output.passes[0]
    points = coarse.points.reshape(views, -1, 3)
    allowed = ((coarse.part_weight.reshape(views, -1) == 0) & (points.abs() <= box / 2).all(-1)).cpu().numpy()
    chosen = np.empty((views, config.points), np.int64)
    for view in range(views):
        places = np.flatnonzero(allowed[view])
        if len(places) < config.points:
            raise SampleError(
                f"{where}: only {len(places)} ray samples are in the box and outside eyes and mouth, {config.points} are asked for; "
                "set --render.points lower",
                renderer.recipe.identity,
                motion,
            )
        chosen[view] = renderer.recipe.stream("points", motion, first + view).choice(places, config.points, replace=False)
    step = box / 65535
    index = torch.from_numpy(chosen).to(points.device)[..., None].expand(-1, -1, 3)
    points = ((points.gather(1, index) + box / 2) / step).round().clamp(0, 65535) * step - box / 2
    repeated = posed.expand_views(views)
    without_neck = renderer.genhead.deformation.remove_neck(points, repeated)
    planes = renderer.planes.expand(views, *renderer.planes.shape[1:])
    features = renderer.genhead.sample_head_features(planes, without_neck, repeated)
    return points.float().cpu().numpy(), features.float().cpu().numpy()


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
