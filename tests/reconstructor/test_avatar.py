"""Driving: the cached source equals the whole network, frames do not flicker, sequences and pictures are read and checked."""

import dataclasses
import json

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from datagen.reading import open_dataset
from head3d.cameras import Camera, frontal, orbit
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.run.errors import ConfigError, DataError
from reconstructor.avatar import Avatar
from reconstructor.drive import Crop, DriveRun, crop_square, drive, read_source
from reconstructor.model import Reconstructor
from reconstructor.sequences import built_in, from_file, interpolate, orbiting
from reconstructor.train import train

EXPRESSIONS = {"smile": 3, "blink_left": 5, "blink_right": 6}


@pytest.fixture(scope="module")
def model(world):
    """Untrained, with cross-attention and density awake."""
    config = world.run(world.shards)
    draws = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reconstructor(config.model, load_head_model(None)).eval().requires_grad_(False)
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=draws)
        model.decoder.density.weight.normal_(generator=draws)
    return model


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    config = world.run(tmp_path_factory.mktemp("trained") / "run", total_images=4)
    assert train(config) == 0
    return config.out / "export"


def motions(count, seed=0, neck=0.0):
    draws = torch.Generator().manual_seed(seed)
    return Motion(*(torch.randn(count, size, generator=draws) * scale for size, scale in ((100, 1.0), (3, neck), (3, 0.05), (6, 0.1))))


def picture(seed=0, side=32):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("neck", [0.0, 0.2])
def test_an_avatar_draws_what_the_whole_network_draws(model, neck):
    image, own, driving = picture(), motions(1, 1), motions(2, 2, neck)
    shape = torch.randn(1, 300, generator=torch.Generator().manual_seed(3)) * 0.1
    camera = orbit(torch.tensor([0.3, -0.2]), torch.zeros(2), torch.full((2,), 4.17))
    avatar = Avatar.from_image(model, image, shape=shape, motion=own)
    source = [part.expand(2, *part.shape[1:]) for part in (image, own.vector(), shape)]
    whole, _ = model(source[0], source[1], driving.vector(), torch.ones(2), source[2], driving, camera)
    driven = avatar.drive(driving, camera)
    assert torch.allclose(driven.image, whole.image, atol=1e-4)
    assert torch.allclose(driven.depth, whole.depth, atol=1e-4)


def test_the_neck_moves_the_picture_and_the_motion_vector_does_not_know_it(model):
    avatar, still, turned = Avatar.from_image(model, picture()), motions(1), motions(1)
    turned.neck_pose[0, 1] = 0.5
    assert torch.equal(still.vector(), turned.vector())
    assert not torch.allclose(avatar.drive(still, frontal()).image, avatar.drive(turned, frontal()).image, atol=1e-3)


def test_equal_calls_give_equal_frames_whatever_shares_the_batch(model):
    avatar, driving = Avatar.from_image(model, picture()), motions(3)
    together = avatar.drive(driving, frontal(3)).image
    assert torch.equal(together, avatar.drive(driving, frontal(3)).image)
    alone = avatar.drive(driving.select(slice(1, 2)), frontal(1)).image
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_one_motion_is_seen_from_several_cameras_with_one_pass_of_the_network(model, monkeypatch):
    avatar, driving, calls = Avatar.from_image(model, picture()), motions(1, neck=0.2), []
    reenact = model.architecture.reenact
    monkeypatch.setattr(model.architecture, "reenact", lambda *arguments: calls.append(1) or reenact(*arguments))
    camera = orbit(torch.tensor([-0.4, 0.0, 0.4]), torch.zeros(3), torch.full((3,), 4.17))
    views = avatar.drive(driving, camera).image
    assert len(calls) == 1
    assert torch.allclose(views[2:], avatar.drive(driving, camera.select(slice(2, 3))).image, atol=1e-4)


def test_a_picture_of_another_size_is_resized(model):
    assert Avatar.from_image(model, picture(side=100)).drive(motions(1), frontal()).image.shape == (1, 3, 32, 32)


def test_interpolation_passes_the_keys_smoothly():
    path = interpolate(torch.tensor([[0.0], [1.0], [0.0]]), 4)
    assert path[:, 0].tolist() == pytest.approx([0, 0.15625, 0.5, 0.84375, 1, 0.84375, 0.5, 0.15625, 0])
    assert interpolate(torch.ones(1, 2), 5).shape == (1, 2)


def test_the_built_in_sequence_acts_and_then_turns():
    sequence = built_in(EXPRESSIONS, 5, 0.5)
    motion, camera = sequence
    assert len(sequence) == 9 * 5 + 1 + 4 * 5 == camera.c2w.shape[0]
    assert motion.expression[:, 3].max() == 2 and motion.expression[:, [5, 6]].amax(0).tolist() == [2, 2]
    assert motion.expression.abs().sum(0).nonzero().flatten().tolist() == [3, 5, 6]
    assert motion.jaw_pose[:, 0].max() == 0.25 and motion.eye_pose[:, 1].max() == pytest.approx(0.35)
    assert torch.equal(motion.eye_pose[:, :3], motion.eye_pose[:, 3:]) and motion.neck_pose.abs().max() == 0
    assert torch.allclose(camera.c2w[:46], frontal().c2w.expand(46, -1, -1), atol=1e-6)
    swing = camera.c2w[46:, 0, 3] / 4.17
    assert swing.max() == pytest.approx(np.sin(0.5), abs=0.02) and swing.min() == pytest.approx(-np.sin(0.5), abs=0.02)
    assert built_in({}, 5, 0.5).motion.expression.abs().sum(0).nonzero().flatten().tolist() == [0, 1]
    steps = (motion.expression[1:] - motion.expression[:-1]).abs().amax()
    assert steps < 2 * 1.6 / 5  # smoothstep's slope is at most 1.5


def test_a_motion_file_is_read_as_it_is(tmp_path):
    camera = orbiting(7, 0.3)
    arrays = {"expression": np.random.default_rng(0).normal(size=(7, 100)), "jaw_pose": np.full((7, 3), 0.1)}
    np.savez(tmp_path / "m.npz", camera=camera.label().numpy(), **arrays)
    sequence = from_file(tmp_path / "m.npz")
    assert torch.allclose(sequence.motion.expression, torch.from_numpy(arrays["expression"]).float())
    assert torch.allclose(sequence.camera.c2w, camera.c2w) and sequence.motion.neck_pose.abs().max() == 0
    np.savez(tmp_path / "plain.npz", **arrays)
    assert torch.allclose(from_file(tmp_path / "plain.npz").camera.c2w, frontal(7).c2w)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"jaw_pose": np.zeros((2, 3))}, "expected the key expression"),
        ({"expression": np.zeros((2, 100)), "pose": np.zeros((2, 3))}, "no other than"),
        ({"expression": np.zeros((2, 50))}, r"key expression: expected finite numbers of shape \[2, 100\], got float64 \[2, 50\]"),
        ({"expression": np.zeros((2, 100)), "jaw_pose": np.zeros((3, 3))}, r"key jaw_pose: .* \[2, 3\]"),
        ({"expression": np.full((2, 100), np.nan)}, "finite"),
        ({"expression": np.array([{}])}, "number arrays"),
    ],
)
def test_a_bad_motion_file_is_an_error_with_key_and_remedy(tmp_path, arrays, words):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(DataError, match=f"m.npz: .*{words}.*numpy.savez"):
        from_file(tmp_path / "m.npz")


def test_a_motion_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere.npz: could not be read"):
        from_file(tmp_path / "nowhere.npz")
    (tmp_path / "m.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match="expected a .npz"):
        from_file(tmp_path / "m.npz")


def test_a_crop_reads_the_square_and_repeats_the_edge():
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10, 1).repeat(3, axis=2)
    inside = crop_square(pixels, Crop(5, 4, 8))
    assert torch.allclose((inside[0, 0] + 1) * 127.5, torch.from_numpy(pixels[0:8, 1:9, 0]).float(), atol=1e-3)
    beyond = crop_square(pixels, Crop(0, 0, 8))
    assert torch.allclose((beyond[0, 0, :5, :5] + 1) * 127.5, torch.zeros(5, 5), atol=1e-3)


def test_drive_writes_a_video_with_every_frame_a_sheet_and_a_record(world, exported, tmp_path, capsys):
    config = DriveRun(out=tmp_path / "drive", reconstructor=exported, frames_between=2, sheet_frames=7)
    assert drive(config) == 0
    frames = imageio.imread(config.out / "drive.mp4", plugin="FFMPEG")
    assert frames.shape == (9 * 2 + 1 + 4 * 2, 32, 32, 3)
    record = json.loads((config.out / "drive.json").read_text())
    assert record["frames"] == len(frames) and "astronaut" in record["source"] and "neutral" in record["source"]
    assert Image.open(config.out / "contact_sheet.png").size == (4 * 34 - 2, 2 * 34 - 2)
    before = (config.out / "drive.mp4").stat().st_mtime_ns
    assert drive(config) == 0
    assert (config.out / "drive.mp4").stat().st_mtime_ns == before and "made before" in capsys.readouterr().out


def test_drive_takes_source_and_motions_from_held_out_samples(world, exported, tmp_path):
    config = DriveRun(
        out=tmp_path, reconstructor=exported, shards=world.shards, source="shard", motion="shard", motion_count=2, frames_between=3
    )
    assert drive(config) == 0
    assert len(imageio.imread(tmp_path / "drive.mp4", plugin="FFMPEG")) == 4
    source = read_source(config, open_dataset(world.shards))
    assert source.shape is not None and source.motion is not None and "identity" in source.note
    with pytest.raises(ConfigError, match=r"source_sample 99: .* held-out identities; choose 0 to"):
        read_source(dataclasses.replace(config, source_sample=99), open_dataset(world.shards))


def test_drive_takes_a_picture_file_and_a_motion_file(exported, tmp_path):
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(tmp_path / "face.png")
    np.savez(tmp_path / "motion.npz", expression=np.zeros((5, 100), np.float32), neck_pose=np.linspace(0, 0.3, 15).reshape(5, 3))
    config = DriveRun(
        out=tmp_path / "out", reconstructor=exported, source=str(tmp_path / "face.png"), motion=str(tmp_path / "motion.npz"), batch=2
    )
    assert drive(config) == 0
    assert len(imageio.imread(tmp_path / "out" / "drive.mp4", plugin="FFMPEG")) == 5
    np.savez(tmp_path / "motion.npz", expression=np.zeros((3, 100), np.float32))
    assert drive(config) == 0  # another file under the same name is not taken for done
    assert len(imageio.imread(tmp_path / "out" / "drive.mp4", plugin="FFMPEG")) == 3


def test_a_source_that_is_no_picture_is_an_error(exported, tmp_path):
    (tmp_path / "face.png").write_bytes(b"nothing")
    for name in ("face.png", "nowhere.png"):
        with pytest.raises(DataError, match=rf"{name}: expected a picture file"):
            drive(DriveRun(out=tmp_path / "out", reconstructor=exported, source=str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


def test_cameras_of_a_sequence_are_valid():
    camera: Camera = orbiting(9, 0.6)
    rotation = camera.c2w[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(9, 3, 3), atol=1e-5)
