"""Published sample sets as a source of recipes: rows of numbers that say where they come from."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from datagen.generate import generate, make_plan
from datagen.plan import open_plan
from datagen.recipes import RecipeConfig, camera_distances, deciding_settings, draw_identity
from datagen.sample_sets import PortraitRows, SampleSetFiles, load_sample_sets
from datagen.verify import VerifyRun, verify
from genhead.portraits import Portrait, write_portraits
from head3d.cameras import Camera, orbit, world_to_camera
from head3d.labels import check_label
from head3d.run.config import from_dict, to_dict
from head3d.run.errors import ConfigError, DataError

PHOTOGRAPHS, CLIPS, FRAMES = 40, 12, 5
FOCAL = 4.0  # not the default camera's


def arrays(rows, frames, first):
    """Shapes and cameras [rows, frames, 325] and motions [rows, frames, 112]; every entry of frame f of row r says first + 10 r + f."""
    number = first + 10 * np.arange(rows)[:, None] + np.arange(frames)
    shapes = np.zeros((rows, frames, 325), np.float32)
    distance = torch.from_numpy(3.8 + number.ravel() / 10_000)
    labels = orbit(torch.full_like(distance, 0.2), torch.zeros_like(distance), distance).label().numpy().reshape(rows, frames, 25)
    shapes[..., :25] = labels
    shapes[..., [16, 20]] = FOCAL
    shapes[..., 25:] = number[..., None]
    motions = np.repeat(number[..., None], 112, axis=2).astype(np.float32)
    motions[..., 103:106] /= 100_000  # jaw
    motions[..., 106:] /= 10_000  # eyes
    return shapes, motions


@pytest.fixture
def files(tmp_path):
    paths = {}
    for name, (rows, frames, first) in {"photograph": (PHOTOGRAPHS, 1, 0), "clip": (CLIPS, FRAMES, 1000)}.items():
        for kind, array in zip(("shapes", "motions"), arrays(rows, frames, first), strict=True):
            paths[f"{name}_{kind}"] = tmp_path / f"{name}_{kind}.npy"
            np.save(paths[f"{name}_{kind}"], array)
    return SampleSetFiles(**paths)


def config(files, **changes):
    return RecipeConfig(**{"source": "sample-sets", "sample_sets": files, "look_at_probability": 0.0, "split_rows": False} | changes)


def test_dynamic_motions_are_frames_of_one_clip_with_the_gaze_of_any_and_no_neck(files):
    clips, own_gaze = set(), []
    for identity in range(30):
        recipe = draw_identity(config(files, dynamic_share=1.0, dynamic_motions=4), 0, identity)
        numbers = []
        for drawn in recipe.motions:
            motion = drawn.motion
            assert motion.expression.unique().numel() == 1 and not motion.neck_pose.any()
            numbers.append(int(motion.expression[0, 0]))
            expected = 0 <= float(motion.jaw_pose[0, 0]) <= 0.2 if drawn.draws["jaw_opened"] else True
            assert expected and float(motion.jaw_pose[0, 1]) == pytest.approx(numbers[-1] / 100_000)
            own_gaze.append(round(float(motion.eye_pose[0, 0]) * 10_000) == numbers[-1])
        assert len({number // 10 for number in numbers}) == 1 and len(set(numbers)) == 4  # one clip, four of its frames
        clips.add(numbers[0] // 10)
    assert min(clips) >= 100 and len(clips) >= 8 and np.mean(own_gaze) < 0.1


def test_more_motions_than_frames_come_round_again_and_leave_the_first_as_they_were(files):
    few, many = (draw_identity(config(files, dynamic_share=1.0, dynamic_motions=count), 0, 3) for count in (3, 7))
    numbers = [int(drawn.motion.expression[0, 0]) for drawn in many.motions]
    assert numbers[:3] == [int(drawn.motion.expression[0, 0]) for drawn in few.motions]
    assert len(set(numbers[:FRAMES])) == FRAMES and numbers[FRAMES:] == numbers[:2]


def test_static_motions_are_photographs_with_the_gaze_of_another_and_no_opened_jaw(files):
    numbers, gazes = [], []
    for identity in range(60):
        (drawn,) = draw_identity(config(files, dynamic_share=0.0), 0, identity).motions
        numbers.append(int(drawn.motion.expression[0, 0]))
        gazes.append(round(float(drawn.motion.eye_pose[0, 5]) * 10_000))
        assert not drawn.draws["jaw_opened"] and float(drawn.motion.jaw_pose[0, 0]) == pytest.approx(numbers[-1] / 100_000)
    assert max(numbers) < 1000 and max(gazes) < 1000 and len(set(numbers)) > 20 and len(set(gazes)) > 20
    assert np.mean(np.equal(numbers, gazes)) < 0.1


def test_shapes_and_cameras_are_independent_uniform_frames_of_both_sets(files):
    shapes, cameras = [], []
    for identity in range(150):
        recipe = draw_identity(config(files, dynamic_share=0.0, static_views=2), 0, identity)
        assert recipe.shape.shape == (1, 300) and recipe.shape.unique().numel() == 1
        shapes.append(int(recipe.shape[0, 0]))
        for label in recipe.motions[0].cameras:
            check_label(torch.cat([label, torch.zeros(412)]).numpy(), "a recipe")
            cameras.append(round((float(label[[3, 7, 11]].norm()) - 3.8) * 10_000))
    for numbers in (shapes, cameras):  # 60 of the 100 frames belong to clips
        assert 0.48 < np.mean(np.array(numbers) >= 1000) < 0.72 and len(set(numbers)) > 60
    assert len(set(zip(cameras[::2], cameras[1::2], strict=True))) > 140
    assert np.mean(np.equal(shapes, cameras[::2])) < 0.1


def test_a_look_at_camera_keeps_the_intrinsics_of_the_label_that_it_replaces(files):
    recipe = draw_identity(config(files, look_at_probability=1.0), 0, 0)
    for drawn in recipe.motions:
        assert all(drawn.draws["look_at"]) and (drawn.cameras[:, [16, 20]] == FOCAL).all()
        assert (drawn.cameras[:, 2].abs().sum() > 0) and len(drawn.cameras.unique(dim=0)) == len(drawn.cameras)


def test_no_camera_is_nearer_or_farther_than_the_stated_bounds(files):
    recipes = config(files)
    near, far = load_sample_sets(files).camera_distances
    assert near == pytest.approx(3.8, abs=2e-4) and far == pytest.approx(3.8 + (1000 + 10 * 11 + 4) / 10_000, abs=2e-4)
    lowest, highest = camera_distances(recipes)
    for identity in range(20):
        for drawn in draw_identity(recipes, 0, identity).motions:
            distance = world_to_camera(torch.zeros(len(drawn.cameras), 1, 3), Camera.from_label(drawn.cameras))[:, 0, 2].abs()
            assert lowest <= near <= distance.min() and distance.max() <= far <= highest


def test_an_identity_is_the_same_in_any_order(files):
    forward = [draw_identity(config(files), 3, identity) for identity in range(6)]
    for identity in reversed(range(6)):
        again = draw_identity(config(files), 3, identity)
        assert torch.equal(again.shape, forward[identity].shape)
        for one, other in zip(again.motions, forward[identity].motions, strict=True):
            assert torch.equal(one.cameras, other.cameras)
            assert all(torch.equal(a, b) for a, b in zip(one.motion, other.motion, strict=True))


def test_the_files_content_is_part_of_the_settings_only_where_they_are_read(files):
    assert "sample_sets" not in deciding_settings(RecipeConfig())
    planned = config(files.pinned())
    assert planned.sample_sets.content and from_dict(RecipeConfig, to_dict(planned), "here") == planned
    array = np.load(files.clip_motions)
    array[3, 2, 1] += 1
    np.save(files.clip_motions, array)
    changed = config(files.pinned())
    assert deciding_settings(changed) != deciding_settings(planned)
    with pytest.raises(
        DataError, match=rf"expected sample sets of content {planned.sample_sets.content}, got {changed.sample_sets.content}"
    ):
        load_sample_sets(planned.sample_sets)


def test_a_set_made_of_sample_sets_is_verified_and_belongs_to_its_files(files, run_of, tmp_path):
    recipe = RecipeConfig(source="sample-sets", sample_sets=files, dynamic_motions=2, dynamic_views=2, static_views=2)
    run = run_of(tmp_path / "set", recipe=recipe, identities=2)
    assert generate(run) == 0 and verify(VerifyRun(folder=tmp_path / "set", rerender=1)) == 0
    assert open_plan(tmp_path / "set") == make_plan(run)
    array = np.load(files.photograph_motions)
    np.save(files.photograph_motions, array + 1)
    with pytest.raises(ConfigError, match=r"changed: recipe\.sample_sets\.content"):
        generate(run)


def test_the_source_needs_its_four_files(files, tmp_path):
    with pytest.raises(ValueError, match="expected all four files under sample_sets"):
        config(dataclasses.replace(files, clip_motions=None))
    with pytest.raises(DataError, match="nowhere.npy: there is no such file of a sample set"):
        dataclasses.replace(files, clip_motions=tmp_path / "nowhere.npy").pinned()


def spoil(name, change):
    def save(files):
        path = getattr(files, name)
        np.save(path, change(np.load(path)), allow_pickle=True)

    return save


def wrong_camera(array, entry=0, value=3.0):
    array[7, -1, entry] = value
    return array


SPOILED = {
    "objects": (
        spoil("clip_motions", lambda a: np.full((2, 2, 112), {}, object)),
        r"clip_motions\.npy: .* cannot be read .*Python objects",
    ),
    "channels": (spoil("clip_motions", lambda a: a[..., :109]), r"clip_motions\.npy: expected floating-point numbers \[N, M, 112\], got"),
    "dimensions": (spoil("photograph_shapes", lambda a: a[:, 0]), r"photograph_shapes\.npy: expected .*got float32 \(40, 325\)"),
    "text": (spoil("photograph_shapes", lambda a: a.astype("S8")), r"photograph_shapes\.npy: expected floating-point numbers"),
    "empty": (spoil("photograph_shapes", lambda a: a[:0]), r"photograph_shapes\.npy: expected"),
    "rows": (
        spoil("photograph_motions", lambda a: a[:-1]),
        r"photograph_motions\.npy: expected motions \[N, M\] = \(40, 1\) .* got \(39, 1\)",
    ),
    "nan": (spoil("clip_motions", lambda a: wrong_camera(a, 5, np.nan)), r"clip_motions\.npy: row 7 holds numbers that are not finite"),
    "rotation": (spoil("clip_shapes", wrong_camera), r"clip_shapes\.npy: row 7, frame 4: expected a camera"),
    "focal": (spoil("photograph_shapes", lambda a: wrong_camera(a, 20, -4)), r"photograph_shapes\.npy: row 7, frame 0: expected a camera"),
    "away": (spoil("clip_shapes", lambda a: wrong_camera(a, 11, -9)), r"clip_shapes\.npy: row 7, frame 4: .* looking down -z"),
    "cut off": (lambda f: f.clip_shapes.write_bytes(f.clip_shapes.read_bytes()[:5000]), r"clip_shapes\.npy: .* cannot be read"),
    "no array": (lambda f: f.clip_shapes.write_bytes(b"325"), r"clip_shapes\.npy: .* cannot be read"),
}


@pytest.mark.parametrize(("change", "message"), SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_with_a_file_is_named(files, change, message):
    change(files)
    with pytest.raises(DataError, match=message):
        load_sample_sets(files.pinned())


def test_clips_of_one_frame_are_refused(files):
    with pytest.raises(DataError, match=r"photograph_motions\.npy: expected clips of at least 2 frames, got 1"):
        load_sample_sets(dataclasses.replace(files, clip_shapes=files.photograph_shapes, clip_motions=files.photograph_motions))


# Splits -----------------------------------------------------------------------------------------------------------------------


def drawn_rows(recipe_config, identities=160):
    """By split: the numbers of the shapes, the clips or photographs, and the gazes that its identities were drawn from."""
    rows = {split: {"shape": set(), "face": set(), "gaze": set()} for split in ("train", "val", "test")}
    for identity in range(identities):
        recipe = draw_identity(recipe_config, 0, identity)
        found = rows[recipe.split]
        found["shape"].add(int(recipe.shape[0, 0]) // 10)
        for drawn in recipe.motions:
            found["face"].add(int(drawn.motion.expression[0, 0]) // 10)
            found["gaze"].add(round(float(drawn.motion.eye_pose[0, 5]) * 10_000) // 10)
    return rows


def test_no_row_serves_two_splits_and_every_row_serves_one(files):
    recipe_config = config(files, split_rows=True, val_share=0.25, test_share=0.25)
    rows = drawn_rows(recipe_config)
    for aspect in ("shape", "face", "gaze"):
        parts = [rows[split][aspect] for split in ("train", "val", "test")]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert set().union(*parts) <= {*range(PHOTOGRAPHS), *range(100, 100 + CLIPS)} and min(map(len, parts)) > 3
    # What an identity learns of by its shape it does not meet in another split as a motion or gaze either.
    everything = [set().union(*rows[split].values()) for split in ("train", "val", "test")]
    assert [len(part) for part in everything] == [20 + 6, 10 + 3, 10 + 3]


def test_without_it_splits_share_rows_as_the_published_draws_do(files):
    rows = drawn_rows(config(files, val_share=0.25, test_share=0.25))
    assert rows["train"]["face"] & rows["val"]["face"] and rows["train"]["shape"] & rows["test"]["shape"]


def test_a_rows_split_follows_its_shape_wherever_it_stands_and_whatever_the_seed(files, tmp_path):
    shares = ("val", 0.25, 0.25)
    rows = load_sample_sets(files)
    before = {int(rows.of_split(*shares).shape(np.random.default_rng(number))[0]) // 10 for number in range(200)}
    for name in ("photograph_shapes", "photograph_motions"):
        path = getattr(files, name)
        array = np.load(path)
        np.save(path, np.concatenate([array[::-1], array[:7]]))  # in another order, some rows twice
    again = load_sample_sets(files.pinned())
    assert {int(again.of_split(*shares).shape(np.random.default_rng(number))[0]) // 10 for number in range(200)} == before


def test_fewer_rows_than_splits_is_an_error_with_a_remedy(files):
    for name in ("clip_shapes", "clip_motions"):
        np.save(getattr(files, name), np.load(getattr(files, name))[:2])
    recipe_config = config(files, split_rows=True, val_share=0.25, test_share=0.25)
    with pytest.raises(DataError, match=r"split_rows: 2 different rows .* none for the split 'train'; .*--recipe.split_rows false"):
        drawn_rows(recipe_config, 8)


def test_more_motions_than_a_clip_has_frames_are_refused_for_motion_rich_identities(files):
    with pytest.raises(DataError, match="motion_rich_motions: 16 different motions .* a clip has 5 frames"):
        draw_identity(config(files, dynamic_share=0.0, motion_rich_share=1.0), 0, 0)


# Portraits --------------------------------------------------------------------------------------------------------------------


def write_record(folder, count=30, head_model="procedural", scale=1.0):
    """Portraits whose labels say which they are, as those of photographs in `arrays` do."""
    shapes, motions = arrays(count, 1, 0)
    labels = np.concatenate([shapes[:, 0], motions[:, 0]], axis=1)
    labels[:, 25:425] *= scale
    picture, matte = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8)
    write_portraits(folder, [Portrait(picture, matte, label) for label in labels], 8, count, {"head_model": head_model})
    return PortraitRows(record=folder)


def test_portraits_are_a_source_of_shapes_cameras_and_independent_motions(tmp_path):
    rows = write_record(tmp_path / "portraits")
    recipe_config = RecipeConfig(
        source="portraits", portraits=rows, look_at_probability=0.0, dynamic_share=1.0, val_share=0.2, test_share=0.2
    )
    found = drawn_rows(recipe_config, 60)
    assert set().union(*(part for split in found.values() for part in split.values())) == set(range(30))
    assert not any(found["train"][aspect] & found["test"][aspect] for aspect in ("shape", "face", "gaze"))
    recipe = draw_identity(recipe_config, 0, 1)
    assert len({float(drawn.motion.expression[0, 0]) for drawn in recipe.motions}) > 1
    assert all((drawn.cameras[:, [16, 20]] == FOCAL).all() and not drawn.motion.neck_pose.any() for drawn in recipe.motions)
    near, far = camera_distances(recipe_config)
    assert near <= 3.8 and far >= 3.8 + 290 / 10_000


def test_a_set_belongs_to_the_labels_of_its_portraits_and_to_their_head_model(tmp_path, run_of, head_file):
    rows = write_record(tmp_path / "portraits", head_model=str(head_file), scale=0.001)
    recipe = RecipeConfig(source="portraits", portraits=rows, dynamic_motions=2, dynamic_views=2, static_views=2, split_rows=False)
    run = run_of(tmp_path / "set", recipe=recipe, identities=2)
    assert generate(run) == 0 and verify(VerifyRun(folder=tmp_path / "set", rerender=1)) == 0
    content = open_plan(tmp_path / "set").recipe.portraits.content
    assert content and "portraits" not in deciding_settings(RecipeConfig())
    shutil.rmtree(tmp_path / "portraits")
    write_record(tmp_path / "portraits", count=31, head_model=str(head_file))
    with pytest.raises(ConfigError, match=r"changed: recipe\.portraits\.content"):
        generate(run)
    with pytest.raises(DataError, match=f"expected portraits with labels of content {content}, got"):
        PortraitRows(tmp_path / "portraits", content).pinned(str(head_file))
    with pytest.raises(DataError, match="labelled for the head model .* but the generator's is 'procedural'"):
        rows.pinned("procedural")
    with pytest.raises(ValueError, match="expected a portraits record under portraits.record"):
        RecipeConfig(source="portraits")
