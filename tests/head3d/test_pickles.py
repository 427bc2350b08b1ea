"""Unpickling into inert containers."""

import pickle

import numpy as np
import pytest

from head3d.run.errors import AssetError
from head3d.run.pickles import plain_names, read_pickle, to_array


def load(path, content, protocol=2):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return read_pickle(path, plain_names(), "these hold only arrays", "take another")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.linspace(0, 1, 6).reshape(2, 3)),
        np.array([True, False]),
        np.float16([1.5]),
        np.zeros((0, 3), np.uint8),
        np.array(7),
    ],
)
def test_arrays_of_every_plain_format_come_back_equal(tmp_path, array, protocol):
    read = to_array(load(tmp_path / "a.pkl", array, protocol))
    assert type(read) is np.ndarray and read.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("value", [np.float32(0.25), np.int64(-3), np.bool_(True)])
def test_numpy_scalars_become_python_numbers(tmp_path, value):
    read = load(tmp_path / "a.pkl", {"x": value})["x"]
    assert read == value.item() and type(read) is type(value.item())


def test_numpys_own_classes_are_not_in_a_files_reach(tmp_path):
    """numpy.ndarray((1,), dtype('O'), bytes) would read bytes of the file as a pointer."""
    text = b"\x80\x02cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\nX\x01\x00\x00\x00O\x85RU\x0812345678tR."
    read = load(tmp_path / "pointer.pkl", text)
    assert not isinstance(read, np.ndarray)
    with pytest.raises(ValueError, match="not enough values"):
        to_array(read)


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.array(["text"]), np.zeros(2, [("a", "f4")])])
def test_arrays_of_anything_but_numbers_cannot_be_read(tmp_path, array):
    with pytest.raises(ValueError, match="expected plain numbers"):
        to_array(load(tmp_path / "a.pkl", array))


def test_a_shape_that_does_not_fit_the_bytes_is_refused(tmp_path):
    text = pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2).replace(b"K\x03\x85", b"K\x04\x85")
    with pytest.raises(ValueError, match="another number of bytes"):
        to_array(load(tmp_path / "a.pkl", text))


def test_a_function_of_the_table_cannot_be_changed_through_a_state(tmp_path):
    text = b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    with pytest.raises(AssetError, match="a state for the function encode_latin1"):
        load(tmp_path / "a.pkl", text)


def test_a_memo_number_that_would_fill_the_memory_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"not a readable pickle .*memo 4294967295 at byte 3, after 2 operations"):
        load(tmp_path / "a.pkl", b"\x80\x02]r\xff\xff\xff\xff.")
    assert load(tmp_path / "a.pkl", b"\x80\x02]q\x02.") == []
