"""`verify` finds and names every sort of damage."""

import json
import shutil
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from datagen.exclusion import Exclusion
from datagen.generate import generate
from datagen.index import INDEX, build_index
from datagen.plan import exclude, manifest_text
from datagen.reading import open_dataset, read_manifest, read_sidecars, write_index
from datagen.render import render_frame
from datagen.shards import shard_name
from datagen.verify import VerifyRun, verify
from head3d.run.errors import DataError


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, undisturbed):
    """The undamaged set, on disk."""
    out = tmp_path_factory.mktemp("untouched") / "set"
    for name, data in undisturbed.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return out


@pytest.fixture
def folder(tmp_path, untouched):
    """A fresh copy of it."""
    return shutil.copytree(untouched, tmp_path / "set")


def outcome(folder, capsys, rerender=0, **settings):
    """Exit status and what was printed."""
    status = verify(VerifyRun(folder, rerender=rerender, **settings))
    return status, capsys.readouterr().out


def change(path, edit):
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def test_an_undamaged_set_passes_and_renders_again_bit_for_bit(folder, capsys):
    status, said = outcome(folder, capsys, rerender=3)
    assert status == 0 and "everything is as it was written" in said and "3 bit-exact" in said


def test_a_truncated_tar_is_named(folder, capsys):
    change(folder / shard_name("frames", 1), lambda data: data.__delitem__(slice(-600, None)))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000001.tar: expected" in said and "cut short" in said and "1 problems" in said


def test_a_flipped_bit_is_named_with_its_member(folder, capsys):
    path = folder / shard_name("labels", 0)
    sample = json.loads(path.with_suffix(".json").read_text())["samples"][1]
    offset, size, _ = sample["members"]["foreground.npy"]

    def flip(data):
        data[offset + size - 1] ^= 1

    change(path, flip)
    status, said = outcome(folder, capsys)
    assert status == 1 and "labels/000000.tar: the SHA-256 does not match" in said and "key 0000000001, member 'foreground.npy'" in said


def test_a_flipped_bit_between_members_is_found_too(folder, capsys):
    change(folder / shard_name("frames", 0), lambda data: data.__setitem__(-1, 1))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000000.tar: the SHA-256 does not match, bytes have changed: outside all members" in said


@pytest.mark.parametrize("suffix", [".tar", ".json"])
def test_a_missing_file_is_named(folder, capsys, suffix):
    (folder / shard_name("identities", 2)).with_suffix(suffix).unlink()
    status, said = outcome(folder, capsys)
    assert status == 1 and f"identities/000002{suffix}: missing" in said


def test_renamed_and_foreign_files_are_named(folder, capsys):
    for suffix in (".tar", ".json"):
        path = (folder / shard_name("frames", 2)).with_suffix(suffix)
        path.rename(path.with_stem("000009"))
    (folder / "labels" / "notes.txt").write_text("hello")
    status, said = outcome(folder, capsys)
    assert status == 1
    for text in ("frames/000002.tar: missing", "frames/000009.tar: foreign", "frames/000009.json: foreign", "labels/notes.txt: foreign"):
        assert text in said


def test_exchanged_shards_are_named(folder, capsys):
    for suffix in (".tar", ".json"):
        one, other = ((folder / shard_name("frames", shard)).with_suffix(suffix) for shard in (0, 1))
        spare = folder / "spare"
        one.rename(spare)
        other.rename(one)
        spare.rename(other)
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000000.json: expected the sidecar of frames shard 0" in said and "frames/000001.json" in said


def test_a_tar_of_another_data_set_is_named(folder, tmp_path, capsys, run_of):
    other = tmp_path / "other"
    generate(run_of(other, seed=1))
    for suffix in (".tar", ".json"):
        shutil.copy((other / shard_name("frames", 1)).with_suffix(suffix), (folder / shard_name("frames", 1)).with_suffix(suffix))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000001.json: expected config_hash" in said


def test_another_schema_and_a_changed_setting_are_named(folder, capsys):
    path = folder / "dataset.json"
    text = path.read_text()
    path.write_text(text.replace("headfoundry-shards/2", "headfoundry-shards/9"))
    status, said = outcome(folder, capsys)
    assert status == 1 and "dataset.json: expected schema 'headfoundry-shards/2', got 'headfoundry-shards/9'" in said
    path.write_text(text.replace('"truncation_psi": 0.95', '"truncation_psi": 0.5'))
    status, said = outcome(folder, capsys)
    assert status == 1 and "dataset.json: its content is not what its content_sha256 was made from" in said


def test_an_old_index_is_named(folder, capsys):
    manifest, sidecars = read_manifest(folder), list(read_sidecars(folder, read_manifest(folder)))
    older = build_index(manifest, [(family, sidecar) for family, sidecar in sidecars if sidecar["shard"] != 1], str)
    (folder / INDEX).write_bytes(older.to_bytes())
    status, said = outcome(folder, capsys)
    assert status == 1 and f"{INDEX}: differs from the sidecars {folder}/frames/000001.json, {folder}/labels/000001.json" in said


@pytest.mark.parametrize("families", [("frames", "labels", "identities"), ("identities",)])
def test_a_consistent_forgery_is_found_by_rendering_again(folder, capsys, run_of, other_generator, tmp_path, families):
    """Data of another generator under this set's name: every hash fits, the recipe does not."""
    forged = tmp_path / "forged"
    generate(run_of(forged, generator=other_generator))
    ours, theirs = (json.loads((path / "dataset.json").read_text())["config_hash"] for path in (folder, forged))
    for family in families:
        shutil.rmtree(folder / family)
        shutil.copytree(forged / family, folder / family)
        for path in (folder / family).glob("*.json"):
            path.write_text(path.read_text().replace(theirs, ours))
    (folder / INDEX).unlink()
    write_index(folder)
    status, said = outcome(folder, capsys)
    assert status == 0, said
    status, said = outcome(folder, capsys, rerender=1)
    assert status == 1 and "rendered again, " in said and families[0] in said and "bit-exact expected" in said


@pytest.mark.parametrize(
    ("same_stack", "step", "status", "words"),
    [
        (True, 1, 1, "same program and processor: bit-exact expected"),
        (False, 1, 0, "0 bit-exact, the least alike 4"),  # one level of 255 is 48 dB
        (False, 30, 1, "expected at least 40 dB"),
    ],
)
@pytest.mark.parametrize("member", ["rgb", "depth"])
def test_elsewhere_a_picture_or_a_map_may_differ_a_little(folder, capsys, monkeypatch, member, same_stack, step, status, words):
    scales = open_dataset(folder).scales

    def rendered(*arguments):
        frame = render_frame(*arguments)
        if member == "depth":
            level = (scales.far - scales.near) / 255
            middle = (scales.far + scales.near) / 2
            return frame | {"depth": np.where(frame["depth"] > middle, frame["depth"] - step * level, frame["depth"] + step * level)}
        return frame | {"rgb": np.where(frame["rgb"] > 127, frame["rgb"] - step, frame["rgb"] + step).astype(np.uint8)}

    monkeypatch.setattr("datagen.verify.render_frame", rendered)
    if not same_stack:
        monkeypatch.setattr("datagen.verify.versions", lambda *_: {"torch": "another"})
    outcome_status, said = outcome(folder, capsys, rerender=2)
    assert outcome_status == status and words in said


def test_a_generator_that_is_gone_is_a_problem_with_a_remedy(folder, capsys, tmp_path, generator):
    status, said = outcome(folder, capsys, rerender=1, generator=tmp_path / "nowhere")
    assert status == 1 and "Give --generator FOLDER, or --rerender 0" in said
    moved = tmp_path / "moved"
    shutil.copytree(generator, moved)
    assert outcome(folder, capsys, rerender=1, generator=moved)[0] == 0


def damage_truncate(path, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw(st.integers(0, len(data) - 1))])
    return [path]


def damage_flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)
    return [path]


def damage_rename(path, draw):
    other = path.with_name(draw(st.sampled_from(["000007", "x", ".tmp-00-"])) + path.name)
    path.rename(other)
    return [path, other]


def damage_remove(path, draw):
    path.unlink()
    return [path]


def damage_add(path, draw):
    other = path.with_name(draw(st.sampled_from(["000003.tar", "000003.json", "000000.tar.part", "photograph.jpg"])))
    shutil.copy(path, other)
    return [other]


def damage_exchange(path, draw):
    """With another file of the set: a shard's, a family's, or a sidecar for a tar."""
    other = draw(st.sampled_from(sorted(data for data in path.parent.parent.glob("*/*") if data != path)))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return [path, other]


def damage_folder(path, draw):
    path.unlink()
    path.mkdir()
    return [path]


DAMAGES = (damage_truncate, damage_flip, damage_rename, damage_remove, damage_add, damage_exchange, damage_folder)


@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_every_sort_of_damage_to_any_file_is_found_and_the_file_is_named(untouched, tmp_path, capsys, data):
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:
        folder = shutil.copytree(untouched, Path(place) / "set")
        everything = sorted(path for path in folder.rglob("*") if path.is_file())
        shards = [path for path in everything if path.parent != folder]
        damage = data.draw(st.sampled_from(DAMAGES))
        touched = damage(data.draw(st.sampled_from(shards if damage is damage_exchange else everything)), data.draw)
        status, said = outcome(folder, capsys)
    assert status == 1
    for path in touched[:1] if touched[0].name == "dataset.json" else touched:  # without it nobody knows what else belongs there
        assert str(path) in said or f" {path.relative_to(folder)}" in said, f"{path} is not named in:\n{said}"


def test_excluded_frames_are_no_damage_and_an_exclusion_of_nothing_is(folder, capsys):
    exclude(folder, Exclusion(frozenset([2]), frozenset(["0000000001"])))
    status, said = outcome(folder, capsys, rerender=1)
    assert status == 0 and "excluded: 1 identities, 1 frames" in said
    manifest = read_manifest(folder) | {"excluded": {"identities": [5], "frames": ["0000020001", "0000030000"]}}
    (folder / "dataset.json").write_text(manifest_text(manifest))
    status, said = outcome(folder, capsys)
    assert status == 1
    for stranger in ("identity 5", "frame 0000020001", "frame 0000030000"):
        assert f"dataset.json: excludes {stranger}, which the set does not have" in said


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        verify(VerifyRun(tmp_path / "nowhere"))
