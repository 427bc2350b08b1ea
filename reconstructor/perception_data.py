"""What the perception network trains on: several motions of each of some identities, changed in colour, sharpness, place and backdrop.

The order is endless and a pure function of (frames, role, seed, position): identities are permuted epoch by epoch, and each shows as many
of its motions as it has, each from a camera drawn anew. Two networks never share a training person: every one belongs, by a draw of its
own number, either to the network that is a loss or to the one that evaluates.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.networks.resample import resize_antialias
from head3d.run.config import Fraction, NonNegativeFloat, PositiveInt
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator
from reconstructor.batches import FrameSource, as_picture
from reconstructor.order import Frame
from reconstructor.perception import Role

_PREFETCH = 2  # batches decoded ahead


@dataclasses.dataclass(frozen=True)
class PictureBatchConfig:
    """How a batch is drawn."""

    identities: PositiveInt = 16  # people in a batch, over all ranks
    pictures: PositiveInt = 8  # of each; all but one are the negatives of a motion


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training picture. Every draw is one picture's own."""

    gain: NonNegativeFloat = 0.25  # contrast, and of each colour channel again: exp(U(-, +))
    brightness: NonNegativeFloat = 0.2  # added, of a range of 2: U(-, +)
    saturation: NonNegativeFloat = 0.5  # colours are mixed with grey, or away from it: factor 1 + U(-, +)
    blur: NonNegativeFloat = 0.02  # Gaussian, standard deviation U(0, +), in picture sides
    zoom: NonNegativeFloat = 0.1  # about the middle: exp(U(-, +))
    shift: NonNegativeFloat = 0.06  # along x and y: U(-, +), in picture sides
    background_share: Fraction = 0.75  # of the pictures whose background becomes smooth noise: people must not be told by it


class PictureKey(NamedTuple):
    """One picture by its frame's index and its view."""

    frame: int
    view: int


class Pictures(NamedTuple):
    """B pictures with what is known of them."""

    image: Tensor  # [B, 3, H, W] in [-1, 1]
    opacity: Tensor  # [B, 1, H, W] in [0, 1]
    label: Tensor  # [B, 437]
    frame: Tensor  # [B] int64, index of the frame: one identity in one motion
    identity: Tensor  # [B] int64

    def to(self, device: torch.device | str) -> Pictures:
        return Pictures(*(value.to(device, non_blocking=True) for value in self))


def role_of(identity: int) -> Role:
    """To which of the two networks a training identity belongs; it depends on its number alone, also when the data set grows."""
    return "losses" if numpy_generator("perception role", identity).random() < 0.5 else "evaluation"


def training_frames(frames: Sequence[Frame], role: Role, where: str) -> dict[int, list[int]]:
    """Frame indices by training identity of this role. Raises DataError if there are fewer than two, or none has two motions."""
    found: dict[int, list[int]] = {}
    for index, frame in enumerate(frames):
        if frame.split == "train" and role_of(frame.identity) == role:
            found.setdefault(frame.identity, []).append(index)
    moving = sum(len(indices) > 1 for indices in found.values())
    if len(found) < 2 or not moving:
        raise DataError(
            f"{where}: expected at least two training identities for the role '{role}', one of them with two motions or more; "
            f"got {len(found)}, {moving} with motions; generate more identities, and dynamic ones (--recipe.dynamic_share)"
        )
    return found


class PictureOrder:
    """The endless order of batches; nothing is remembered."""

    def __init__(self, frames: Sequence[Frame], by_identity: dict[int, list[int]], config: PictureBatchConfig, seed: int) -> None:
        self._frames, self._by_identity, self._config, self._seed = frames, by_identity, config, seed
        self._identities = np.array(sorted(by_identity))

    @property
    def batch_size(self) -> int:
        """Pictures in a batch, over all ranks."""
        return self._config.identities * self._config.pictures

    def pictures_of(self, position: int) -> list[PictureKey]:
        """The pictures of the identity at `position` of the order: different motions as far as there are, then other views of them."""
        epoch, place = divmod(position, len(self._identities))
        identity = int(numpy_generator(self._seed, "people", epoch).permutation(self._identities)[place])
        rng = numpy_generator(self._seed, "pictures", position)
        indices = rng.permutation(self._by_identity[identity])
        chosen = [int(indices[k % len(indices)]) for k in range(self._config.pictures)]
        return [PictureKey(index, int(rng.integers(self._frames[index].views))) for index in chosen]

    def batch(self, images_seen: int, rank: int = 0, world_size: int = 1) -> list[PictureKey]:
        """What `rank` reads of the batch that starts at `images_seen`: all pictures of every world_size-th identity."""
        first = images_seen // self._config.pictures
        return [key for k in range(rank, self._config.identities, world_size) for key in self.pictures_of(first + k)]


def read_pictures(dataset: FrameSource, keys: Sequence[PictureKey], side: int) -> Pictures:
    """Read, decode and resize to `side` px, pictures and opacity: the kinds of identities have pictures of different sides.

    Raises DataError (from the reader) if a member is missing or damaged.
    """
    rows = []
    for key in keys:
        frame, picture = dataset.frames[key.frame], f"rgb.{key.view}"
        data = dataset.read(frame, [picture, "opacity", "label"])
        maps = (torch.from_numpy(values)[None] for values in (as_picture(data[picture]), data["opacity"][key.view][None]))
        image, opacity = (resize_antialias(values, side)[0] for values in maps)
        label = torch.from_numpy(np.array(data["label"][key.view]))
        rows.append((image, opacity, label, torch.tensor(key.frame), torch.tensor(frame.identity)))
    return Pictures(*(torch.stack(column) for column in zip(*rows, strict=True)))


def stream_pictures(
    dataset: FrameSource, order: PictureOrder, side: int, images_seen: int, rank: int, world_size: int
) -> Iterator[Pictures]:
    """Batches of one rank for ever, read ahead by a thread. An error while reading is raised in the batch's turn; `close` it after use."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as thread:
        ahead: collections.deque[Future[Pictures]] = collections.deque()
        try:
            while True:
                while len(ahead) < _PREFETCH:
                    ahead.append(thread.submit(read_pictures, dataset, order.batch(images_seen, rank, world_size), side))
                    images_seen += order.batch_size
                yield ahead.popleft().result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


class Augmented(NamedTuple):
    """Changed pictures, and where their points went."""

    image: Tensor  # [B, 3, H, W] in [-1, 1]
    scale: Tensor  # [B] a point u of the picture in [0, 1] is now at (u - 1/2) * scale + 1/2 + shift
    shift: Tensor  # [B, 2]

    def move(self, points: Tensor) -> Tensor:
        """Points [B, N, 2] of the picture, in [0, 1], in the changed one."""
        return (points - 0.5) * self.scale[:, None, None] + 0.5 + self.shift[:, None]


def augment(pictures: Pictures, config: AugmentConfig, draws: torch.Generator, rows: Tensor, total: int) -> Augmented:
    """Change pictures at random. The whole batch of `total` is drawn and `rows` [B] are ours, so that the number of ranks changes nothing.

    Shift and zoom are another principal point and focal length, so the head's rotation in camera axes stays as it is.
    """
    image, device = pictures.image, pictures.image.device
    uniform = (torch.rand(total, 11, generator=draws) * 2 - 1)[rows].to(device)  # U(-1, 1)
    backdrop = torch.randn(total, 3, 8, 8, generator=draws)[rows].to(device)
    if config.background_share > 0:
        image = replace_background(image, pictures.opacity, backdrop, uniform[:, 10] < config.background_share * 2 - 1)
    scale, shift = torch.exp(config.zoom * uniform[:, 0]), config.shift * uniform[:, 1:3]
    image = _move(image, scale, shift)
    image = _blur(image, config.blur * uniform[:, 3].abs(), config.blur)
    gain = torch.exp(config.gain * (uniform[:, 4:5] + uniform[:, 5:8]))[:, :, None, None]
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (1 + config.saturation * uniform[:, 8])[:, None, None, None]
    image = image * gain + 2 * config.brightness * uniform[:, 9][:, None, None, None]
    return Augmented(image.clamp(-1, 1), scale, shift)


def replace_background(image: Tensor, opacity: Tensor, noise: Tensor, where: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] over smooth noise instead of what was behind the head, for those with `where` [B].

    noise [B, 3, n, n] is widened to the picture; opacity [B, 1, H, W] decides how much of a pixel stays. What shines through a
    half-covered pixel stays too, in proportion.
    """
    behind = F.interpolate(noise, size=image.shape[-2:], mode="bicubic", align_corners=False).mul(0.7).clamp(-1, 1)
    return torch.where(where[:, None, None, None], opacity * image + (1 - opacity) * behind, image)


def _move(image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Zoom about the middle, then shift (in picture sides); the border repeats."""
    matrix = torch.zeros(len(image), 2, 3, device=image.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale  # output place -> input place, both in [-1, 1]
    matrix[:, :, 2] = -2 * shift / scale[:, None]
    places = F.affine_grid(matrix, list(image.shape), align_corners=False)
    return F.grid_sample(image, places, padding_mode="border", align_corners=False)


def _blur(image: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian of sigma [B] <= largest, in picture sides; the border repeats."""
    deviation = (sigma * image.shape[-1]).clamp(min=1e-3)
    radius = int(2.5 * largest * image.shape[-1] + 0.5)
    steps = torch.arange(-radius, radius + 1, device=image.device)
    taps = torch.exp(-0.5 * (steps / deviation[:, None]).square())
    taps = taps / taps.sum(1, keepdim=True)
    batch, channels, height, width = image.shape
    kernel = taps.repeat_interleave(channels, 0)[:, None]
    rows = F.pad(image, (radius,) * 4, mode="replicate").reshape(1, batch * channels, height + 2 * radius, width + 2 * radius)
    rows = F.conv2d(rows, kernel[:, :, None, :], groups=batch * channels)
    return F.conv2d(rows, kernel[:, :, :, None], groups=batch * channels).reshape(batch, channels, height, width)
