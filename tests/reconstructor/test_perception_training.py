"""Training the perception network on a tiny data set: what comes out, resume, stops, ranks, refusals."""

import dataclasses
import json

import pytest
import torch

from datagen import worker
from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.plan import open_plan
from datagen.reading import open_dataset
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig
from head3d.run import distributed
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.errors import ConfigError, DataError
from head3d.run.runlog import read_metrics
from reconstructor import perception_training as training
from reconstructor.perception import PerceptionConfig, TrunkConfig, load_errors, load_perception
from reconstructor.perception_data import AugmentConfig, PictureBatchConfig, PictureOrder, read_pictures, training_frames
from reconstructor.perception_training import PerceptionRun, train

ALONE = distributed.Process(0, 1, torch.device("cpu"), True)
TRUNK = TrunkConfig(16, 8, (1, 1))


@pytest.fixture(scope="module")
def people(world, tmp_path_factory):
    """Shards of 12 people in two motions with two views and nothing but what this training reads; two are held out."""
    config = DatagenRun(
        out=str(tmp_path_factory.mktemp("people") / "shards"),
        generator=world.generator,
        identities=12,
        workers=0,
        recipe=RecipeConfig(dynamic_share=1, dynamic_motions=2, dynamic_views=2, val_share=0.1, test_share=0.1, split_rule="modulo"),
        render=RenderConfig(labels=("opacity",)),
        shards=ShardConfig(identities_per_shard=6),
    )
    assert generate(config) == 0
    return config.out


@pytest.fixture
def run(people, tmp_path, monkeypatch, built_in_head):
    """Settings of a run of four steps."""
    monkeypatch.setattr(worker, "load_head_model", lambda place: built_in_head)
    return PerceptionRun(
        out=tmp_path / "run",
        shards=people,
        total_images=32,
        log_every=8,
        pictures_every=16,
        checkpoint_every=100,
        batches=PictureBatchConfig(identities=2, pictures=4),
        network=PerceptionConfig(trunk=TRUNK, identity_size=6, hidden=8, motion_trunk=TRUNK, motion_directions=4, motion_hidden=8),
    )


def learner_and_pictures(config):
    dataset = open_dataset(config.shards)
    by_identity = training_frames(dataset.frames, config.role, "here")
    learner = training.build(config, dataset, open_plan(config.shards), by_identity, torch.device("cpu"))
    order = PictureOrder(dataset.frames, by_identity, config.batches, 0)
    return learner, lambda rank, ranks: read_pictures(dataset, order.batch(0, rank, ranks), 16)


def test_a_run_logs_every_term_exports_and_measures_itself_on_people_held_out(run):
    assert train(run) == 0
    lines = read_metrics(run.out)
    assert [line["images_seen"] for line in lines] == [8, 16, 24, 32]
    terms = ("expression", "jaw", "gaze", "landmarks", "rotation", "identity", "motion", "adversary", "total")
    assert {f"loss/{name}" for name in terms} <= lines[0].keys()
    assert sorted(path.name for path in (run.out / "pictures").iterdir()) == ["000000016_shown.png", "000000032_shown.png"]
    errors = load_errors(run.out / "export")
    held_out = [frame for frame in open_dataset(run.shards).frames if frame.split != "train"]
    assert errors["pictures"] == 2 * len(held_out) and errors["identities"] == len({frame.identity for frame in held_out})
    assert errors["reading"]["rotation_deg"]["unit"] == "degrees between head rotations in camera axes"
    assert all(one["network"] > 0 and one["mean"] > 0 for name, one in errors["reading"].items() if name != "expression")
    network = load_perception(run.out / "export", "losses")
    averaged = latest_checkpoint(run.out).tensors
    assert torch.equal(network.trunk.stem[0].weight, averaged["averaged/trunk.stem.0.weight"])
    assert "people" not in network.state_dict() and not hasattr(network, "adversary")
    before = (run.out / "export" / "model.safetensors").stat().st_mtime_ns
    assert train(run) == 0 and (run.out / "export" / "model.safetensors").stat().st_mtime_ns == before  # a finished run is not repeated


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path, differing):
    whole, parts = dataclasses.replace(run, total_images=24), dataclasses.replace(run, out=tmp_path / "parts", total_images=16)
    train(whole)
    train(parts)
    train(dataclasses.replace(parts, total_images=24))
    first, second = latest_checkpoint(whole.out), latest_checkpoint(parts.out)
    assert first.images_seen == second.images_seen == 24
    assert differing(first.tensors, second.tensors) == [] and first.state == second.state
    with pytest.raises(ConfigError, match=r"started with other settings of role"):
        train(dataclasses.replace(parts, role="evaluation"))


def test_sigterm_saves_and_the_same_command_goes_on(run, sigterm_in_second_step):
    sigterm_in_second_step(training)
    assert train(run) == 0
    assert latest_checkpoint(run.out).images_seen == 16 and not (run.out / "export").exists()


def test_the_ranks_gradients_average_to_that_of_one_process(run):
    gradients = []
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            learner, read = learner_and_pictures(run)
            pictures = read(rank, ranks)
            seen = training.show(run, pictures, 0, ALONE._replace(rank=rank, world_size=ranks))
            terms = training.loss_terms(run.weights, learner.network, learner.scaffold, learner.head, pictures, seen)
            sum(terms.values()).backward()
            parts.append(torch.cat([p.grad.flatten() for p in (*learner.network.parameters(), *learner.scaffold.parameters())]))
        gradients.append(sum(parts) / ranks)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_a_small_network_learns_where_heads_are(run):
    config = dataclasses.replace(run, learning_rate=5e-3, augment=AugmentConfig(background_share=0, blur=0))
    learner, read = learner_and_pictures(config)
    pictures, losses = read(0, 1), []
    for number in range(20):
        seen = training.show(config, pictures, 0, ALONE)
        losses.append(training.step(config, learner, pictures, seen, 8 * number, ALONE))
    for term in ("rotation", "landmarks", "identity", "total"):
        assert losses[-1][f"loss/{term}"] < 0.8 * losses[0][f"loss/{term}"], term


def test_the_two_roles_see_different_people_and_begin_differently(run):
    networks, people = [], []
    for role in ("losses", "evaluation"):
        config = dataclasses.replace(run, role=role)
        learner, read = learner_and_pictures(config)
        networks.append(learner.network.trunk.stem[0].weight)
        people.append(set(learner.scaffold.people.tolist()))
    assert not torch.equal(*networks) and not people[0] & people[1]


def test_a_set_without_held_out_people_or_opacity_is_refused_at_the_start(run, monkeypatch):
    def without(member=None, split=None):
        def opened(place):
            dataset = open_dataset(place)
            frames = [
                frame._replace(split=split or frame.split, members={name: where for name, where in frame.members.items() if name != member})
                for frame in dataset.frames
            ]
            dataset.frames = frames
            return dataset

        return opened

    for changes, message in (({"split": "train"}, "no identity is held out"), ({"member": "opacity"}, "have no member 'opacity'")):
        monkeypatch.setattr(training, "open_dataset", without(**changes))
        with pytest.raises(DataError, match=message):
            train(run)
        assert not run.out.exists()


def test_errors_are_written_before_the_export_is_finished(run, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(training, "export_model", broken)
    with pytest.raises(RuntimeError):
        train(dataclasses.replace(run, total_images=8))
    assert json.loads((run.out / "export" / "errors.json").read_text())["pictures"] > 0 and not (run.out / "export" / "model.json").exists()
