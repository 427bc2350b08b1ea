"""`verify` finds and names every sort of damage."""

import json
import shutil

import pytest

from datagen.generate import generate
from datagen.reading import write_index
from datagen.shards import shard_path
from datagen.verify import VerifyRun, verify
from head3d.run.errors import DataError


@pytest.fixture
def folder(tmp_path, run_of, undisturbed):
    """A fresh copy of the undamaged set."""
    out = tmp_path / "set"
    for name, data in undisturbed.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return out


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
    change(shard_path(folder, "frames", 1), lambda data: data.__delitem__(slice(-600, None)))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000001.tar: expected" in said and "cut short" in said and "1 problems" in said


def test_a_flipped_bit_is_named_with_its_member(folder, capsys):
    path = shard_path(folder, "labels", 0)
    sample = json.loads(path.with_suffix(".json").read_text())["samples"][1]
    offset, size, _ = sample["members"]["foreground.npy"]

    def flip(data):
        data[offset + size - 1] ^= 1

    change(path, flip)
    status, said = outcome(folder, capsys)
    assert status == 1 and "labels/000000.tar: the SHA-256 does not match" in said and "key 0000000001, member 'foreground.npy'" in said


def test_a_flipped_bit_between_members_is_found_too(folder, capsys):
    change(shard_path(folder, "frames", 0), lambda data: data.__setitem__(-1, 1))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000000.tar: the SHA-256 does not match, bytes have changed: outside all members" in said


@pytest.mark.parametrize("suffix", [".tar", ".json"])
def test_a_missing_file_is_named(folder, capsys, suffix):
    shard_path(folder, "identities", 2).with_suffix(suffix).unlink()
    status, said = outcome(folder, capsys)
    assert status == 1 and f"identities/000002{suffix}: missing" in said


def test_renamed_and_foreign_files_are_named(folder, capsys):
    for suffix in (".tar", ".json"):
        path = shard_path(folder, "frames", 2).with_suffix(suffix)
        path.rename(path.with_stem("000009"))
    (folder / "labels" / "notes.txt").write_text("hello")
    status, said = outcome(folder, capsys)
    assert status == 1
    for text in ("frames/000002.tar: missing", "frames/000009.tar: foreign", "frames/000009.json: foreign", "labels/notes.txt: foreign"):
        assert text in said


def test_exchanged_shards_are_named(folder, capsys):
    for suffix in (".tar", ".json"):
        one, other = (shard_path(folder, "frames", shard).with_suffix(suffix) for shard in (0, 1))
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
        shutil.copy(shard_path(other, "frames", 1).with_suffix(suffix), shard_path(folder, "frames", 1).with_suffix(suffix))
    status, said = outcome(folder, capsys)
    assert status == 1 and "frames/000001.json: expected config_hash" in said


def test_another_schema_and_a_changed_setting_are_named(folder, capsys):
    path = folder / "dataset.json"
    text = path.read_text()
    path.write_text(text.replace("headfoundry-shards/1", "headfoundry-shards/9"))
    status, said = outcome(folder, capsys)
    assert status == 1 and "dataset.json: expected schema 'headfoundry-shards/1', got 'headfoundry-shards/9'" in said
    path.write_text(text.replace('"truncation_psi": 0.95', '"truncation_psi": 0.5'))
    status, said = outcome(folder, capsys)
    assert status == 1 and "dataset.json: its settings have the hash" in said


def test_an_old_index_is_named(folder, capsys):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"]["frames"].pop()
    path.write_text(json.dumps(content))
    status, said = outcome(folder, capsys)
    assert status == 1 and "index.json: differs from the sidecars" in said


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
    (folder / "index.json").unlink()
    write_index(folder)
    status, said = outcome(folder, capsys)
    assert status == 0, said
    status, said = outcome(folder, capsys, rerender=1)
    assert status == 1 and "rendered again, " in said and families[0] in said and "bit-exact expected" in said


def test_a_generator_that_is_gone_is_a_problem_with_a_remedy(folder, capsys, tmp_path, generator):
    status, said = outcome(folder, capsys, rerender=1, generator=tmp_path / "nowhere")
    assert status == 1 and "Give --generator FOLDER, or --rerender 0" in said
    moved = tmp_path / "moved"
    shutil.copytree(generator, moved)
    assert outcome(folder, capsys, rerender=1, generator=moved)[0] == 0


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        verify(VerifyRun(tmp_path / "nowhere"))
