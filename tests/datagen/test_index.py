"""The index: small, quick to open, and the same as the sidecars."""

import tracemalloc

import numpy as np
import pytest

from datagen.exclusion import Exclusion
from datagen.index import FrameEntry, Frames, Index, Place, build_index
from datagen.shards import SCHEMA
from head3d.run.errors import DataError

MANIFEST = {"config_hash": "0123456789abcdef", "plan": {"shards": 2}}


def sidecar(family, shard, samples):
    """As the writer makes it: members one after another. samples: (facts, {name: (size, checksum)})."""
    offset, entries = 0, []
    for number, (facts, members) in enumerate(samples):
        places = {}
        for name, (size, checksum) in sorted(members.items()):
            places[name] = [offset + 512, size, checksum]
            offset += 512 + (size + 511) // 512 * 512
        entries.append({"key": f"{shard:06d}{number:04d}", **facts, "members": places})
    return family, {"schema": SCHEMA, "family": family, "shard": shard, "bytes": offset + 1024, "sha256": "ab" * 32, "samples": entries}


def facts(identity, motion, **changes):
    return {"identity": identity, "motion": motion, "kind": "dynamic", "split": "train", "views": 2} | changes


@pytest.fixture
def sidecars():
    """Shards 0 and 3 of a set: identities 0 and 1 with three frames, identity 9 with one; shard 3 without labels."""
    pictures, label = {"rgb.0.jpg": (1000, 7), "rgb.1.jpg": (512, 8)}, {"depth.npy": (513, 9)}
    people = [facts(0, 0), facts(0, 1, split="val"), facts(1, 0, kind="static", views=1)]
    return [
        sidecar("identities", 0, [({"identity": identity}, {"background.npy": (10 + identity, identity)}) for identity in (0, 1)]),
        sidecar("frames", 0, [(people[0], pictures), (people[1], pictures), (people[2], {"rgb.0.jpg": (1, 2**32 - 1)})]),
        sidecar("labels", 0, [(person, label) for person in people]),
        sidecar("identities", 3, [({"identity": 9}, {"background.npy": (30, 3)})]),
        sidecar("frames", 3, [(facts(9, 0), {"json": (3, 4)})]),
    ]


def test_places_are_counted_from_sizes_and_families_are_joined(sidecars):
    index = Index.from_bytes(build_index(MANIFEST, sidecars, str).to_bytes(), "index")
    frames = Frames(index, Exclusion())
    assert all(entry.dataset == 0 for entry in frames)
    assert [entry[: FrameEntry._fields.index("members")] for entry in frames] == [
        ("0000000000", 0, 0, 0, "dynamic", "train", 2),
        ("0000000001", 0, 0, 1, "dynamic", "val", 2),
        ("0000000002", 0, 1, 0, "static", "train", 1),
        ("0000030000", 3, 9, 0, "dynamic", "train", 2),
    ]
    # frame 0 takes 512 + 1024 and 512 + 512 bytes, so frame 1 begins at 2560; a depth map takes 512 + 1024
    assert dict(frames[1].members) == {
        "rgb.0": Place("frames/000000.tar", 2560 + 512, 1000, 7, 2),
        "rgb.1": Place("frames/000000.tar", 2560 + 512 + 1024 + 512, 512, 8, 3),
        "depth": Place("labels/000000.tar", 1536 + 512, 513, 9, 1),
        "identity.background": Place("identities/000000.tar", 512, 10, 0, 0),
    }
    assert frames[2].members["rgb.0"] == Place("frames/000000.tar", 2 * 2560 + 512, 1, 2**32 - 1, 4)
    assert frames[2].members["identity.background"].offset == 1024 + 512
    assert dict(frames[3].members) == {
        "json": Place("frames/000003.tar", 512, 3, 4, 5),
        "identity.background": Place("identities/000003.tar", 512, 30, 3, 2),
    }
    assert index.tars()["labels/000000.tar"] == (3 * 1536 + 1024, "ab" * 32) and len(index.tars()) == 5


def test_frames_are_a_sequence_of_entries(sidecars):
    frames = Frames(build_index(MANIFEST, sidecars, str), Exclusion())
    assert len(frames) == 4 and frames[-1] == frames[3] == list(frames)[3] and frames[1:3] == [frames[1], frames[2]]
    assert isinstance(frames[0], FrameEntry) and frames[0]._replace(split="test").members == frames[0].members
    with pytest.raises(IndexError):
        frames[4]


def test_excluded_identities_and_frames_are_left_out_and_counted(sidecars):
    frames = Frames(build_index(MANIFEST, sidecars, str), Exclusion(frozenset([0]), frozenset(["0000030000", "0000990000", "nonsense"])))
    assert [entry.key for entry in frames] == ["0000000002"] and frames.excluded == 3


def test_a_set_without_a_single_shard_has_no_frames():
    assert list(Frames(Index.from_bytes(build_index(MANIFEST, [], str).to_bytes(), "index"), Exclusion())) == []


def test_equal_sidecars_give_equal_bytes_and_a_changed_one_shows(sidecars):
    index = build_index(MANIFEST, sidecars, str)
    assert index.to_bytes() == build_index(MANIFEST, sidecars, str).to_bytes() == Index.from_bytes(index.to_bytes(), "index").to_bytes()
    sidecars[1][1]["versions"] = {"torch": "another"}
    changed = build_index(MANIFEST, sidecars, str).sidecars()
    assert [name for name, digest in index.sidecars().items() if changed[name] != digest] == ["frames/000000.json"]


def test_a_sidecar_whose_members_do_not_lie_one_after_another_is_refused(sidecars):
    sidecars[1][1]["samples"][1]["members"]["rgb.1.jpg"][0] += 512
    with pytest.raises(DataError, match=r"frames/000000.json: it does not describe a tar of ours .*'rgb.1.jpg' at byte 5120 .*delete"):
        build_index(MANIFEST, sidecars, str)
    del sidecars[0][1]["samples"][0]["identity"]
    with pytest.raises(DataError, match="identities/000000.json: it does not describe a tar of ours .*identity"):
        build_index(MANIFEST, sidecars, str)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"{}", lambda data: data.replace(b"/shard", b"/shart", 1)]
)
def test_a_damaged_index_is_an_error_with_a_remedy(sidecars, damage):
    data = build_index(MANIFEST, sidecars, str).to_bytes()
    with pytest.raises(DataError, match=r"somewhere/index: could not be read as an index .*delete it"):
        Index.from_bytes(damage(data), "somewhere/index")


def test_a_frame_takes_less_than_three_hundred_bytes_in_memory():
    """Five views, fourteen members and a share of an identity: the default set."""
    pictures = {f"rgb.{view}.jpg": (90_000, 1) for view in range(5)} | dict.fromkeys(
        ("json", "label.npy", "opacity.npy", "parts.npy", "background.jpg"), (4096, 1)
    )
    maps = dict.fromkeys(("depth.npy", "foreground.npy", "points.npy", "point_features.npy"), (500000, 1))
    count = 4000
    people = [facts(number, 0, views=5) for number in range(count)]
    index = build_index(
        MANIFEST,
        [
            sidecar("frames", 0, [(person, pictures) for person in people]),
            sidecar("labels", 0, [(person, maps) for person in people]),
            sidecar("identities", 0, [({"identity": number}, {"background.npy": (70_000, 1)}) for number in range(count)]),
        ],
        str,
    )
    data = index.to_bytes()
    del index
    tracemalloc.start()
    frames = Frames(Index.from_bytes(data, "index"), Exclusion())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(frames) == count and len(data) / count < 200 and held / count < 300
    assert np.isclose(frames[count - 1].members["depth"].offset, (count - 1) * 4 * (512 + 500_224) + 512)
