"""Published portrait records: protobuf messages made by hand."""

import io
import struct

import lmdb
import numpy as np
import pytest
from PIL import Image

from genhead.portraits import PortraitSet
from genhead.published_records import PublishedRecord, parse_datum
from head3d.cameras import frontal
from head3d.run.errors import DataError
from pipelines.__main__ import main


def varint(value):
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def make_label(**changes):
    label = np.zeros(437, np.float32)
    label[:25] = frontal().label()[0].numpy()
    for position, value in changes.items():
        label[int(position.removeprefix("at_"))] = value
    return label


def packed(label):
    return field(6, label.astype("<f4").tobytes())


def single(label):
    return b"".join(varint(6 << 3 | 5) + struct.pack("<f", number) for number in label)


def datum(image, seg, label, labels=packed):
    side = varint(image.shape[0])
    sizes = varint(1 << 3) + varint(3) + varint(2 << 3) + side + varint(3 << 3) + side
    mots = field(7, np.ones(548, "<f4").tobytes())
    return sizes + field(4, encoded(image)) + (b"" if seg is None else field(5, encoded(seg))) + labels(label) + mots


def write_record(path, messages, **entries):
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for index, message in enumerate(messages):
            transaction.put(b"%08d" % index, message)
        for key, value in ({"num_samples": str(len(messages)).encode()} | entries).items():
            transaction.put(key.encode(), value)
    return path


@pytest.fixture
def pictures():
    g = np.random.default_rng(0)
    image = g.integers(0, 256, (16, 16, 3), np.uint8)
    seg = np.zeros((16, 16, 3), np.uint8)
    seg[4:] = (255, 0, 30)  # mean 95
    return image, seg


@pytest.mark.parametrize("labels", [packed, single])
def test_a_message_gives_picture_segmentation_and_labels_packed_or_not(pictures, labels):
    image, seg = pictures
    label = make_label(at_30=1.5, at_436=-0.25)
    read = parse_datum(datum(image, seg, label, labels), "here")
    assert read.image == encoded(image) and read.seg == encoded(seg)
    assert read.labels.dtype == np.float32
    np.testing.assert_array_equal(read.labels, label)


def test_fields_of_a_later_version_are_passed_over(pictures):
    later = varint(9 << 3 | 1) + bytes(8) + varint(300 << 3) + varint(2**63) + field(20, b"abc") + varint(8 << 3 | 5) + bytes(4)
    np.testing.assert_array_equal(parse_datum(later + datum(*pictures, make_label()) + later, "here").labels, make_label())


def test_portraits_have_the_segmentations_mean_as_matte_and_no_neck(tmp_path, pictures):
    image, seg = pictures
    label = make_label(at_425=0.3, at_426=-0.2, at_427=0.1, at_428=0.05, at_424=1.0)
    record = PublishedRecord(write_record(tmp_path / "ffhq_16_2", [datum(image, seg, label), datum(image, None, label)]))
    assert len(record) == 2
    portrait, has_matte = record.portrait(0, 16)
    assert has_matte
    np.testing.assert_array_equal(portrait.image, image)
    np.testing.assert_array_equal(portrait.matte, np.where(np.arange(16)[:, None] < 4, 0, 95).repeat(16, 1))
    np.testing.assert_array_equal(portrait.label, make_label(at_428=0.05, at_424=1.0))
    opaque, has_matte = record.portrait(1, 8)
    assert not has_matte and (opaque.matte == 255).all() and opaque.image.shape == (8, 8, 3)


def test_the_command_writes_a_portraits_record_once(tmp_path, pictures, capsys):
    image, seg = pictures
    source = write_record(tmp_path / "ffhq_16_2", [datum(image, seg, make_label(at_25=index)) for index in range(2)])
    command = ["portraits", "--from-lmdb", str(source), "--resolution", "16", "--image_format", "png", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    portraits = PortraitSet(tmp_path / "out")
    assert portraits.labels()[:, 25].tolist() == [0, 1] and portraits.metadata["synthetic"] is False
    np.testing.assert_array_equal(portraits[1].image, image)
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--from-folder", str(tmp_path)])
    assert "from_folder and from_lmdb are both given" in capsys.readouterr().err


def test_a_message_cut_off_anywhere_is_a_data_error(pictures):
    message = datum(*pictures, make_label())
    body = len(message) - len(field(7, np.ones(548, "<f4").tobytes()))
    parse_datum(message[:body], "here")
    for length in [*range(60), *range(60, body, 97), body - 1, len(message) - 1]:
        with pytest.raises(DataError, match="here: "):
            parse_datum(message[:length], "here")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"\x22" + b"\xff" * 12, "a number of more than ten bytes"),
        (b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "field 4 promises 9223372036854775807 bytes"),
        (b"\x23", "wire type 3"),
        (b"\x02\x00", "field 0"),
        (b"\x20\x05", "field 4 has wire type 0"),
        (field(6, bytes(7)), "field 6 has wire type 2"),
        (field(4, b"x") + packed(np.zeros(436)), "got 1 bytes and 436 numbers"),
        (packed(np.zeros(437)), "got 0 bytes and 437 numbers"),
        (b"", "got 0 bytes and 0 numbers"),
    ],
)
def test_what_is_no_such_message_is_named(message, expected):
    with pytest.raises(DataError, match=f"here: .*{expected}"):
        parse_datum(message, "here")


def test_wrong_labels_pictures_and_records_are_named(tmp_path, pictures):
    image, seg = pictures
    messages = [
        datum(image, seg, make_label(at_428=12)),
        datum(image[:, :8], seg, make_label()),
        datum(image, seg[:8, :8], make_label()),
        field(4, b"GIF?") + packed(make_label()),
        datum(image[..., 0], seg, make_label()),
    ]
    record = PublishedRecord(write_record(tmp_path / "bad", messages, num_samples=b"9"))
    for index, message in enumerate(
        (
            r"entry 00000000: expected \|jaw_pose\| <= 1\.6",
            "entry 00000001, image: expected a square picture, got 8 x 16",
            "entry 00000002, seg: expected at least 16 x 16 pixels",
            "entry 00000003, image: expected a PNG or JPEG picture, but it cannot be decoded",
            "entry 00000004, image: expected RGB with 8 bits a channel, got L",
            "entry 00000005: missing, though num_samples is 9",
        )
    ):
        with pytest.raises(DataError, match=message):
            record.portrait(index, 16)
    with pytest.raises(DataError, match="expected an entry num_samples that counts the portraits, got b'many'"):
        PublishedRecord(write_record(tmp_path / "text", [], num_samples=b"many"))
    with pytest.raises(DataError, match=r"expected a folder with data\.mdb, found none; check --from-lmdb"):
        PublishedRecord(tmp_path / "nowhere")
