"""The Frechet distance between two sets of pictures, on features that need no download or on Inception's where the user has its weights.

Without weights the features are those of a fixed random convolutional network and a thumbnail; they have never seen a photograph, so the
number is no FID and compares only with itself: same features, resolution and counts. Each kind of features gives its number a name of its
own, and only the network that FID is defined with gives "fid".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genhead.inception import Network, read_inception
from genhead.portraits import PortraitSet
from head3d.run.config import config_hash
from head3d.run.files import sha256_of_file, write_atomic
from head3d.run.seeding import numpy_generator

CHANNELS = 16  # of every layer of the random network
SMALLEST_PX = 4  # side of its last layer, and of the thumbnail
_BOUNDS = "lower is better; ceiling: as many other portraits, floor: the mean portrait, again and again"
FRECHET_METRICS = {
    "frechet": f"squared distance of Gaussians of features of a fixed random network (no FID), {_BOUNDS}",
    "fid": f"Frechet Inception distance by pytorch-fid's network and the weights that were given, {_BOUNDS}",
    "frechet_inception": f"squared distance of Gaussians of torchvision's Inception-v3's features (no FID), {_BOUNDS}",
}
_INCEPTION_METRICS: dict[Network, str] = {"fid": "fid", "torchvision": "frechet_inception"}


class Features(NamedTuple):
    """How a picture becomes numbers."""

    metric: str  # what a distance on them is called, a key of FRECHET_METRICS
    name: str  # which they are, to the weights: part of the results, and of the name under which reference statistics are kept
    extract: Callable[[Tensor], Tensor]  # pictures [B, 3, S, S] in [-1, 1] -> [B, F]


class Statistics(NamedTuple):
    """Mean and covariance of features, float64."""

    mean: np.ndarray  # [F]
    covariance: np.ndarray  # [F, F], divided by N - 1


class References(NamedTuple):
    """Statistics of portraits: two sets of equal size without a common picture, so that one shows what real pictures score."""

    first: Statistics
    second: Statistics
    mean_picture: Statistics  # of the first set's mean, again and again: no covariance


def chosen_features(inception: Path | None, device: torch.device | str) -> Features:
    """Those of Inception-v3 with the weights of a file, computed on `device`, or with None the random network's. Raises AssetError."""
    if inception is None:
        return random_convolution_features()
    network, model = read_inception(inception)
    model.to(device)
    name = f"inception-v3-{network}-{sha256_of_file(inception)[:16]}"
    return Features(_INCEPTION_METRICS[network], name, lambda pictures: model(pictures.to(device)))


def random_convolution_features() -> Features:
    """Features of a fixed random network: layers that halve the picture until it is 4 px, and a 4 x 4 thumbnail.

    Layer: 3 x 3 convolution, stride 2, 16 channels, weights ~ N(0, 2 / fan-in) keyed by the layer's number, leaky ReLU 0.2. Each layer
    gives the mean and the standard deviation of every channel over the picture, so all scales count; the thumbnail holds the layout of
    colours. F = 32 log2(S / 4) + 48: 176 at 64 px.
    """
    return Features("frechet", "random-convolution-1", _random_convolutions)


def _random_convolutions(pictures: Tensor) -> Tensor:
    values, found = pictures.float(), [_thumbnail(pictures.float())]
    layer = 0
    while values.shape[-1] > SMALLEST_PX:
        inputs = values.shape[1]
        weight = numpy_generator("random convolution features", layer).standard_normal((CHANNELS, inputs, 3, 3))
        weight = torch.from_numpy(weight * math.sqrt(2 / (9 * inputs))).to(values)
        values = F.leaky_relu(F.conv2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), weight, stride=2), 0.2)
        found += [values.mean((2, 3)), values.flatten(2).std(2, correction=0)]
        layer += 1
    return torch.cat(found, dim=1)


def _thumbnail(pictures: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pictures, SMALLEST_PX).flatten(1)


def statistics(features: Tensor | Iterable[Tensor]) -> Statistics:
    """Statistics of features [N, F], or of batches of them; N >= 2."""
    rows = features if isinstance(features, Tensor) else torch.cat(list(features))
    assert rows.ndim == 2 and len(rows) >= 2, f"features must be [N >= 2, F], got {tuple(rows.shape)}"
    values = rows.double().cpu().numpy()
    return Statistics(values.mean(0), np.cov(values, rowvar=False).reshape(values.shape[1], -1))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    Both roots are taken of symmetric matrices by their eigenvalues, negative ones (rounding) as 0, so covariances of fewer pictures than
    features are allowed. In the features' units squared, >= 0; it falls with the number of pictures, so compare equal numbers.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    apart = np.square(first.mean - second.mean).sum()
    return max(0.0, float(apart + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross))


def reference_statistics(portraits: PortraitSet, count: int, seed: int, features: Features, batch: int, cache: Path | None) -> References:
    """Statistics of two sets of `count` random portraits each; 2 <= count <= half of them.

    With a folder `cache` they are kept there, in a file named for what they depend on.
    """
    depends_on = {"portraits": config_hash(portraits.metadata), "features": features.name, "count": count, "seed": seed}
    file = None if cache is None else cache / f"reference-{config_hash(depends_on)}.npz"
    if file is not None and file.exists():
        with np.load(file, allow_pickle=False) as kept:
            return References(*(Statistics(kept[f"{name}.mean"], kept[f"{name}.covariance"]) for name in References._fields))
    chosen = numpy_generator(seed, "evaluate portraits").permutation(len(portraits))[: 2 * count]
    sets, total = [], torch.zeros(3, portraits.resolution, portraits.resolution, dtype=torch.float64)
    for members in (chosen[:count], chosen[count:]):
        rows = []
        for start in range(0, count, batch):
            pictures = portraits.images(members[start : start + batch])
            rows.append(features.extract(pictures))
            if not sets:
                total += pictures.double().sum(0)
        sets.append(statistics(rows))
    mean = features.extract((total / count)[None].float())[0].double().cpu().numpy()
    found = References(*sets, Statistics(mean, np.zeros((len(mean), len(mean)))))
    if file is not None:
        arrays = {f"{name}.{part}": getattr(value, part) for name, value in found._asdict().items() for part in Statistics._fields}
        write_atomic(file, lambda stream: np.savez(stream, **arrays))
    return found
