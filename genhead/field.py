"""The part-wise radiance field of one posed head: what colour and density a point of observation space has.

Per ray, M_e and M_m are the eye and mouth masks; b(x) is 1 inside either eye box (portrait4d, section 1, "Blending"):

    part query   canonical-mouth position where M_m > 0 on the ray, else canonical-eye position   (planes T_p)
    head query   canonical-head position                                                          (planes T_h)
    s_p <- s_p (b + M_m);   w_e = M_e b,  w_m = M_m,  w = w_e + w_m
    s = w s_p + (1 - w) s_h,   the same formula for colours

Raw densities are mixed before the activation and integrated once. The part branch is evaluated only where w > 0; elsewhere its
factor is zero, so the result is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from head3d.deformation import Deformation, PosedHead
from head3d.rendering import FieldSamples
from head3d.triplane import Decoder, sample_planes


class FieldPass(NamedTuple):
    """What one evaluation of the field saw; regularisers and the plane-point labels read it."""

    points: Tensor  # [B, R, S, 3] observation space, scene units
    points_without_neck: Tensor  # [B, R, S, 3] after the neck stage
    head_density: Tensor  # [B, R, S] raw density of the head branch
    inside_eye: Tensor  # [B, R, S] 1 inside an eye box, else 0
    part_weight: Tensor  # [B, R, S] w in [0, 1]


def _padded_index(mask: Tensor) -> Tensor | None:
    """Indices of the true entries of [B, N] as [B, n], n the largest count; short rows repeat index 0. None if all are false."""
    counts = mask.sum(1)
    largest = int(counts.max())
    if largest == 0:
        return None
    index = torch.zeros(mask.shape[0], largest, dtype=torch.long, device=mask.device)
    rows, columns = mask.nonzero(as_tuple=True)
    starts = torch.cumsum(counts, 0) - counts
    index[rows, torch.arange(rows.shape[0], device=mask.device) - starts[rows]] = columns
    return index


class PartField:
    """A field for `render_rays`: planes, decoder, deformation and ray masks of one batch of posed heads.

    `passes` collects one FieldPass per evaluation (coarse, then importance).
    """

    def __init__(
        self,
        planes: Tensor,  # [B, 2, 3, C, P, P]: [:, 0] part planes T_p, [:, 1] head planes T_h
        decoder: Decoder,
        deformation: Deformation,
        posed: PosedHead,
        eye_mask: Tensor,  # [B, R] per ray in [0, 1]
        mouth_mask: Tensor,  # [B, R] per ray in [0, 1]
        box_side: float,
        fuse_mouth: bool = False,  # rule 4 of the published code, used above 64 x 64 rays
    ) -> None:
        self.planes, self.decoder, self.deformation, self.posed = planes, decoder, deformation, posed
        self.eye_mask, self.mouth_mask, self.box_side, self.fuse_mouth = eye_mask, mouth_mask, box_side, fuse_mouth
        self.passes: list[FieldPass] = []

    def __call__(self, points: Tensor) -> FieldSamples:
        """points [B, R, S, 3] -> colours [B, R, S, C] and raw density [B, R, S]."""
        batch, rays, samples, _ = points.shape
        with torch.no_grad():
            flat = self.deformation.remove_neck(points.reshape(batch, -1, 3), self.posed)
            inside_eye = self.deformation.inside_eye_boxes(flat, self.posed)
            canonical = self.deformation.to_canonical(flat, self.posed, "head")
        eye = self.eye_mask[..., None].expand(-1, -1, samples).reshape(batch, -1)
        mouth = self.mouth_mask[..., None].expand(-1, -1, samples).reshape(batch, -1)
        inside = inside_eye.to(eye.dtype)
        weight = eye * inside + mouth

        colors, density = self.decoder(sample_planes(self.planes[:, 1], canonical, self.box_side))
        density = density[..., 0]
        head_density = density
        for part, chosen in (("eyes", (weight > 0) & (mouth == 0)), ("mouth", mouth > 0)):
            index = _padded_index(chosen)
            if index is not None:
                colors, density = self._blend(part, index, chosen, flat, inside + mouth, weight, colors, density)

        shape = (batch, rays, samples)
        self.passes.append(
            FieldPass(points, flat.reshape(*shape, 3), head_density.reshape(shape), inside.reshape(shape), weight.reshape(shape))
        )
        return FieldSamples(colors.reshape(*shape, -1), density.reshape(shape))

    def _blend(
        self, part: str, index: Tensor, chosen: Tensor, flat: Tensor, gain: Tensor, weight: Tensor, colors: Tensor, density: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mix the part branch into colours [B, N, C] and raw density [B, N] at `index` [B, n]."""
        with torch.no_grad():
            points = flat.gather(1, index[..., None].expand(-1, -1, 3))
            canonical = self.deformation.to_canonical(points, self.posed, part)
        part_colors, part_density = self.decoder(sample_planes(self.planes[:, 0], canonical, self.box_side))
        part_density = part_density[..., 0] * gain.gather(1, index)
        index_colors = index[..., None].expand(-1, -1, colors.shape[-1])
        head_colors, head_density = colors.gather(1, index_colors), density.gather(1, index)
        if self.fuse_mouth and part == "mouth":
            share = torch.softmax(torch.stack([part_density, head_density]), dim=0)[..., None]
            new_colors, new_density = share[0] * part_colors + share[1] * head_colors, part_density + head_density
        else:
            w = weight.gather(1, index)
            new_colors = torch.lerp(head_colors, part_colors, w[..., None])
            new_density = torch.lerp(head_density, part_density, w)
        # Padding repeats index 0: an addition of the change, zero on padding, leaves every other entry alone.
        valid = torch.arange(index.shape[1], device=index.device) < chosen.sum(1, keepdim=True)
        change = (new_colors - head_colors) * valid[..., None]
        colors = colors.scatter_add(1, index_colors, change)
        return colors, density.scatter_add(1, index, (new_density - head_density) * valid)
