"""What a training begins with: the warm start, the data that it takes or refuses, the labels that its losses need."""

import collections
import dataclasses
import json
import shutil

import pytest

from datagen.exclusion import Exclusion
from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.plan import exclude
from datagen.reading import open_dataset
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig
from genhead.generator import load_genhead
from head3d.run.errors import AssetError, ConfigError
from head3d.run.runlog import read_metrics
from reconstructor import mixture, steps
from reconstructor.frozen_networks import FrozenNetworks
from reconstructor.learner import check_data, circumstances
from reconstructor.losses import LossConfig, TermConfig
from reconstructor.mixture import Mixture
from reconstructor.motion_vectors import MotionVectors
from reconstructor.order import BatchConfig
from reconstructor.train import train

NO_NETWORKS, FLAME = FrozenNetworks(None, None), MotionVectors("flame")


def test_warm_start_takes_decoder_and_superresolution_from_the_generator(world, tmp_path, learner, differing):
    config, generator = world.run(tmp_path), load_genhead(world.generator)
    warm, cold = learner(config).model, learner(config, warm=False).model
    for part in ("decoder", "superresolution"):
        assert not differing(getattr(warm, part).state_dict(), getattr(generator, part).state_dict())
        assert differing(getattr(cold, part).state_dict(), getattr(generator, part).state_dict())
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder_hidden=12))
    with pytest.raises(ConfigError, match=r"warm_start: the generator's decoder does not fit .* at color.weight.*--warm_start false"):
        learner(wider)


def test_wrong_data_is_refused_before_anything_is_written(world, tmp_path):
    config = world.run(tmp_path / "run")
    manifest = json.loads((world.shards / "dataset.json").read_text())
    assert manifest["plan"]["labels_share"] == 1.0
    for change, message in (
        ({"render_resolution": 8}, "made with render_resolution 16, but model.render_resolution gives 8; make it 16"),
        ({"architecture": dataclasses.replace(config.model.architecture, plane_channels=5)}, "model.architecture.plane_channels gives 5"),
        ({"superresolution": dataclasses.replace(config.model.superresolution, channels=(8, 8))}, r"image_resolution 32, but .* gives 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(config, model=dataclasses.replace(config.model, **change)))
    with pytest.raises(ConfigError, match="architecture.background.channels: expected feature_channels, 4, got 6"):
        dataclasses.replace(config.model, feature_channels=4)
    with pytest.raises(AssetError, match="generator weights"):
        other = tmp_path / "generator"
        other.mkdir()
        for name in ("model.safetensors", "config.yaml"):
            (other / name).write_bytes((world.generator / name).read_bytes())
        record = json.loads((world.generator / "model.json").read_text())
        (other / "model.json").write_text(json.dumps(record | {"tensors_sha256": "0" * 64}))
        train(dataclasses.replace(config, generator=other))
    assert not config.out.exists()


def test_a_loss_without_labels_is_refused_before_anything_is_written(world, tmp_path, monkeypatch):
    config = world.run(tmp_path / "run")

    def without_depth(folder):
        dataset = open_dataset(folder)
        dataset.frames = [
            frame._replace(members={name: place for name, place in frame.members.items() if name != "depth"}) for frame in dataset.frames
        ]
        return dataset

    monkeypatch.setattr(mixture, "open_dataset", without_depth)
    with pytest.raises(ConfigError, match=r"the loss losses.depth compares with the member 'depth', but none of"):
        train(config)
    assert not config.out.exists()
    silent = dataclasses.replace(config, losses=dataclasses.replace(config.losses, depth=TermConfig(0.0)), total_images=4)
    assert train(silent) == 0


def test_excluded_frames_are_not_trained_on_and_make_another_run(world, tmp_path):
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    whole = open_dataset(shards)
    frame = next(frame for frame in whole.frames if frame.split == "train")
    exclude(shards, Exclusion(frames=frozenset([frame.key])))
    less = open_dataset(shards)
    check_data(world.run(tmp_path / "run", shards=shards), Mixture([less]))  # complete, though shorter than planned
    assert frame.key not in {other.key for other in less.frames} and len(less.frames) == len(whole.frames) - 1
    one, other = (Mixture([dataset]) for dataset in (less, whole))
    assert circumstances(one, NO_NETWORKS, FLAME) != circumstances(other, NO_NETWORKS, FLAME)
    exclude(shards, Exclusion(frames=frozenset([next(f.key for f in whole.frames if f.key != frame.key)])))  # as many, not the same
    assert circumstances(Mixture([open_dataset(shards)]), NO_NETWORKS, FLAME) != circumstances(one, NO_NETWORKS, FLAME)


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """Two identities with labels, two without, and two motion-rich ones of small pictures."""
    recipe = RecipeConfig(
        dynamic_share=1 / 3, motion_rich_share=1 / 3, motion_rich_motions=3, motion_rich_views=2, dynamic_motions=2, dynamic_views=2,
        static_views=2, val_share=0.0, test_share=0.0,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("mixed") / "shards"
    config = DatagenRun(
        out=out, generator=world.generator, identities=6, workers=0, labels_share=0.5, recipe=recipe,
        render=RenderConfig(points=30, motion_rich_side=8), shards=ShardConfig(identities_per_shard=3),
    )  # fmt: skip
    assert generate(config) == 0
    return out


def test_a_set_with_labels_for_half_of_it_trains_on_that_half_while_labels_count(world, mixed, tmp_path, capsys, monkeypatch):
    early = {name: dataclasses.replace(getattr(LossConfig(), name), until=8) for name in ("features", "points", "depth")}
    losses = LossConfig(**early, smoothness=dataclasses.replace(LossConfig().smoothness, every=2, points=20))
    config = world.run(tmp_path / "run", shards=mixed, losses=losses, total_images=24)
    seen, terms = [], steps.loss_terms

    def watched(config, learner, batch, images_seen, draws):
        seen.append((images_seen, set(batch.identity.tolist()), batch.image.shape))
        return terms(config, learner, batch, images_seen, draws)

    monkeypatch.setattr(steps, "loss_terms", watched)
    assert train(config) == 0
    said = capsys.readouterr().out
    assert "losses.depth: from 0 images to 8, targets are the 3 of 6 frames with 'depth'" in said and "losses.image" not in said
    kinds = {frame.identity: frame.kind for frame in open_dataset(mixed).frames}
    assert collections.Counter(kinds.values()) == {"motion-rich": 2, "dynamic": 2, "static": 2}
    trained = {images: set().union(*(found for clock, found, _ in seen if (clock < 8) == images)) for images in (True, False)}
    assert all(kinds[identity] != "motion-rich" for found in trained.values() for identity in found)
    assert max(trained[True]) < 3 and trained[False] == {identity for identity, kind in kinds.items() if kind != "motion-rich"}
    lines = read_metrics(config.out)
    assert ["loss/depth" in line for line in lines] == [True] * 2 + [False] * 4
    assert all("loss/image_foreground" in line for line in lines)


def test_small_pictures_of_motion_rich_identities_are_refused_where_they_are_asked_for(world, mixed, tmp_path):
    config = world.run(tmp_path / "run", shards=mixed, batches=BatchConfig(size=4, motion_rich_weights=(1,)))
    with pytest.raises(
        ConfigError, match="motion-rich identities, whose pictures are 8 px, but the others' are 32 px; .*--render.motion_rich_side 32"
    ):
        train(config)


def test_a_label_that_no_shard_has_is_named_with_what_to_do(world, mixed, tmp_path):
    manifest = json.loads((mixed / "dataset.json").read_text())
    assert manifest["settings"]["render"]["labels"] == ["depth", "opacity", "parts", "foreground", "background", "planepoints"]
    dataset = open_dataset(mixed)
    dataset.frames = [frame for frame in dataset.frames if frame.shard == 1]
    dataset.manifest["plan"]["frames"] = len(dataset.frames)
    with pytest.raises(ConfigError, match=r"losses.features .* none of the 3 training frames has it; .* the label foreground \(--render"):
        check_data(world.run(tmp_path / "run", shards=mixed), Mixture([dataset]))
