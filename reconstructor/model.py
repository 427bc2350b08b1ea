"""The reconstructor: one picture and a motion -> tri-planes of that head in that motion, rendered at any camera.

    source picture, its motion --architecture.encode_source--> SourceCode                   once per source
    driving motion or picture --architecture.encode_driver--> code of the driver            once per driven frame
    both codes, switch --architecture.planes--> planes                                      once per driven frame
    shape, driving motion --neck stage--> PosedHead (None while the neck is at rest)        once per driven frame
    planes, PosedHead, camera --rays, decoder--> features, depth, opacity                   once per view
    features + transmittance * background --superresolution--> picture

The planes hold the head in its own shape and driven expression with the neck at rest; the neck stage brings posed points there
(portrait4d, sections 2 and 6.6; arXiv:2311.18729).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from head3d.cameras import Camera, camera_rays, ray_bounds
from head3d.deformation import Deformation, DeformationConfig, PosedHead
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import Motion
from head3d.networks.stylegan2 import Precision
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig
from head3d.rendering import FieldSamples, HeadImages, RaySampling, compose_pictures, render_rays
from head3d.run.checkpoint import fill_weights, load_exported
from head3d.run.config import PositiveInt
from head3d.run.errors import ConfigError
from head3d.run.seeding import Draws
from head3d.triplane import Decoder, sample_planes
from reconstructor.architecture import Architecture, Driver, SourceCode
from reconstructor.architectures.portrait4d import Portrait4D, Portrait4DConfig

EXPORT_KIND = "reconstructor"


@dataclasses.dataclass(frozen=True)
class ReconstructorConfig:
    """Architecture and renderer. Defaults are the published run."""

    architecture: Portrait4DConfig = Portrait4DConfig()  # encoders, motion blocks, plane decoder, background
    decoder_hidden: PositiveInt = 64  # hidden units between plane features and colour or density
    feature_channels: PositiveInt = 32  # rendered features, the first three are RGB; as the generator's
    render_resolution: PositiveInt = 64  # rays per picture side, R
    sampling: RaySampling = RaySampling()  # ray samples
    deformation: DeformationConfig = DeformationConfig()  # neck stage
    superresolution: SuperResolutionConfig = SuperResolutionConfig()  # R to the final picture; as the generator's

    def __post_init__(self) -> None:
        for name, channels in (
            ("architecture.background.channels", self.architecture.background_channels),
            ("superresolution.feature_channels", self.superresolution.feature_channels),
        ):
            if channels != self.feature_channels:
                raise ConfigError(f"{name}: expected feature_channels, {self.feature_channels}, got {channels}; set both to one number")


class Reconstruction(NamedTuple):
    """What `Reconstructor.forward` returns."""

    images: HeadImages
    planes: Tensor  # [B, 3, C, P, P] driven
    source: SourceCode  # of the architecture
    driver: Any  # of the architecture


class Reconstructor(nn.Module):
    """Architecture, decoder, neck stage, renderer and super-resolution, called by name in `forward`."""

    def __init__(self, config: ReconstructorConfig, head: HeadModel) -> None:
        super().__init__()
        self.config = config
        self.head_model = head
        self.deformation = Deformation(head, config.deformation)
        self.architecture: Architecture = Portrait4D(config.architecture)
        self.decoder = Decoder(config.architecture.plane_channels, config.decoder_hidden, config.feature_channels)
        self.superresolution = SuperResolution(config.superresolution)

    def weights(self) -> dict[str, Tensor]:
        """The learned state; the head model, which the configuration names, is not in it."""
        return self.state_dict()

    def load_weights(self, weights: dict[str, Tensor], where: str) -> None:
        """Fill the learned state. Raises AssetError naming `where` and the keys or shapes that do not fit."""
        fill_weights(self, weights, where)

    def pose(self, shape: Tensor, motion: Motion) -> PosedHead | None:
        """What the neck stage needs for shape [B, 300] and motion; None if every neck is at rest (the stage is then the identity)."""
        if not bool(motion.neck_pose.any()):
            return None
        return self.deformation.prepare(shape, motion)

    def _to_planes(self, points: Tensor, posed: PosedHead | None) -> Tensor:
        """Posed points [B, N, 3] in the space of the planes; no gradient into the points."""
        with torch.no_grad():
            return points if posed is None else self.deformation.remove_neck(points, posed)

    def point_features(self, planes: Tensor, points: Tensor, posed: PosedHead | None = None) -> Tensor:
        """Mean-plane features [B, N, C] at posed points [B, N, 3]: what the plane-point label compares with."""
        return sample_planes(planes, self._to_planes(points, posed), self.config.sampling.box_side)

    def field(self, planes: Tensor, points: Tensor, posed: PosedHead | None = None) -> tuple[Tensor, Tensor]:
        """Colours [B, N, C] in [0, 1] and raw density [B, N] at posed points [B, N, 3]."""
        colors, density = self.decoder(self.point_features(planes, points, posed))
        return colors, density[..., 0]

    def render(
        self,
        planes: Tensor,  # [B, 3, C, P, P] XY, YZ, ZX
        background: Tensor,  # [B, C, b, b] in [0, 1]
        posed: PosedHead | None,  # from `pose`
        camera: Camera,
        *,
        generator: Draws | None = None,  # None renders deterministically
        resolution: int | None = None,  # rays per side; None = config.render_resolution
        precision: Precision = "float32",  # of super-resolution; rays are sampled, decoded and summed in float32
    ) -> HeadImages:
        """Render one picture per batch entry."""
        sampling, side = self.config.sampling, resolution or self.config.render_resolution

        def along_rays(points: Tensor) -> FieldSamples:
            colors, density = self.field(planes, points.flatten(1, 2), posed)
            return FieldSamples(colors.unflatten(1, points.shape[1:3]), density.unflatten(1, points.shape[1:3]))

        origins, directions = camera_rays(camera, side)
        near, far = ray_bounds(camera, sampling.box_side)
        rendered = render_rays(along_rays, origins, directions, near, far, sampling, generator)
        return compose_pictures(rendered, background, side, functools.partial(self.superresolution, precision=precision))

    def render_at_rest(self, planes: Tensor, background: Tensor, camera: Camera) -> HeadImages:
        """`render` without neck rotation or jitter: what an architecture may draw for itself. Always in float32."""
        with torch.autocast(planes.device.type, enabled=False):
            return self.render(planes.float(), background.float(), None, camera)

    def encode_source(self, image: Tensor, motion: Tensor | None, motion_scale: Tensor) -> SourceCode:
        """As the architecture's, which gets nothing that it does not need."""
        return self.architecture.encode_source(image, motion if "source_motion" in self.architecture.needs else None, motion_scale)

    def driven_planes(self, source: SourceCode, driver: Driver, motion_scale: Tensor) -> tuple[Tensor, Any]:
        """Planes [B, 3, C, P, P] of the source as driven, and the architecture's code of the driver.

        Raises ConfigError if the driver lacks what the architecture needs.
        """
        needs = self.architecture.needs
        for member, given in (("driving_motion", driver.motion), ("driver_image", driver.image)):
            if member in needs and given is None:
                raise ConfigError(
                    f"driver: expected {member}, which this architecture ({type(self.architecture).__name__}) reads, got none"
                )
        seen = Driver(driver.motion if "driving_motion" in needs else None, driver.image if "driver_image" in needs else None)
        driving = self.architecture.encode_driver(seen, source, self.render_at_rest)
        return self.architecture.planes(source, driving, motion_scale), driving

    def forward(
        self,
        source_image: Tensor,  # [B, 3, H, W] in [-1, 1]
        source_motion: Tensor | None,  # [B, D] motion vector of the source
        driver: Driver,
        motion_scale: Tensor,  # [B] the disentangling switch; 0 takes the cross-attention out, 1 leaves it
        shape: Tensor,  # [B, 300] of the source, for the neck stage
        motion: Motion,  # of the driver, for the neck stage
        camera: Camera,
        *,
        generator: Draws | None = None,
        resolution: int | None = None,
        precision: Precision = "float32",  # bfloat16: the products of architecture and super-resolution; weights stay float32
    ) -> Reconstruction:
        """Everything in one call. Pictures and planes are float32."""
        with torch.autocast(source_image.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            source = self.encode_source(source_image, source_motion, motion_scale)
            planes, driving = self.driven_planes(source, driver, motion_scale)
        planes = planes.float()
        posed, background = self.pose(shape, motion), source.background.float()
        images = self.render(planes, background, posed, camera, generator=generator, resolution=resolution, precision=precision)
        return Reconstruction(images, planes, source, driving)

    def parts(self) -> Iterator[nn.Module]:
        """The modules that a forward pass calls one after the other: blocks and networks of the architecture, decoder, super-resolution."""
        for part in (*self.architecture.children(), self.decoder, self.superresolution):
            yield from part if isinstance(part, nn.ModuleList) else (part,)

    def recompute_activations(self) -> None:
        """From now on keep of each part only its inputs, and compute the rest again for the gradient: less memory, a third more work."""
        for part in self.parts():
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)

    def compile_parts(self) -> None:
        """From now on run each part through torch.compile; the first steps, and those at new resolutions, take minutes."""
        for part in self.parts():
            part.compile()


@dataclasses.dataclass(frozen=True)
class ReconstructorExport:
    """What config.yaml beside exported weights holds."""

    head_model: str = "procedural"  # path of a FLAME-format file, or "procedural"
    motion_encoder: str = ""  # folder of the perception network whose motion vectors it was trained on; "": FLAME motion, or imported
    motion_encoder_hash: str = ""  # of that network
    model: ReconstructorConfig = ReconstructorConfig()  # the network


def load_reconstructor(folder: str, device: torch.device | str = "cpu") -> Reconstructor:
    """The exported reconstructor in `folder` (model.safetensors, config.yaml), in evaluation mode without gradients.

    Raises AssetError if a file is missing, damaged or does not fit.
    """
    weights, config = load_exported(folder, ReconstructorExport, EXPORT_KIND)
    model = Reconstructor(config.model, load_head_model(config.head_model))
    model.load_weights(weights, str(folder))
    return model.to(device).eval().requires_grad_(False)
