"""Where the motion vectors come from that a reconstructor's attention reads (`architecture.motion`).

    flame   expression, jaw and eyes of a label, see motion.flame_motion_vector          109 numbers
    image   read off a picture by a perception network's motion encoder, frozen          548 numbers
            where there is FLAME motion and no picture: the encoder's branch for it       the same numbers, less exactly
            of an encoder that is not here (published networks: PD-FGC's): from files     548 numbers; `drive` takes them

The published encoder wants faces cut out and aligned by landmarks (portrait4d, section 6.2). Ours has learned on whole pictures in the
framing of labels (`sources.py`), zoomed and shifted at random, and is given such pictures: those of shards, and the central square or
crop of others. An encoder is a part of the reconstructor that was trained with it: another one's vectors mean nothing to it, so its
hash stands in checkpoints and exports, and others are refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from head3d.labels import Motion
from head3d.run.checkpoint import exported_config, exported_hash
from head3d.run.errors import AssetError, ConfigError
from reconstructor.batches import Batch
from reconstructor.model import EXPORT_KIND, ReconstructorExport
from reconstructor.motion import MotionKind, flame_motion_vector
from reconstructor.perception import Perception, load_perception

NO_ENCODER = (
    "this reconstructor reads the motion vectors of an encoder that is not here (published networks: PD-FGC's), so they can neither be "
    "read off pictures nor made of FLAME motion; drive takes them from files that hold the key vector: --source_vector FILE.npz [1, 548] "
    "and --motion FILE.npz [T, 548]"
)


@dataclasses.dataclass(frozen=True)
class MotionVectors:
    """The motion vectors [B, D] of one reconstructor; no gradient reaches pictures or encoder."""

    kind: MotionKind
    network: Perception | None = None  # whose motion encoder reads pictures; for `image`; None there: vectors come in files alone
    folder: Path | None = None  # where that network lies
    weights_hash: str = ""  # of that network

    @torch.no_grad()
    def seen(self, pictures: Tensor, motion: Motion) -> Tensor:
        """Of heads that are known by pictures [B, 3, n, n] in [-1, 1], in the framing of labels, and by the motion of their labels."""
        match self.kind:
            case "flame":
                return flame_motion_vector(motion)
            case "image":
                return self._encoder().motion(pictures)
            case other:
                raise ValueError(f"motion: expected flame or image, got {other!r}")

    @torch.no_grad()
    def described(self, motion: Motion) -> Tensor:
        """Of FLAME motion for which there is no picture; on the device of `motion`."""
        if self.kind == "flame":
            return flame_motion_vector(motion)
        encoder = self._encoder().motion
        return encoder.vector(encoder.flame_coefficients(motion.to(encoder.basis.device))).to(motion.expression.device)

    def _encoder(self) -> Perception:
        if self.network is None:
            raise ConfigError(NO_ENCODER)
        return self.network

    def weights_hashes(self) -> dict[str, str]:
        """As `FrozenNetworks.weights_hashes`: another encoder makes another run."""
        return {"motion": self.weights_hash} if self.network else {}

    def of_batch(self, batch: Batch) -> Batch:
        """The batch with the vectors of source and driver in the place of FLAME's; the label, which the neck stage reads, stays."""
        if self.kind == "flame":
            return batch
        with torch.no_grad():
            source, driver = (self.network.motion(pictures) for pictures in (batch.source_image, batch.driver_image))
        return dataclasses.replace(batch, source_motion=source, driving_motion=driver)


def open_motion_vectors(kind: MotionKind, perception: Path | None, device: torch.device | str) -> MotionVectors:
    """For training: `perception` is the exported network whose motion encoder is used, of the role "losses".

    Raises ConfigError if `image` has none, AssetError if it cannot be used.
    """
    if kind == "flame":
        return MotionVectors(kind)
    if perception is None:
        raise ConfigError(
            "model.architecture.motion is image: expected the perception network that reads motion off pictures, got none; add "
            "--perception DIR (made by the perception command with --role losses), or --model.architecture.motion flame for "
            "the motion of the labels"
        )
    return _reading_pictures(perception, exported_hash(perception), device)


def _reading_pictures(folder: Path, weights_hash: str, device: torch.device | str) -> MotionVectors:
    return MotionVectors("image", load_perception(folder, "losses", device), folder, weights_hash)


def exported_motion_vectors(reconstructor: Path, given: Path | None, setting: str, device: torch.device | str) -> MotionVectors:
    """For use: the vectors that the exported `reconstructor` was trained on.

    given: folder of its perception network, what the user calls `setting`; None = where it lay in training. Raises AssetError if it is
    not there or is another one.
    """
    export = exported_config(reconstructor, ReconstructorExport, EXPORT_KIND)
    if export.model.architecture.motion == "flame":
        return MotionVectors("flame")
    if not export.motion_encoder_hash:  # an imported network
        return MotionVectors("image")
    folder = given or Path(export.motion_encoder)
    remedy = f"give the folder of the network that it was trained with, --{setting} DIR"
    if not folder.is_dir():
        raise AssetError(
            f"{folder}: expected the perception network that reads motion for {reconstructor}, there is no such folder; {remedy}"
        )
    found = exported_hash(folder)
    if found != export.motion_encoder_hash:
        raise AssetError(
            f"{folder}: expected the perception network whose motion vectors {reconstructor} was trained on (hash "
            f"{export.motion_encoder_hash}, then in {export.motion_encoder}), got {found}; {remedy}"
        )
    return _reading_pictures(folder, found, device)
