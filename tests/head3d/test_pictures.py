"""Pictures: exact pixel values, layout, and the marks that say they are synthetic."""

from __future__ import annotations

import json
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from head3d.pictures import SYNTHETIC_NOTICE, colorize, grid, save_png, save_video, to_uint8


def test_floats_become_bytes_by_rounding_and_clipping():
    values = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0])
    images = values.reshape(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(images)[0, :, 1].tolist() == [0, 0, 128, 128, 255, 255]


def test_every_byte_survives_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    assert (to_uint8(pixels / 127.5 - 1).transpose(2, 0, 1) == pixels.numpy()).all()


def test_channels_go_last_under_any_leading_shape():
    images = torch.rand(2, 5, 3, 4, 6) * 2 - 1
    shown = to_uint8(images)
    assert shown.shape == (2, 5, 4, 6, 3)
    assert (shown[1, 2] == to_uint8(images[1, 2])).all()


def test_the_grid_fills_rows_first_with_white_gaps():
    pictures = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = grid(pictures, columns=2, gap_px=1)
    assert sheet[..., 0].tolist() == [
        [10, 10, 10, 255, 20, 20, 20],
        [10, 10, 10, 255, 20, 20, 20],
        [255, 255, 255, 255, 255, 255, 255],
        [30, 30, 30, 255, 255, 255, 255],
        [30, 30, 30, 255, 255, 255, 255],
    ]


def test_a_map_runs_from_dark_violet_to_yellow_and_is_grey_where_undefined():
    shown = colorize(torch.tensor([[-1.0, 0.0, 0.5, 1.0, 9.0], [0.0, 0.0, 0.0, float("nan"), float("inf")]]), 0.0, 1.0)
    assert shown.shape == (2, 5, 3) and shown.dtype == np.uint8
    assert shown[0, 0].tolist() == shown[0, 1].tolist() == [68, 1, 84]
    assert shown[0, 3].tolist() == shown[0, 4].tolist() == [253, 231, 37]
    assert shown[1, 3].tolist() == shown[1, 4].tolist() == [64, 64, 64]


def test_the_colours_of_a_map_grow_lighter_throughout():
    brightness = colorize(np.linspace(0, 1, 64), 0, 1).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all()


def test_a_png_says_that_it_is_synthetic_and_how_it_was_made(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "deep" / "a.png", picture, {"seed": 3, "name": "ü"})
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert (np.asarray(image) == picture).all()
        assert image.text["Comment"] == SYNTHETIC_NOTICE
        assert image.text["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
        assert json.loads(image.text["Provenance"]) == {"seed": 3, "name": "ü"}


def test_a_video_has_every_frame_and_says_that_it_is_synthetic(tmp_path):
    frames = [np.full((33, 48, 3), 20 * index, np.uint8) for index in range(7)]
    save_video(tmp_path / "a.mp4", iter(frames), 5, {"seed": 3})
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    described = next(reader)
    assert described["size"] == (48, 32) and described["fps"] == 5
    means = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert np.abs(np.array(means) - 20 * np.arange(7)).max() < 3
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4"), "-f", "ffmetadata", "-"]
    text = subprocess.run(ffmpeg, capture_output=True, text=True, check=True).stdout
    comment = json.loads(re.sub(r"\\(.)", r"\1", re.search(r"comment=(.*)", text)[1]))
    assert comment["notice"] == SYNTHETIC_NOTICE and comment["provenance"] == {"seed": 3}


def test_a_video_that_fails_half_way_leaves_nothing(tmp_path):
    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        save_video(tmp_path / "a.mp4", frames(), 5, {})
    with pytest.raises(ValueError, match="at least one frame"):
        save_video(tmp_path / "a.mp4", [], 5, {})
    assert list(tmp_path.iterdir()) == []
