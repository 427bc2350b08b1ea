"""Training from a bucket is training from a folder."""

import dataclasses
import threading

import pytest
import torch

from datagen.cache import CacheConfig, ShardCache, open_cache
from datagen.reading import open_dataset
from datagen.storage import Patience, RemoteFolder, open_storage
from head3d.run.errors import ConfigError, DataError
from reconstructor.batches import BatchStream
from reconstructor.losses import LossConfig, members_needed
from reconstructor.mixture import Mixture
from reconstructor.order import BatchConfig
from reconstructor.train import train

CONFIG = BatchConfig(size=4, threads=2, prefetch=2, shuffle_window=1)


@pytest.fixture
def remote(world, bucket):
    """The URL of the world's shards."""
    storage = open_storage(bucket)
    for path in world.shards.rglob("*"):
        if path.is_file():
            storage.write(str(path.relative_to(world.shards)), path.read_bytes())
    return bucket


def batches(dataset, count, samples_seen=0, config=CONFIG):
    with BatchStream(dataset, config, 0, lambda seen: members_needed(LossConfig(), seen), samples_seen=samples_seen) as stream:
        return [next(stream) for _ in range(count)]


def same(ours, theirs):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b
        for a, b in zip(dataclasses.astuple(ours), dataclasses.astuple(theirs), strict=True)
    )


def test_batches_from_a_bucket_are_those_from_the_folder_also_when_the_cache_forgets_and_the_run_is_resumed(world, remote, tmp_path):
    wanted = batches(open_dataset(world.shards), 12)
    dataset = open_dataset(remote)
    everything = sum(tar.size for tar in dataset.tars.values())
    cache = ShardCache(open_storage(remote), tmp_path / "cache", everything - 1)  # so that it cannot keep all
    found = batches(dataset.through(cache), 5) + batches(dataset.through(cache), 7, samples_seen=20)
    assert all(map(same, found, wanted)) and len(found) == 12
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) < everything
    with pytest.raises(ConfigError, match="cannot hold the 16 shards"):
        batches(dataset.through(cache), 1, config=dataclasses.replace(CONFIG, shuffle_window=8))


def test_a_bucket_and_a_folder_are_mixed_as_two_folders_are(world, remote, tmp_path):
    config = dataclasses.replace(CONFIG, static_weights=(1, 0))  # shares: half, a quarter, a quarter
    folder, copy = open_dataset(world.shards), open_dataset(world.shards)
    cache = ShardCache(open_storage(remote), tmp_path / "cache", 10**9)
    wanted = batches(Mixture([folder, copy]), 4, config=config)
    found = batches(Mixture([folder, open_dataset(remote)]).through([None, cache]), 4, config=config)
    assert all(map(same, found, wanted)) and any(cache.folder.glob("*.tar"))


def test_training_from_a_bucket_gives_the_network_that_the_folder_gives(world, remote, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for name, shards in (("folder", world.shards), ("bucket", remote)):
        assert train(world.run(tmp_path / name, shards=shards, total_images=8)) == 0
    ours, theirs = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("bucket", "folder"))
    assert ours == theirs
    assert list((tmp_path / "temporary").iterdir()) == [], "the private cache is gone"


def test_a_folder_needs_no_cache(world):
    with open_cache(CacheConfig(), world.shards) as cache:
        assert cache is None and open_dataset(world.shards).through(cache).fetch_ahead([], 1) is None


def test_a_server_that_is_gone_in_the_midst_ends_the_batches_with_an_error_that_names_the_file(world, remote, tmp_path, monkeypatch):
    dataset = open_dataset(remote)
    storage = RemoteFolder(remote, Patience(attempts=2, first_wait_s=0.0))
    cache = ShardCache(storage, tmp_path / "cache", 10**9)
    read, asked = RemoteFolder.read, []

    def two_then_none(self, name, *place):
        asked.append(name)
        if len(asked) > 2:
            raise DataError(f"{self.where(name)}: could not be read in 2 attempts: no route to host")
        return read(self, name, *place)

    monkeypatch.setattr(RemoteFolder, "read", two_then_none)
    with (
        pytest.raises(DataError, match=f"{remote}/.*tar: could not be read in 2 attempts"),
        BatchStream(dataset.through(cache), CONFIG, 0, lambda seen: members_needed(LossConfig(), seen)) as stream,
    ):
        for _ in range(12):
            next(stream)
    assert all(thread.name != "fetch-ahead" for thread in threading.enumerate())
