"""Copies of remote shards: fetched once and ahead of time, bounded, shared, and never a half or a wrong one."""

import errno
import hashlib
import os
import queue
import threading
import zlib

import pytest

import head3d.run.files
from datagen.cache import CacheConfig, Copy, FetchAhead, ShardCache, Tar, open_cache, open_caches
from datagen.reading import open_dataset
from datagen.storage import open_storage
from head3d.run.errors import ConfigError, DataError

NAMES = ["rgb.0", "label", "depth", "identity.background"]


class Place:
    """A remote folder in memory that counts what is read of it."""

    def __init__(self, url, files):
        self.storage, self.asked, self._lock = open_storage(url), [], threading.Lock()
        self.tars = {}
        for name, data in files.items():
            self.storage.write(name, data)
            self.tars[name] = Tar(name, len(data), hashlib.sha256(data).hexdigest())
        self.where, self.each, self.sends_whole_files = self.storage.where, self.storage.each, False

    def read(self, name, start=0, stop=None):
        with self._lock:
            self.asked.append(name)
        return self.storage.read(name, start, stop)


@pytest.fixture
def place(tmp_path):
    return Place(f"memory://{tmp_path}", {f"frames/{letter}.tar": letter.encode() * 1000 for letter in "abcd"})


def letters(cache):
    """The files that a cache has, each by the letter that fills it."""
    return "".join(sorted(path.read_text()[0] for path in cache.folder.glob("*.tar")))


def read(cache, place, letter):
    with cache.open(place.tars[f"frames/{letter}.tar"]) as file:
        return file.read()


# Copies -----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_in_pieces_for_all_who_share_the_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr("datagen.cache.PIECE", 300)
    cache, other = ShardCache(place, tmp_path / "cache", 10_000), ShardCache(place, tmp_path / "cache", 10_000)
    assert read(cache, place, "a") == b"a" * 1000 and place.asked == ["frames/a.tar"] * 4  # 300 + 300 + 300 + 100
    assert read(cache, place, "a") == read(other, place, "a") == b"a" * 1000 and len(place.asked) == 4


def test_of_a_server_that_sends_whole_files_a_file_is_asked_for_once(place, tmp_path, monkeypatch):
    monkeypatch.setattr("datagen.cache.PIECE", 300)
    place.sends_whole_files = True
    assert read(ShardCache(place, tmp_path / "cache", 10_000), place, "a") == b"a" * 1000 and place.asked == ["frames/a.tar"]


def test_many_who_want_a_file_at_once_fetch_it_once(place, tmp_path):
    ready, found = threading.Barrier(8), []

    def work():
        cache = ShardCache(place, tmp_path / "cache", 10_000)  # its lock is of the file system, as between processes
        ready.wait()
        found.append(read(cache, place, "a"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"a" * 1000] * 8 and place.asked == ["frames/a.tar"]


def test_what_was_used_least_recently_goes_first_and_what_is_open_stays_readable(place, tmp_path):
    cache = ShardCache(place, tmp_path / "cache", 3500)
    for letter in "abc":
        read(cache, place, letter)
    for age, letter in enumerate("cba"):  # a was used last, then b, then c; none of them now
        os.utime(cache._path(place.tars[f"frames/{letter}.tar"]), (1000 + age, 1000 + age))
    assert cache.used(place.tars["frames/c.tar"])  # c is used
    with cache.open(place.tars["frames/b.tar"]) as held:  # and b too
        os.utime(held.fileno(), (1, 1))
        read(cache, place, "d")
        assert letters(cache) == "acd" and held.read() == b"b" * 1000
    cache.finished(place.tars["frames/d.tar"])
    read(cache, place, "b")
    assert letters(cache) == "abc"
    assert not cache.used(place.tars["frames/d.tar"]) and cache.holds(place.tars["frames/a.tar"])


def test_a_cache_shrinks_when_the_disk_is_full(place, tmp_path, monkeypatch):
    cache = ShardCache(place, tmp_path / "cache", 10_000)
    for letter in "abc":
        read(cache, place, letter)
    free = iter([0, 500, 1000])
    monkeypatch.setattr("datagen.cache.shutil.disk_usage", lambda folder: type("Usage", (), {"free": next(free)}))
    read(cache, place, "d")
    assert letters(cache) == "cd"


def test_a_disk_that_is_full_all_the_same_is_an_error_with_a_remedy_and_leaves_nothing(place, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(head3d.run.files, "_flush", full)
    cache = ShardCache(place, tmp_path / "cache", 10_000)
    with pytest.raises(DataError, match=rf"{tmp_path}/cache/.*tar: could not be written: No space left on device.*free space"):
        read(cache, place, "a")
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


def test_a_file_that_is_not_what_its_record_says_is_fetched_again_and_then_refused(place, tmp_path):
    cache, tar = ShardCache(place, tmp_path / "cache", 10_000), place.tars["frames/a.tar"]
    place.storage.write("frames/a.tar", b"a" * 999 + b"b")
    with pytest.raises(DataError, match=rf"frames/a.tar: fetched twice, its SHA-256 is \w+, expected {tar.sha256}; delete"):
        cache.open(tar)
    with pytest.raises(DataError, match="fetched twice"):  # every sample of the shard meets it, and only the first one waits
        cache.open(tar)
    assert place.asked == ["frames/a.tar"] * 2 and letters(cache) == ""
    place.storage.delete("frames/a.tar")
    with pytest.raises(DataError, match=r"frames/a.tar: could not be opened .*; delete"):
        ShardCache(place, tmp_path / "cache", 10_000).open(tar)


def test_what_a_killed_process_left_is_swept_and_a_copy_of_another_size_is_replaced(place, tmp_path):
    cache, tar = ShardCache(place, tmp_path / "cache", 10_000), place.tars["frames/a.tar"]
    cache.folder.mkdir()
    (cache.folder / f".tmp-012345-{tar.sha256}.tar").write_text("half")
    (cache.folder / f"{tar.sha256}.tar").write_text("short")
    assert read(cache, place, "a") == b"a" * 1000
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", f"{tar.sha256}.tar"]


def test_a_cache_that_is_smaller_than_a_file_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="cache.gigabytes: 9.99e-07 is less than the file .*frames/a.tar has"):
        read(ShardCache(place, tmp_path / "cache", 999), place, "a")


def test_a_private_cache_is_deleted_a_named_one_stays_and_a_local_folder_has_none(place, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with open_cache(CacheConfig(gigabytes=1e-5), place.storage) as cache:
        read(cache, place, "a")
        assert cache.limit == 10_000 and cache.folder.parent == tmp_path / "temporary"
    assert list((tmp_path / "temporary").iterdir()) == []
    with open_cache(CacheConfig(tmp_path / "kept"), place.storage) as cache:
        read(cache, place, "a")
    assert letters(cache) == "a"
    with open_cache(CacheConfig(), tmp_path) as cache:
        assert cache is None


# A data set through a cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, undisturbed):
    """The tiny set in memory."""
    storage = open_storage(f"memory://{tmp_path}/set")
    for name, data in undisturbed.items():
        storage.write(name, data)
    return storage


def test_a_data_set_is_the_same_through_a_cache_of_any_size(remote, tmp_path):
    dataset = open_dataset(remote)
    largest = max(tar.size for tar in dataset.tars.values())
    for name, limit in (("small", largest), ("large", 10**9)):
        cached = dataset.through(ShardCache(remote, tmp_path / name, limit))
        for entry in [*dataset.frames, *reversed(dataset.frames)]:
            ours, theirs = cached.read(entry, NAMES), dataset.read(entry, NAMES)
            assert all((ours[member] == theirs[member]).all() for member in NAMES)
        assert sum(path.stat().st_size for path in (tmp_path / name).glob("*.tar")) <= limit


def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again(remote, tmp_path):
    cache = ShardCache(remote, tmp_path / "cache", 10**9)
    dataset = open_dataset(remote).through(cache)
    wanted = dataset.read(dataset.frames[0], NAMES)
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.write_bytes(bytes(copy.stat().st_size))
    found = open_dataset(remote).through(cache).read(dataset.frames[0], NAMES)
    assert all((found[member] == wanted[member]).all() for member in NAMES)


def test_a_checksum_is_computed_of_whatever_comes_by_a_request_and_once_of_a_copy(remote, tmp_path, monkeypatch):
    computed, crc32 = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: computed.append(len(data)) or crc32(data))
    dataset = open_dataset(remote)
    for one, times in ((dataset, 2), (dataset.through(ShardCache(remote, tmp_path / "cache", 10**9)), 1)):
        computed.clear()
        for _ in range(2):
            one.read(one.frames[0], NAMES)
        assert len(computed) == times * len(NAMES)


def test_a_copy_that_went_is_let_go_of(remote, tmp_path):
    cache = ShardCache(remote, tmp_path / "cache", 10**9)
    dataset = open_dataset(remote).through(cache)
    dataset.read(dataset.frames[0], ["label"])
    first = dataset.tars["frames/000000.tar"]
    cache.drop(first)
    dataset.read(dataset.frames[-1], ["label"])
    assert list(dataset._maps) == ["frames/000002.tar"]
    dataset.read(dataset.frames[0], ["label"])
    assert cache.holds(first)


def test_a_cache_that_cannot_hold_what_is_read_at_a_time_is_refused(remote, tmp_path):
    dataset = open_dataset(remote)
    shards = sorted(
        sum(dataset.tars[f"{family}/{shard:06d}.tar"].size for family in ("frames", "labels", "identities")) for shard in range(3)
    )
    assert dataset.fetch_ahead([], 2) is None
    cached = dataset.through(ShardCache(remote, tmp_path / "cache", sum(shards[1:]) - 1))
    with pytest.raises(ConfigError, match=r"cache.gigabytes: .* cannot hold the 2 shards of memory://.* lower batches.shuffle_window"):
        cached.fetch_ahead([], 2)
    cached.fetch_ahead([], 1).close()


# Ahead of time ----------------------------------------------------------------------------------------------------------------


class Watched(ShardCache):
    """A cache that tells which files are opened."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.opened, self.refuse = queue.Queue(), set()

    def open(self, tar):
        self.opened.put(tar.name)
        if tar.name in self.refuse:
            raise DataError("the server is gone")
        return super().open(tar)

    def next(self):
        return self.opened.get(timeout=60)


def test_files_are_fetched_in_the_order_in_which_they_are_wanted_while_there_is_room(place, tmp_path):
    cache = Watched(place, tmp_path / "cache", 2500)  # two files
    a, b, c, d = (Copy(cache, place.tars[f"frames/{letter}.tar"]) for letter in "abcd")
    order = [(0, [a]), (1, [a, b]), (2, [b]), (3, [c]), (4, [b]), (5, [d])]
    fetcher = FetchAhead(order, cache.limit)
    assert [cache.next(), cache.next()] == [a.tar.name, b.tar.name]
    assert cache.opened.empty()  # c waits: a is wanted by sample 1
    fetcher.passed(1)
    assert cache.opened.empty()
    fetcher.passed(2)
    assert cache.next() == c.tar.name
    fetcher.passed(4)  # c has been read; b is wanted by sample 4, for which it is still there
    assert cache.next() == d.tar.name
    fetcher.passed(6)
    fetcher.close()
    assert cache.opened.empty() and letters(cache) == "bd"


def test_no_more_samples_are_looked_at_than_the_horizon(place, tmp_path, monkeypatch):
    monkeypatch.setattr("datagen.cache.SAMPLES_AHEAD", 10)
    walked, passed_ten, cache = [], threading.Event(), ShardCache(place, tmp_path / "cache", 10_000)

    def endless():
        sample = 0
        while True:
            walked.append(sample)
            if sample == 13:
                passed_ten.set()
            yield sample, [Copy(cache, place.tars["frames/a.tar"])]
            sample += 1

    fetcher = FetchAhead(endless(), cache.limit)
    fetcher.passed(2)
    assert passed_ten.wait(timeout=60)
    fetcher.close()
    fetcher.close()
    assert walked == list(range(14)), "sample 13 waits until 3 have been read"


def test_what_cannot_be_fetched_is_left_to_the_reader_and_does_not_hold_up_the_end(place, tmp_path):
    cache = Watched(place, tmp_path / "cache", 10_000)
    cache.refuse.add("frames/a.tar")
    fetcher = FetchAhead([(0, [Copy(cache, place.tars["frames/a.tar"])]), (1, [Copy(cache, place.tars["frames/b.tar"])])], 10_000)
    assert cache.next() == "frames/a.tar"
    fetcher.close()  # at once, though it waits to try again
    assert cache.opened.empty()


def test_what_the_reader_has_gone_past_without_it_is_not_fetched_any_more(place, tmp_path):
    """So a file that stays damaged does not hold up those behind it."""
    cache = Watched(place, tmp_path / "cache", 10_000)
    cache.refuse.add("frames/a.tar")
    fetcher = FetchAhead([(0, [Copy(cache, place.tars["frames/a.tar"])]), (1, [Copy(cache, place.tars["frames/b.tar"])])], 10_000)
    assert cache.next() == "frames/a.tar"
    fetcher.passed(1)
    assert cache.next() == "frames/b.tar"
    fetcher.close()


def test_caches_of_several_places_share_one_folder_and_its_limit(place, tmp_path):
    with open_caches(CacheConfig(gigabytes=1e-6), [tmp_path, "memory://one", "memory://other"]) as (none, one, other):
        assert none is None and one.folder == other.folder and one.limit == other.limit == 1000
    with open_caches(CacheConfig(folder=tmp_path / "kept"), ["memory://one"]) as (kept,):
        assert kept.folder == tmp_path / "kept"
