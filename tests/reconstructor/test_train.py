"""Training: the switch, the warm start, logs, resume and stops, on a tiny data set."""

import collections
import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
import yaml

from datagen.exclusion import Exclusion
from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.plan import exclude, open_plan
from datagen.reading import open_dataset
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig
from genhead.generator import load_genhead
from genhead.train import DISCRIMINATOR_FOLDER, GenHeadRun
from head3d.cameras import frontal
from head3d.labels import Motion, unpack_label
from head3d.networks.discriminator import DiscriminatorConfig
from head3d.run import distributed
from head3d.run.checkpoint import Checkpoint, latest_checkpoint
from head3d.run.config import from_dict, load_yaml, save_yaml
from head3d.run.errors import AssetError, ConfigError, DataError
from head3d.run.runlog import read_metrics
from head3d.run.training import Divergence, check_finite
from reconstructor import mixture, steps
from reconstructor import train as training
from reconstructor.adversary import Adversary, AdversaryConfig
from reconstructor.architecture import Driver
from reconstructor.batches import BatchStream
from reconstructor.frozen_networks import FrozenNetworks
from reconstructor.learner import build, check_data, circumstances
from reconstructor.losses import LossConfig, SmoothnessConfig, TermConfig, labels_at, members_needed
from reconstructor.mixture import Mixture
from reconstructor.model import load_reconstructor
from reconstructor.motion_vectors import MotionVectors
from reconstructor.order import BatchConfig
from reconstructor.preview import preview_batch, preview_picture
from reconstructor.settings import GrowthConfig, ReconstructorRun
from reconstructor.stages import StageConfig, stage_at
from reconstructor.steps import loss_terms
from reconstructor.train import train

NO_NETWORKS, FLAME = FrozenNetworks(None, None), MotionVectors("flame")
TINY_ADVERSARY = AdversaryConfig(
    r1_every=2, discriminator=DiscriminatorConfig(resolution=32, channel_base=128, channel_max=8, mapping_layers=1)
)
TERMS_OF_NETWORKS = ("loss/perceptual_final", "loss/identity", "loss/adversarial", "discriminator/adversarial", "discriminator/r1")
ALONE = distributed.Process(0, 1, torch.device("cpu"), True)


def learner(config, warm=True):
    return build(dataclasses.replace(config, warm_start=warm), open_plan(config.shards), torch.device("cpu"), fresh=True)


def adversarial(since):
    return LossConfig(adversarial=TermConfig(0.01, since=since), smoothness=SmoothnessConfig(every=2, points=20))


def first_batch(config):
    with BatchStream(open_dataset(config.shards), config.batches, 0, lambda seen: members_needed(config.losses, seen)) as batches:
        return next(batches)


def equal_tensors(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_with_the_switch_off_the_driver_has_no_influence_and_with_it_on_it_has(world, tmp_path):
    config = world.run(tmp_path)
    model = learner(config).model
    with torch.no_grad():
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch = first_batch(config)
    outputs = {}
    for scale in (0.0, 1.0):
        for sign in (1.0, -1.0):
            images = model(
                batch.source_image,
                batch.source_motion * sign,
                Driver(batch.driving_motion * sign),
                torch.full((4,), scale),
                batch.label[:, 25:325],
                Motion.neutral(4),
                frontal(4),
            ).images
            outputs[scale, sign] = images.image
    assert torch.equal(outputs[0.0, 1.0], outputs[0.0, -1.0])
    assert not torch.equal(outputs[1.0, 1.0], outputs[1.0, -1.0])


def test_warm_start_takes_decoder_and_superresolution_from_the_generator(world, tmp_path):
    config, generator = world.run(tmp_path), load_genhead(world.generator)
    warm, cold = learner(config).model, learner(config, warm=False).model
    for part in ("decoder", "superresolution"):
        assert not equal_tensors(getattr(warm, part).state_dict(), getattr(generator, part).state_dict())
        assert equal_tensors(getattr(cold, part).state_dict(), getattr(generator, part).state_dict())
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder_hidden=12))
    with pytest.raises(ConfigError, match=r"warm_start: the generator's decoder does not fit .* at color.weight.*--warm_start false"):
        learner(wider)


def test_every_parameter_gets_a_gradient(world, tmp_path):
    """All but what the zero-initialised cross-attention output hides until its first step."""
    config = world.run(tmp_path)
    one = learner(config)
    model = one.model
    with torch.no_grad():
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.decoder.density.weight, generator=torch.Generator().manual_seed(0))
    sum(loss_terms(config, one, first_batch(config), 0, torch.Generator())[0].values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_accumulation_gives_the_gradients_of_the_whole_batch(world, tmp_path):
    """The reconstructor's by jittered rays, and the discriminator's, of which a group of two samples is never torn."""
    config, gradients = world.run(tmp_path, losses=adversarial(since=0), adversary=TINY_ADVERSARY), []
    for micro in (4, 2):
        one, found = learner(config), []

        def keep(network=one.adversary.network, found=found):
            found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]))

        one.adversary.optimizer.step = keep  # by the pictures, then by the penalty
        steps.step(dataclasses.replace(config, micro_batch=micro), one, first_batch(config), 0, ALONE)
        gradients.append([*found, torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])])
    for whole, by_halves in zip(*gradients, strict=True):
        assert (whole - by_halves).norm() < 1e-4 * whole.norm()


def test_a_run_learns_logs_and_exports(world, tmp_path):
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
    assert not equal_tensors(exported.weights(), {name[9:]: value for name, value in saved.tensors.items() if name.startswith("averaged/")})
    before = (config.out / "export" / "model.safetensors").stat().st_mtime_ns
    assert train(config) == 0
    assert (config.out / "export" / "model.safetensors").stat().st_mtime_ns == before  # a finished run is not repeated


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(world, tmp_path, tiny_perception):
    """With a perceptual term to the end of the first part, a discriminator that learns in both, and an identity term from the second on."""
    tiny_perception(tmp_path / "perception")
    losses = dataclasses.replace(adversarial(since=4), perceptual=TermConfig(1.0, until=8), identity=TermConfig(1.0, since=8))
    whole = world.run(tmp_path / "whole", losses=losses, adversary=TINY_ADVERSARY, perception=tmp_path / "perception")
    parts = dataclasses.replace(whole, out=tmp_path / "parts", batches=BatchConfig(size=4, threads=0))
    train(whole)
    train(dataclasses.replace(parts, total_images=8))
    train(parts)
    first, second = latest_checkpoint(whole.out), latest_checkpoint(parts.out)
    assert first.images_seen == second.images_seen == 16
    assert equal_tensors(first.tensors, second.tensors) == [] and first.state == second.state
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


def test_a_run_goes_on_from_an_export_with_the_discriminator_that_lies_below_it(world, tmp_path):
    first = world.run(tmp_path / "first", total_images=4, losses=adversarial(since=0), adversary=TINY_ADVERSARY)
    assert train(first) == 0
    saved = {name[14:]: value for name, value in latest_checkpoint(first.out).tensors.items() if name.startswith("discriminator/")}
    onward = dataclasses.replace(first, out=tmp_path / "onward", start_from=first.out / "export", total_images=8)
    assert not equal_tensors(learner(onward).adversary.network.state_dict(), saved)
    late = build(onward, open_plan(world.shards), torch.device("cpu"), fresh=False).adversary
    late.restore(Checkpoint(tmp_path, 4, {}, {}, {}))  # of a run that was to end before the term began
    assert not equal_tensors(late.network.state_dict(), saved)
    wider = dataclasses.replace(TINY_ADVERSARY, discriminator=dataclasses.replace(TINY_ADVERSARY.discriminator, channel_base=256))
    with pytest.raises(ConfigError, match="other settings than adversary.discriminator.* --start_from None"):
        learner(dataclasses.replace(onward, adversary=wider))
    shutil.rmtree(first.out / "export" / DISCRIMINATOR_FOLDER)
    assert equal_tensors(learner(onward).adversary.network.state_dict(), saved), "an export without one: at random again"
    shutil.rmtree(first.out / "export")
    with pytest.raises(AssetError, match="there is no such folder"):
        late.restore(Checkpoint(tmp_path, 4, {}, {}, {}))


def test_sigterm_saves_and_the_same_command_goes_on(world, tmp_path, monkeypatch):
    config = world.run(tmp_path / "run")
    step, calls = training.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(training, "step", interrupted)
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


def test_divergence_stops_before_the_weights_are_touched(world, tmp_path):
    config = world.run(tmp_path / "run")
    one, batch = learner(config), first_batch(config)
    before = {name: value.clone() for name, value in one.model.weights().items()}
    broken = dataclasses.replace(batch, depth=batch.depth * float("nan"))
    scalars = steps.step(config, one, broken, 0, ALONE)
    assert not equal_tensors(one.model.weights(), before)
    with pytest.raises(Divergence, match=r"loss/depth, loss/total is not finite after 4 images; last good checkpoint: none yet"):
        check_finite(scalars, 4, config.out, "")


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


def test_the_preview_shows_source_driver_output_truth_depths_and_a_novel_view(world, tmp_path):
    config = world.run(tmp_path)
    batch = preview_batch(config, open_dataset(config.shards))
    picture = preview_picture(learner(config).averaged, batch)
    assert picture.shape == (len(batch) * 34 - 2, 7 * 34 - 2, 3)
    assert (picture[:32, :32].astype(float) - 127.5 * (1 + batch.source_image[0].permute(1, 2, 0).numpy())).max() < 1


def test_defaults_are_the_published_run():
    config = ReconstructorRun()
    assert (config.learning_rate, config.betas, config.epsilon, config.batches.size, config.batches.static_share) == (
        1e-4,
        (0.9, 0.999),
        1e-5,
        32,
        0.5,
    )


def test_the_paper_config_is_the_defaults_and_the_small_one_fits_its_generator(root):
    paper = load_yaml(ReconstructorRun, root / "configs" / "reconstructor_paper.yaml")
    assert paper == ReconstructorRun(out=paper.out, shards=paper.shards)
    small = load_yaml(ReconstructorRun, root / "configs" / "reconstructor_small.yaml")
    generator = load_yaml(GenHeadRun, root / "configs" / "genhead_small.yaml").model
    shared = ("decoder_hidden", "feature_channels", "render_resolution", "superresolution", "sampling")
    assert [getattr(small.model, name) for name in shared] == [getattr(generator, name) for name in shared]
    assert small.model.architecture.image_resolution == generator.image_resolution
    assert small.model.architecture.plane_channels == generator.plane_channels
    for run in (paper, small):
        run.adversary.check(run.model.architecture.image_resolution, run.batches.size, processes=1, micro_batch=run.micro_batch)
    assert small.adversary.discriminator == load_yaml(GenHeadRun, root / "configs" / "genhead_small.yaml").discriminator
    tiny = load_yaml(ReconstructorRun, root / "configs" / "reconstructor_tiny.yaml")
    Adversary(tiny.adversary, 0, root / "pretrained" / "genhead-tiny").begin()  # its own settings, or it would be refused
    assert small.ema_images == 10_000 * small.batches.size / 32


def test_the_documented_warm_up_is_accepted(root, world, tmp_path):
    text = (root / "configs" / "reconstructor_paper.yaml").read_text()
    warm_up = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith(("# stages", "#   - "))))
    config = from_dict(ReconstructorRun, warm_up, "the comment")
    assert stage_at(config.all_stages(), 999_999).freeze == ("decoder", "superresolution")
    assert stage_at(config.all_stages(), 1_000_000) == StageConfig("everything")
    learner(dataclasses.replace(world.run(tmp_path), stages=config.stages))


def gradients_of(config):
    """Loss terms and gradients of the first step, with cross-attention and density awake."""
    one, draws = learner(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in (*one.model.architecture.deexpression, *one.model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(std=0.1, generator=draws)
        one.model.decoder.density.weight.normal_(generator=draws)
    terms, _ = loss_terms(config, one, first_batch(config), 0, torch.Generator().manual_seed(1))
    sum(terms.values()).backward()
    assert all(value.dtype == torch.float32 for value in terms.values())
    gradients = {name: parameter.grad for name, parameter in one.model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {name: value.item() for name, value in terms.items()}, gradients


def test_bfloat16_gives_nearly_the_losses_and_gradients_of_float32_and_recomputing_exactly(world, tmp_path):
    config = world.run(tmp_path)
    terms, gradients = gradients_of(config)
    rounded, rough = gradients_of(dataclasses.replace(config, precision="bfloat16"))
    assert rounded != terms
    assert rounded == {name: pytest.approx(value, rel=0.02) for name, value in terms.items()}
    whole, other = (torch.cat([gradient.flatten() for gradient in one.values()]) for one in (gradients, rough))
    assert torch.nn.functional.cosine_similarity(whole, other, dim=0) > 0.99
    again, recomputed = gradients_of(dataclasses.replace(config, recompute_activations=True))
    assert again == terms
    assert not equal_tensors(recomputed, gradients)


def test_recomputing_keeps_less_for_the_gradient(world, tmp_path):
    def kept_bytes(recompute):
        config, sizes = world.run(tmp_path, recompute_activations=recompute), {}
        model, batch = learner(config).model, first_batch(config)
        label = unpack_label(batch.label)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            arguments = (Driver(batch.driving_motion), batch.motion_scale, label.shape, label.motion, label.camera)
            output = model(batch.source_image, batch.source_motion, *arguments)
        assert output.images.image.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept_bytes(True) < 0.6 * kept_bytes(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; compiling for a CPU takes minutes")
def test_compiled_parts_give_the_losses_of_the_others(world, tmp_path):
    config = world.run(tmp_path)
    terms, _ = gradients_of(config)
    compiled, _ = gradients_of(dataclasses.replace(config, compile=True))
    assert compiled == {name: pytest.approx(value, rel=1e-3) for name, value in terms.items()}


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
    adversary = {"losses": adversarial(since=0), "adversary": TINY_ADVERSARY}
    config = world.run(tmp_path / "run", shards=str(shards), batches=batches, total_images=8, stages=stages, **adversary)
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


def test_the_average_follows_the_network_by_its_half_life(world, tmp_path):
    config = world.run(tmp_path, ema_images=8.0, ema_ramp=0.0)
    one = learner(config)
    before = one.averaged.decoder.color.weight.clone()
    steps.step(config, one, first_batch(config), 0, ALONE)
    keep = 0.5 ** (4 / 8)
    assert torch.allclose(one.averaged.decoder.color.weight, before * keep + one.model.decoder.color.weight * (1 - keep), atol=1e-7)
    assert not torch.equal(before, one.averaged.decoder.color.weight)


def test_rays_are_drawn_anew_for_every_step_and_sample(world, tmp_path, monkeypatch):
    config, keys = world.run(tmp_path, micro_batch=2), []
    one, batch = learner(config), first_batch(config)
    original = steps.torch_generator
    monkeypatch.setattr(steps, "torch_generator", lambda *key, **device: keys.append(key) or original(*key))
    for seen, rank in ((0, 0), (4, 0), (4, 1)):
        steps.step(config, one, batch, seen, ALONE._replace(rank=rank, world_size=2))
    assert len(keys) == 12 and len(set(keys)) == 12


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


def test_rays_grow_from_a_million_images_to_two_by_eights():
    rays = ReconstructorRun().rays_at
    assert [rays(images) for images in (0, 1_000_000, 1_124_999, 1_125_000, 1_500_000, 1_999_999, 2_000_000, 10**8)] == [
        64, 64, 64, 72, 96, 120, 128, 128,
    ]  # fmt: skip
    assert ReconstructorRun(growth=GrowthConfig(resolution=None)).rays_at(10**8) == 64
    with pytest.raises(ConfigError, match="growth.resolution is 32 rays, fewer than the 64 of model.render_resolution"):
        ReconstructorRun(growth=GrowthConfig(resolution=32))


def test_labels_are_enlarged_to_the_rays(world, tmp_path):
    batch = first_batch(world.run(tmp_path))
    enlarged = labels_at(batch, 32)
    assert enlarged.opacity.shape[-1] == enlarged.background_features.shape[-1] == enlarged.depth.shape[-1] == 32
    assert torch.equal(enlarged.image, batch.image) and torch.equal(enlarged.points, batch.points)
    left, right = batch.opacity[..., 0, 4], batch.opacity[..., 0, 5]  # pixel centres of 32 lie at quarters between those of 16
    assert torch.allclose(enlarged.opacity[..., 0, 9], 0.75 * left + 0.25 * right)
    assert torch.allclose(enlarged.opacity[..., 0, 10], 0.25 * left + 0.75 * right)
    same = labels_at(batch, 16)
    assert torch.equal(same.depth, batch.depth)


def test_a_run_whose_rays_grow_resumes_exactly_and_exports_what_it_came_to(world, tmp_path):
    whole = world.run(tmp_path / "whole", total_images=12, growth=GrowthConfig(resolution=32, since=4, images=8))
    parts = dataclasses.replace(whole, out=tmp_path / "parts")
    train(whole)
    train(dataclasses.replace(parts, total_images=8))
    train(parts)
    assert [whole.rays_at(images) for images in (0, 4, 8, 12)] == [16, 16, 24, 32]
    assert equal_tensors(latest_checkpoint(whole.out).tensors, latest_checkpoint(parts.out).tensors) == []
    assert load_reconstructor(whole.out / "export").config.render_resolution == 32


# Sets of which not every frame has every label --------------------------------------------------------------------------------


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
