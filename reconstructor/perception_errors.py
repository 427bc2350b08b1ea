"""How wrong the perception network is, on people whom no network of either role has seen; and who can be told by a motion vector.

Whoever prints a number that the network read prints the network's own error beside it. Every measure stands beside what somebody gets
who does not look at the picture: the mean of the training labels, or chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.head_model import SCENE_UNITS_PER_METRE, HeadModel
from head3d.labels import Motion, unpack_label
from head3d.rotations import axis_angle_to_matrix
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator, torch_generator
from reconstructor.batches import FrameSource
from reconstructor.order import Frame
from reconstructor.perception import Perception, Reading, feature_distance, true_reading
from reconstructor.perception_data import PictureKey, Pictures, read_pictures, replace_background

READING_UNITS = {
    "expression": "FLAME coefficients, mean absolute difference",
    "face_mm": "mm, mean distance of vertices that the difference in expression and jaw moves, on the true shape",
    "jaw_deg": "degrees between jaw rotations",
    "gaze_deg": "degrees between directions of gaze, relative to the head, mean of both eyes",
    "rotation_deg": "degrees between head rotations in camera axes",
    "landmarks": "picture sides, mean distance of 70 points",
}
PICTURE_UNITS = {
    "perceptual": "our perceptual distance from the truth, the picture's whole area, lower is better",
    "identity_cosine": "cosine of the identity embeddings of picture and source, higher is better",
} | {name: f"{unit}; read off the picture, against the true label, lower is better" for name, unit in READING_UNITS.items()}
_BATCH = 64
_MOST_FRAMES = 2000  # held-out frames measured, all views of each
PROBES = {"nearest": "nearest-neighbour classifier", "linear": "linear classifier"}
_RIDGE = 1.0  # of the linear probe, on standardised numbers


def rotation_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees [...] between rotations [..., 3, 3]: 2 asin(|A - B| / sqrt 8), exact also for small angles."""
    return torch.rad2deg(2 * torch.asin(((first - second).square().sum((-1, -2)).sqrt() / 8**0.5).clamp(max=1)))


def gaze_directions(eye_pose: Tensor) -> Tensor:
    """Unit vectors [B, 2, 3] in head axes: where the eyes of pose [B, 6] look; straight ahead is +z."""
    return axis_angle_to_matrix(eye_pose.unflatten(1, (2, 3)))[..., 2]


def face_mesh(reading: Reading, eye_pose: Tensor, shape: Tensor, head: HeadModel) -> Tensor:
    """Vertices [B, N, 3] of the expression and jaw of a reading, the neck straight; scene units."""
    return head.vertices(shape, Motion(reading.expression, torch.zeros_like(reading.jaw_pose), reading.jaw_pose, eye_pose))


def reading_errors(
    reading: Reading,
    truth: Reading,
    shape: Tensor,  # [B, 300] the true one
    head: HeadModel,
    true_mesh: Tensor | None = None,  # `face_mesh` of the truth, where it is at hand
) -> dict[str, Tensor]:
    """Measure -> [B], in the units of READING_UNITS."""
    if true_mesh is None:
        true_mesh = face_mesh(truth, truth.eye_pose, shape, head)
    cosine = (gaze_directions(reading.eye_pose) * gaze_directions(truth.eye_pose)).sum(-1)
    return {
        "expression": (reading.expression - truth.expression).abs().mean(1),
        "face_mm": (face_mesh(reading, truth.eye_pose, shape, head) - true_mesh).norm(dim=2).mean(1) * (1000 / SCENE_UNITS_PER_METRE),
        "jaw_deg": rotation_angle(axis_angle_to_matrix(reading.jaw_pose), axis_angle_to_matrix(truth.jaw_pose)),
        "gaze_deg": torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).mean(1),
        "rotation_deg": rotation_angle(reading.rotation, truth.rotation),
        "landmarks": (reading.landmarks - truth.landmarks).norm(dim=2).mean(1),
    }


class Judge:
    """A perception network of the role "evaluation" before B samples; what depends on their truth alone is computed once."""

    @torch.no_grad()
    def __init__(
        self,
        network: Perception,
        head: HeadModel,
        truth: Tensor,  # [B, 3, S, S] in [-1, 1]: what a reconstructor should make
        source: Tensor,  # [B, 3, S, S] what it is shown
        label: Tensor,  # [B, 437] of the truth
    ) -> None:
        self._network, self._head, self._device = network, head, network.centre.device
        truth, source, label = (values.to(self._device) for values in (truth, source, label))
        self._layers, self._person = network.trunk(truth), network.identity(source)
        self._truth, self._shape = true_reading(label, head), unpack_label(label).shape
        self._mesh = face_mesh(self._truth, self._truth.eye_pose, self._shape, head)

    @torch.no_grad()
    def measures(self, images: Tensor) -> dict[str, Tensor]:
        """Measure -> [B] on the CPU, in the units of PICTURE_UNITS, of pictures [B, 3, S, S]. Of the truth itself they are the network's
        own error."""
        network, images = self._network, images.to(self._device)
        features = network.trunk.summary(images)
        found = {
            "perceptual": feature_distance(network.trunk(images), self._layers),
            "identity_cosine": (F.normalize(network.to_identity(features), dim=1) * self._person).sum(1),
        }
        found |= reading_errors(network.read_features(features), self._truth, self._shape, self._head, self._mesh)
        return {name: values.cpu() for name, values in found.items()}


@torch.no_grad()
def held_out_errors(network: Perception, dataset: FrameSource, head: HeadModel, where: str) -> dict[str, Any]:
    """The network's errors on the val and test identities of a data set; JSON.

    `reading`: measure -> {unit, network, mean}: mean error of the network, and of the mean of its training labels.
    `identity`: how well people are told apart, every background replaced by noise. `motion`: see `motion_measures`.
    Raises DataError if no identity is held out.
    """
    keys = held_out_pictures(dataset.frames, where)
    device = network.centre.device
    errors: dict[str, dict[str, list[Tensor]]] = {"network": {}, "mean": {}}
    embeddings, codes, flame, frames, people = [], [], [], [], []
    for number, pictures in enumerate(_batches(dataset, keys, network.config.resolution)):
        pictures = pictures.to(device)
        label, truth = unpack_label(pictures.label), true_reading(pictures.label, head)
        mesh = face_mesh(truth, truth.eye_pose, label.shape, head)
        for who, reading in (("network", network.read(pictures.image)), ("mean", network.mean_reading(len(pictures.image)))):
            for name, values in reading_errors(reading, truth, label.shape, head, mesh).items():
                errors[who].setdefault(name, []).append(values.cpu())
        noise = torch.randn(len(pictures.image), 3, 8, 8, generator=torch_generator("perception errors", number)).to(device)
        everywhere = torch.ones(len(pictures.image), dtype=torch.bool, device=device)
        image = replace_background(pictures.image, pictures.opacity, noise, everywhere)
        embeddings.append(network.identity(image).cpu())
        codes.append(network.motion.coefficients(image).cpu())
        flame.append(network.motion.flame_coefficients(label.motion).cpu())
        frames.append(pictures.frame.cpu())
        people.append(pictures.identity.cpu())
    identity, frame, embedding = torch.cat(people), torch.cat(frames), torch.cat(embeddings)
    means = {who: {name: float(torch.cat(values).mean()) for name, values in found.items()} for who, found in errors.items()}
    return {
        "identities": len(identity.unique()),
        "pictures": len(identity),
        "reading": {name: {"unit": unit} | {who: means[who][name] for who in means} for name, unit in READING_UNITS.items()},
        "identity": identity_measures(embedding, identity, frame),
        "motion": motion_measures(torch.cat(codes), torch.cat(flame), embedding, identity, frame),
    }


def held_out_pictures(frames: Sequence[Frame], where: str) -> list[PictureKey]:
    """All views of the val and test frames, of a random part of them if there are many. Raises DataError if there are none."""
    held_out = [index for index, frame in enumerate(frames) if frame.split != "train"]
    if not held_out:
        raise DataError(
            f"{where}: no identity is held out, so the network's error cannot be measured; "
            "generate the data set with --recipe.val_share or --recipe.test_share above 0"
        )
    chosen = sorted(numpy_generator("perception errors").permutation(held_out)[:_MOST_FRAMES].tolist())
    return [PictureKey(index, view) for index in chosen for view in range(frames[index].views)]


def _batches(dataset: FrameSource, keys: list[PictureKey], side: int) -> Iterator[Pictures]:
    for start in range(0, len(keys), _BATCH):
        yield read_pictures(dataset, keys[start : start + _BATCH], side)


def identity_measures(embedding: Tensor, identity: Tensor, frame: Tensor) -> dict[str, float | None]:
    """How well unit vectors [N, E] tell people [N] apart over pairs of pictures from different frames [N] (motions).

    same, different: mean cosine of pairs of one person and of two; separation: the probability that the first is larger (area under the
    ROC curve; 0.5 is chance). None where there are no such pairs.
    """
    cosines = embedding @ embedding.T
    first, second = torch.triu_indices(len(identity), len(identity), 1)
    other_motion = frame[first] != frame[second]
    of_one = identity[first] == identity[second]
    same, different = cosines[first, second][of_one & other_motion], cosines[first, second][~of_one]
    if not len(same) or not len(different):
        return {"same": None, "different": None, "separation": None}
    return {"same": float(same.mean()), "different": float(different.mean()), "separation": separation(same, different)}


def separation(higher: Tensor, lower: Tensor) -> float:
    """Probability that one of `higher` [N] exceeds one of `lower` [M]; equal ones count half."""
    ordered = lower.sort().values
    below, up_to = torch.searchsorted(ordered, higher), torch.searchsorted(ordered, higher, right=True)
    return float((below + up_to).double().mean() / (2 * len(lower)))


def motion_measures(codes: Tensor, flame: Tensor, embedding: Tensor, identity: Tensor, frame: Tensor) -> dict[str, Any]:
    """What a motion vector tells of the motion, and what it should not tell: who moves.

    codes, flame: unit vectors [N, n] from pictures and from the true motions; embedding [N, E] of the same pictures.
    rank: mean share of the pictures of all people in other motions that lie nearer to a true motion than a picture that shows it (0 is
    perfect, 0.5 is chance). told_by_...: share of pictures whose person a classifier names that was fitted on other motions of the same
    people, from the motion vector and, for comparison, from the identity embedding; None if nobody has two motions.
    """
    cosines = flame @ codes.T
    nearer = (cosines > cosines.diagonal()[:, None]) & (frame[:, None] != frame[None])
    others = (frame[:, None] != frame[None]).sum(1).clamp(min=1)
    found: dict[str, Any] = {"rank": float((nearer.sum(1) / others).mean())}
    fitted, tested = split_by_motion(identity, frame)
    people = int(identity[fitted].unique().numel())
    found["people"], found["chance"] = people, 1 / people if people else None
    for name, vectors in (("motion_vector", codes), ("identity_embedding", embedding)):
        for probe in (nearest_probe, linear_probe):
            value = probe(vectors[fitted], identity[fitted], vectors[tested], identity[tested]) if people else None
            found[f"told_by_{name}_{probe.__name__.removesuffix('_probe')}"] = value
    return found


def split_by_motion(identity: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of pictures to fit a classifier of people on, and to test it on: of everybody with two motions or more, every second
    motion each, so that no motion is in both."""
    fitted, tested = [], []
    for number in identity.unique().tolist():
        motions = frame[identity == number].unique().tolist()
        if len(motions) < 2:
            continue
        for place, motion in enumerate(motions):
            (tested if place % 2 else fitted).append(torch.nonzero(frame == motion)[:, 0])
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *fitted]), torch.cat([empty, *tested])


def nearest_probe(fitted: Tensor, people: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Share of `tested` [M, E] whose nearest of `fitted` [N, E] (largest cosine) belongs to the right person."""
    nearest = (F.normalize(tested, dim=1) @ F.normalize(fitted, dim=1).T).argmax(1)
    return float((people[nearest] == truth).double().mean())


def linear_probe(fitted: Tensor, people: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Share of `tested` that a linear classifier names: ridge regression of standardised numbers on one-hot people."""
    numbers, targets = people.unique(return_inverse=True)
    centre, spread = fitted.double().mean(0), fitted.double().std(0, correction=0).clamp(min=1e-8)
    inputs, checked = (torch.cat([(x.double() - centre) / spread, torch.ones(len(x), 1).double()], dim=1) for x in (fitted, tested))
    gram = inputs.T @ inputs + _RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ F.one_hot(targets, len(numbers)).double())
    return float((numbers[(checked @ weights).argmax(1)] == truth).double().mean())


class OwnError(NamedTuple):
    """One measure of the network, for a table."""

    name: str
    network: float
    blind: float  # of who does not look: the mean of the training labels, or chance
    blind_is: str  # which of the two
    meaning: str


def own_errors(errors: dict[str, Any]) -> list[OwnError]:
    """What `held_out_errors` found, line by line; what could not be measured is left out."""
    rows = [OwnError(name, one["network"], one["mean"], "mean", one["unit"]) for name, one in errors["reading"].items()]
    identity, motion = errors["identity"], errors["motion"]
    if identity["separation"] is not None:
        meaning = "probability that one person's pictures are more alike than two people's "
        meaning += f"(cosine {identity['same']:.3f}, {identity['different']:.3f})"
        rows.append(OwnError("identity", identity["separation"], 0.5, "chance", meaning))
    meaning = "share of other motions' pictures that lie nearer to a motion's vector than one that shows it"
    rows.append(OwnError("motion rank", motion["rank"], 0.5, "chance", meaning))
    for probe in ("nearest", "linear") if motion["chance"] is not None else ():
        told, known = (motion[f"told_by_{name}_{probe}"] for name in ("motion_vector", "identity_embedding"))
        meaning = f"share of pictures whose person, of {motion['people']}, a {PROBES[probe]} tells by the motion vector; "
        rows.append(OwnError("person told", told, motion["chance"], "chance", f"{meaning}by the identity embedding {known:.4f}"))
    return rows


def errors_table(errors: dict[str, Any]) -> str:
    """The errors as text."""
    lines = [f"own error on {errors['pictures']} pictures of {errors['identities']} people held out; mean: the mean of the training labels"]
    lines += [f"  {row.name:13} {row.network:9.4f}   {row.blind_is:6} {row.blind:9.4f}   {row.meaning}" for row in own_errors(errors)]
    return "\n".join(lines)
