"""GenHead: (z, shape) -> tri-planes in canonical space, deformed part-wise by a head model, rendered at any camera.

    z, condition camera, shape --mapping--> ws --backbone--> planes T_p, T_h        once per identity
    z ------------------------background_network---------> background features      once per identity
    shape, motion ------------head model, deformation----> PosedHead                once per motion
    PosedHead, camera --------rasterised eye and mouth masks, rays, PartField------> features, depth, opacity
    features + transmittance * background --superresolution--> picture

Portrait4D, section 1 (arXiv:2311.18729). One integration per ray over per-sample blended branches, as in the released code; the
paper's text blends two rendered feature maps.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genhead.background import BackgroundConfig, BackgroundGenerator
from genhead.field import FieldPass, PartField
from head3d.cameras import Camera, camera_rays, ray_bounds
from head3d.deformation import Deformation, DeformationConfig, PosedHead
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import SHAPE_SIZE, Motion
from head3d.networks.stylegan2 import Mapping, Precision, Synthesis
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig
from head3d.rasterize import Backend, PartMasks, part_masks
from head3d.rendering import HeadImages, RaySampling, Rendered, compose_pictures, render_rays
from head3d.run.checkpoint import fill_weights, load_exported
from head3d.run.config import PositiveInt
from head3d.run.errors import AssetError
from head3d.run.seeding import Draws
from head3d.triplane import Decoder, sample_planes

EXPORT_KIND = "genhead"


@dataclasses.dataclass(frozen=True)
class GenHeadConfig:
    """Widths and resolutions. Defaults are the published 512 x 512 network."""

    z_dim: PositiveInt = 512  # latent size
    w_dim: PositiveInt = 512  # style size
    mapping_layers: PositiveInt = 2  # fully connected layers of the mapping network
    plane_resolution: PositiveInt = 256  # side of a feature plane
    plane_channels: PositiveInt = 32  # features per plane
    feature_channels: PositiveInt = 32  # rendered features, the first three are RGB
    decoder_hidden: PositiveInt = 64  # hidden units between plane features and colour or density
    channel_base: PositiveInt = 32768  # backbone channels at resolution r: min(channel_base / r, channel_max)
    channel_max: PositiveInt = 512  # most channels of a backbone layer
    render_resolution: PositiveInt = 64  # rays per picture side, R
    image_resolution: PositiveInt = 512  # final picture side, S
    mask_resolution: PositiveInt = 512  # side at which eye and mouth masks are rasterised before they are reduced to R
    sampling: RaySampling = RaySampling()  # ray samples
    deformation: DeformationConfig = DeformationConfig()  # posed to canonical points
    background: BackgroundConfig = BackgroundConfig()  # background network
    superresolution: SuperResolutionConfig = SuperResolutionConfig()  # R to S
    published: bool = False  # keep the quirks of the published code (needed for its checkpoints); deformation.published goes with it

    def __post_init__(self) -> None:
        equal = (
            {"z_dim": self.z_dim, "background.z_dim": self.background.z_dim},  # the same z drives both
            {
                "feature_channels": self.feature_channels,
                "background.channels": self.background.channels,
                "superresolution.feature_channels": self.superresolution.feature_channels,
            },
            {"sampling.box_side": self.sampling.box_side, "deformation.box_side": self.deformation.box_side},
            {"published": self.published, "deformation.published": self.deformation.published},
        )
        for settings in equal:
            if len(set(settings.values())) > 1:
                raise ValueError(f"{', '.join(settings)} must be equal, got {', '.join(map(str, settings.values()))}; change what differs")


@dataclasses.dataclass(frozen=True)
class GenHeadOutput:
    """Pictures and what the field saw while rendering them."""

    images: HeadImages
    passes: tuple[FieldPass, ...]  # coarse, then importance samples
    field: PartField  # the field itself, for labels that ask it about further points


class GenHead(nn.Module):
    """The generator. `config` and `head` are the only collaborators; both travel with every checkpoint."""

    def __init__(self, config: GenHeadConfig, head: HeadModel) -> None:
        super().__init__()
        self.config = config
        self.head_model = head
        self.deformation = Deformation(head, config.deformation)
        channels = 2 * 3 * config.plane_channels
        self.backbone = Synthesis(
            config.w_dim, config.plane_resolution, channels, channel_base=config.channel_base, channel_max=config.channel_max
        )
        self.mapping = Mapping(config.z_dim, 25 + SHAPE_SIZE, config.w_dim, self.backbone.num_ws, layers=config.mapping_layers)
        self.background_network = BackgroundGenerator(config.background)
        self.decoder = Decoder(config.plane_channels, config.decoder_hidden, config.feature_channels)
        self.superresolution = SuperResolution(config.superresolution)

    def weights(self) -> dict[str, Tensor]:
        """The learned state; the head model, which the configuration names, is not in it."""
        return self.state_dict()

    def load_weights(self, weights: dict[str, Tensor], where: str) -> None:
        """Fill the learned state. Raises AssetError naming `where` and the keys or shapes that do not fit."""
        fill_weights(self, weights, where)

    def map(self, z: Tensor, condition_camera: Tensor, shape: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """z [B, z_dim], condition camera label [B, 25], shape [B, 300] -> styles ws [B, L, w_dim] (section 1, "mapping")."""
        condition = torch.cat([condition_camera, shape], dim=1)
        return self.mapping(z, condition, truncation_psi=truncation_psi)

    def planes(self, ws: Tensor, noise: str = "constant", generator: Draws | None = None, precision: Precision = "float32") -> Tensor:
        """Styles -> planes [B, 2, 3, C, P, P]: [:, 0] part planes (eyes, mouth), [:, 1] head planes."""
        planes = self.backbone(ws, noise, generator, precision)
        return planes.reshape(planes.shape[0], 2, 3, self.config.plane_channels, *planes.shape[2:])

    def background(self, z: Tensor, precision: Precision = "float32") -> Tensor:
        """z [B, z_dim] -> background features [B, C, b, b] in [0, 1]; the same z drives head and background."""
        return self.background_network(z, precision)

    def pose(self, shape: Tensor, motion: Motion) -> PosedHead:
        """Meshes and tables of one shape [B, 300] in one motion; no gradient."""
        return self.deformation.prepare(shape, motion)

    def render(
        self,
        planes: Tensor,  # [B, 2, 3, C, P, P]
        background: Tensor,  # [B, C, b, b] in [0, 1]
        posed: PosedHead,
        camera: Camera,
        *,
        generator: Draws | None = None,  # of the batch or of each entry; None renders deterministically
        resolution: int | None = None,  # rays per side; None = config.render_resolution
        precision: Precision = "float32",  # of super-resolution; rays are always float32
    ) -> GenHeadOutput:
        """Render one picture per batch entry."""
        side = resolution or self.config.render_resolution
        rendered, masks, field = self._march(planes, posed, camera, side, None, generator)
        images = compose_pictures(rendered, background, side, functools.partial(self.superresolution, precision=precision))
        images = dataclasses.replace(images, eye_mask=masks.eye, mouth_mask=masks.mouth, head_mask=masks.head)
        return GenHeadOutput(images, tuple(field.passes), field)

    def render_chosen(
        self,
        planes: Tensor,  # as `render`
        background: Tensor,
        posed: PosedHead,
        camera: Camera,
        chosen: Tensor,  # [B, n] int64, row-major numbers of the R * R rays
        *,
        generator: Draws | None = None,
    ) -> GenHeadOutput:
        """Some rays of each picture, as strips: every picture of the result is [B, C, 1, n], and the final one is the raw one.

        Training by single pixels needs no super-resolution and pays only for the rays that it looks at.
        """
        side = self.config.render_resolution
        rendered, masks, field = self._march(planes, posed, camera, side, chosen, generator)

        def strip(picture: Tensor) -> Tensor:
            return _chosen(picture.flatten(2).transpose(1, 2), chosen).transpose(1, 2)[:, :, None]

        behind = strip(F.interpolate(background, size=(side, side), mode="bilinear", align_corners=False))
        foreground, transmittance = rendered.colors.transpose(1, 2)[:, :, None], rendered.transmittance[:, None, None]
        features = (foreground + transmittance * behind) * 2 - 1
        images = HeadImages(
            image=features[:, :3],
            raw=features[:, :3],
            features=features,
            foreground=foreground,
            background=behind * 2 - 1,
            depth=rendered.depth[:, None, None],
            opacity=1 - transmittance,
            rays=rendered,
            eye_mask=strip(masks.eye),
            mouth_mask=strip(masks.mouth),
            head_mask=strip(masks.head),
        )
        return GenHeadOutput(images, tuple(field.passes), field)

    def _march(
        self, planes: Tensor, posed: PosedHead, camera: Camera, side: int, chosen: Tensor | None, generator: Draws | None
    ) -> tuple[Rendered, PartMasks, PartField]:
        """The rays of a picture of that side, all or the chosen [B, n]; the masks of the whole picture; the field that was asked."""
        config = self.config
        masks = part_masks(
            self.head_model, posed.vertices_posed, camera, side, raster_resolution=config.mask_resolution, published=config.published
        )
        origins, directions = camera_rays(camera, side)
        near, far = ray_bounds(camera, config.sampling.box_side)
        per_ray = [masks.eye.flatten(1)[..., None], masks.mouth.flatten(1)[..., None], origins, directions]
        if chosen is not None:
            per_ray = [_chosen(values, chosen) for values in per_ray]
        eye, mouth, origins, directions = per_ray
        field = PartField(
            planes,
            self.decoder,
            self.deformation,
            posed,
            eye_mask=eye[..., 0],
            mouth_mask=mouth[..., 0],
            box_side=config.sampling.box_side,
            fuse_mouth=side > 64,
        )
        return render_rays(field, origins, directions, near, far, config.sampling, generator), masks, field

    def sample_head_features(self, planes: Tensor, points_without_neck: Tensor, posed: PosedHead) -> Tensor:
        """Features [B, N, C] of the head planes T_h at the canonical positions of points [B, N, 3] (the plane-point label)."""
        canonical = self.deformation.to_canonical(points_without_neck, posed, "head")
        return sample_planes(planes[:, 1], canonical, self.config.sampling.box_side)

    def forward(
        self,
        z: Tensor,  # [B, z_dim] ~ N(0, 1)
        shape: Tensor,  # [B, 300]
        motion: Motion,
        camera: Camera,
        *,
        condition_camera: Tensor | None = None,  # [B, 25]; None = the rendering camera's label
        truncation_psi: float = 1.0,
        noise: str = "constant",
        generator: Draws | None = None,
    ) -> GenHeadOutput:
        """Everything in one call; data generation calls the stages and keeps what an identity shares."""
        condition = camera.label() if condition_camera is None else condition_camera
        ws = self.map(z, condition, shape, truncation_psi)
        posed = self.pose(shape, motion)
        return self.render(self.planes(ws, noise, generator), self.background(z), posed, camera, generator=generator)


def _chosen(per_ray: Tensor, chosen: Tensor) -> Tensor:
    """Of values [B, R * R, C], those of the rays `chosen` [B, n]: [B, n, C]."""
    return per_ray.gather(1, chosen[..., None].expand(-1, -1, per_ray.shape[-1]))


@dataclasses.dataclass(frozen=True)
class GenHeadExport:
    """What config.yaml beside exported weights holds."""

    head_model: str = "procedural"  # path of a FLAME-format file, or "procedural"
    head_model_hash: str = ""  # its content; another head would give the planes another meaning
    model: GenHeadConfig = GenHeadConfig()  # the network


def load_genhead(folder: str | Path, device: torch.device | str = "cpu", rasterizer: Backend = "torch") -> GenHead:
    """The exported generator in `folder` (model.safetensors, config.yaml), in evaluation mode without gradients.

    Raises AssetError if a file is missing, damaged or does not fit, ConfigError if the rasteriser is not installed.
    """
    weights, config = load_exported(folder, GenHeadExport, EXPORT_KIND)
    head = load_head_model(config.head_model, rasterizer)
    if head.content_hash != config.head_model_hash:
        raise AssetError(
            f"{folder}: trained with the head model {config.head_model} of content {config.head_model_hash}, but that is now "
            f"{head.content_hash}; bring back the file it was trained with, or train again"
        )
    genhead = GenHead(config.model, head)
    genhead.load_weights(weights, str(folder))
    return genhead.to(device).eval().requires_grad_(False)
