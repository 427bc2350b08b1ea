"""Paint of the studio, per visible point: skin, eyes, mouth, hair, cloth and spectacle frames. Linear RGB.

Paint is a function of template coordinates (the resting mean head, millimetres from the neck joint), so that it sticks to the
skin whatever the identity and motion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genhead.studio_clothing import neckline
from genhead.studio_hair import hairline
from genhead.studio_meshes import CAVITY, LEFT_EYE, MM_PER_UNIT, RIGHT_EYE, SKIN, TEETH, smooth, vertex_normals
from genhead.studio_people import Look
from head3d.head_model import HeadModel

EXTRAS = ("lips", "scalp", "beard", "ears", "nose", "concavity")  # soft vertex attributes of the head, [0, 1]


class Points(NamedTuple):
    """Visible surface points of one picture."""

    coordinates: np.ndarray  # [M, 3] template mm (head, cloth, frame) or strand coordinates (hair)
    position: np.ndarray  # [M, 3] posed, mm
    normal: np.ndarray  # [M, 3] unit, towards the camera
    view: np.ndarray  # [M, 3] unit, to the camera
    extras: np.ndarray  # [M, 6] EXTRAS for the head; the strand direction in the first three for hair
    lit: np.ndarray  # [M] share of the key lamp that is not in shadow

    def select(self, chosen: np.ndarray) -> Points:
        return Points(*(part[chosen] for part in self))


class Surface(NamedTuple):
    """What light does with a point."""

    albedo: np.ndarray  # [M, 3]
    wrap: np.ndarray  # [3] light that bleeds past the terminator, per channel
    gloss: np.ndarray  # [M] strength of the highlight
    sharpness: float  # its Blinn-Phong exponent
    occlusion: np.ndarray  # [M] share of ambient light that arrives


class FaceAtlas:
    """What painting needs to know of the head's template; made once."""

    def __init__(self, head: HeadModel, arrays: dict[str, np.ndarray]):
        """`arrays`: what the head was made from, with the built-in head's extra `mask_*` regions."""
        self.template = head.template.numpy().astype(np.float64) * MM_PER_UNIT
        landmarks = head.landmarks(head.template[None])[0].numpy().astype(np.float64) * MM_PER_UNIT
        self.brows = (landmarks[17:22], landmarks[22:27][::-1])  # outer end first
        self.eyes = (landmarks[36:42], landmarks[42:48])
        self.mouth_centre = landmarks[48:68].mean(0)
        self.mouth_half_width = abs(landmarks[54, 0] - landmarks[48, 0]) / 2
        self.nose_tip, self.nose_base = landmarks[30], landmarks[33]
        self.chin = landmarks[8]
        ring = head.ring.numpy()
        valid = (ring < len(self.template))[..., None]
        ring = np.minimum(ring, len(self.template) - 1)
        counts = valid.sum(1)

        def smoothed(values: np.ndarray, times: int) -> np.ndarray:
            for _ in range(times):
                values = (values[ring][..., None] * valid).sum(1)[:, 0] / counts[:, 0]
            return values

        def mask(name: str, times: int = 1) -> np.ndarray:
            values = np.zeros(len(self.template))
            values[arrays[f"mask_{name}"]] = 1
            return smoothed(values, times)

        faces = head.faces.numpy()
        normals = vertex_normals(self.template, faces)
        offsets = (self.template[ring] - self.template[:, None]) * valid
        length = np.linalg.norm(offsets, axis=-1) + 1e-6
        bend = ((offsets * normals[:, None]).sum(-1) / length * valid[..., 0]).sum(1) / np.maximum(counts[:, 0] - 1, 1)
        concavity = np.clip(smoothed(smoothed(bend, 2) * 3.2, 1), 0, 1)
        soft = {name: mask(name) for name in ("lips", "scalp", "ears", "nose")} | {"beard": mask("beard", 3), "concavity": concavity}
        self.extras = np.stack([soft[name] for name in EXTRAS], -1)

        kind = np.zeros(len(self.template), np.int64)
        for name, value in (("mouth_cavity", CAVITY), ("tongue", CAVITY), ("upper_teeth", TEETH), ("lower_teeth", TEETH)):
            if f"mask_{name}" in arrays:
                kind[arrays[f"mask_{name}"]] = value
        kind[head.regions.left_eyeball.numpy()] = LEFT_EYE
        kind[head.regions.right_eyeball.numpy()] = RIGHT_EYE
        self.materials_of_vertices = kind
        self.materials = kind[faces].min(1)  # a face is teeth, cavity or eye only if all its corners are
        self.eye_centres = {
            LEFT_EYE: self.template[head.regions.left_eyeball.numpy()].mean(0),
            RIGHT_EYE: self.template[head.regions.right_eyeball.numpy()].mean(0),
        }
        scalp = self.template[arrays["mask_scalp"]]
        self.skull_centre = np.array(
            [0.0, (scalp[:, 1].max() + self.eyes[0][:, 1].mean()) / 2 - 14, (scalp[:, 2].min() + scalp[:, 2].max()) / 2]
        )
        self.outer_skin = np.setdiff1d(np.flatnonzero(kind == SKIN), arrays["mask_ears"])
        self.outer_skin = np.intersect1d(self.outer_skin, head.regions.without_inner_mouth.numpy())


def _rgb(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def _ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def _mix(colour: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return colour + weight[:, None] * (other - colour)


def _noise(points: np.ndarray, wavelength: float, generator: np.random.Generator, waves: int = 7) -> np.ndarray:
    """Smooth noise [M] of about unit deviation: plane waves in random directions (points in mm)."""
    vectors = generator.normal(0, 1, (3, waves))
    vectors *= 2 * np.pi / wavelength * generator.uniform(0.6, 1.5, waves) / np.linalg.norm(vectors, axis=0)
    phases = generator.uniform(0, 2 * np.pi, waves)
    return np.sin(points @ vectors.astype(np.float32) + phases.astype(np.float32)).sum(-1) * np.float32(np.sqrt(2 / waves))


def _to_polyline(points: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to an open polyline, position along it in [0, 1], and height above it (+y); points [M, D], line [n, D]."""
    best, along, above = np.full(len(points), np.inf, np.float32), np.zeros(len(points), np.float32), np.zeros(len(points), np.float32)
    line = line.astype(np.float32)
    for k in range(len(line) - 1):
        axis = line[k + 1] - line[k]
        t = np.clip(((points - line[k]) @ axis) / (axis @ axis), 0, 1)
        offset = points - line[k] - t[:, None] * axis
        distance = np.linalg.norm(offset, axis=1)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        along = np.where(nearer, (k + t) / (len(line) - 1), along)
        above = np.where(nearer, offset[:, 1], above)
    return best, along, above


# ---- materials ---------------------------------------------------------------------------------------------------------


def paint_skin(points: Points, look: Look, atlas: FaceAtlas) -> Surface:
    g = np.random.default_rng(look.noise_seed)
    xyz, extras = points.coordinates, points.extras
    lips, scalp, beard, ears, nose, concavity = extras.T
    x, y, z = xyz.T
    fine, coarse = _noise(xyz, 5, g, 14), _noise(xyz, 26, g)
    albedo = look.skin * (1 + 0.014 * fine + 0.035 * coarse)[:, None]
    # blood under the skin: cheeks, nose, ears, chin
    cheek_y = (atlas.nose_base[1] + atlas.eyes[0][:, 1].mean()) / 2 - 8
    cheeks = np.exp(-((np.abs(x) - 40) ** 2 / 22**2 + (y - cheek_y) ** 2 / 17**2)) * (z > 20)
    tip = np.exp(-(((xyz - atlas.nose_tip.astype(np.float32)) ** 2).sum(1) / 13**2))
    red = look.ruddiness * np.clip(cheeks + 0.8 * tip + 0.7 * ears + 0.15 * coarse, 0, 1.2)
    albedo *= 1 - red[:, None] * _rgb([0.0, 0.20, 0.17])
    under_eye = sum(np.exp(-(((x - e[:, 0].mean()) / 16) ** 2 + ((y - e[:, 1].mean() + 9) / 5.5) ** 2)) for e in atlas.eyes) * (z > 40)
    albedo *= 1 - under_eye[:, None] * _rgb([0.10, 0.13, 0.10])
    if look.freckles:
        spots = smooth(_noise(xyz, 4.2, g) + 0.35 * _noise(xyz, 2.6, g), 1.25, 1.9) * np.clip(cheeks * 1.2 + tip + 0.25, 0, 1) * (z > 30)
        albedo *= 1 - 0.5 * look.freckles * spots[:, None] * _rgb([0.6, 0.9, 1.0])
    # lips, darker towards the line between them
    lips = smooth(lips, 0.25, 0.75)
    albedo = _mix(albedo, look.lips * (1 + 0.06 * fine)[:, None], lips * 0.92)
    gloss = 0.045 + 0.05 * lips + 0.03 * tip
    # hair on the skin
    strands = 1 + 0.25 * _noise(xyz * _rgb([1.0, 0.35, 1.0]), 3.4, g)
    hair = look.hair * 0.8
    offset = xyz - atlas.skull_centre
    polar = np.arccos(np.clip(offset[:, 1] / np.linalg.norm(offset, axis=1), -1, 1))
    if look.hair_style != "bald":
        ragged = hairline(look, np.arctan2(offset[:, 0], offset[:, 2])) + np.radians(1.2) * coarse
        grown = smooth(polar, ragged + 0.05, ragged - 0.05) * (1 - smooth(ears, 0.1, 0.5))
        albedo = _mix(albedo, hair * strands[:, None], grown * (0.78 if look.hair_style == "buzz" else 0.95))
        gloss = gloss * (1 - 0.8 * grown)
    if look.stubble or look.beard_m:
        beard = beard * (1 - 0.9 * lips)
        if not look.moustache:
            beard = beard * (1 - smooth(y, atlas.mouth_centre[1] - 4, atlas.mouth_centre[1] + 3) * smooth(np.abs(x), 34, 26))
        if look.beard_m:
            full = smooth(beard + 0.10 * fine, 0.30, 0.62)
            albedo = _mix(albedo, hair * 0.9 * strands[:, None], full * 0.96)
            gloss = gloss * (1 - 0.7 * full)
        else:
            shadow = smooth(beard, 0.1, 0.8) * look.stubble * np.clip(0.55 + 0.25 * _noise(xyz, 2.4, g), 0.2, 0.9)
            albedo = _mix(albedo, 0.35 * look.skin + 0.5 * hair * _rgb([0.9, 1.0, 1.1]), shadow)
    albedo = _paint_brows(albedo, xyz, look, atlas, g)
    albedo = _paint_lashes(albedo, xyz, look, atlas)
    # clothing below the neckline
    below = neckline(look, xyz)
    dressed = smooth(below, -0.6, 0.6)
    if dressed.any():
        albedo = _mix(albedo, cloth_colour(xyz, look), dressed)
        gloss = gloss * (1 - dressed)
    occlusion = np.clip(1 - 0.75 * concavity - 0.35 * np.exp(-np.abs(below) / 5) * (below < 0), 0.15, 1)
    albedo *= (1 - 0.25 * np.clip(concavity, 0, 1))[:, None]
    return Surface(albedo, _rgb([0.24, 0.13, 0.09]), gloss, 22.0, occlusion)


def _paint_brows(albedo: np.ndarray, xyz: np.ndarray, look: Look, atlas: FaceAtlas, g: np.random.Generator) -> np.ndarray:
    shift, frequency = g.uniform(0, 6.28), g.uniform(2.4, 3.2)
    for line in atlas.brows:
        near = np.flatnonzero(
            (np.abs(xyz[:, 0] - line[:, 0].mean()) < 36) & (np.abs(xyz[:, 1] - line[:, 1].mean()) < 18) & (xyz[:, 2] > 20)
        )
        p = xyz[near]
        distance, along, above = _to_polyline(p[:, :2], line[:, :2])  # along: 0 at the outer end
        half = look.brow_thickness * (1.1 + 3.4 * smooth(along, 0.0, 0.55) - 0.5 * smooth(along, 0.8, 1.0))
        hairs = 0.82 + 0.18 * np.sin(frequency * (p[:, 0] * np.sign(line[0, 0]) - 1.1 * above) + shift)
        weight = smooth(distance, half + 1.4, half - 1.6) * look.brow_strength * hairs * (0.65 + 0.35 * smooth(along, 1.0, 0.8))
        albedo[near] = _mix(albedo[near], look.brows, np.clip(weight, 0, 1))
    return albedo


def _paint_lashes(albedo: np.ndarray, xyz: np.ndarray, look: Look, atlas: FaceAtlas) -> np.ndarray:
    """Dark rims of the lids: landmarks 0-3 of an eye run along the upper lid, 3-5 and 0 along the lower one."""
    for eye in atlas.eyes:
        centre = eye.mean(0)
        near = np.flatnonzero((np.abs(xyz - centre) < _rgb([24, 12, 25])).all(1))
        p = xyz[near]
        upper = _to_polyline(p, eye[[0, 1, 2, 3]])[0]
        lower = _to_polyline(p, eye[[3, 4, 5, 0]])[0]
        crease = np.exp(-(((upper - 6.0) / 1.3) ** 2)) * (p[:, 1] > centre[1] + 3)
        dark = np.clip(
            (0.6 + 0.4 * look.eye_liner) * smooth(upper, 1.9 + 1.0 * look.eye_liner, 0.6) + 0.35 * smooth(lower, 1.4, 0.3), 0, 0.95
        )
        albedo[near] = _mix(albedo[near] * (1 - 0.16 * crease)[:, None], _rgb([0.018, 0.012, 0.010]), dark)
    return albedo


def paint_eye(points: Points, look: Look, atlas: FaceAtlas, which: int) -> Surface:
    """Sclera, iris with limbus and fibres, pupil; in the eyeball's own frame, so it turns with the gaze."""
    direction = points.coordinates - atlas.eye_centres[which]
    direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    angle = np.arccos(np.clip(direction[:, 2], -1, 1))
    around = np.arctan2(direction[:, 1], direction[:, 0])
    sclera = _rgb([0.74, 0.71, 0.68]) * (1 - 0.30 * smooth(angle, 0.6, 1.2)[:, None] * _rgb([0.3, 0.8, 0.8]))
    radius = look.iris_radius_rad
    share = angle / radius
    fibres = 1 + 0.22 * np.sin(around * 23 + 3 * np.sin(around * 7)) * smooth(share, 0.3, 0.6)
    iris = look.iris * (fibres * (0.8 + 0.8 * smooth(share, 0.9, 0.45)))[:, None]
    iris = _mix(iris, look.iris * 0.2, smooth(share, 0.78, 1.0))  # limbus
    colour = _mix(sclera, iris, smooth(share, 1.06, 0.96))
    colour = _mix(colour, _rgb([0.004] * 3), smooth(angle, look.pupil_radius_rad + 0.03, look.pupil_radius_rad - 0.03))
    ball = points.position - points.position.mean(0)
    lid_shadow = smooth(ball[:, 1], -1.0, 5.5) if len(ball) > 4 else np.zeros(len(ball), np.float32)  # the upper lid's shade on the ball
    colour = colour * (1 - 0.45 * lid_shadow)[:, None]
    return Surface(colour, _rgb([0.15] * 3), np.full(len(colour), 1.0, np.float32), 140.0, 1 - 0.35 * lid_shadow)


def paint_teeth(points: Points, look: Look, atlas: FaceAtlas) -> Surface:
    x = points.coordinates[:, 0]
    gaps = 0.5 + 0.5 * np.cos(2 * np.pi * x / 8.0 + np.pi)
    back = smooth(np.abs(x), 8, 26)
    colour = _rgb([0.74, 0.69, 0.58]) * ((1 - 0.30 * smooth(gaps, 0.12, 0.0)) * (1 - 0.65 * back))[:, None]
    return Surface(colour, _rgb([0.2] * 3), np.full(len(x), 0.25, np.float32), 60.0, np.clip(0.8 - 0.5 * back, 0.1, 1))


def paint_cavity(points: Points, look: Look, atlas: FaceAtlas) -> Surface:
    depth = np.clip((atlas.mouth_centre[2] - points.coordinates[:, 2]) / 38, 0, 1)
    colour = _rgb([0.26, 0.045, 0.045]) * (1 - 0.9 * smooth(depth, 0.05, 0.8))[:, None]
    return Surface(colour, _rgb([0.2] * 3), np.full(len(depth), 0.05, np.float32), 40.0, 0.6 * (1 - depth))


def paint_hair(points: Points, look: Look) -> Surface:
    g = np.random.default_rng(look.noise_seed + 1)
    phi, along, depth = points.coordinates.T
    if look.hair_style in ("curly", "afro"):
        scale = 9 if look.hair_style == "curly" else 6
        lump = _noise(points.position, scale, g, 9) + 0.5 * _noise(points.position, scale / 2.2, g, 9)
        tone = 1 + 0.30 * lump
    else:
        tone = _ones(len(phi))
        for frequency, weight in ((7, 0.05), (19, 0.08), (37, 0.09), (71, 0.08), (113, 0.06)):
            tone = tone + weight * np.sin(frequency * phi + 0.01 * frequency**0.5 * g.normal() * along + g.uniform(0, 6.28))
    albedo = look.hair * np.clip(tone, 0.3, 1.9)[:, None]
    return Surface(albedo, _rgb([0.18] * 3), np.zeros(len(phi), np.float32), 1.0, np.clip(1 - depth, 0.25, 1))


def cloth_colour(xyz: np.ndarray, look: Look) -> np.ndarray:
    x, y, z = xyz.T
    colour = np.broadcast_to(look.cloth, xyz.shape)
    match look.cloth_pattern:
        case 1:
            colour = _mix(colour, look.cloth_accent, smooth(np.abs((y / 14) % 1 - 0.5), 0.22, 0.28))
        case 2:
            colour = colour * (1 + 0.14 * np.sin(np.arctan2(x, z + 18) * 70) * np.sin(y * 1.6))[:, None]
    return colour


def paint_cloth(points: Points, look: Look) -> Surface:
    xyz = points.coordinates
    folds = _noise(points.position, 45, np.random.default_rng(look.noise_seed + 2))
    colour = cloth_colour(xyz, look) * (1 + 0.06 * folds)[:, None]
    dressed = (
        smooth(neckline(look, xyz), -30, -29)
        if look.garment in ("shirt", "hoodie", "crew", "turtleneck")
        else smooth(neckline(look, xyz), -0.6, 0.6)
    )
    return Surface(
        _mix(np.broadcast_to(look.skin, xyz.shape), colour, dressed),
        _rgb([0.1] * 3),
        np.full(len(xyz), 0.01, np.float32),
        12.0,
        _ones(len(xyz)),
    )


def paint_frame(points: Points, look: Look) -> Surface:
    count = len(points.position)
    return Surface(np.broadcast_to(look.glasses, (count, 3)), _rgb([0.1] * 3), np.full(count, 0.35, np.float32), 50.0, _ones(count))
