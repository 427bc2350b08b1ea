"""Source pictures: the square that is cut, what a label says of it, and what is said of unusable files."""

import numpy as np
import pytest
import torch
from PIL import Image

from head3d.cameras import Camera, camera_rays, default_intrinsics, frontal
from head3d.labels import Motion, pack_label
from head3d.run.errors import ConfigError, DataError
from reconstructor.sources import ASTRONAUT, Crop, central_square, crop_of_intrinsics, crop_square, read_photograph


def gradient(height, width):
    """A picture whose red is the column and green the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def test_a_crop_reads_the_square_and_repeats_the_edge():
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10, 1).repeat(3, axis=2)
    inside = crop_square(pixels, Crop(5, 4, 8))
    assert torch.allclose((inside[0, 0] + 1) * 127.5, torch.from_numpy(pixels[0:8, 1:9, 0]).float(), atol=1e-3)
    beyond = crop_square(pixels, Crop(0, 0, 8))
    assert torch.allclose((beyond[0, 0, :5, :5] + 1) * 127.5, torch.zeros(5, 5), atol=1e-3)


def test_without_a_crop_the_largest_central_square_is_used(tmp_path):
    Image.fromarray(gradient(40, 60)).save(tmp_path / "face.png")
    source = read_photograph(str(tmp_path / "face.png"), None, None)
    assert torch.allclose((source.image[0, :2, 0, 0] + 1) * 127.5, torch.tensor([10.0, 0.0]), atol=1e-3)
    assert source.image.shape == (1, 3, 40, 40) and source.shape is None and source.motion is None
    assert source.note == "face.png, square of 40 px around (30, 20), taken as mean shape and neutral face"
    assert central_square(gradient(7, 5)) == Crop(2.5, 3.5, 5.0)


def test_a_picture_stored_turned_is_set_upright(tmp_path):
    turned = Image.fromarray(gradient(20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise to view
    turned.save(tmp_path / "face.png", exif=exif)
    image = read_photograph(str(tmp_path / "face.png"), Crop(10, 15, 20), None).image
    assert torch.allclose((image[0, 0, :, 0] + 1) * 127.5, torch.arange(5.0, 25.0), atol=1e-3)  # what were columns runs down


def test_the_square_of_a_label_is_what_the_twelve_degree_camera_sees():
    intrinsics = torch.tensor([[2.0, 0.0, 0.45], [0.0, 3.0, 0.6], [0.0, 0.0, 1.0]])  # of a picture of 300 x 200
    crop = crop_of_intrinsics(intrinsics, 300, 200, "label")
    assert (crop.center_x, crop.center_y) == pytest.approx((135.0, 120.0)) and crop.side == pytest.approx(600 / 4.7572, rel=1e-4)
    camera = frontal()
    whole, _ = camera_rays(Camera(camera.c2w, intrinsics[None]), 1)[1], None
    u, v = 0.5 * 300, 0.5 * 200  # the middle of the whole picture, in the square's coordinates
    inside = torch.tensor([(u - crop.center_x) / crop.side, -(v - crop.center_y) / crop.side, -1.0])
    inside[:2] /= default_intrinsics(1)[0, 0, 0]
    assert torch.allclose(whole[0, 0], torch.nn.functional.normalize(camera.c2w[0, :3, :3] @ inside, dim=0), atol=1e-5)
    with pytest.raises(DataError, match=r"label: expected square pixels, got focal lengths of 600.0 and 400.0 px"):
        crop_of_intrinsics(default_intrinsics(1)[0] * 0 + torch.diag(torch.tensor([2.0, 2.0, 1.0])), 300, 200, "label")


def test_a_label_brings_square_shape_and_motion(tmp_path):
    Image.fromarray(gradient(100, 100)).save(tmp_path / "face.png")
    motion = Motion.neutral(1)._replace(jaw_pose=torch.tensor([[0.2, 0.0, 0.0]]))
    intrinsics = default_intrinsics(1) * torch.tensor([0.5, 0.5, 1.0])[:, None]
    intrinsics[:, :2, 2] = 0.5
    label = pack_label(Camera(frontal().c2w, intrinsics), torch.full((1, 300), 0.1), motion)
    np.save(tmp_path / "face.npy", label[0].numpy())
    source = read_photograph(str(tmp_path / "face.png"), None, tmp_path / "face.npy")
    assert source.image.shape[-1] == 50 and (source.image[0, 0, 0, 0] + 1) * 127.5 == pytest.approx(25, abs=1e-3)
    assert torch.equal(source.motion.jaw_pose, motion.jaw_pose) and source.shape[0, 0] == pytest.approx(0.1)
    assert "shape and motion of face.npy" in source.note
    with pytest.raises(ConfigError, match="expected one of them, got both"):
        read_photograph(str(tmp_path / "face.png"), Crop(1, 1, 1), tmp_path / "face.npy")
    with pytest.raises(DataError, match=r"nowhere.npy: expected the label of face.png"):
        read_photograph(str(tmp_path / "face.png"), None, tmp_path / "nowhere.npy")


def test_a_source_that_is_no_picture_is_an_error(tmp_path):
    (tmp_path / "face.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"face.png: expected a PNG or JPEG picture"):
        read_photograph(str(tmp_path / "face.png"), None, None)
    with pytest.raises(DataError, match=r"nowhere.png: expected a picture file, there is none"):
        read_photograph(str(tmp_path / "nowhere.png"), None, None)


def test_the_astronaut_comes_with_its_square():
    assert read_photograph(ASTRONAUT, None, None).image.shape == (1, 3, 186, 186)
