"""What is measured of a picture that a reconstructor made, one number a sample; and of a sequence, how steady it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from datagen.reading import ShardDataset
from head3d.cameras import project
from head3d.head_model import HeadModel
from head3d.image_metrics import masked_mean, psnr, ssim
from head3d.labels import unpack_label
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator
from reconstructor.batches import as_picture
from reconstructor.evaluation_cases import Pictured, Sample

METRICS = {
    "psnr": "dB, whole picture, higher is better",
    "psnr_head": "dB, where the head truly is, higher is better",
    "ssim": "whole picture, higher is better",
    "eye_l1": "mean colour difference, 0 to 1, in boxes around the eyes' landmarks where the true label puts them, lower is better",
    "mouth_l1": "the same around the mouth's landmarks, lower is better",
    "depth": "mean distance error on the head, scene units (a third of a metre), lower is better",
    "opacity_iou": "opacity > 0.5 against the true one, higher is better",
}
STEADINESS_METRICS = {
    "flicker": "mean |(a' - a) - (t' - t)|, 0 to 1, of consecutive pictures a, a' and true ones t, t', lower is better",
    "change": "mean |a' - a| - mean |t' - t|: above 0 it moves more than the truth, below 0 less",
}
# Landmarks, and how far the box around them is enlarged on each side, in parts of its longer side
_EYES = ((range(36, 42), 0.5), (range(42, 48), 0.5))
_MOUTH = ((range(48, 68), 0.25),)


def measure(made: Pictured, samples: list[Sample], head: HeadModel) -> dict[str, Tensor]:
    """Metric of METRICS -> [B]; NaN where it does not apply. made: with a batch in front; head: that of the labels."""
    truth, opacity, label = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "opacity", "target_label"))
    on_head = F.interpolate(opacity, size=truth.shape[-2:], mode="bilinear", align_corners=False)
    eyes, mouth = feature_boxes(label, head, truth.shape[-1])
    difference = (made.image.clamp(-1, 1) - truth.clamp(-1, 1)).abs() / 2
    result = {
        "psnr": psnr(made.image, truth),
        "psnr_head": psnr(made.image, truth, on_head),
        "ssim": ssim(made.image, truth),
        "eye_l1": masked_mean(difference, eyes),
        "mouth_l1": masked_mean(difference, mouth),
        "depth": torch.full((len(samples),), math.nan),
        "opacity_iou": torch.full((len(samples),), math.nan),
    }
    if made.depth is not None and samples[0].depth is not None:
        result["depth"] = masked_mean((made.depth - torch.stack([sample.depth for sample in samples])).abs(), opacity)
    if made.opacity is not None:
        result["opacity_iou"] = overlap(made.opacity > 0.5, opacity > 0.5)
    return result


def feature_boxes(label: Tensor, head: HeadModel, side: int) -> tuple[Tensor, Tensor]:
    """Where eyes and mouth of labels [B, 437] are in pictures of `side` pixels: two masks [B, 1, side, side] of 0 and 1.

    A box holds the pixels whose centre lies in the upright rectangle around the projected landmarks of an eye (or of the mouth),
    enlarged by half (a quarter) of its longer side on all sides. Landmarks count also where the head hides them.
    """
    device = head.landmark_corners.device
    camera, shape, motion = unpack_label(label.to(device))
    points = project(head.landmarks(head.vertices(shape, motion)), camera)[0].cpu()
    centres = (torch.arange(side) + 0.5) / side
    masks = []
    for boxes in (_EYES, _MOUTH):
        inside = torch.zeros(len(label), side, side, dtype=torch.bool)
        for numbers, margin in boxes:
            corners = points[:, list(numbers)]
            low, high = corners.amin(1), corners.amax(1)  # [B, 2] x, y
            reach = margin * (high - low).amax(1, keepdim=True)
            within = ((centres > (low - reach)[..., None]) & (centres < (high + reach)[..., None])).unbind(1)  # [B, side] each
            inside |= within[1][:, :, None] & within[0][:, None, :]
        masks.append(inside[:, None].float())
    return masks[0], masks[1]


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union [B] of masks [B, 1, R, R]; NaN where both are empty."""
    both, either = (first & second).flatten(1).sum(1), (first | second).flatten(1).sum(1)
    return both / either


def steadiness(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Metric of STEADINESS_METRICS of a sequence [T, 3, S, S] in [-1, 1] against the true one; both are clamped."""
    made, true = (pictures.clamp(-1, 1).diff(dim=0) / 2 for pictures in (images, truth))
    return {"flicker": float((made - true).abs().mean()), "change": float(made.abs().mean() - true.abs().mean())}


def mean_training_image(dataset: ShardDataset, count: int, seed: int) -> Tensor:
    """Mean [3, S, S] of `count` training pictures (all, if there are fewer)."""
    frames = [frame for frame in dataset.frames if frame.split == "train" and frame.kind != "motion-rich"]
    pictures = [(frame, view) for frame in frames for view in range(frame.views)]
    if not pictures:
        raise DataError(f"{dataset.storage.address}: no training frame to average; the data set holds held-out identities only")
    chosen = numpy_generator(seed, "mean image").permutation(len(pictures))[:count]
    total = 0.0
    for index in chosen:
        frame, view = pictures[index]
        total = total + as_picture(dataset.read(frame, [f"rgb.{view}"])[f"rgb.{view}"]).astype("float64")
    return torch.from_numpy(total / len(chosen)).float()
