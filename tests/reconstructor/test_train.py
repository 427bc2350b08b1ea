"""Training: logs, export, resume and stops, alone and in two processes, on a tiny data set."""

import collections
import dataclasses
import shutil

import pytest
import torch

from datagen.plan import open_plan
from datagen.reading import open_dataset
from genhead.train import DISCRIMINATOR_FOLDER
from head3d.run.checkpoint import Checkpoint, latest_checkpoint
from head3d.run.config import save_yaml
from head3d.run.errors import AssetError, ConfigError, DataError
from head3d.run.runlog import read_metrics
from reconstructor import mixture
from reconstructor import train as training
from reconstructor.learner import build
from reconstructor.losses import TermConfig
from reconstructor.model import load_reconstructor
from reconstructor.order import BatchConfig
from reconstructor.settings import GrowthConfig
from reconstructor.stages import StageConfig
from reconstructor.train import train

TERMS_OF_NETWORKS = ("loss/perceptual_final", "loss/identity", "loss/adversarial", "discriminator/adversarial", "discriminator/r1")


def test_a_run_learns_logs_and_exports(world, tmp_path, differing):
    config = world.run(tmp_path / "run", total_images=48, pictures_every=16, checkpoint_every=16)
    assert train(config) == 0
    lines = read_metrics(config.out)
    assert [line["images_seen"] for line in lines] == list(range(4, 52, 4))
    assert lines[-1]["loss/total"] < lines[0]["loss/total"]
    wanted = ("image_final", "image_raw", "image_foreground", "image_background", "features", "points", "depth", "opacity", "total")
    assert {f"loss/{name}" for name in wanted} | {"speed/images_per_s"} <= lines[0].keys()
    shares = [lines[0][f"speed/{part}_share"] for part in ("data_wait", "forward", "backward", "update")]
    assert all(share > 0 for share in shares) and sum(shares) <= 1
    assert "loss/smoothness" in lines[0] and "loss/smoothness" not in lines[1]  # every second step
    assert sorted(path.name for path in (config.out / "pictures").iterdir()) == [f"{seen:09d}_preview.png" for seen in (16, 32, 48)]
    exported = load_reconstructor(config.out / "export")
    saved = latest_checkpoint(config.out)
    assert not differing(exported.weights(), {name[9:]: value for name, value in saved.tensors.items() if name.startswith("averaged/")})
    before = (config.out / "export" / "model.safetensors").stat().st_mtime_ns
    assert train(config) == 0
    assert (config.out / "export" / "model.safetensors").stat().st_mtime_ns == before  # a finished run is not repeated


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(world, tmp_path, tiny_perception, differing):
    """With a perceptual term to the end of the first part, a discriminator that learns in both, and an identity term from the second on."""
    tiny_perception(tmp_path / "perception")
    settings = world.adversarial(since=4)
    settings["losses"] = dataclasses.replace(settings["losses"], perceptual=TermConfig(1.0, until=8), identity=TermConfig(1.0, since=8))
    whole = world.run(tmp_path / "whole", **settings, perception=tmp_path / "perception")
    parts = dataclasses.replace(whole, out=tmp_path / "parts", batches=BatchConfig(size=4, threads=0))
    train(whole)
    train(dataclasses.replace(parts, total_images=8))
    train(parts)
    first, second = latest_checkpoint(whole.out), latest_checkpoint(parts.out)
    assert first.images_seen == second.images_seen == 16
    assert differing(first.tensors, second.tensors) == [] and first.state == second.state
    for one, other in zip(read_metrics(whole.out), read_metrics(parts.out), strict=True):
        assert {k: v for k, v in one.items() if "speed" not in k} == {k: v for k, v in other.items() if "speed" not in k}
    counts = {name: [name in line for line in read_metrics(whole.out)] for name in TERMS_OF_NETWORKS}
    assert counts == {
        "loss/perceptual_final": [True, True, False, False],
        "loss/identity": [False, False, True, True],
        "loss/adversarial": [False, True, True, True],
        "discriminator/adversarial": [False, True, True, True],
        "discriminator/r1": [False, False, True, False],  # every second step
    }
    tiny_perception(tmp_path / "perception", seed=1)
    with pytest.raises(ConfigError, match="the run was started with networks .*'perceptual'.* another --out"):
        train(dataclasses.replace(parts, total_images=20))


def test_a_run_whose_rays_grow_resumes_exactly_and_exports_what_it_came_to(world, tmp_path, differing):
    whole = world.run(tmp_path / "whole", total_images=12, growth=GrowthConfig(resolution=32, since=4, images=8))
    parts = dataclasses.replace(whole, out=tmp_path / "parts")
    train(whole)
    train(dataclasses.replace(parts, total_images=8))
    train(parts)
    assert [whole.rays_at(images) for images in (0, 4, 8, 12)] == [16, 16, 24, 32]
    assert differing(latest_checkpoint(whole.out).tensors, latest_checkpoint(parts.out).tensors) == []
    assert load_reconstructor(whole.out / "export").config.render_resolution == 32


def test_a_run_goes_on_from_an_exported_reconstructor_with_its_clock(world, tmp_path):
    first = world.run(tmp_path / "first", total_images=8, export_half=True)
    assert train(first) == 0
    exported = load_reconstructor(first.out / "export").weights()
    onward = dataclasses.replace(first, out=tmp_path / "onward", start_from=first.out / "export", total_images=12)
    assert train(onward) == 0
    assert [line["images_seen"] for line in read_metrics(onward.out)] == [12]
    moved = [(latest_checkpoint(onward.out).tensors[f"model/{name}"] - value).abs().max() for name, value in exported.items()]
    assert 0 < max(moved) < 0.01, "one step from the exported weights, neither from noise nor from the generator's"
    other = dataclasses.replace(onward.model.architecture, token_width=2 * onward.model.architecture.token_width)
    wider = dataclasses.replace(onward, out=tmp_path / "wider", model=dataclasses.replace(onward.model, architecture=other))
    with pytest.raises(ConfigError, match="other settings of model"):
        train(wider)


def test_a_run_goes_on_from_an_export_with_the_discriminator_that_lies_below_it(world, tmp_path, learner, differing):
    first = world.run(tmp_path / "first", total_images=4, **world.adversarial(since=0))
    assert train(first) == 0
    saved = {name[14:]: value for name, value in latest_checkpoint(first.out).tensors.items() if name.startswith("discriminator/")}
    onward = dataclasses.replace(first, out=tmp_path / "onward", start_from=first.out / "export", total_images=8)
    assert not differing(learner(onward).adversary.network.state_dict(), saved)
    late = build(onward, open_plan(world.shards), torch.device("cpu"), fresh=False).adversary
    late.restore(Checkpoint(tmp_path, 4, {}, {}, {}))  # of a run that was to end before the term began
    assert not differing(late.network.state_dict(), saved)
    wider = dataclasses.replace(first.adversary, discriminator=dataclasses.replace(first.adversary.discriminator, channel_base=256))
    with pytest.raises(ConfigError, match="other settings than adversary.discriminator.* --start_from None"):
        learner(dataclasses.replace(onward, adversary=wider))
    shutil.rmtree(first.out / "export" / DISCRIMINATOR_FOLDER)
    assert differing(learner(onward).adversary.network.state_dict(), saved), "an export without one: at random again"
    shutil.rmtree(first.out / "export")
    with pytest.raises(AssetError, match="there is no such folder"):
        late.restore(Checkpoint(tmp_path, 4, {}, {}, {}))


def test_sigterm_saves_and_the_same_command_goes_on(world, tmp_path, sigterm_in_second_step):
    config = world.run(tmp_path / "run")
    sigterm_in_second_step(training)
    assert train(config) == 0
    assert latest_checkpoint(config.out).images_seen == 8 and not (config.out / "export").exists()
    assert train(config) == 0
    assert latest_checkpoint(config.out).images_seen == 16 and (config.out / "export" / "model.json").exists()


def test_a_resume_with_other_settings_is_refused_by_name(world, tmp_path):
    config = world.run(tmp_path / "run", total_images=4)
    train(config)
    with pytest.raises(ConfigError, match="other settings of batches, learning_rate;"):
        train(dataclasses.replace(config, total_images=8, learning_rate=1e-2, batches=BatchConfig(size=2)))


def test_a_resume_on_a_data_set_that_changed_is_refused(world, tmp_path, monkeypatch):
    config = world.run(tmp_path / "run", total_images=4)
    train(config)

    def grown(folder):
        dataset = open_dataset(folder)
        dataset.frames = [*dataset.frames, dataset.frames[0]]
        return dataset

    monkeypatch.setattr(mixture, "open_dataset", grown)
    with pytest.raises(ConfigError, match="the run was started with data .* another --out"):
        train(dataclasses.replace(config, total_images=8))


def test_two_processes_do_on_uneven_damaged_shards_what_one_does_and_one_goes_on(world, tmp_path, two_processes):
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    frames = open_dataset(shards).frames
    assert sorted(collections.Counter(frame.shard for frame in frames).values()) == [3, 4, 5]
    damaged = next(frame for frame in frames if frame.split == "train" and frame.kind == "dynamic")
    place = damaged.members["rgb.0"]
    with (shards / place.tar).open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        file.write(b"another")
    batches = BatchConfig(size=4, threads=1, prefetch=2, damaged="replace")
    stages = (StageConfig("first", images=4, freeze=("decoder",)), StageConfig("second"))
    config = world.run(tmp_path / "run", shards=str(shards), batches=batches, total_images=8, stages=stages, **world.adversarial(since=0))
    save_yaml(config, tmp_path / "run.yaml")
    two_processes(["-m", "pipelines", "reconstructor", "--config", str(tmp_path / "run.yaml")])
    assert train(dataclasses.replace(config, out=tmp_path / "alone")) == 0
    lines, alone = read_metrics(config.out), read_metrics(tmp_path / "alone")
    assert [line["images_seen"] for line in lines] == [4, 8] and "discriminator/r1" in lines[0]
    assert [line.keys() for line in lines] == [line.keys() for line in alone]
    replaced = [line["data/replaced_samples"] for line in lines]
    assert replaced == [line["data/replaced_samples"] for line in alone] and 0 < replaced[-1] >= replaced[0]
    for together, one in zip(lines, alone, strict=True):
        same = [name for name in one if name.startswith(("loss/", "discriminator/"))]
        assert [together[name] for name in same] == pytest.approx([one[name] for name in same], rel=1e-4)
    tensors, other = (latest_checkpoint(folder).tensors for folder in (config.out, tmp_path / "alone"))
    for kind in ("model/", "discriminator/"):
        mine, its = (torch.cat([value.flatten() for name, value in found.items() if name.startswith(kind)]) for found in (tensors, other))
        assert (mine - its).norm() < 1e-4 * its.norm()
    saved = latest_checkpoint(config.out)
    steps = {g["name"]: float(saved.tensors[f"optimizer.{g['params'][0]}.step"]) for g in saved.state["optimizer"]["groups"]}
    assert steps["decoder"] == 1 and steps["architecture"] == 2  # the decoder was frozen in the first of two steps, in both processes
    assert train(dataclasses.replace(config, total_images=12)) == 0
    assert latest_checkpoint(config.out).images_seen == 12
    strict = dataclasses.replace(config, out=tmp_path / "strict", batches=dataclasses.replace(batches, damaged="stop"))
    with pytest.raises(DataError, match=rf"{place.tar}: key {damaged.key}, member 'rgb.0' .* checksum"):
        train(strict)
