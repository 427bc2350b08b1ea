"""Files that would run something, fill the memory or lie about sizes: refused, and nothing runs or grows."""

import collections
import io
import os
import pickle
import re
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from genhead.published_files import read_published
from head3d.run.errors import AssetError

PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux: the process's peak memory, and what resets it


@contextmanager
def grows_little():
    """What is inside may take 60 MB at most; nothing is measured where the system does not tell."""

    def peak_mb() -> float:
        return int(re.search(r"VmHWM:\s+(\d+)", PEAK[0].read_text())[1]) / 1024

    try:
        PEAK[1].write_text("5")
        before = peak_mb()
    except (OSError, TypeError):
        before = None
    yield
    if before is not None:
        assert peak_mb() - before < 60


def write_pickle(path, content):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    return path


def storage_stream(hostile, payload):
    """A pickle whose tensor lies in `payload` where torch puts the bytes of a storage."""
    call = hostile(torch.storage._load_from_bytes, payload)
    return {"G_ema": hostile(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, collections.OrderedDict())}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_hostile_stream_inside_a_storage_is_refused_by_name_and_nothing_runs(tmp_path, hostile, zipped):
    marker, buffer = tmp_path / "ran", io.BytesIO()
    torch.save(hostile(os.system, f"touch {marker}"), buffer, _use_new_zipfile_serialization=zipped)
    path = write_pickle(tmp_path / "evil.pkl", storage_stream(hostile, buffer.getvalue()))
    with pytest.raises(AssetError, match=r"evil\.pkl: refused to load: a torch stream in it asks for \w+\.system"):
        read_published(path)
    plain = write_pickle(tmp_path / "plain.pkl", storage_stream(hostile, pickle.dumps(hostile(os.system, f"touch {marker}"), protocol=2)))
    with pytest.raises(AssetError, match=r"plain\.pkl: refused to load: a torch stream in it asks for \w+\.system"):
        read_published(plain)
    assert not marker.exists()


def test_a_hostile_pickle_in_a_torch_zip_is_refused_by_name_and_nothing_runs(tmp_path, hostile):
    marker = tmp_path / "ran"
    torch.save({"a": torch.zeros(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for name in good.namelist():
            payload = pickle.dumps(hostile(os.system, f"touch {marker}"), protocol=2)
            evil.writestr(name, payload if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(AssetError, match=r"evil\.pt: refused to load: a torch stream in it asks for \w+\.system"):
        read_published(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (4,)),
        (0, (10**4, 10**4), (0, 0)),
        (0, (2,), (1, 1)),
        (True, (1,), (1,)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, hostile, offset, size, stride):
    buffer = io.BytesIO()
    torch.save(torch.arange(4.0)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    content = storage_stream(hostile, buffer.getvalue())
    call = content["G_ema"].call[1][0]
    content["G_ema"] = hostile(torch._utils._rebuild_tensor_v2, call, offset, size, stride, False, collections.OrderedDict())
    with pytest.raises(AssetError, match=r"bent\.pkl: not a readable pickle .*a tensor"):
        read_published(write_pickle(tmp_path / "bent.pkl", content))


def test_a_damaged_storage_is_an_error_that_names_the_file(tmp_path, hostile):
    buffer = io.BytesIO()
    torch.save(torch.arange(4.0)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    stream = buffer.getvalue()
    key = max(re.findall(rb"\d{9,}", stream), key=stream.rindex)  # under which the data lies, stated twice
    unknown = stream[: stream.rindex(key)] + b"0" * len(key) + stream[stream.rindex(key) + len(key) :]
    for spoilt in (b"", stream[:-3], stream[:100], unknown):
        with pytest.raises(AssetError, match=r"bent\.pkl: not readable tensors of torch"):
            read_published(write_pickle(tmp_path / "bent.pkl", storage_stream(hostile, spoilt)))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage_bytes(count: int = 4, zipped: bool = True) -> bytes:
    """What torch puts into a pickle for a storage of `count` numbers."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(count)._typed_storage(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def load_storage(payload: bytes) -> bytes:
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(payload)) + payload + b"\x85R"


TWICE = b")" + 25 * b"2\x86"  # () and then 25 times the pair of it with itself: 200 bytes here, 150 MB spelt out
LAYER, SETTINGS, FORMAT, TENSOR = (
    b"ctorch.nn.modules.linear\nLinear\n",
    b"cdnnlib.util\nEasyDict\n",
    b"cnumpy\ndtype\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
)
STATE = b"}" + text("array") + b"K\x01s"  # {"array": 1}
ROW = b"(h\x01K\x00J" + struct.pack("<i", 4_000_000) + b"\x85K\x00\x85\x89NtR"  # one number of a storage, four million times
MANY = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)  # a megabyte of text
HOSTILE = {
    # what would run: every way to name a class or to change one
    "a global": (b"cos\nsystem\n" + text("true") + b"\x85R", "asks for os.system"),
    "INST": (b"(S'true'\nios\nsystem\n", "asks for os.system"),
    "OBJ": (b"(cos\nsystem\nS'true'\no", "asks for os.system"),
    "STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93", "asks for os.system"),
    "an attribute of an allowed function": (
        b"\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93",
        "asks for torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "an extension code": (b"\x82\x01", "unregistered extension code"),
    "an external object": (text("a") + b"Q", "refers to an external object, 'a'"),
    "an external object in a state": (LAYER + b")\x81}" + text("x") + b"K\x01Qsb", "refers to an external object, a int"),
    "BUILD of a class": (LAYER + STATE + b"b", "not a readable pickle"),
    "BUILD of a class by slots": (LAYER + b"N" + STATE + b"\x86b", "not a readable pickle"),
    "BUILD of a function": (TENSOR + STATE + b"b", "a state for the function tensor"),
    "BUILD of a function by slots": (TENSOR + b"N" + STATE + b"\x86b", "a state for the function tensor"),
    "BUILD of settings": (SETTINGS + b")\x81" + STATE + b"b", "a state for a dictionary of settings"),
    "BUILD of a dictionary": (b"}" + STATE + b"b", "has no attribute '__dict__'"),
    "NEWOBJ of a function": (TENSOR + b")\x81", "must be a type"),
    # what would fill the memory
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 1 << 34) + b"abc", "not a readable pickle"),
    "text that is not there": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc", "not a readable pickle"),
    "a frame that is not there": (b"\x95" + struct.pack("<Q", 1 << 34) + b"N", "not a readable pickle"),
    "a memo of 64 GB": (b"]r\xff\xff\xff\xff", "memo 4294967295"),
    "a storage that is not there": (
        load_storage(storage_bytes(zipped=False).replace(b"K\x04Nt", b"\x8a\x08" + struct.pack("<q", 1 << 40) + b"Nt")),
        "not readable tensors of torch",
    ),
    "one number as many tensors": (
        load_storage(storage_bytes()) + b"q\x010(" + 5 * (TENSOR + ROW) + b"l",
        r"a tensor of size \(4000000,\)",
    ),
    "one text, encoded many times": (
        MANY + b"q\x010" + 30 * (b"c_codecs\nencode\n(h\x01" + text("latin1") + b"tR"),
        "copy more than 4 times",
    ),
    "one list as many sets": (b"](" + 40_000 * b"N" + b"eq\x010" + 100 * b"c__builtin__\nset\n(h\x01tR", "copy more than 4 times"),
    "copies of settings": (b"}q\x010" + SETTINGS + b"(h\x01tR", "not a readable pickle"),
    # what a message would spell out
    "nested state of a format": (FORMAT + b")R" + TWICE + b"b", "state of a number format is a tuple"),
    "nested external object": (TWICE + b"Q", "an external object, a tuple"),
    "nested class": (b"ccopy_reg\n_reconstructor\n" + TWICE + b"c__builtin__\nobject\nN\x87R", "reconstruction of a tuple"),
    "nested encoding": (b"c_codecs\nencode\n" + text("a") + TWICE + b"\x86R", "encoding a tuple of 'a'"),
    "nested shape": (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + TWICE + text("b") + b"\x87R", "with shape a tuple"),
    "nested scalar": (b"cnumpy.core.multiarray\nscalar\n" + TWICE + b"\x85R", "a numpy scalar of a tuple"),
    "nested size": (load_storage(storage_bytes()) + b"q\x010" + TENSOR + b"(h\x01K\x00" + TWICE + b"K\x00\x85\x89NtR", "of the wrong kind"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_no_way_to_write_a_pickle_runs_anything_or_fills_the_memory(tmp_path, name):
    content, message = HOSTILE[name]
    path = write_pickle(tmp_path / "evil.pkl", b"\x80\x04" + content + b".")
    with grows_little(), pytest.raises(AssetError, match=message) as caught:
        read_published(path)
    assert str(tmp_path / "evil.pkl") in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("nested", [False, True])
def test_packed_and_overlapping_records_of_a_torch_zip_are_refused(tmp_path, hostile, nested):
    torch.save({"a": torch.zeros(4)}, tmp_path / "good.pt")
    records = dict.fromkeys(("packed", "longer"), b"")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        for kind in records:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED) as bad:
                for name in good.namelist():
                    bad.writestr(name, bytes(100_000_000) if kind == "packed" and name.endswith("/data/0") else good.read(name))
                if kind == "longer":  # many names for one record
                    bad.filelist += [bad.filelist[0]] * 2000
            records[kind] = buffer.getvalue()
    for kind, message in (("packed", r"'\S+data\.pkl' is packed"), ("longer", "they are longer than the file")):
        if nested:
            path = write_pickle(tmp_path / "evil.pkl", storage_stream(hostile, records[kind]))
        else:
            path = tmp_path / "evil.pt"
            path.write_bytes(records[kind])
        with (
            grows_little(),
            pytest.raises(AssetError, match=rf"refused to load: expected records stored as torch\.save writes them, but {message}"),
        ):
            read_published(path)


@pytest.mark.parametrize(
    ("children", "tensors", "message"),
    [
        ({"a": 0, "b": 0}, 0, "names of more than 1000 characters"),  # the module holds itself, twice
        (dict.fromkeys(map(str, range(10_001)), 1), 0, "got a _Module as number 10001"),
        (dict.fromkeys(map(str, range(101)), 1), 100, "more than 10000 tensors"),
    ],
)
def test_a_network_without_end_comes_to_one(tmp_path, children, tensors, message):
    """Modules 0, the network, and 1, a leaf of so many tensors; children: name -> module."""

    def module(number: int, parameters: bytes, modules: bytes) -> bytes:
        state = b"}(" + text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules") + modules + b"u"
        return b"ctorch.nn.modules.container\nSequential\n)\x81q" + bytes([number]) + state + b"b"

    tensor = load_storage(storage_bytes()) + b"q\x020" + TENSOR + b"(h\x02K\x00K\x01\x85K\x01\x85\x89NtRq\x030"
    held = b"}(" + b"".join(text(str(number)) + b"h\x03" for number in range(tensors)) + b"u"
    inside = b"}(" + b"".join(text(name) + b"h" + bytes([number]) for name, number in children.items()) + b"u"
    content = tensor + module(1, held, b"}") + b"0}" + text("G_ema") + module(0, b"}", inside) + b"s"
    with pytest.raises(AssetError, match=rf"wide\.pkl: G_ema is not a torch module as published .*{message}"):
        read_published(write_pickle(tmp_path / "wide.pkl", b"\x80\x02" + content + b"."))
