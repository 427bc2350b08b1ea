"""The shard format: values there and back, foreign readers, and every sort of damage found and named."""

import errno
import json
import pickle
import shutil
import tarfile
import threading
import zlib

import numpy as np
import pytest
import webdataset

import head3d.run.files
from datagen.index import INDEX, asked_name, build_index
from datagen.labels import DEFAULT_LABELS, members_of
from datagen.members import Scales, ShardConfig, decode, dequantise, encode_sample, member_entries, quantise
from datagen.reading import open_dataset, read_manifest, read_sidecars, write_index
from datagen.shards import SCHEMA, read_sidecar, sample_key, shard_name, write_shard
from head3d.run.errors import DataError

SCALES = Scales(near=3.0, far=5.0, box_side=1.3)
CONFIG = ShardConfig(identities_per_shard=2)
VIEWS, SIDE, RAYS, CHANNELS, POINTS = 2, 16, 8, 4, 5
MEMBERS = {family: members_of(DEFAULT_LABELS, family) for family in ("frames", "labels", "identities")}
MEMBER = {f"{member.family}.{member.name}": member for members in MEMBERS.values() for member in members}


def frame(identity, motion):
    rng = np.random.default_rng([identity, motion])
    smooth = np.linspace(0, 255, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    return {
        "rgb": np.stack([smooth + identity, smooth[::-1] + motion]).astype(np.uint8),
        "opacity": rng.random((VIEWS, RAYS, RAYS)),
        "parts": rng.integers(0, 4, (VIEWS, RAYS, RAYS)).astype(np.uint8),
        "label": rng.standard_normal((VIEWS, 437)).astype(np.float32),
        "background": np.full((RAYS, RAYS, 3), 10 * identity, np.uint8),
        "json": {"identity": identity, "motion": motion},
        "depth": rng.uniform(3, 5, (VIEWS, RAYS, RAYS)),
        "foreground": rng.random((VIEWS, CHANNELS, RAYS, RAYS)),
        "points": rng.uniform(-0.65, 0.65, (VIEWS, POINTS, 3)),
        "point_features": rng.standard_normal((VIEWS, POINTS, CHANNELS)),
    }


def identity_background(identity):
    return np.random.default_rng(identity).random((CHANNELS, RAYS, RAYS))


def write_dataset(folder, shards=2, config=CONFIG, motions=2):
    manifest = {
        "schema": SCHEMA,
        "config_hash": "0123456789abcdef",
        "plan": {"shards": shards},
        "depth": {"near": SCALES.near, "far": SCALES.far},
        "box_side": SCALES.box_side,
        "members": member_entries(members_of(DEFAULT_LABELS)),
        "settings": {"shards": {"image_format": config.image_format}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    for shard in range(shards):
        people = range(shard * 2, shard * 2 + 2)
        for family in ("identities", "labels", "frames"):
            with write_shard(folder, family, shard, {"config_hash": manifest["config_hash"]}) as writer:
                for index, identity in enumerate(people):
                    if family == "identities":
                        values = {"identity.background": identity_background(identity)}
                        writer.add(sample_key(shard, index), encode_sample(MEMBERS[family], values, SCALES, config), {"identity": identity})
                    for motion in range(motions if family != "identities" else 0):
                        about = {"identity": identity, "motion": motion, "kind": "dynamic", "split": "train", "views": VIEWS}
                        key = sample_key(shard, index * motions + motion)
                        writer.add(key, encode_sample(MEMBERS[family], frame(identity, motion), SCALES, config), about)
    write_index(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "set")


# Values -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high"), [("labels.depth", 3.0, 5.0), ("labels.points", -0.65, 0.65), ("frames.opacity", 0.0, 1.0)]
)
def test_quantised_ends_are_exact_and_everything_between_is_half_a_step_away(name, low, high):
    member = MEMBER[name]
    steps = np.iinfo(member.dtype).max
    values = np.linspace(low, high, 10_001)
    stored = quantise(values, member, SCALES)
    assert stored[0] == 0 and stored[-1] == steps and stored.dtype == member.dtype
    back = dequantise(stored, member, SCALES)
    assert back.dtype == np.float32
    assert np.abs(back - values).max() <= 0.5001 * (high - low) / steps + 1e-6


def test_quantising_twice_changes_nothing():
    member = MEMBER["labels.points"]
    stored = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(quantise(dequantise(stored, member, SCALES), member, SCALES), stored)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels.depth", np.nan, "not finite"),
        ("labels.depth", 5.1, "must lie in"),
        ("labels.depth", 2.9, "must lie in"),
        ("labels.foreground", np.inf, "not finite"),
        ("labels.foreground", 1e6, "too large for float16"),
        ("labels.points", 0.66, "must lie in"),
    ],
)
def test_a_number_that_cannot_be_stored_is_an_error_and_not_a_clip(name, value, message):
    with pytest.raises(ValueError, match=message):
        quantise(np.full(3, value), MEMBER[name], SCALES)


# Round trip and foreign readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["jpg", "png"])
def test_what_is_written_is_read(tmp_path, image_format):
    folder = write_dataset(tmp_path / "set", config=ShardConfig(identities_per_shard=2, image_format=image_format))
    dataset = open_dataset(folder)
    assert [(entry.identity, entry.motion, entry.shard) for entry in dataset.frames] == [(i, m, i // 2) for i in range(4) for m in range(2)]
    entry = dataset.frames[5]
    assert (entry.key, entry.kind, entry.split, entry.views) == ("0000010001", "dynamic", "train", VIEWS)
    names = [
        "rgb.0",
        "rgb.1",
        "opacity",
        "parts",
        "label",
        "background",
        "json",
        "depth",
        "foreground",
        "points",
        "point_features",
        "identity.background",
    ]
    data, wanted = dataset.read(entry, names), frame(2, 1)
    assert set(data) == set(names) == set(entry.members)
    tolerance = {"opacity": 0.002, "depth": 2e-5, "foreground": 3e-4, "points": 1.1e-5, "point_features": 2e-3, "label": 0, "parts": 0}
    for name, allowed in tolerance.items():
        np.testing.assert_allclose(data[name], wanted[name], atol=allowed, rtol=0)
        assert data[name].dtype == (np.uint8 if name == "parts" else np.float32)
    for view in range(VIEWS):
        error = np.abs(data[f"rgb.{view}"].astype(int) - wanted["rgb"][view])
        assert error.max() == 0 if image_format == "png" else error.mean() < 3
    np.testing.assert_allclose(data["identity.background"], identity_background(2), atol=5e-4)
    assert data["json"] == {"identity": 2, "motion": 1}


def test_raw_reading_gives_the_stored_types(folder):
    dataset = open_dataset(folder)
    raw = dataset.read(dataset.frames[0], ["depth", "foreground", "opacity"], dequantised=False)
    assert [raw[name].dtype for name in raw] == [np.uint16, np.float16, np.uint8]


def test_webdataset_reads_every_sample_whole(folder):
    paths = [str(folder / shard_name("frames", shard)) for shard in range(2)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == ["0000000000", "0000000001", "0000000002", "0000000003"] + [
        f"000001000{i}" for i in range(4)
    ]
    for sample in samples:
        assert {name for name in sample if not name.startswith("__")} == {
            "rgb.0.jpg",
            "rgb.1.jpg",
            "opacity.npy",
            "parts.npy",
            "label.npy",
            "background.jpg",
            "json",
        }
    dataset = open_dataset(folder)
    label = dataset.read(dataset.frames[3], ["label"])["label"]
    np.testing.assert_array_equal(decode(samples[3]["label.npy"], "label.npy"), label)


def test_tars_hold_no_time_and_no_user_and_are_the_same_each_time(folder, tmp_path):
    other = write_dataset(tmp_path / "other")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes(), path
    with tarfile.open(folder / shard_name("frames", 0)) as archive:
        assert {(info.mtime, info.uname, info.uid, info.mode) for info in archive} == {(0, "headfoundry", 0, 0o444)}


def test_a_dataset_is_read_without_its_index(folder):
    with_index = list(open_dataset(folder).frames)
    (folder / INDEX).unlink()
    assert list(open_dataset(folder).frames) == with_index


def test_an_index_of_an_older_plan_is_not_used(folder):
    older = read_manifest(folder) | {"plan": {"shards": 1}}
    (folder / INDEX).write_bytes(build_index(older, read_sidecars(folder, older), str).to_bytes())
    assert len(open_dataset(folder).frames) == 8


def test_a_shard_without_its_frames_sidecar_is_not_there(folder):
    (folder / INDEX).unlink()
    (folder / shard_name("frames", 0)).with_suffix(".json").unlink()
    assert {entry.shard for entry in open_dataset(folder).frames} == {1}


def test_reading_from_threads_and_from_a_pickled_copy_gives_the_same(folder):
    dataset = open_dataset(folder)
    wanted = [dataset.read(entry, ["label"])["label"] for entry in dataset.frames]
    copy, found = pickle.loads(pickle.dumps(dataset)), {}

    def work(number):
        for index, entry in enumerate(copy.frames):
            found[number, index] = copy.read(entry, ["label"])["label"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    for (_, index), label in found.items():
        np.testing.assert_array_equal(label, wanted[index])


def test_names_that_readers_ask_for():
    assert asked_name("frames", "rgb.3.jpg") == "rgb.3"
    assert asked_name("frames", "json") == "json"
    assert asked_name("identities", "background.npy") == "identity.background"


# Damage -----------------------------------------------------------------------------------------------------------------------


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(change(data))


def test_a_truncated_tar_is_named_with_both_sizes(folder):
    path = folder / shard_name("labels", 1)
    size = path.stat().st_size
    damage(path, lambda data: data[:-700])
    dataset = open_dataset(folder)
    dataset.read(dataset.frames[0], ["depth"])
    with pytest.raises(DataError, match=rf"labels/000001.tar: expected {size} bytes, got {size - 700}.*delete"):
        dataset.read(dataset.frames[4], ["depth"])


def test_a_flipped_bit_is_found_where_it_is_and_only_there(folder):
    dataset = open_dataset(folder)
    entry = dataset.frames[1]
    _, offset, size, _, _ = entry.members["depth"]

    def flip(data):
        data[offset + size - 3] ^= 4
        return data

    damage(folder / shard_name("labels", 0), flip)
    dataset = open_dataset(folder)
    dataset.read(entry, ["foreground"])
    with pytest.raises(
        DataError, match=rf"labels/000000.tar: key 0000000001, member 'depth' at byte {offset}: the checksum does not match"
    ):
        dataset.read(entry, ["depth"])
    open_dataset(folder, checksums=False).read(entry, ["depth"])  # the user's choice


def test_a_checksum_is_computed_once_for_what_is_read_from_files(folder, monkeypatch):
    computed, crc32 = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: computed.append(len(data)) or crc32(data))
    for one in (dataset := open_dataset(folder), dataset, pickle.loads(pickle.dumps(dataset))):  # the last as another process has it
        one.read(dataset.frames[1], ["depth", "label"])
    assert len(computed) == 4


def test_an_empty_or_missing_tar_is_named(folder):
    path = folder / shard_name("frames", 0)
    damage(path, lambda data: b"")
    with pytest.raises(DataError, match="frames/000000.tar"):
        open_dataset(folder).read(open_dataset(folder).frames[0], ["label"])
    path.unlink()
    with pytest.raises(DataError, match="frames/000000.tar: could not be opened"):
        open_dataset(folder).read(open_dataset(folder).frames[0], ["label"])


def test_a_missing_member_is_an_error_that_lists_what_is_there(folder):
    (folder / INDEX).unlink()
    shutil.rmtree(folder / "labels")
    dataset = open_dataset(folder)
    with pytest.raises(DataError, match="frame 0000000000 has no member 'depth'; it has background, identity.background"):
        dataset.read(dataset.frames[0], ["depth"])


@pytest.mark.parametrize("extension", ["rgb.0.jpg", "rgb.0.png", "label.npy", "json"])
@pytest.mark.parametrize("kept", [0, 60, 0.7])
def test_damaged_bytes_of_every_encoding_are_a_value_error(extension, kept):
    """Readers and `verify` turn it into a message with file, key and member."""
    config = ShardConfig(image_format="png" if extension.endswith("png") else "jpg")
    data = encode_sample(MEMBERS["frames"], frame(0, 0), SCALES, config)[extension]
    decode(data, extension)
    with pytest.raises(ValueError):
        decode(data[: int(kept * len(data)) if isinstance(kept, float) else min(kept, len(data) - 1)], extension)


def test_a_sidecar_that_lacks_an_entry_is_refused(folder):
    path = (folder / shard_name("frames", 1)).with_suffix(".json")
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="frames/000001.json: expected the entries of a sidecar, sha256 is missing; delete"):
        read_sidecar(folder, "frames", 1)


def test_a_shard_of_another_data_set_is_not_read(folder):
    (folder / INDEX).unlink()
    path = (folder / shard_name("labels", 1)).with_suffix(".json")
    path.write_text(path.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    with pytest.raises(
        DataError, match="labels/000001.json: expected a shard of settings 0123456789abcdef .* got fedcba9876543210.*delete"
    ):
        open_dataset(folder)


def test_a_quality_that_no_jpeg_has_is_refused():
    with pytest.raises(ValueError, match="expected 1 to 100, got 101"):
        ShardConfig(jpeg_quality=101)


def test_another_schema_is_refused(folder):
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace(SCHEMA, "somebody-elses/3"))
    with pytest.raises(DataError, match=r"dataset.json: expected schema 'headfoundry-shards/2', got 'somebody-elses/3'"):
        open_dataset(folder)


def test_a_renamed_sidecar_is_refused(folder):
    source, target = ((folder / shard_name("frames", shard)).with_suffix(".json") for shard in (0, 1))
    shutil.copy(source, target)
    with pytest.raises(DataError, match="expected the sidecar of frames shard 1, got frames shard 0"):
        read_sidecar(folder, "frames", 1)


def test_a_folder_without_a_dataset_says_so(tmp_path):
    with pytest.raises(DataError, match="dataset.json: there is no such file"):
        read_manifest(tmp_path)


# Writing ----------------------------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), write_shard(tmp_path, "frames", 0, {}) as writer:
        writer.add("0000000000", encode_sample(MEMBERS["frames"], frame(0, 0), SCALES, CONFIG), {})
        raise RuntimeError("the generator failed")
    assert list((tmp_path / "frames").iterdir()) == []


def test_a_full_disk_is_an_error_with_a_remedy_and_nothing_half_written(tmp_path, monkeypatch):
    from datagen import shards

    def full(self, data):
        if self.abandoned:
            return len(data)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards._HashedStream, "write", full)
    message = r"frames/000000.tar: could not be written: No space left on device.*free space"
    with pytest.raises(DataError, match=message), write_shard(tmp_path, "frames", 0, {}) as writer:
        for index in range(40):
            writer.add(f"{index:010d}", encode_sample(MEMBERS["frames"], frame(0, 0), SCALES, CONFIG), {})
    assert list((tmp_path / "frames").iterdir()) == []


def test_a_disk_that_fills_at_the_last_flush_leaves_no_sidecar(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(head3d.run.files.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"), write_shard(tmp_path, "frames", 0, {}) as writer:
        writer.add("0000000000", encode_sample(MEMBERS["frames"], frame(0, 0), SCALES, CONFIG), {})
    assert list((tmp_path / "frames").iterdir()) == []


def test_one_view_is_that_row_of_every_member_that_has_one_for_each_view(folder):
    dataset = open_dataset(folder)
    names = ["depth", "foreground", "label", "identity.background", "background", "rgb.0"]
    whole, one = dataset.read(dataset.frames[3], names), dataset.read(dataset.frames[3], names, view=1)
    for name in names:
        np.testing.assert_array_equal(one[name], whole[name][1] if name in names[:3] else whole[name])
    stored = dataset.read(dataset.frames[3], names, dequantised=False)
    assert all(value.flags.owndata and value.flags.writeable for value in (*stored.values(), *whole.values())), "not a view of the file"
