"""The drive command: sources, drivers and cameras in, every asked-for output out; pictures as drivers through a reader."""

import dataclasses
import json

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from datagen.reading import open_dataset
from head3d.cameras import frontal, orbit
from head3d.labels import Motion
from head3d.run.errors import ConfigError, DataError
from head3d.surface import SurfaceConfig
from reconstructor.drive import DriveRun, MeshConfig, drive, read_sequence, read_source
from reconstructor.drivers import PictureMotion, camera_of_rotation, open_pictures, perception_reader
from reconstructor.model import load_reconstructor
from reconstructor.motion import flame_motion_vector
from reconstructor.train import train


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    config = world.run(tmp_path_factory.mktemp("trained") / "run", total_images=4)
    assert train(config) == 0
    return config.out / "export"


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


def test_nothing_is_written_for_a_source_that_is_no_picture(exported, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.png: expected a picture file"):
        drive(DriveRun(out=tmp_path / "out", reconstructor=exported, source=str(tmp_path / "nowhere.png")))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def motion_file(tmp_path):
    np.savez(tmp_path / "motion.npz", expression=np.zeros((5, 100), np.float32), jaw_pose=np.linspace(0, 0.3, 15).reshape(5, 3))
    return str(tmp_path / "motion.npz")


def test_pictures_and_meshes_are_written_where_they_are_asked_for(exported, motion_file, tmp_path, capsys):
    config = DriveRun(
        out=tmp_path / "out",
        reconstructor=exported,
        motion=motion_file,
        outputs=("frames", "mesh"),
        mesh=MeshConfig(frame=4, format="obj", surface=SurfaceConfig(resolution=8, threshold=0.2)),
    )
    assert drive(config) == 0
    assert sorted(path.name for path in config.out.iterdir()) == ["drive.json", "frames", "mesh_driven.obj", "mesh_rest.obj"]
    assert sorted(path.name for path in (config.out / "frames").iterdir()) == [f"{index:06d}.png" for index in range(5)]
    assert trimesh.load(config.out / "mesh_rest.obj", process=False).is_watertight
    assert drive(config) == 0 and "made before" in capsys.readouterr().out
    (config.out / "frames" / "000099.png").touch()  # of a longer run
    assert drive(dataclasses.replace(config, outputs=("frames", "video"))) == 0
    frames = imageio.imread(config.out / "drive.mp4", plugin="FFMPEG")
    stills = np.stack([np.asarray(Image.open(path)) for path in sorted((config.out / "frames").iterdir())])
    assert stills.shape == frames.shape and np.abs(stills.astype(int) - frames).mean() < 6  # the codec's loss
    with pytest.raises(ConfigError, match=r"mesh.frame 5: the driver has 5 frames; choose 0 to 4"):
        drive(dataclasses.replace(config, mesh=MeshConfig(frame=5)))


def test_the_camera_is_the_driver_s_or_fixed_or_goes_around(exported, motion_file):
    model, config = load_reconstructor(exported), DriveRun(reconstructor=exported, motion=motion_file, turn_deg=90)
    yaws = {}
    for camera in ("driver", "fixed", "orbit"):
        sequence, fps = read_sequence(dataclasses.replace(config, camera=camera), None, model, None)
        assert fps is None
        yaws[camera] = torch.atan2(sequence.camera.c2w[:, 0, 3], sequence.camera.c2w[:, 2, 3]).tolist()
    assert yaws["driver"] == yaws["fixed"] == [0] * 5
    assert yaws["orbit"] == pytest.approx([0, np.pi / 2, 0, -np.pi / 2, 0], abs=1e-4)


def test_motions_of_a_data_set_are_seen_from_their_own_cameras(exported, world):
    config = DriveRun(reconstructor=exported, shards=str(world.shards), motion="shard", motion_count=2, frames_between=3)
    dataset = open_dataset(world.shards)
    sequence, _ = read_sequence(config, dataset, load_reconstructor(exported), None)
    frame = next(frame for frame in dataset.frames if frame.split != "train" and frame.kind == "dynamic")
    label = torch.from_numpy(dataset.read(frame, ["label"])["label"][:1])
    assert len(sequence) == 4 and torch.allclose(sequence.camera.c2w[:1].flatten(1), label[:, :16], atol=1e-4)


def bright_jaw(pictures):
    """A stand-in for a trained reader: the jaw opens with the brightness, the head turns with it."""
    brightness = pictures.mean((1, 2, 3))
    motion = Motion.neutral(len(pictures))
    motion.jaw_pose[:, 0] = brightness
    rotation = orbit(brightness, torch.zeros_like(brightness), torch.ones_like(brightness)).c2w[:, :3, :3].mT
    return PictureMotion(motion, rotation, flame_motion_vector(motion))


def test_a_video_drives_through_a_reader_at_its_own_speed(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("reconstructor.drivers.READER_BATCH", 2)
    levels = np.array([100, 120, 140, 160, 180], np.uint8)
    clip = levels[:, None, None, None].repeat(32, 1).repeat(48, 2).repeat(3, 3)
    imageio.imwrite(tmp_path / "clip.mp4", clip, plugin="FFMPEG", fps=10)
    config = DriveRun(out=tmp_path / "out", reconstructor=exported, motion=str(tmp_path / "clip.mp4"), most_frames=4)
    sequence, fps = read_sequence(config, None, load_reconstructor(exported), bright_jaw)
    expected = torch.from_numpy(levels[:4].astype(np.float32)) / 127.5 - 1
    assert len(sequence) == 4 and fps == 10 and torch.allclose(sequence.motion.jaw_pose[:, 0], expected, atol=0.03)
    yaw = torch.atan2(sequence.camera.c2w[:, 0, 3], sequence.camera.c2w[:, 2, 3])
    assert torch.allclose(yaw, sequence.motion.jaw_pose[:, 0], atol=1e-4)
    assert drive(config, bright_jaw) == 0
    assert "its motion as the reader of the driver sees it" in json.loads((tmp_path / "out" / "drive.json").read_text())["source"]
    with imageio.imopen(tmp_path / "out" / "drive.mp4", "r", plugin="FFMPEG") as video:
        assert video.metadata()["fps"] == 10 and sum(1 for _ in video.iter()) == 4


def test_a_folder_of_pictures_drives_in_the_order_of_names(exported, tmp_path):
    for name, level in (("b.png", 200), ("a.png", 50), ("c.jpg", 128)):
        Image.fromarray(np.full((20, 30, 3), level, np.uint8)).save(tmp_path / name)
    config = DriveRun(reconstructor=exported, motion=str(tmp_path))
    sequence, fps = read_sequence(config, None, load_reconstructor(exported), bright_jaw)
    assert fps is None and sequence.motion.jaw_pose[:, 0].tolist() == pytest.approx(
        [50 / 127.5 - 1, 200 / 127.5 - 1, 128 / 127.5 - 1], abs=0.01
    )


def test_a_turned_head_is_seen_by_a_camera_that_went_around_it():
    yaw, pitch = torch.tensor([0.5, -0.2]), torch.tensor([0.1, 0.3])
    camera = orbit(yaw, pitch, torch.full((2,), 4.17))
    found = camera_of_rotation(camera.c2w[:, :3, :3].mT)  # world = head axes -> camera axes
    assert torch.allclose(found.c2w, camera.c2w, atol=1e-5) and torch.equal(found.intrinsics, camera.intrinsics)
    assert torch.allclose(camera_of_rotation(torch.eye(3)[None]).c2w, frontal().c2w)


def test_pictures_without_a_network_that_reads_them_are_an_error(exported, tmp_path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"this reconstructor takes FLAME motion \(109 numbers.*give a network .* with --perception DIR"):
        drive(DriveRun(out=tmp_path / "out", reconstructor=exported, motion=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_the_perception_network_reads_flame_motion_or_the_image_motion_vector(tiny_perception, tmp_path):
    network = tiny_perception(tmp_path)
    pictures = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    flame, vectors = perception_reader(network, "flame")(pictures), perception_reader(network, "image")(pictures)
    assert torch.equal(flame.vector, flame_motion_vector(flame.motion)) and torch.equal(
        flame.motion.expression, network.read(pictures).expression
    )
    assert torch.equal(flame.rotation, vectors.rotation) and torch.equal(vectors.vector, network.motion(pictures))
    assert not vectors.vector.requires_grad and not flame.motion.neck_pose.any()


def test_pictures_drive_through_an_exported_perception_network(exported, tiny_perception, tmp_path):
    tiny_perception(tmp_path / "perception")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "pictures" / "a.png")
    settings = DriveRun(
        out=tmp_path / "out",
        reconstructor=exported,
        motion=str(tmp_path / "pictures"),
        perception=tmp_path / "perception",
        outputs=("frames",),
    )
    assert drive(settings) == 0
    assert [path.name for path in (tmp_path / "out" / "frames").iterdir()] == ["000000.png"]
    assert "perception" in json.loads((tmp_path / "out" / "drive.json").read_text())["inputs"]


def test_a_camera_that_is_not_there_and_files_that_are_no_video_are_errors(tmp_path):
    with (
        pytest.raises(DataError, match=r"^camera 97: expected a camera that ffmpeg can open, found none \(.*; connect one"),
        open_pictures("97"),
    ):
        pass
    (tmp_path / "clip.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"clip.mp4: expected a video that ffmpeg can read"), open_pictures(str(tmp_path / "clip.mp4")):
        pass
    with pytest.raises(DataError, match=r"a.PNG: expected a video, got a picture; put it in a folder"), open_pictures("a.PNG"):
        pass
    (tmp_path / "empty").mkdir()
    with open_pictures(str(tmp_path / "empty")) as pictures, pytest.raises(DataError, match="empty: expected pictures .* found none"):
        next(pictures.frames)


def test_a_driver_that_is_nowhere_is_an_error_that_says_what_drives(exported, tmp_path):
    with pytest.raises(DataError, match=r"clip.mp4: expected built-in, shard, a file of motions .*, a video, .*; there is no such file"):
        drive(DriveRun(out=tmp_path / "out", reconstructor=exported, motion=str(tmp_path / "clip.mp4")))
