"""Leaving frames out of a data set without touching its tars."""

import json

import pytest

from datagen.exclusion import Exclusion, read_exclusion
from datagen.generate import generate
from datagen.plan import exclude, open_plan
from datagen.reading import open_dataset
from head3d.run.errors import DataError

# Five identities in three shards: 0 static, 1 dynamic | 2 static, 3 dynamic | 4 static; a dynamic one has two frames
KEYS = ["0000000000", "0000000001", "0000000002", "0000010000", "0000010001", "0000010002", "0000020000"]


def listed(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return read_exclusion(path)


def test_a_list_names_identities_and_frames_with_notes(tmp_path):
    text = "# seen by me\nidentity 3   # no hair\n\n  frame 0000000001\nidentity 3\n"
    assert listed(tmp_path, text) == Exclusion(frozenset([3]), frozenset(["0000000001"]))
    assert listed(tmp_path, "") == Exclusion()
    both = Exclusion(frozenset([17, 3]), frozenset(["0000000001"]))
    assert both.text() == "identity 3\nidentity 17\nframe 0000000001\n" and listed(tmp_path, both.text()) == both


@pytest.mark.parametrize("line", ["3", "identity", "identity three", "identity -3", "frame 1 2", "person 3", "identity ²"])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"list.txt, line 2: expected an identity or a frame, got .*write `identity NUMBER` or"):
        listed(tmp_path, f"identity 1\n{line}\n")


def test_readers_leave_out_what_is_excluded_and_no_tar_changes(made_set, undisturbed, data_files):
    exclude(made_set, Exclusion(frozenset([3]), frozenset(["0000000001"])))
    dataset = open_dataset(made_set)
    assert [frame.key for frame in dataset.frames] == ["0000000000", "0000000002", "0000010000", "0000020000"]
    assert dataset.excluded_count == 3
    assert {name for name, data in data_files(made_set).items() if undisturbed[name] != data} == {"dataset.json"}
    assert open_plan(made_set).hash == json.loads(undisturbed["dataset.json"])["config_hash"]


def test_the_list_is_the_whole_truth_so_an_empty_one_brings_everything_back(made_set, undisturbed, data_files):
    exclude(made_set, Exclusion(frozenset([3]), frozenset()))
    exclude(made_set, Exclusion(frozenset(), frozenset(["0000020000"])))
    assert [frame.key for frame in open_dataset(made_set).frames] == KEYS[:-1]
    exclude(made_set, Exclusion())
    assert data_files(made_set) == undisturbed


@pytest.mark.parametrize(
    "stranger",
    [
        Exclusion(identities=frozenset([5])),
        Exclusion(frames=frozenset(["0000020001"])),
        Exclusion(frames=frozenset(["0000030000"])),
        Exclusion(frames=frozenset(["20000"])),
    ],
)
def test_what_the_set_does_not_have_cannot_be_excluded(made_set, stranger):
    with pytest.raises(DataError, match="expected identities below 5 and keys of frames of this set, got (identity 5|frame .*)"):
        exclude(made_set, stranger)


def test_a_set_that_grows_goes_on_excluding(made_set, run_of):
    exclude(made_set, Exclusion(frozenset([3]), frozenset()))
    assert generate(run_of(made_set, identities=7)) == 0
    assert {frame.identity for frame in open_dataset(made_set).frames} == {0, 1, 2, 4, 5, 6}


def test_a_malformed_entry_is_an_error(made_set):
    path = made_set / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"excluded": {"identities": ["3"], "frames": []}}))
    with pytest.raises(DataError, match="dataset.json: expected 'excluded' to hold lists 'identities'"):
        open_dataset(made_set)
