"""The portraits record and the import of photographs."""

import json
import multiprocessing
import os
import pickle

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from genhead.photographs import check_folder, read_label, read_photograph
from genhead.portraits import Portrait, PortraitSet, create_record, decode_portrait, encode_portrait, write_portraits
from head3d.cameras import frontal
from head3d.run.errors import DataError


def make_label(**changes: float) -> np.ndarray:
    label = np.zeros(437, np.float32)
    label[:25] = frontal().label()[0].numpy()
    for position, value in changes.items():
        label[int(position.removeprefix("at_"))] = value
    return label


def make_portraits(count: int, side: int = 24) -> list[Portrait]:
    g = np.random.default_rng(3)
    ramp = np.linspace(0, 255, side)
    smooth = [
        np.stack([np.add.outer(ramp * g.random(), ramp * g.random()) / 2 for _ in range(3)], -1).astype(np.uint8) for _ in range(count)
    ]
    return [Portrait(image, g.integers(0, 256, (side, side), np.uint8), make_label(at_25=index)) for index, image in enumerate(smooth)]


def write(path, count=5, **kwargs):
    portraits = make_portraits(count)
    write_portraits(path, portraits, 24, count, {"config_hash": "abc"}, **kwargs)
    return portraits


# ---- the record --------------------------------------------------------------------------------------------------------


def test_png_records_return_every_byte_of_image_matte_and_label(tmp_path):
    portraits = write(tmp_path / "record", image_format="png")
    read = PortraitSet(tmp_path / "record")
    assert len(read) == 5 and read.resolution == 24
    for index, expected in enumerate(portraits):
        for got, want in zip(read[index], expected, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


def test_jpeg_records_keep_colours_within_a_few_levels_and_the_matte_exactly(tmp_path):
    portraits = write(tmp_path / "record", image_format="jpeg")
    got = PortraitSet(tmp_path / "record")[2]
    assert np.abs(got.image.astype(int) - portraits[2].image).mean() < 2.5
    np.testing.assert_array_equal(got.matte, portraits[2].matte)


def test_batches_have_the_promised_shapes_and_ranges(tmp_path):
    portraits = write(tmp_path / "record", image_format="png")
    read = PortraitSet(tmp_path / "record")
    images, mattes, labels = read.batch(torch.tensor([4, 0]))
    assert images.shape == (2, 3, 24, 24) and mattes.shape == (2, 1, 24, 24) and labels.shape == (2, 437)
    torch.testing.assert_close(images[0, 1], torch.from_numpy(portraits[4].image[..., 1]).float() / 127.5 - 1)
    torch.testing.assert_close(mattes[1, 0], torch.from_numpy(portraits[0].matte).float() / 255)
    torch.testing.assert_close(read.images([4]), images[:1])
    torch.testing.assert_close(read.mattes([0]), mattes[1:])
    assert read.labels()[:, 25].tolist() == [0, 1, 2, 3, 4] and read.labels() is read.labels()


def test_the_same_portraits_give_the_same_file(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a/data.mdb").read_bytes() == (tmp_path / "b/data.mdb").read_bytes()


def test_two_readers_a_pickled_one_and_a_forked_process_read_the_same(tmp_path):
    write(tmp_path / "record")
    first, second = PortraitSet(tmp_path / "record"), PortraitSet(tmp_path / "record")
    np.testing.assert_array_equal(first[1].image, second[1].image)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first))[1].image, first[1].image)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(first.__getitem__, (1,)).image, first[1].image)


def test_a_write_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    with pytest.raises(KeyboardInterrupt), create_record(tmp_path / "record", 24, 3, {}) as writer:
        writer.add(encode_portrait(make_portraits(1)[0]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".tmp-0123456789ab-record").mkdir()  # what a killed writer leaves
    write(tmp_path / "record")
    assert [path.name for path in tmp_path.iterdir()] == ["record"] and len(PortraitSet(tmp_path / "record")) == 5


def test_a_full_disk_is_a_data_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("genhead.portraits._map_size", lambda *_: 64 * 1024)
    with (
        pytest.raises(DataError, match="record: could not write the portraits .* free some space"),
        create_record(tmp_path / "record", 24, 1, {}) as writer,
    ):
        for portrait in make_portraits(100):
            writer.add(encode_portrait(portrait, "png"))
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_not_written_over_other_files(tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record/thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        write(tmp_path / "record")
    assert (tmp_path / "record/thesis.txt").read_text() == "all of it"


def test_missing_unfinished_foreign_and_damaged_records_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected a portraits record .* found none; make one with"):
        PortraitSet(tmp_path / "nowhere")
    for name, entry, message in (
        ("unfinished", None, "no metadata entry"),
        ("foreign", {"schema": "cats", "version": 9}, "got cats version 9"),
    ):
        with lmdb.open(str(tmp_path / name)) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"metadata" if entry else b"other", json.dumps(entry).encode())
        with pytest.raises(DataError, match=message):
            PortraitSet(tmp_path / name)
    with lmdb.open(str(tmp_path / "garbled")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"metadata", b"{\xac")
    with pytest.raises(DataError, match="garbled: expected JSON in the metadata entry"):
        PortraitSet(tmp_path / "garbled")
    write(tmp_path / "overwritten", 30)
    path = tmp_path / "overwritten/data.mdb"
    content = path.read_bytes()
    path.write_bytes(content[:8192] + bytes(len(content) - 8192))  # only the two pages that describe the file are left
    with pytest.raises(DataError, match="overwritten/data.mdb: the file is damaged"):
        PortraitSet(tmp_path / "overwritten")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise/data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="noise/data.mdb: expected an LMDB file"):
        PortraitSet(tmp_path / "noise")
    value = bytearray(encode_portrait(make_portraits(1)[0]))
    value[400] ^= 1
    with pytest.raises(DataError, match="entry 7: the checksum"):
        decode_portrait(bytes(value), "entry 7")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_record_that_was_cut_off_is_a_data_error(tmp_path, share):
    write(tmp_path / "record", 30)
    path = tmp_path / "record/data.mdb"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"record/data\.mdb: expected .* delete the folder and make it again"):
        PortraitSet(tmp_path / "record")


# ---- photographs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photographs"
    path.mkdir()
    for name, side in (("ann.png", 48), ("bob.jpg", 32)):
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)).save(path / name)
        np.save(path / f"{name[:3]}.npy", make_label(at_30=side / 16))
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(path / "ann_matte.png")
    return path


def test_photographs_are_read_in_name_order_with_matte_or_flagged_opaque(folder):
    ann, bob = (read_photograph(photograph, 32) for photograph in check_folder(folder, 32))
    assert ann[0].image.shape == bob[0].image.shape == (32, 32, 3)
    assert ann[0].label[30] == 3 and bob[0].label[30] == 2
    assert ann[1] and (ann[0].matte == 200).all()
    assert not bob[1] and (bob[0].matte == 255).all()


def spoil_label(values):
    return lambda folder: np.save(folder / "bob.npy", values)


def picture(mode: str, size: tuple[int, int], name: str = "bob.jpg"):
    return lambda folder: Image.new(mode, size).save(folder / name, format="PNG")


SPOILED = {
    "missing label": (lambda f: (f / "bob.npy").unlink(), r"bob\.npy: expected the label of bob\.jpg .* no such file; fit one"),
    "short label": (spoil_label(np.zeros(436)), r"bob\.npy: a label has 437 numbers .* got shape \(436,\); write"),
    "nan": (spoil_label(make_label(at_300=np.nan)), r"bob\.npy: entries \[300\] of the label are not finite; refit"),
    "text label": (spoil_label(np.array(["a"] * 437)), r"bob\.npy: a label holds numbers, got dtype"),
    "pickled label": (spoil_label(np.array([{}] * 437)), r"bob\.npy: expected a \.npy file of 437 numbers, but it cannot be read"),
    "no array": (
        lambda f: (f / "bob.npy").write_bytes(b"437"),
        r"bob\.npy: expected a \.npy file of 437 numbers, but it cannot be read .* numpy\.save",
    ),
    "mirrored camera": (spoil_label(make_label(at_0=-1)), r"bob\.npy: .* camera-to-world matrix with a proper rotation"),
    "camera looks away": (
        spoil_label(make_label(at_11=-4.2)),
        r"bob\.npy: expected the neck joint \(the origin\) in front of the camera .* look down -z",
    ),
    "degrees": (spoil_label(make_label(at_428=12)), r"bob\.npy: expected \|jaw_pose\| <= 1\.6 .* got 12; check"),
    "not square": (picture("RGB", (40, 32)), r"bob\.jpg: expected a square picture, got 40 x 32; crop"),
    "too small": (picture("RGB", (16, 16)), r"bob\.jpg: expected at least 32 x 32 pixels, got 16 x 16; use"),
    "four channels": (picture("RGBA", (32, 32)), r"bob\.jpg: expected RGB .* got RGBA; convert"),
    "no picture": (lambda f: (f / "bob.jpg").write_bytes(b"GIF?"), r"bob\.jpg: expected a PNG or JPEG picture, but it cannot be decoded"),
    "cut off": (
        lambda f: (f / "ann.png").write_bytes((f / "ann.png").read_bytes()[:900]),
        r"ann\.png: expected a PNG or JPEG picture, but it cannot be decoded",
    ),
    "matte size": (picture("L", (40, 40), "ann_matte.png"), r"ann_matte\.png: expected the size of ann\.png, 48 x 48, got another; export"),
    "same name": (picture("RGB", (32, 32), "bob.png"), r"bob\.png: expected one picture per name, but bob\.jpg has the same; rename"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_with_a_photograph_is_named_with_file_expected_got_and_remedy(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        check_folder(folder, 32)


def test_an_empty_or_missing_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="expected pictures .* found none; put"):
        check_folder(tmp_path, 32)
    with pytest.raises(DataError, match="expected a folder of photographs, but there is none"):
        check_folder(tmp_path / "absent", 32)


def test_a_label_within_the_limits_comes_back_unchanged(tmp_path):
    np.save(tmp_path / "x.npy", make_label(at_25=2.0, at_428=0.2).astype(np.float64))
    np.testing.assert_array_equal(read_label(tmp_path / "x.npy", tmp_path / "x.png"), make_label(at_25=2.0, at_428=0.2))
