"""Compare our reconstructor with reference numbers of the published one (recipe.json and io.npz in one folder, head.npz above it).

The published super-resolution takes the buffer `w_avg` as its style, ours a style of ones by default; the comparison uses `w_avg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genhead.parity import Comparison, psnr_db, read_head, read_recording, relative_error
from genhead.published import GENHEAD_NAMES, read_recipe, rename
from head3d.cameras import Camera
from head3d.deformation import DeformationConfig
from head3d.labels import Motion
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig
from reconstructor.architectures.portrait4d import Portrait4D
from reconstructor.blocks import to_map, with_coordinates
from reconstructor.model import Reconstructor, ReconstructorConfig
from reconstructor.published import load_published

STAGE_LIMIT = 1e-3  # relative error up to which a stage counts as equal
RENDERER = ("decoder.", "superresolution.")


@torch.no_grad()
def compare(folder: Path) -> list[Comparison]:
    """Build the published network, fill it from the recipe, run the recorded inputs. Needs about 3 GB and a minute of one core."""
    recorded, recipe = read_recording(folder), read_recipe(folder)
    where = str(folder / "recipe.json")
    head = read_head(folder)
    with torch.device("meta"):  # weights are assigned, so nothing is drawn for them first
        architecture = Portrait4D(ReconstructorConfig().architecture)
    load_published(architecture.eval(), recipe, where)
    rows = [
        Comparison(name.removeprefix("stage_"), relative_error(ours, recorded(name)), STAGE_LIMIT, at_least=False)
        for name, ours in _stages(architecture, recorded)
    ]
    return rows + _compare_pictures(
        architecture, head, {name: recipe[name] for name in recipe if name.startswith((*RENDERER, "w_avg"))}, recorded, where
    )


def _stages(model: Portrait4D, recorded: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(reference name, our output at the reference's stride) of each stage."""
    image = recorded("image")
    always = torch.ones(len(image))
    features = model.encode_image(image)
    yield "stage_encoder_global_every2", features.global_features[:, :, ::2, ::2]
    yield "stage_encoder_detail_every8", features.detail[:, :, ::8, ::8]
    yield "stage_background_every16", model.background.logits(with_coordinates(image))[:, :, ::16, ::16]
    canonical = model.deexpress(features, recorded("motion_source"), always)
    reenacted = model.reenact_tokens(canonical, model.driving_motion(recorded("motion_driver")), always)
    planes = model.decode_planes(reenacted, features.detail)
    shuffled = F.pixel_shuffle(to_map(reenacted, model.grid), 2)
    yield "stage_encoder_canonical_every2", shuffled[:, :, ::2, ::2]
    yield "stage_generator_triplane_every8", planes.flatten(1, 2)[:, :, ::8, ::8]


def _compare_pictures(
    architecture: Portrait4D, head: torch.nn.Module, renderer: dict[str, Tensor], recorded: Callable[[str], Tensor], where: str
) -> list[Comparison]:
    """The rendered maps and the final picture."""
    with torch.device("meta"):
        model = Reconstructor(ReconstructorConfig(deformation=DeformationConfig(published=True)), head)
        superresolution = SuperResolution(SuperResolutionConfig(style="given"))
    weights = rename({name: value for name, value in renderer.items() if name.startswith(RENDERER)}, GENHEAD_NAMES, where)
    for name, network in (("decoder.", model.decoder), ("superresolution.", model.superresolution), ("superresolution.", superresolution)):
        network.load_state_dict({key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}, assign=True)
    model.architecture = architecture

    pose = recorded("pose")
    motion = Motion(recorded("expression"), pose[:, :3], pose[:, 3:], recorded("eye_pose"))
    always = torch.ones(len(pose))
    source = architecture.encode_source(recorded("image"), recorded("motion_source"), always)
    planes = architecture.planes(source, architecture.driving_motion(recorded("motion_driver")), always)
    images = model.render(planes, source.background, model.pose(recorded("shape"), motion), Camera.from_label(recorded("camera")))
    final = superresolution(images.raw, images.features, renderer["w_avg"].expand(len(pose), -1))
    rows = [
        Comparison(name, relative_error(ours, recorded(f"out_{key}")), 1e-2, at_least=False)
        for name, key, ours in (
            ("depth", "image_depth", images.depth),
            ("features", "image_feature", images.features),
            ("transmittance", "T_bg", 1 - images.opacity),
            ("raw image", "image", images.raw),
        )
    ]
    return rows + [Comparison("final image, dB", psnr_db(final, recorded("out_image_sr"), 2.0), 40.0, at_least=True)]
