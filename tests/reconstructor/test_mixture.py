"""Several data sets read as one."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datagen.reading import open_dataset
from head3d.run.config import load_yaml
from head3d.run.errors import ConfigError
from reconstructor.batches import BatchStream
from reconstructor.mixture import open_mixture
from reconstructor.order import BatchConfig
from reconstructor.settings import ReconstructorRun
from reconstructor.train import train

STATIC_HERE_DYNAMIC_THERE = BatchConfig(size=4, threads=1, static_weights=(1, 0), dynamic_weights=(0, 1))


@pytest.fixture
def two(world, tmp_path):
    """Two folders of shards."""
    return str(world.shards), str(shutil.copytree(world.shards, tmp_path / "other"))


def test_frames_of_all_sets_follow_one_another_under_numbers_of_their_own(two):
    mixture, single = open_mixture(two), open_dataset(two[0])
    count, frames = len(single.frames), list(mixture.frames)
    assert len(mixture.frames) == len(frames) == 2 * count and mixture.dataset_count == 2
    assert (
        frames[:count] == list(single.frames)
        and mixture.frames[-1] == frames[-1]
        and mixture.frames[count - 1 : count + 1] == frames[count - 1 : count + 1]
    )
    for ours, theirs in zip(frames[count:], single.frames, strict=True):
        assert (ours.dataset, ours.shard, ours.identity) == (1, theirs.shard + 3, theirs.identity + 8)  # three shards, eight identities
        assert np.array_equal(mixture.read(ours, ["rgb.0"])["rgb.0"], single.read(theirs, ["rgb.0"])["rgb.0"])
    with pytest.raises(IndexError):
        mixture.frames[2 * count]


def test_a_batch_takes_from_each_set_what_its_weights_say(two):
    with BatchStream(open_mixture(two), STATIC_HERE_DYNAMIC_THERE, 0, lambda seen: {"depth"}) as batches:
        for _ in range(4):
            batch = next(batches)
            assert [(identity >= 8) for identity in batch.identity.tolist()] == [scale == 1 for scale in batch.motion_scale.tolist()]
            assert batch.motion_scale.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("generator", "hash"), "0" * 64, "expected the generator's weights to be .*, got 0{64}"),
        (("head_model",), "another", "expected the head model to be .*, got another; .* one generator, one head model"),
        (("render", "points"), 7, "expected render.points to be 30, .* got 7"),
        (("generator", "model", "image_resolution"), 64, "expected the generator's image_resolution to be 32, .* got 64"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused_by_name(two, keys, value, message):
    path = Path(two[1]) / "dataset.json"
    manifest = json.loads(path.read_text())
    place = manifest["settings"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"{two[1]}: {message}"):
        open_mixture(two)


def test_one_set_twice_is_refused(two):
    with pytest.raises(ConfigError, match="expected one data set or different ones"):
        open_mixture((two[0], two[0]))


def test_training_on_a_mixture_resumes_and_notices_when_one_of_its_sets_is_another(world, two, tmp_path):
    config = world.run(tmp_path / "run", shards=two, batches=STATIC_HERE_DYNAMIC_THERE, total_images=4)
    assert train(config) == 0
    assert load_yaml(ReconstructorRun, config.out / "config.yaml").shards == two
    longer = dataclasses.replace(config, total_images=8)
    with pytest.raises(ConfigError, match="was started with data 2 .* now it is None|expected one weight for each of 1 data sets"):
        train(dataclasses.replace(longer, shards=two[0]))
    with pytest.raises(ConfigError, match="other settings of batches"):
        train(dataclasses.replace(longer, batches=dataclasses.replace(config.batches, dynamic_weights=(1, 1))))
    assert train(dataclasses.replace(longer, shards=two[:1] + (str(shutil.move(two[1], tmp_path / "moved")),))) == 0


def test_a_set_without_any_weight_is_named(world, two, tmp_path):
    batches = BatchConfig(size=4, static_weights=(1, 0), dynamic_weights=(1, 0))
    with pytest.raises(ConfigError, match=f"{two[1]}: no frame of its split 'train' is of a kind that has a weight"):
        train(world.run(tmp_path / "run", shards=two, batches=batches))
