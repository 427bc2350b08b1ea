"""Who stands in the studio: draws of the label (camera, shape, motion) and of the look (colours, hair, clothing, light).

Every function is pure in its NumPy generator. Colours are linear RGB; directions are unit vectors of the world frame.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from head3d.cameras import Camera, orbit
from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE, HeadLabel, Motion
from head3d.procedural_head import BLINK_CLOSES_AT, EXPRESSIONS

HairStyle = Literal["bald", "buzz", "short", "side_part", "fringe", "quiff", "bob", "long", "bun", "curly", "afro"]
Garment = Literal["crew", "v_neck", "turtleneck", "shirt", "hoodie"]

# Skin by individual typology angle ITA = atan((L* - 50) / b*) (Chardin et al. 1991): ITA deg, L*, a*, b* from very light to dark.
_SKIN_TABLE = np.array(
    [
        [-58, 31.5, 9.0, 11.6],
        [-40, 37.5, 11.5, 15.0],
        [-20, 43.5, 13.0, 18.0],
        [10, 53.5, 13.5, 20.0],
        [28, 61.0, 11.5, 20.0],
        [45, 68.0, 10.0, 17.5],
        [58, 73.5, 9.0, 14.5],
    ]
)
_HAIR_SRGB = np.array(
    [
        [22, 18, 17],
        [40, 27, 21],
        [66, 43, 30],
        [98, 64, 40],
        [122, 62, 34],
        [164, 84, 42],
        [176, 136, 84],
        [214, 180, 128],
        [128, 126, 124],
        [206, 203, 198],
    ]
)
_HAIR_WEIGHTS_LIGHT = np.array([0.08, 0.14, 0.19, 0.17, 0.07, 0.07, 0.10, 0.09, 0.05, 0.04])
_HAIR_WEIGHTS_DARK = np.array([0.52, 0.28, 0.09, 0.02, 0.01, 0.0, 0.01, 0.0, 0.04, 0.03])
_IRIS_SRGB = np.array([[46, 26, 16], [84, 52, 28], [118, 88, 44], [92, 108, 66], [84, 122, 150], [126, 150, 166]])
_IRIS_WEIGHTS_LIGHT = np.array([0.14, 0.22, 0.16, 0.15, 0.22, 0.11])
_IRIS_WEIGHTS_DARK = np.array([0.66, 0.28, 0.05, 0.01, 0.0, 0.0])


class Light(NamedTuple):
    """Key and fill lamps and a sky-to-ground ambient."""

    key_direction: np.ndarray  # [3] towards the lamp
    key: np.ndarray  # [3] linear RGB
    fill_direction: np.ndarray  # [3]
    fill: np.ndarray  # [3]
    sky: np.ndarray  # [3] ambient from above
    ground: np.ndarray  # [3] ambient from below


class Look(NamedTuple):
    """Everything visible that the label does not hold. Strengths are in [0, 1]."""

    skin: np.ndarray  # [3] albedo
    ruddiness: float  # cheeks, nose, ears
    freckles: float
    lips: np.ndarray  # [3]
    brows: np.ndarray  # [3]
    brow_thickness: float  # about 1
    brow_strength: float
    iris: np.ndarray  # [3]
    iris_radius_rad: float
    pupil_radius_rad: float
    eye_liner: float
    hair: np.ndarray  # [3]
    hair_style: HairStyle
    hair_shape: np.ndarray  # [8] in [0, 1]: what the style makes of it (volume, length, hairline, part side ...)
    stubble: float
    beard_m: float  # thickness of the beard, metres; 0 = none
    moustache: bool
    glasses: np.ndarray | None  # [3] colour of the frame
    glasses_shape: np.ndarray  # [3] in [0, 1]: size, roundness, thickness
    garment: Garment
    cloth: np.ndarray  # [3]
    cloth_accent: np.ndarray  # [3]
    cloth_pattern: int  # 0 plain, 1 stripes, 2 knit
    light: Light
    noise_seed: int


def linear(srgb: np.ndarray | list[float]) -> np.ndarray:
    """sRGB in [0, 255] -> linear RGB in [0, 1] (IEC 61966-2-1)."""
    value = np.asarray(srgb, np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab_to_linear(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) [..., 3] -> linear sRGB, clipped to [0.004, 1]."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.95047, 1.0, 1.08883])
    to_rgb = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]])
    return np.clip(xyz @ to_rgb.T, 0.004, 1.0)


def skin_colour(generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """(linear albedo [3], ITA in degrees) over the whole ITA range, with small individual changes of hue."""
    ita = generator.uniform(5, 58) if generator.random() < 0.6 else generator.uniform(-55, 5)
    lab = np.array([np.interp(ita, _SKIN_TABLE[:, 0], _SKIN_TABLE[:, k]) for k in (1, 2, 3)])
    lab += generator.normal(0, [0.8, 1.0, 1.3])
    return lab_to_linear(lab), float(ita)


def draw_label(generator: np.random.Generator, wide_fraction: float, motion_scale: float) -> HeadLabel:
    """Camera, shape and motion of one portrait (batch of 1).

    Radius, aim, jaw and gaze follow the published labels (portrait4d, section 4: radius 4.17 +- 0.16 within 3.74-4.45, origin within
    +-0.02 of the axis, gaze 0.07 / 0.10 rad) with more open mouths and closed eyes, which are rare there and which a generator
    must see. Neck pose and gaze roll are 0.
    """
    g = generator
    wide = g.random() < wide_fraction
    yaw = g.uniform(-1.1, 1.1) if wide else float(np.clip(g.normal(0, 0.28), -0.6, 0.6))
    pitch = float(np.clip(g.normal(0.02, 0.12), -0.3, 0.35))
    radius = float(np.clip(g.normal(4.17, 0.16), 3.74, 4.45))
    target = torch.tensor([[*np.clip(g.normal(0, 0.012, 2), -0.03, 0.03), 0.0]], dtype=torch.float32)
    roll = float(np.clip(g.normal(0, 0.06), -0.2, 0.2))
    camera = orbit(*(torch.tensor([v], dtype=torch.float32) for v in (yaw, pitch, radius)), target=target, roll_rad=torch.tensor([roll]))

    shape = np.clip(g.normal(0, 1, SHAPE_SIZE), -2.2, 2.2) * np.exp(-np.arange(SHAPE_SIZE) / 80)
    expression = np.clip(g.normal(0, 0.3, EXPRESSION_SIZE), -0.8, 0.8) * np.exp(-np.arange(EXPRESSION_SIZE) / 25)

    def act(name: str, value: float) -> None:
        expression[EXPRESSIONS[name]] = value

    act("smile", g.choice([g.normal(0, 0.3), g.uniform(0.3, 1.8), g.uniform(-1.0, 0.0)], p=[0.35, 0.5, 0.15]))
    act("pucker", g.uniform(0.3, 1.5) if g.random() < 0.12 else g.normal(0, 0.15))
    act("brow_raise", float(np.clip(g.normal(0.1, 0.6), -1.2, 1.8)))
    lids = g.choice([g.normal(0.0, 0.08), g.uniform(0.2, 1.0), 1.0], p=[0.86, 0.08, 0.06])  # open, narrowed, closed
    act("blink_left", BLINK_CLOSES_AT * lids)
    act("blink_right", BLINK_CLOSES_AT * (lids if g.random() < 0.97 else 1.0))
    act("frown", g.uniform(0.3, 1.5) if g.random() < 0.12 else g.normal(0, 0.25))
    jaw = float(np.clip(abs(g.normal(0, 0.03)) if g.random() < 0.6 else g.uniform(0, 0.25), 0, 0.35))
    jaw_pose = np.array([jaw, *g.normal(0, 0.008, 2)])
    follow = g.random() * 0.5 if g.random() < 0.6 else 0.0  # eyes that turn towards the camera
    gaze = np.clip([g.normal(0, 0.07) - follow * pitch, g.normal(0, 0.10) + follow * yaw], -0.42, 0.42)
    eye_pose = np.array([gaze[0], gaze[1], 0.0] * 2)

    def row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32))[None]

    motion = Motion(row(expression * motion_scale), torch.zeros(1, 3), row(jaw_pose * motion_scale), row(eye_pose))
    return HeadLabel(Camera(*camera), row(shape), motion)


def draw_look(generator: np.random.Generator) -> Look:
    """Colours, hair, accessories and light of one person; independent of the label."""
    g = generator
    skin, ita = skin_colour(g)
    lightness = np.interp(ita, [-10, 35], [0.0, 1.0])

    def choose(table: np.ndarray, light: np.ndarray, dark: np.ndarray) -> np.ndarray:
        weights = lightness * light + (1 - lightness) * dark
        return linear(table[g.choice(len(table), p=weights / weights.sum())] * g.uniform(0.88, 1.12))

    hair = choose(_HAIR_SRGB, _HAIR_WEIGHTS_LIGHT, _HAIR_WEIGHTS_DARK)
    if g.random() < 0.03:  # dyed
        hair = linear(_hsv(g.random(), g.uniform(0.4, 0.7), g.uniform(0.4, 0.8)))
    styles = get_args(HairStyle)
    weights = np.array([0.05, 0.07, 0.15, 0.13, 0.10, 0.08, 0.10, 0.13, 0.07, 0.08, 0.04 + 0.10 * (1 - lightness)])
    style: HairStyle = styles[g.choice(len(styles), p=weights / weights.sum())]
    short = style in ("bald", "buzz", "short", "side_part", "quiff", "afro", "curly")
    beard_p, makeup = (0.38, g.random() < 0.15) if short else (0.05, g.random() < 0.5)
    bearded = g.random() < beard_p
    red = lab_to_linear(np.array([g.uniform(38, 48), g.uniform(28, 46), g.uniform(8, 20)]))
    natural = skin * np.array([0.86, 0.58, 0.62]) if ita > 0 else skin * np.array([0.92, 0.68, 0.72])
    lips = natural * (1 - 0.6 * makeup) + red * 0.6 * makeup if makeup else natural * g.uniform(0.92, 1.06)
    glasses = None
    if g.random() < 0.17:
        glasses = linear([[24, 22, 22], [70, 42, 26], [150, 130, 96], [120, 124, 130], [40, 46, 78], [110, 28, 34]][g.integers(6)])
    cloth = linear(_hsv(g.random(), g.beta(1.4, 3.2), g.uniform(0.15, 0.88)))
    garments = get_args(Garment)
    look = Look(
        skin=skin,
        ruddiness=g.uniform(0.2, 1.0) * (0.5 + 0.5 * lightness),
        freckles=g.uniform(0.3, 1.0) if g.random() < 0.12 * lightness else 0.0,
        lips=lips,
        brows=np.minimum(hair * g.uniform(0.45, 0.8), 0.45),
        brow_thickness=g.uniform(0.7, 1.35),
        brow_strength=g.uniform(0.65, 0.95),
        iris=choose(_IRIS_SRGB, _IRIS_WEIGHTS_LIGHT, _IRIS_WEIGHTS_DARK),
        iris_radius_rad=g.uniform(0.49, 0.54),
        pupil_radius_rad=g.uniform(0.15, 0.24),
        eye_liner=g.uniform(0.4, 0.9) if makeup else g.uniform(0.1, 0.35),
        hair=hair,
        hair_style=style,
        hair_shape=g.random(8),
        stubble=g.uniform(0.2, 0.8) if (short and not bearded and g.random() < 0.35) else 0.0,
        beard_m=g.uniform(0.004, 0.016) if bearded else 0.0,
        moustache=bool(g.random() < 0.8),
        glasses=glasses,
        glasses_shape=g.random(3),
        garment=garments[g.choice(len(garments), p=[0.34, 0.16, 0.15, 0.22, 0.13])],
        cloth=cloth,
        cloth_accent=linear(_hsv(g.random(), g.uniform(0.1, 0.6), g.uniform(0.2, 0.95))),
        cloth_pattern=int(g.choice(3, p=[0.62, 0.2, 0.18])),
        light=draw_light(g),
        noise_seed=int(g.integers(1 << 31)),
    )
    return look._replace(**_float32(look), light=Light(**_float32(look.light)))


def _float32(record: NamedTuple) -> dict[str, np.ndarray]:
    """The arrays of a record in single precision, which is what painting computes in."""
    return {name: value.astype(np.float32) for name, value in record._asdict().items() if isinstance(value, np.ndarray)}


def draw_light(generator: np.random.Generator) -> Light:
    """A key lamp from the front half, a weaker fill from the other side, ambient light; warm against cool."""
    g = generator
    azimuth, elevation = g.uniform(-1.2, 1.2), g.uniform(0.05, 1.0)
    warmth = g.normal(0, 0.5)
    key_strength = g.uniform(0.65, 1.25)
    key = key_strength * _temperature(warmth)
    fill = key_strength * g.uniform(0.1, 0.45) * _temperature(-warmth * g.uniform(0, 1))
    ambient = g.uniform(0.34, 0.62)
    sky = ambient * _temperature(g.normal(-0.15, 0.25))
    return Light(
        _direction(azimuth, elevation), key,
        _direction(-np.sign(azimuth) * g.uniform(0.5, 1.3), g.uniform(-0.1, 0.5)), fill,
        sky, sky * g.uniform(0.45, 0.8) * np.array([1.06, 1.0, 0.92]),
    )  # fmt: skip


def _direction(azimuth_rad: float, elevation_rad: float) -> np.ndarray:
    return np.array(
        [math.sin(azimuth_rad) * math.cos(elevation_rad), math.sin(elevation_rad), math.cos(azimuth_rad) * math.cos(elevation_rad)]
    )


def _temperature(warmth: float) -> np.ndarray:
    """White balance [3] of about unit luminance: 1 = incandescent, -1 = shade."""
    colour = np.array([1 + 0.16 * warmth, 1.0, 1 - 0.22 * warmth])
    return np.clip(colour, 0.4, 1.6)


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """sRGB [3] in [0, 255]."""
    k = (np.array([5, 3, 1]) + hue * 6) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
