"""Motion sequences: smooth interpolation, the built-in one, files of motions and what is said of bad ones."""

import dataclasses

import numpy as np
import pytest
import torch

from head3d.cameras import Camera, frontal, orbit
from head3d.labels import HeadLabel, Motion
from head3d.run.errors import DataError
from reconstructor.sequences import built_in, from_file, interpolate, interpolate_camera, of_labels, orbiting

EXPRESSIONS = {"smile": 3, "blink_left": 5, "blink_right": 6}


def test_interpolation_passes_the_keys_smoothly():
    path = interpolate(torch.tensor([[0.0], [1.0], [0.0]]), 4)
    assert path[:, 0].tolist() == pytest.approx([0, 0.15625, 0.5, 0.84375, 1, 0.84375, 0.5, 0.15625, 0])
    assert interpolate(torch.ones(1, 2), 5).shape == (1, 2)


def test_the_built_in_sequence_acts_and_then_turns():
    sequence = built_in(EXPRESSIONS, 5, 0.5)
    motion, camera = sequence.motion, sequence.camera
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


def test_cameras_of_a_sequence_are_valid():
    camera: Camera = orbiting(9, 0.6)
    rotation = camera.c2w[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(9, 3, 3), atol=1e-5)


def test_a_camera_between_two_goes_around_the_head_on_the_shortest_arc():
    keys = orbit(torch.tensor([0.0, 1.0, -0.2]), torch.zeros(3), torch.full((3,), 4.0))
    path = interpolate_camera(keys, 4)
    for frame, yaw in ((0, 0.0), (1, 0.15625), (2, 0.5), (4, 1.0), (6, 0.4), (8, -0.2)):  # smoothstep, as for motions
        expected = orbit(torch.tensor([yaw]), torch.zeros(1), torch.tensor([4.0]))
        assert torch.allclose(path.c2w[frame : frame + 1], expected.c2w, atol=1e-5)
    assert torch.allclose(path.intrinsics, keys.intrinsics[:1].expand(9, 3, 3))
    assert torch.allclose(interpolate_camera(keys.select(slice(1)), 4).c2w, keys.c2w[:1], atol=1e-6)


def test_labels_are_played_from_their_own_cameras():
    motion = Motion.neutral(2)._replace(jaw_pose=torch.tensor([[0.0, 0, 0], [0.2, 0, 0]]))
    camera = orbit(torch.tensor([-0.3, 0.3]), torch.zeros(2), torch.full((2,), 4.17))
    sequence = of_labels(HeadLabel(camera, torch.zeros(2, 300), motion), 2)
    assert sequence.motion.jaw_pose[:, 0].tolist() == pytest.approx([0, 0.1, 0.2])
    assert torch.allclose(sequence.camera.c2w, orbit(torch.tensor([-0.3, 0.0, 0.3]), torch.zeros(3), torch.full((3,), 4.17)).c2w, atol=1e-5)
    part = dataclasses.replace(sequence, vector=torch.arange(3.0)[:, None]).select(slice(1, 3))
    assert len(part) == 2 and part.vector[:, 0].tolist() == [1, 2] and part.motion.jaw_pose[0, 0] == pytest.approx(0.1)


def test_a_plain_array_of_motions_is_in_the_order_of_labels(tmp_path):
    rows = np.arange(2 * 112, dtype=np.float32).reshape(2, 112) / 1000
    np.save(tmp_path / "m.npy", rows)
    sequence = from_file(tmp_path / "m.npy")
    assert torch.equal(torch.cat(sequence.motion, dim=1), torch.from_numpy(rows))
    assert sequence.motion.neck_pose.shape == (2, 3) and torch.allclose(sequence.camera.c2w, frontal(2).c2w)
    np.save(tmp_path / "m.npy", rows[:, :109])
    with pytest.raises(DataError, match=r"m.npy: expected finite numbers of shape \[2, 112\], got float32 \[2, 109\]"):
        from_file(tmp_path / "m.npy")
