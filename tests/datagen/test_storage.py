"""Data sets in a folder, in memory, on an S3 server and behind plain HTTP: the same bytes, and what goes wrong on the way there."""

import functools
import hashlib
import http.server
import json
import pickle
import re
import shlex
import shutil
import socket
import threading

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from datagen.generate import generate
from datagen.index import INDEX
from datagen.reading import open_dataset
from datagen.shards import read_sidecar, write_shard
from datagen.storage import LocalFolder, Patience, RemoteFolder, open_storage
from head3d.run.errors import ConfigError, DataError
from pipelines.__main__ import run_command

AT_ONCE = Patience(attempts=3, first_wait_s=0.0)


@pytest.fixture
def impatient(monkeypatch):
    """Waits of no length, everywhere in this process."""
    monkeypatch.setattr(Patience, "wait_s", lambda self, attempt, name: 0.0)


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def place(request, tmp_path):
    if request.param == "s3":
        return open_storage(request.getfixturevalue("bucket") + "/deep/set")
    return open_storage({"folder": tmp_path / "set", "file": f"file://{tmp_path}/set", "memory": f"memory://{tmp_path}/set"}[request.param])


# Any place --------------------------------------------------------------------------------------------------------------------


def test_what_is_written_anywhere_is_read_whole_or_in_part(place):
    place.write("frames/000001.json", "grün")
    with place.writing("frames/000001.tar") as path:
        path.write_bytes(bytes(range(200)))
    assert place.read("frames/000001.json").decode() == "grün" and place.size("frames/000001.json") == 5
    assert place.read("frames/000001.tar", 100, 103) == bytes([100, 101, 102]) and place.read("frames/000001.tar", 198) == bytes([198, 199])
    assert place.read("frames/000001.tar", 0, 2) == bytes([0, 1])
    place.write("frames/000001.json", b"other")
    assert place.read("frames/000001.json") == b"other"
    assert place.names("frames") == ["frames/000001.json", "frames/000001.tar"] and place.names("labels") == []
    assert place.where("frames/000001.tar").endswith("set/frames/000001.tar") and not place.where().endswith("/")


def test_what_is_not_there_has_no_size_and_cannot_be_read_but_deleted(place):
    assert place.size("frames/000001.tar") is None
    with pytest.raises(FileNotFoundError):
        place.read("frames/000001.tar")
    place.delete("frames/000001.tar")
    place.write("frames/000001.tar", "x")
    place.delete("frames/000001.tar")
    assert place.size("frames/000001.tar") is None


def test_an_error_while_a_file_is_made_leaves_the_old_one(place):
    place.write("index", "old")
    with pytest.raises(RuntimeError), place.writing("index") as path:
        path.write_text("half")
        raise RuntimeError("on purpose")
    assert place.read("index") == b"old"


def test_lines_are_added_to_those_that_are_there(place):
    for line in ("one", "two"):
        with place.appending("log.jsonl") as add:
            add(line)
    with place.appending("log.jsonl"):
        pass
    assert place.read("log.jsonl") == b"one\ntwo\n"


def test_many_requests_come_back_in_order_and_a_copy_in_another_process_is_the_same_place(place):
    for number in range(5):
        place.write(f"frames/{number}", "x" * number)
    copy = pickle.loads(pickle.dumps(place.resolved()))
    assert list(copy.each(copy.size, [f"frames/{number}" for number in range(6)])) == [0, 1, 2, 3, 4, None]


def test_a_place_that_is_open_already_stays_as_it_is(place):
    assert open_storage(place) is place
    assert isinstance(place, LocalFolder) == (place.address.startswith("file") or "://" not in place.address)


def test_a_kind_of_url_that_nobody_knows_is_an_error_with_a_remedy():
    with pytest.raises(ConfigError, match="foo://bar/set: places with foo:// cannot be opened here .*give a folder"):
        open_storage("foo://bar/set")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    def absent(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=r"Install s3fs to access S3.*pip install 'head-foundry\[s3\]'"):
        open_storage("s3://bucket/set")


# Trying again -----------------------------------------------------------------------------------------------------------------


def broken_puts(monkeypatch, fault, whole=0, broken=99):
    """After `whole` good puts, `broken` go through fault(body) -> body before the rest is good. Returns the list of all puts' keys."""
    call, puts = s3fs.S3FileSystem._call_s3, []

    async def sometimes(self, method, *args, **kwargs):
        if method == "put_object":
            puts.append(kwargs["Key"])
            if whole < len(puts) <= whole + broken:
                kwargs["Body"] = fault(kwargs["Body"])
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", sometimes)
    return puts


def refuse(body):
    raise ConnectionError("reset by peer")


def forbid(body):
    raise PermissionError("Access Denied")


def cut(body):
    return body[:-1]


@pytest.mark.parametrize("fault", [refuse, cut])
def test_a_put_that_fails_or_arrives_short_is_made_again(bucket, monkeypatch, fault):
    puts = broken_puts(monkeypatch, fault, broken=2)
    RemoteFolder(bucket, AT_ONCE).write("frames/000000.tar", "0123456789")
    assert len(puts) == 3 and RemoteFolder(bucket).read("frames/000000.tar") == b"0123456789"


@pytest.mark.parametrize(("fault", "said"), [(refuse, "ConnectionError: reset by peer"), (cut, "put 10240 bytes, 10239 arrived")])
def test_a_shard_whose_upload_never_succeeds_leaves_no_record(bucket, monkeypatch, fault, said):
    puts = broken_puts(monkeypatch, fault)
    message = rf"{bucket}/frames/000000.tar: could not be written in 3 attempts: .*({said}).*call the same command again"
    with pytest.raises(DataError, match=message), write_shard(RemoteFolder(bucket, AT_ONCE), "frames", 0, {}) as writer:
        writer.add("0000000000", {"json": b"{}"}, {})
    assert len(puts) == 3 and read_sidecar(bucket, "frames", 0) is None


def test_waits_double_and_every_process_has_its_own(monkeypatch):
    patience = Patience(attempts=5, first_wait_s=0.5)
    waits = [patience.wait_s(attempt, "frames/000000.tar") for attempt in range(4)]
    for wait, middle in zip(waits, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert 0.5 * middle <= wait < 1.5 * middle
    monkeypatch.setattr("datagen.storage.os.getpid", lambda: 1)
    assert patience.wait_s(0, "frames/000000.tar") != waits[0]


def test_a_server_that_is_gone_is_an_error_that_names_the_file_and_says_how_often_it_was_tried(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": "http://{}:{}".format(*server.get_host_and_port()), "key": "a", "secret": "b"}
    )
    fsspec.filesystem("s3").mkdir("s3://going")
    place = RemoteFolder("s3://going/set", AT_ONCE)
    place.write("dataset.json", "{}")
    server.stop()
    for request in (place.read, place.size, lambda name: place.write(name, "x"), place.delete):
        with pytest.raises(
            DataError, match=r"s3://going/set/dataset.json: could not be .* in 3 attempts: EndpointConnectionError.*network"
        ):
            request("dataset.json")


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_server_that_never_answers_is_an_error_and_no_hang(monkeypatch, protocol):
    monkeypatch.setattr("datagen.storage.SILENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": address, "key": "a", "secret": "b"})
        url = {"s3": "s3://bucket/set", "http": f"{address}/set"}[protocol]
        with pytest.raises(DataError, match=f"{url}/dataset.json: could not be read in 3 attempts: .*[Tt]imeout"):
            RemoteFolder(url, AT_ONCE).read("dataset.json")


def test_a_bucket_that_does_not_exist_is_an_error_with_a_remedy(s3_server):
    with pytest.raises(DataError, match="s3://no-such-bucket/set/a: could not be written: .*make the bucket"):
        open_storage("s3://no-such-bucket/set").write("a", "b")
    with pytest.raises(DataError, match="s3://no-such-bucket/set holds no data set"):
        open_dataset("s3://no-such-bucket/set")


def test_what_is_forbidden_is_not_tried_again(bucket, monkeypatch):
    puts = broken_puts(monkeypatch, forbid)
    with pytest.raises(DataError, match=f"{bucket}/a: could not be written: Access Denied; check .*credentials"):
        open_storage(bucket).write("a", "b")
    assert len(puts) == 1


# Whole runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_into_a_bucket_gives_the_bytes_of_a_local_one_and_lists_nothing(bucket, run_of, data_files, undisturbed, monkeypatch):
    url = f"{bucket}/set"
    call, lists = s3fs.S3FileSystem._call_s3, []

    async def noted(self, method, *args, **kwargs):
        lists.append(kwargs.get("MaxKeys")) if "list" in method else None
        return await call(self, method, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
        assert generate(run_of(url)) == 0
    assert set(lists) <= {1}  # s3fs asks whether a missing name is the beginning of others: one key at most
    assert data_files(url) == undisturbed


def test_a_set_that_is_there_is_left_alone_and_what_was_lost_is_made_again(bucket, run_of, data_files, undisturbed, monkeypatch, capsys):
    for name, data in undisturbed.items():
        open_storage(bucket).write(name, data)
    open_storage(bucket).delete("labels/000001.json")
    open_storage(bucket).write("frames/000002.tar", undisturbed["frames/000002.tar"][:-512])
    assert generate(run_of(bucket)) == 0
    assert "made 2 shards now" in capsys.readouterr().out and data_files(bucket) == undisturbed
    puts = broken_puts(monkeypatch, refuse, broken=0)
    assert generate(run_of(bucket)) == 0
    assert "made 0 shards now" in capsys.readouterr().out and puts == [INDEX]
    with pytest.raises(ConfigError, match=f"{bucket}/dataset.json: this folder holds shards of other settings.*seed: 0 -> 1"):
        generate(run_of(bucket, seed=1))


def test_a_server_that_fails_in_the_middle_of_a_run_leaves_whole_shards_and_the_run_goes_on_later(
    bucket, run_of, data_files, undisturbed, monkeypatch, impatient
):
    with monkeypatch.context() as patch:
        broken_puts(patch, refuse, whole=8)
        with pytest.raises(DataError, match=f"{bucket}/.*: could not be written in 5 attempts: ConnectionError: reset by peer"):
            generate(run_of(bucket))
    there = data_files(bucket)
    assert there.items() < undisturbed.items() and INDEX not in there
    for name in there:
        if name.endswith(".json") and name != "dataset.json":
            assert hashlib.sha256(there[name.replace(".json", ".tar")]).hexdigest() == json.loads(there[name])["sha256"]
    assert generate(run_of(bucket)) == 0
    assert data_files(bucket) == undisturbed


def test_a_set_behind_plain_http_is_read_and_cannot_be_written(s3_server, bucket, undisturbed, tmp_path):
    for name, data in undisturbed.items():
        fsspec.filesystem("s3").pipe_file(f"{bucket}/{name}", data, ACL="public-read")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    url = f"{s3_server}/{bucket.removeprefix('s3://')}"
    names = ["rgb.0", "label", "depth", "identity.background", "json"]
    for ours, theirs in zip(open_dataset(url).frames, open_dataset(tmp_path).frames, strict=True):
        a, b = open_dataset(url).read(ours, names), open_dataset(tmp_path).read(theirs, names)
        assert all((a[name] == b[name]) if name == "json" else (a[name] == b[name]).all() for name in names)
    with pytest.raises(DataError, match=f"{url}/index: could not be written: .*read-only"):
        open_storage(url).write("index", "{}")


def test_a_server_that_ignores_ranges_is_read_in_parts_all_the_same(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(range(200)))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)  # `python -m http.server` answers whole files
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = RemoteFolder(f"http://127.0.0.1:{server.server_port}", AT_ONCE)
        assert not place.sends_whole_files
        assert place.read("a.tar", 100, 103) == bytes([100, 101, 102]) and place.read("a.tar", 0, 2) == bytes([0, 1])
        assert place.sends_whole_files and place.read("a.tar", 0, 200) == bytes(range(200))
        with pytest.raises(DataError, match="a.tar: could not be read in 3 attempts: .*asked for bytes 100 to 201"):
            place.read("a.tar", 100, 201)
        server.shutdown()


def test_what_http_forbids_is_not_tried_again(s3_server, bucket):
    open_storage(bucket).write("dataset.json", "{}")
    url = f"{s3_server}/{bucket.removeprefix('s3://')}"
    with pytest.raises(DataError, match=f"{url}/dataset.json: could not be read: 403.*FORBIDDEN.*; check .*credentials"):
        RemoteFolder(url, Patience(attempts=10**6, first_wait_s=1e6)).read("dataset.json")


def test_a_tar_that_is_gone_or_short_in_the_bucket_is_named(bucket, undisturbed, impatient):
    place = open_storage(bucket)
    for name, data in undisturbed.items():
        place.write(name, data)
    dataset = open_dataset(bucket)
    place.delete("frames/000000.tar")
    with pytest.raises(DataError, match=f"{bucket}/frames/000000.tar: could not be opened .*delete"):
        dataset.read(dataset.frames[0], ["label"])
    place.write("labels/000000.tar", undisturbed["labels/000000.tar"][:600])
    with pytest.raises(DataError, match=f"{bucket}/labels/000000.tar: "):
        dataset.read(dataset.frames[0], ["depth"])


def test_scratch_space_is_free_again_after_a_run(bucket, run_of, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert generate(run_of(f"{bucket}/set")) == 0
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)


def test_the_readmes_commands_make_and_check_shards_in_a_bucket(bucket, generator, root, capsys, monkeypatch):
    """As written, but for the bucket's name, a smaller generator, two people and no Ray."""
    monkeypatch.chdir(root)
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    make, check = (shlex.split(line)[1:] for line in lines if re.search(r"bin/headfoundry (datagen|verify) .*s3://my-bucket/shards", line))
    make[make.index("--generator") + 1] = str(generator)
    smaller = ["--workers", "0", "--identities", "2"]
    for command, *arguments in (make + smaller, check):
        assert run_command(command, [argument.replace("s3://my-bucket", bucket) for argument in arguments]) == 0
    assert "everything is as it was written" in capsys.readouterr().out and len(open_dataset(f"{bucket}/shards").frames) > 2
