"""The motion vector that a reconstructor reads: FLAME's or a picture's, in training, evaluation and use."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datagen.plan import open_plan
from datagen.reading import open_dataset
from head3d.cameras import frontal
from head3d.labels import Motion
from head3d.run.checkpoint import exported_config, exported_hash, latest_checkpoint
from head3d.run.errors import AssetError, ConfigError
from reconstructor.architecture import Driver
from reconstructor.avatar import Avatar
from reconstructor.batches import BatchConfig, BatchStream, as_picture
from reconstructor.drive import DriveRun, drive, read_sequence
from reconstructor.drivers import perception_reader
from reconstructor.evaluate import EvaluateRun, evaluate, predict
from reconstructor.evaluation_cases import Truths, draw_cases
from reconstructor.learner import build
from reconstructor.model import EXPORT_KIND, ReconstructorExport, load_reconstructor
from reconstructor.motion import flame_motion_vector
from reconstructor.motion_vectors import MotionVectors, exported_motion_vectors, open_motion_vectors
from reconstructor.perception import load_perception
from reconstructor.sources import held_out_frames
from reconstructor.train import train


def image_run(world, out, perception, **changes):
    """Settings of a run that reads motion off pictures."""
    model = dataclasses.replace(world.model, architecture=dataclasses.replace(world.model.architecture, motion="image"))
    return world.run(out, model=model, perception=perception, **changes)


@pytest.fixture(scope="module")
def trained(world, tiny_perception, tmp_path_factory):
    """A finished run of two steps; its encoder lies beside its folder."""
    folder = tmp_path_factory.mktemp("image")
    tiny_perception(folder / "perception")
    config = image_run(world, folder / "run", folder / "perception", total_images=8)
    assert train(config) == 0
    return config


def pictures(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def moved(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return Motion(*(0.1 * torch.randn(count, part.shape[1], generator=draws) for part in Motion.neutral(count)))


def enliven(model):
    """Cross-attention begins at zero; give it something to say."""
    with torch.no_grad():
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=torch.Generator().manual_seed(0))


def test_flame_vectors_are_the_label_s_and_image_vectors_the_encoder_s(tiny_perception, tmp_path):
    network = tiny_perception(tmp_path)
    flame, image = MotionVectors("flame"), MotionVectors("image", network)
    assert torch.equal(flame.seen(pictures(3), moved(3)), flame_motion_vector(moved(3))) and torch.equal(
        flame.described(moved(3)), flame_motion_vector(moved(3))
    )
    found = image.seen(pictures(3), moved(3))
    assert found.shape == (3, 548) and torch.equal(found, network.motion(pictures(3)))
    assert torch.equal(found, image.seen(pictures(3), moved(3, seed=1)))  # the label has no say
    assert torch.allclose(found[1:2], image.seen(pictures(3)[1:2], moved(1)), atol=1e-5)  # nor have batch mates
    described = image.described(moved(3))
    assert torch.equal(described, network.motion.vector(network.motion.flame_coefficients(moved(3))))
    assert torch.equal(described, image.described(moved(3)._replace(neck_pose=torch.ones(3, 3))))
    for vectors in (found, described):
        assert torch.allclose(vectors.norm(dim=1), torch.full((3,), 548**0.5), atol=1e-3) and not vectors.requires_grad


def test_a_batch_gets_the_vectors_of_its_source_and_driver_pictures(world, tiny_perception, tmp_path):
    network = tiny_perception(tmp_path)
    with BatchStream(open_dataset(world.shards), BatchConfig(size=4, threads=0), 0, lambda seen: (), driver_image=True) as batches:
        batch = next(batches)
    assert MotionVectors("flame").of_batch(batch) is batch and batch.source_motion.shape == (4, 109)
    found = MotionVectors("image", network).of_batch(batch)
    assert torch.equal(found.source_motion, network.motion(batch.source_image))
    assert torch.equal(found.driving_motion, network.motion(batch.driver_image))
    assert found.label is batch.label and found.image is batch.image
    assert not (batch.driver_image == batch.image).flatten(1).all(1).any()  # the target is never its own driver


def test_image_motion_without_a_network_or_with_the_judge_s_is_refused(world, tiny_perception, tmp_path):
    with pytest.raises(ConfigError, match=r"motion is image: expected the perception network .*--perception DIR.*motion flame"):
        train(image_run(world, tmp_path / "run", None))
    tiny_perception(tmp_path / "judge", "evaluation")
    with pytest.raises(AssetError, match="trained with --role losses, got evaluation"):
        train(image_run(world, tmp_path / "run", tmp_path / "judge"))
    assert not (tmp_path / "run").exists()


def test_with_the_switch_off_the_driver_s_picture_has_no_influence_and_with_it_on_it_has(world, tiny_perception, tmp_path):
    config = image_run(world, tmp_path / "run", tmp_path / "perception")
    vectors = MotionVectors("image", tiny_perception(tmp_path / "perception"))
    model = build(config, open_plan(config.shards), torch.device("cpu"), fresh=True).model
    enliven(model)
    source, rest, outputs = pictures(2), Motion.neutral(2), {}
    for scale in (0.0, 1.0):
        for seed in (1, 2):
            driver, switch = Driver(vectors.seen(pictures(2, seed), rest)), torch.full((2,), scale)
            found = model(source, vectors.seen(source, rest), driver, switch, torch.zeros(2, 300), rest, frontal(2))
            outputs[scale, seed] = found.images.image
    assert torch.equal(outputs[0.0, 1], outputs[0.0, 2])
    assert not torch.equal(outputs[1.0, 1], outputs[1.0, 2])


def test_the_network_that_reads_motion_and_judges_losses_is_in_memory_once(trained):
    one = build(trained, open_plan(trained.shards), torch.device("cpu"), fresh=True)
    assert one.frozen.perceptual.distance.__self__ is one.vectors.network
    assert one.frozen.weights_hashes() == dict.fromkeys(("perceptual", "identity"), one.vectors.weights_hash)


def test_a_resumed_run_equals_an_uninterrupted_one_and_both_know_their_encoder(world, trained, tmp_path):
    parts = dataclasses.replace(trained, out=tmp_path / "parts", batches=BatchConfig(size=4, threads=0))
    train(dataclasses.replace(parts, total_images=4))
    train(parts)
    first, second = latest_checkpoint(trained.out), latest_checkpoint(parts.out)
    assert first.images_seen == second.images_seen == 8 and first.state == second.state
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors | second.tensors)
    assert first.state["circumstances"]["networks"]["motion"] == exported_hash(trained.perception)
    export = exported_config(trained.out / "export", ReconstructorExport, EXPORT_KIND)
    assert (export.motion_encoder, export.motion_encoder_hash) == (str(trained.perception), exported_hash(trained.perception))


def test_another_encoder_is_refused_by_a_resume_and_by_whoever_uses_the_export(world, trained, tiny_perception, tmp_path, monkeypatch):
    tiny_perception(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"the run was started with networks .*'motion': '.*'\}, now it is"):
        train(dataclasses.replace(trained, perception=tmp_path / "other", total_images=12))
    export, own, other = trained.out / "export", exported_hash(trained.perception), exported_hash(tmp_path / "other")
    with pytest.raises(AssetError, match=rf"trained on \(hash {own}, then in .*\), got {other}; .* --motion_encoder DIR"):
        exported_motion_vectors(export, tmp_path / "other", "motion_encoder", "cpu")
    with pytest.raises(AssetError, match=rf"trained on \(hash {own}"):
        drive(DriveRun(out=tmp_path / "drive", reconstructor=export, perception=tmp_path / "other"))
    with pytest.raises(AssetError, match=r"gone: expected the perception network .*, there is no such folder; .*--perception DIR"):
        exported_motion_vectors(export, tmp_path / "gone", "perception", "cpu")
    assert exported_motion_vectors(export, None, "perception", "cpu").kind == "image"


def test_it_is_evaluated_by_pictures_and_the_motion_of_labels_has_no_part_in_it(world, trained, tmp_path):
    config = EvaluateRun(
        out=tmp_path / "out",
        reconstructor=trained.out / "export",
        shards=world.shards,
        generator=world.generator,
        samples=1,
        identities=1,
        resamples=10,
    )
    assert evaluate(config) == 0
    tasks = json.loads((config.out / "evaluation.json").read_text())["tasks"]
    assert all("psnr" in tasks[task]["rows"]["ours"] for task in ("self_reenactment", "cross_reenactment"))
    dataset, model = open_dataset(world.shards), load_reconstructor(config.reconstructor)
    enliven(model)
    truths = Truths(dataset, open_plan(world.shards), world.generator, "cpu")
    cases = draw_cases(dataset, config.split, config.seed, config.identities, config.samples)
    sample = next(truths.sample(case) for case in cases if case.task == "cross_reenactment")
    vectors = exported_motion_vectors(config.reconstructor, None, "motion_encoder", "cpu")
    relabelled = sample.target_label.clone()
    relabelled[[*range(325, 425), 428]] += 1.0  # expression and jaw, not the neck
    variants = (sample, sample._replace(target_label=relabelled), sample._replace(driver_image=-sample.driver_image))
    first, same, other = (predict(model, vectors, [one], "cross_reenactment", sample.truth)["ours"].image for one in variants)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_pictures_drive_it_through_its_own_encoder_and_so_do_flame_motions(trained, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, level in (("a.png", 40), ("b.png", 200)):
        Image.fromarray(np.full((20, 20, 3), level, np.uint8)).save(folder / name)
    config = DriveRun(out=tmp_path / "out", reconstructor=trained.out / "export", motion=str(folder), outputs=("frames",))
    assert drive(config) == 0
    assert [path.name for path in sorted((config.out / "frames").iterdir())] == ["000000.png", "000001.png"]
    assert "as the reader of the driver sees it" in capsys.readouterr().out
    built_in = dataclasses.replace(config, motion="built-in", frames_between=1, outputs=("sheet",))
    assert drive(built_in) == 0 and (config.out / "contact_sheet.png").exists()


def test_held_out_samples_drive_it_by_their_pictures_and_their_cameras(world, trained):
    config = DriveRun(reconstructor=trained.out / "export", shards=world.shards, motion="shard", motion_count=2, frames_between=2)
    network, dataset = load_perception(trained.perception, "losses"), open_dataset(world.shards)
    sequence, _ = read_sequence(config, dataset, load_reconstructor(config.reconstructor), perception_reader(network, "image"))
    shown = [torch.from_numpy(as_picture(dataset.read(frame, ["rgb.0"])["rgb.0"])) for frame in held_out_frames(dataset)[:2]]
    keys = network.motion(torch.stack(shown))
    assert torch.allclose(sequence.vector[::2], keys, atol=1e-4)
    between = keys.sum(0) / keys.sum(0).norm() * 548**0.5  # half-way, as long as a vector is
    assert torch.allclose(sequence.vector[1], between, atol=1e-3) and len(sequence) == 3
    assert not torch.equal(sequence.camera.c2w[0], sequence.camera.c2w[2])


def test_an_avatar_of_such_a_network_takes_vectors_of_pictures(trained, tiny_perception, tmp_path):
    model, vectors = load_reconstructor(trained.out / "export"), open_motion_vectors("image", trained.perception, "cpu")
    enliven(model)
    rest = Motion.neutral(1)
    avatar = Avatar.from_image(model, pictures(1), vector=vectors.seen(pictures(1), rest))
    first, second = (avatar.drive(rest, frontal(), vector=vectors.seen(pictures(1, seed), rest)).image for seed in (1, 2))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigError, match=r"vectors of 548 numbers \(read off pictures\), got 109 .*; give those of a picture"):
        Avatar.from_image(model, pictures(1))
