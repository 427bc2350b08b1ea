"""Pictures and videos for people. Every file says in its metadata that what it shows is synthetic, and how it was made."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from head3d.run.files import atomic_path

SYNTHETIC_NOTICE = "Synthetic image made by Head Foundry; it does not show a real event."
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # IPTC's word for generated media

# Ten evenly spaced colours of matplotlib's viridis (public domain, CC0)
_VIRIDIS = np.array(
    [
        [0x44, 0x01, 0x54], [0x48, 0x28, 0x78], [0x3E, 0x49, 0x89], [0x31, 0x68, 0x8E], [0x26, 0x82, 0x8E],
        [0x1F, 0x9E, 0x89], [0x35, 0xB7, 0x79], [0x6E, 0xCE, 0x58], [0xB5, 0xDE, 0x2B], [0xFD, 0xE7, 0x25],
    ],
    dtype=np.float64,
)  # fmt: skip
_UNDEFINED = (64, 64, 64)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float images [..., 3, H, W] in [-1, 1] (what is outside is clipped) as uint8 [..., H, W, 3]; -1 is 0 and 1 is 255."""
    assert images.ndim >= 3 and images.shape[-3] == 3, f"images must be [..., 3, H, W], got {tuple(images.shape)}"
    scaled = (images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def colorize(values: Tensor | np.ndarray, minimum: float, maximum: float) -> np.ndarray:
    """A map [...] of numbers as colours, uint8 [..., 3]: dark violet at `minimum`, yellow at `maximum`, grey where not finite."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    assert maximum > minimum, f"expected minimum < maximum, got {minimum} and {maximum}"
    finite = np.isfinite(values)
    position = np.clip((np.where(finite, values, minimum) - minimum) / (maximum - minimum), 0.0, 1.0) * (len(_VIRIDIS) - 1)
    colors = np.stack([np.interp(position, np.arange(len(_VIRIDIS)), channel) for channel in _VIRIDIS.T], axis=-1)
    return np.where(finite[..., None], colors.round(), _UNDEFINED).astype(np.uint8)


def grid(images: np.ndarray, columns: int, gap_px: int = 2) -> np.ndarray:
    """Lay uint8 images [N, H, W, 3] out row by row with white gaps: uint8 [rows (H + gap) - gap, columns (W + gap) - gap, 3]."""
    assert images.ndim == 4 and images.shape[-1] == 3 and len(images) > 0, f"images must be [N, H, W, 3], got {images.shape}"
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3), 255, np.uint8)
    for index, picture in enumerate(images):
        top, left = index // columns * (height + gap_px), index % columns * (width + gap_px)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_png(path: Path | str, picture: np.ndarray, provenance: Mapping[str, Any]) -> None:
    """Write a uint8 [H, W, 3] picture atomically, marked as synthetic; `provenance` (JSON types) says how it was made."""
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, f"expected uint8 [H, W, 3], got {picture.shape}"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", "Head Foundry")
    chunks.add_text("Comment", SYNTHETIC_NOTICE)
    chunks.add_text("DigitalSourceType", SOURCE_TYPE)
    chunks.add_itxt("Provenance", json.dumps(dict(provenance), ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=chunks)


def jpeg_bytes(picture: np.ndarray, provenance: Mapping[str, Any]) -> bytes:
    """A uint8 [H, W, 3] picture as a JPEG for a page, marked as synthetic in its comment; `provenance` as in `save_png`."""
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, f"expected uint8 [H, W, 3], got {picture.shape}"
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=88, subsampling=0, comment=_comment(provenance).encode())
    return stream.getvalue()


def _comment(provenance: Mapping[str, Any]) -> str:
    return json.dumps({"notice": SYNTHETIC_NOTICE, "source_type": SOURCE_TYPE, "provenance": dict(provenance)})


def save_video(path: Path | str, frames: Iterable[np.ndarray], fps: float, provenance: Mapping[str, Any]) -> None:
    """Write uint8 [H, W, 3] frames as H.264 in mp4, atomically, marked as synthetic in the comment tag.

    Frames are taken one at a time. An odd height or width loses its last row or column: the codec needs even ones.
    Raises ValueError if there is no frame.
    """
    import imageio_ffmpeg

    stream = iter(frames)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    height, width = (size - size % 2 for size in first.shape[:2])
    with atomic_path(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", "18", "-metadata", f"comment={_comment(provenance)}", "-movflags", "+faststart", "-f", "mp4"],
        )
        writer.send(None)
        try:
            for frame in itertools.chain([first], stream):
                assert frame.dtype == np.uint8 and frame.shape == first.shape, f"expected uint8 {first.shape}, got {frame.shape}"
                writer.send(np.ascontiguousarray(frame[:height, :width]))
        finally:
            writer.close()
