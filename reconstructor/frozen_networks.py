"""The terms of eq. 4 that a frozen network judges: how alike two pictures look, and whether they show one person.

Perceptual term: the distance of rendered and true final picture, raw picture, foreground and background, each mean added with weight 1;
identity term: 1 - cosine of the embeddings of rendered and true final picture (Portrait4D, arXiv:2311.18729, eq. 4; portrait4d,
section 6.8). The published ones are LPIPS on VGG-16 and ArcFace, for who has their files. Without them, the perception network that was
trained for losses on made-up people takes both places (`perception.py`); what evaluates a reconstructor is another one, and is refused
here. Logs call each by its own name: `perceptual` and `identity` are ours, `lpips` and `arcface` the published ones.

Gradients flow into the rendered pictures, never into networks or truth. Published weights are meant for LPIPS; our distance, a sum over
layers without learned weights, began five to eight times as large as the L1 of the same pictures in a training of 64 x 64 pixels.
Forward and backward pass of one sample of 512 x 512 pixels and 64 x 64 rays: LPIPS 504 GFLOP and 670 MB kept for the gradient, our
distance (default widths) 32 GFLOP and 110 MB, ArcFace (IR-18) 16 GFLOP and 50 MB, our embedding 5 MB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from head3d.head_model import HeadModel
from head3d.rendering import HeadImages
from head3d.run.checkpoint import exported_hash
from head3d.run.errors import ConfigError
from head3d.run.files import sha256_of_file
from reconstructor.batches import Batch
from reconstructor.losses import LossConfig, picture_pairs
from reconstructor.perception import Perception, load_perception, true_reading
from reconstructor.published_perception import ArcFace, align_faces, load_arcface, load_lpips


class PerceptualNetwork(NamedTuple):
    """Says how different two pictures look."""

    name: str  # in logs
    distance: Callable[[Tensor, Tensor], Tensor]  # pictures and truth [B, 3, H, W] in [-1, 1], of any side -> [B] >= 0
    weights_hash: str  # identifies what the distance is computed with


class IdentityNetwork(NamedTuple):
    """Says who is in a picture."""

    name: str  # in logs
    embed: Callable[[Tensor, Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1] and what they show, labels [B, 437] -> unit vectors [B, E]
    weights_hash: str  # identifies what the embedding is computed with


class FrozenNetworks(NamedTuple):
    """What a run's losses ask; None where a term has no weight or no network."""

    perceptual: PerceptualNetwork | None
    identity: IdentityNetwork | None

    def weights_hashes(self) -> dict[str, str]:
        """By name in logs: another network makes another run."""
        return {network.name: network.weights_hash for network in self if network is not None}


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """Where frozen networks are. Published ones, where given, take the place of ours."""

    perception: Path | None  # export of the perception command with role losses
    lpips: tuple[Path, ...]  # LPIPS and VGG-16, for the perceptual term
    arcface: Path | None  # ArcFace, for the identity term

    def lacking(self, config: LossConfig) -> list[str]:
        """Terms that have a weight but no network, each with what to give."""
        ours = "--perception DIR (its export; `headfoundry perception --role losses --out RUN` trains one, in RUN/export)"
        lpips = "--lpips FILE FILE (LPIPS: the authors' vgg.pth of version 0.1 and torchvision's VGG-16)"
        arcface = "--arcface FILE (ArcFace: backbone.pth of one of insightface's IR-ResNets)"
        found = []
        if config.perceptual.weight > 0 and not self.perception and not self.lpips:
            found.append(f"losses.perceptual: no network compares pictures; give {ours} or {lpips}")
        if config.identity.weight > 0 and not self.perception and not self.arcface:
            found.append(f"losses.identity: no network tells people apart; give {ours} or {arcface}")
        return found


def check_networks(files: NetworkFiles, config: LossConfig, missing: Literal["refuse", "drop"]) -> list[str]:
    """Raise ConfigError if a term with a weight has no network, or say which terms do without if they may be dropped."""
    lacking = files.lacking(config)
    if lacking and missing == "refuse":
        raise ConfigError("; ".join(lacking) + "; or train without such terms by setting their weights to 0, or by --missing_networks drop")
    return [f"{message}; this run does without the term" for message in lacking]


def load_frozen_networks(
    files: NetworkFiles,
    config: LossConfig,
    head: HeadModel,  # the labels', on `device`; its landmarks place ArcFace's crop
    device: torch.device | str = "cpu",
    perception: Perception | None = None,  # that of `files` where it has been loaded before, on `device`
) -> FrozenNetworks:
    """The networks of terms with a weight, as far as there are files.

    Raises AssetError if a file is missing, damaged, does not fit, or holds a perception network that was trained for evaluation.
    """
    compares, recognises = config.perceptual.weight > 0, config.identity.weight > 0
    ours = None
    if files.perception and ((compares and not files.lpips) or (recognises and not files.arcface)):
        ours, ours_hash = perception or load_perception(files.perception, "losses", device), exported_hash(files.perception)
    perceptual = identity = None
    if compares and files.lpips:
        distance = load_lpips("vgg", files.lpips).to(device)
        perceptual = PerceptualNetwork("lpips", distance, " ".join(sorted(sha256_of_file(path)[:16] for path in files.lpips)))
    elif compares and ours:
        perceptual = PerceptualNetwork("perceptual", ours.perceptual_distance, ours_hash)
    if recognises and files.arcface:
        identity = arcface_network(load_arcface(files.arcface).to(device), head, sha256_of_file(files.arcface)[:16])
    elif recognises and ours:
        identity = IdentityNetwork("identity", lambda pictures, labels: ours.identity(pictures), ours_hash)
    return FrozenNetworks(perceptual, identity)


def arcface_network(network: ArcFace, head: HeadModel, weights_hash: str) -> IdentityNetwork:
    """ArcFace on faces that are cut out by where a label says that the landmarks are; network and head on one device."""

    def embed_face(pictures: Tensor, labels: Tensor) -> Tensor:
        return network(align_faces(pictures, true_reading(labels, head).landmarks))

    return IdentityNetwork("arcface", embed_face, weights_hash)


def frozen_network_losses(
    config: LossConfig, networks: FrozenNetworks, rendered: HeadImages, batch: Batch, images_seen: int
) -> dict[str, Tensor]:
    """The active terms, each already multiplied by its weight. Means over the batch; R as in `reconstruction_losses`.

    Both networks see pictures as they were trained: ours whole ones of any side, ArcFace the face cut out by where the target's
    projected landmarks are, in the rendered picture too.
    """
    terms: dict[str, Tensor] = {}
    if networks.perceptual and config.perceptual.active(images_seen):
        pairs = picture_pairs(rendered, batch)
        final, small = pairs.pop("final"), [torch.cat(pictures) for pictures in zip(*pairs.values(), strict=True)]
        distances = (networks.perceptual.distance(*final), *networks.perceptual.distance(*small).chunk(len(pairs)))
        for name, distance in zip(("final", *pairs), distances, strict=True):
            terms[f"{networks.perceptual.name}_{name}"] = config.perceptual.weight * distance.mean()
    if networks.identity and config.identity.active(images_seen):
        with torch.no_grad():
            person = networks.identity.embed(batch.image, batch.label)
        cosine = (networks.identity.embed(rendered.image, batch.label) * person).sum(1)
        terms[networks.identity.name] = config.identity.weight * (1 - cosine).mean()
    return terms
