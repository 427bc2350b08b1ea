"""GenHead's training: resume equals uninterrupted, bad settings are named, the export loads."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from genhead.evaluate import GeneratorMeasures
from genhead.game import Game, GameConfig
from genhead.generator import load_genhead
from genhead.losses import RegularizerConfig
from genhead.pool import PortraitSampling
from genhead.portraits import PortraitSet, create_record, encode_portrait, write_portraits
from genhead.train import GenHeadRun, train
from head3d.cameras import orbit
from head3d.labels import Motion
from head3d.rendering import RaySampling
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.config import load_yaml, save_yaml
from head3d.run.errors import AssetError, ConfigError
from head3d.run.runlog import read_metrics
from head3d.run.training import Divergence
from pipelines.portraits import PortraitsRun


@pytest.fixture(scope="module")
def finished(tmp_path_factory, portraits, run_of) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert train(run_of(out, portraits)) == 0
    return out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    saved = latest_checkpoint(folder)
    assert saved is not None and saved.images_seen == 12
    return saved.tensors


def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, portraits, finished, run_of):
    train(run_of(tmp_path, portraits, total_images=4))
    train(run_of(tmp_path, portraits, total_images=8))
    train(run_of(tmp_path, portraits))
    ours, theirs = _tensors(tmp_path), _tensors(finished)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert read_metrics(tmp_path) == read_metrics(finished)


def test_training_moves_both_players_and_the_average_lags(finished):
    tensors = _tensors(finished)
    first = next(name for name in tensors if name.startswith("generator/backbone") and name.endswith("conv0.weight"))
    assert not torch.equal(tensors[first], tensors[first.replace("generator/", "averaged/")])
    moments = [name for name in tensors if name.startswith("optimizer_discriminator") and name.endswith("exp_avg_sq")]
    assert moments and all(tensors[name].abs().sum() > 0 for name in moments if tensors[name].numel() > 1)


def test_lazy_terms_are_optimiser_steps_of_their_own(finished):
    """Three steps with both terms at the first and the third: five updates of what they reach, three of what they do not."""
    tensors = _tensors(finished)
    counts = {
        player: {int(value) for name, value in tensors.items() if name.startswith(f"optimizer_{player}") and name.endswith(".step")}
        for player in ("generator", "discriminator")
    }
    assert counts["generator"] == {3, 5} and max(counts["discriminator"]) == 5


def test_a_finished_run_is_not_repeated(finished, portraits, capsys, run_of):
    before = (finished / "export" / "model.safetensors").stat().st_mtime_ns
    assert train(run_of(finished, portraits)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (finished / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_the_export_renders_and_carries_no_head_model(finished):
    genhead = load_genhead(finished / "export")
    motion, camera = Motion.neutral(1), orbit(torch.zeros(1), torch.zeros(1), torch.full((1,), 4.17))
    with torch.no_grad():
        images = genhead(torch.zeros(1, 8), torch.zeros(1, 300), motion, camera).images
    assert images.image.shape == (1, 3, 16, 16) and images.image.isfinite().all()
    assert (finished / "export" / "model.safetensors").stat().st_size < 1_000_000


def test_metrics_name_every_loss(finished):
    line = read_metrics(finished)[-1]
    expected = {
        "generator/adversarial",
        "discriminator/adversarial",
        "discriminator/real_logits",
        "discriminator/fake_logits",
        "generator/opacity",
    }
    assert expected <= line.keys() and line["images_seen"] == 12
    assert any("discriminator/r1" in entry for entry in read_metrics(finished))


def test_a_line_is_the_mean_of_the_steps_since_the_last_one_also_across_a_stop(tmp_path, portraits, finished, run_of, monkeypatch):
    """`finished` has a line for each of its three steps, the gradient penalty in the first and the third."""
    step, config = Game.step, run_of(tmp_path, portraits, log_every=12)

    def stopped(game, labels, real, images_seen, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(game, labels, real, images_seen, number)

    monkeypatch.setattr(Game, "step", stopped)
    assert train(config) == 0
    assert latest_checkpoint(tmp_path).images_seen == 8 and read_metrics(tmp_path) == [] and not (tmp_path / "export").exists()
    assert train(config) == 0
    (line,) = read_metrics(tmp_path)
    steps = read_metrics(finished)
    assert [("discriminator/r1" in entry) for entry in steps] == [True, False, True]
    assert line.keys() == steps[0].keys()
    for name in line.keys() - {"images_seen"}:
        values = [entry[name] for entry in steps if name in entry]
        assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-12), name


def test_weights_that_a_finite_loss_has_spoilt_take_no_good_checkpoint_s_place(tmp_path, portraits, run_of, monkeypatch):
    step = Game.step

    def spoiling(game, labels, real, images_seen, number):
        scalars = step(game, labels, real, images_seen, number)
        if number == 1:
            game.generator.decoder.color.bias.data[0] = torch.nan
        return scalars

    monkeypatch.setattr(Game, "step", spoiling)
    message = r"generator/decoder\.color\.bias is not finite after 8 images; last good checkpoint: .*000000004\. Lower the learning rates"
    with pytest.raises(Divergence, match=message):
        train(run_of(tmp_path, portraits))
    assert latest_checkpoint(tmp_path).images_seen == 4
    assert "last good checkpoint" in (tmp_path / "divergence.txt").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert train(run_of(tmp_path, portraits)) == 0
    assert not (tmp_path / "divergence.txt").exists()


def test_the_average_is_measured_on_the_way_and_training_does_not_feel_it(tmp_path, portraits, finished, run_of):
    measures = GeneratorMeasures(pictures=2, identities=2, points=10, sheet_rows=1, resamples=5)
    assert train(run_of(tmp_path, portraits, evaluate_every=8, measures=measures)) == 0
    measured = [line for line in read_metrics(tmp_path) if any(name.startswith("evaluation/") for name in line)]
    assert [line["images_seen"] for line in measured] == [8, 12]
    assert all(line["evaluation/frechet"] > 0 and line["evaluation/depth"] > 0 for line in measured)
    assert len(list((tmp_path / "pictures").glob("*_evaluation.png"))) == 2
    ours, theirs = _tensors(tmp_path), _tensors(finished)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_other_settings_are_refused_on_resume(finished, portraits, run_of):
    with pytest.raises(ConfigError, match="game"):
        train(run_of(finished, portraits, total_images=16, game=GameConfig(batch=2)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"image_resolution": 32}}, "16 px"),
        ({"discriminator": {"resolution": 32}}, "discriminator.resolution"),
        ({"game": {"batch": 3, "accumulation": 2}}, "multiple"),
    ],
)
def test_contradicting_settings_are_named_before_anything_is_written(tmp_path, portraits, changes, says, run_of):
    run = run_of(tmp_path / "run", portraits)
    run = dataclasses.replace(run, **{name: dataclasses.replace(getattr(run, name), **values) for name, values in changes.items()})
    with pytest.raises(ConfigError, match=says):
        train(run)
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"z_dim": 9}, "z_dim, background.z_dim must be equal, got 9, 8"),
        ({"feature_channels": 5}, "feature_channels, background.channels, superresolution.feature_channels must be equal, got 5, 6, 6"),
        ({"sampling": RaySampling(box_side=1.5)}, "sampling.box_side, deformation.box_side must be equal, got 1.5, 1.3"),
        ({"published": True}, "published, deformation.published must be equal, got True, False"),
    ],
)
def test_widths_that_do_not_fit_each_other_are_named(changes, names, tiny_genhead):
    with pytest.raises(ValueError, match=names):
        dataclasses.replace(tiny_genhead(16), **changes)


def test_an_export_of_other_widths_is_refused(tmp_path, finished):
    config = (finished / "export" / "config.yaml").read_text().replace("plane_channels: 4", "plane_channels: 5")
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes((finished / "export" / name).read_bytes())
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(AssetError, match="do not fit"):
        load_genhead(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["kind"] == "genhead"


def test_a_rasteriser_that_is_missing_is_said_before_anything_is_written(tmp_path, portraits, run_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    with pytest.raises(ConfigError, match="rasterizer: pytorch3d is asked for"):
        train(run_of(tmp_path / "run", portraits, rasterizer="pytorch3d"))
    assert not (tmp_path / "run").exists()


def test_another_record_of_portraits_is_refused_on_resume(finished, portraits, tmp_path, run_of):
    other = tmp_path / "other"
    pictures = PortraitSet(portraits)
    write_portraits(other, [pictures[i] for i in range(5)], 16, 5, {})
    with pytest.raises(ConfigError, match="started with portraits"):
        train(run_of(finished, other, total_images=16))


def test_portraits_without_a_matte_are_refused_unless_accepted(portraits, tmp_path, run_of):
    pictures = PortraitSet(portraits)
    with create_record(tmp_path / "bare", 16, 2, {}) as writer:
        for index in range(2):
            writer.add(encode_portrait(pictures[index], has_matte=False))
    with pytest.raises(ConfigError, match="2 of 2 portraits have no matte"):
        train(run_of(tmp_path / "run", tmp_path / "bare"))
    assert train(run_of(tmp_path / "run", tmp_path / "bare", missing_matte="opaque", total_images=4)) == 0


def test_an_export_refuses_another_head_model(finished, tmp_path):
    shutil.copytree(finished / "export", tmp_path / "export")
    settings = (tmp_path / "export" / "config.yaml").read_text(encoding="utf-8")
    changed = re.sub(r"head_model_hash: .*", "head_model_hash: '0123456789abcdef'", settings)
    (tmp_path / "export" / "config.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(AssetError, match="trained with the head model procedural of content 0123456789abcdef"):
        load_genhead(tmp_path / "export")


def test_a_run_goes_on_from_an_exported_generator_with_its_clock(finished, portraits, tmp_path, run_of):
    assert train(run_of(tmp_path, portraits, total_images=16, start_from=finished / "export")) == 0
    assert [line["images_seen"] for line in read_metrics(tmp_path)] == [16]
    saved, first = latest_checkpoint(tmp_path), latest_checkpoint(finished)
    assert saved.images_seen == 16
    name = next(name for name in first.tensors if name.startswith("discriminator/") and name.endswith("conv0.weight"))
    moved = (saved.tensors[name] - first.tensors[name]).abs().max()
    assert 0 < moved < 0.01, "one step from the exported discriminator, not from noise"


def test_going_on_from_other_widths_is_refused(finished, portraits, tmp_path, run_of):
    other = dataclasses.replace(run_of(tmp_path, portraits).discriminator, mapping_layers=2)
    with pytest.raises(ConfigError, match="other settings of discriminator"):
        train(run_of(tmp_path, portraits, discriminator=other, start_from=finished / "export"))
    with pytest.raises(AssetError, match="no such folder"):
        train(run_of(tmp_path, portraits, start_from=tmp_path / "nowhere"))


def test_half_precision_exports_halve_the_file_and_still_render(finished, portraits, tmp_path, run_of):
    assert train(run_of(tmp_path, portraits, export_half=True, start_from=finished / "export", total_images=12)) == 0
    sizes = [(folder / "export" / "model.safetensors").stat().st_size for folder in (tmp_path, finished)]
    assert sizes[0] < 0.6 * sizes[1]
    assert next(load_genhead(tmp_path / "export").parameters()).dtype == torch.float32


def _far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Weights that differ by more than rounding; moments of the optimisers are left out, where squares of tiny gradients lie."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if not name.startswith("optimizer_")]
    return [name for name in names if not torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=5e-6)]


def _eight(**changes) -> GameConfig:
    return dataclasses.replace(
        GameConfig(batch=8, r1_every=2, smoothness_every=2, blur_sigma=1.0, blur_images=64, swap_end=0.5, swap_images=8), **changes
    )


@pytest.fixture(scope="module")
def undivided(tmp_path_factory, portraits, run_of) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("undivided")
    assert train(run_of(out, portraits, total_images=16, checkpoint_every=16, game=_eight())) == 0
    return latest_checkpoint(out).tensors


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_no_result(tmp_path, portraits, undivided, accumulation, run_of):
    assert train(run_of(tmp_path, portraits, total_images=16, checkpoint_every=16, game=_eight(accumulation=accumulation))) == 0
    assert _far(latest_checkpoint(tmp_path).tensors, undivided) == []


def test_two_processes_train_what_one_trains(tmp_path, portraits, undivided, two_processes, run_of):
    config = run_of(tmp_path / "run", portraits, total_images=16, checkpoint_every=16, game=_eight())
    save_yaml(config, tmp_path / "run.yaml")
    two_processes(["-m", "pipelines", "genhead", "--config", str(tmp_path / "run.yaml")])
    assert _far(latest_checkpoint(config.out).tensors, undivided) == []
    assert train(dataclasses.replace(config, total_images=24)) == 0  # one process goes on


def test_the_paper_config_is_the_defaults_and_the_small_one_follows_its_rule(root):
    paper = load_yaml(GenHeadRun, root / "configs" / "genhead_paper.yaml")
    assert paper == GenHeadRun(out=paper.out, portraits=paper.portraits)
    small = load_yaml(GenHeadRun, root / "configs" / "genhead_small.yaml")
    size, batch = small.model.image_resolution / 512, small.game.batch / 32
    assert dataclasses.astuple(small.game.r1) == tuple(weight * size**2 / batch for weight in dataclasses.astuple(paper.game.r1))
    assert (small.game.ema_images, small.game.blur_sigma) == (10_000 * batch, 10 * size)
    assert load_yaml(PortraitsRun, root / "configs" / "portraits_small.yaml").resolution == small.model.image_resolution


def test_mirrored_and_replicated_portraits_train_and_resume(tmp_path, portraits, capsys, run_of):
    config = run_of(tmp_path, portraits, total_images=4, sampling=PortraitSampling(mirror=True, yaw_bins_deg=(10.0,), copies=(1, 3)))
    assert train(config) == 0
    assert "differ from the mirrored meshes by" in capsys.readouterr().out
    assert train(dataclasses.replace(config, total_images=8)) == 0
    with pytest.raises(ConfigError, match="other settings of sampling"):
        train(dataclasses.replace(config, total_images=12, sampling=PortraitSampling()))


def test_the_surface_term_counts_only_where_it_is_asked_for(tmp_path, portraits, run_of):
    for weight in (0.0, 10.0):
        config = run_of(tmp_path / str(weight), portraits, total_images=4, regularizers=RegularizerConfig(surface=weight))
        assert train(config) == 0
        assert read_metrics(config.out)[-1].get("generator/surface", 0.0) > 0 if weight else "surface" not in str(read_metrics(config.out))


def test_a_step_with_half_precision_blocks_has_the_losses_of_single_precision(tmp_path, portraits, monkeypatch, run_of):
    """The float16 code runs on a CPU too once it does not ask for the device; both penalties are in the first step."""
    for kind in ("single", "half"):
        if kind == "half":
            for module in ("stylegan2", "discriminator"):
                asked = lambda half_precision, device: torch.float16 if half_precision else torch.float32  # noqa: E731
                monkeypatch.setattr(f"head3d.networks.{module}.feature_type", asked)
        assert train(run_of(tmp_path / kind, portraits, total_images=4)) == 0
    single, half = (read_metrics(tmp_path / kind)[-1] for kind in ("single", "half"))
    assert single.keys() == half.keys() and {"discriminator/r1", "generator/smoothness"} <= half.keys()
    assert single != half
    for name, value in single.items():
        assert half[name] == pytest.approx(value, rel=2e-2, abs=2e-2), name
