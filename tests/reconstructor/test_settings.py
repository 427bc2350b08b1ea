"""The settings of a training: the published run, the shipped configurations, the growth of the rays."""

import dataclasses

import pytest
import yaml

from genhead.train import GenHeadRun
from head3d.run.config import from_dict, load_yaml
from head3d.run.errors import ConfigError
from reconstructor.adversary import Adversary
from reconstructor.settings import GrowthConfig, ReconstructorRun
from reconstructor.stages import StageConfig, stage_at


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


def test_the_documented_warm_up_is_accepted(root, world, tmp_path, learner):
    text = (root / "configs" / "reconstructor_paper.yaml").read_text()
    warm_up = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith(("# stages", "#   - "))))
    config = from_dict(ReconstructorRun, warm_up, "the comment")
    assert stage_at(config.all_stages(), 999_999).freeze == ("decoder", "superresolution")
    assert stage_at(config.all_stages(), 1_000_000) == StageConfig("everything")
    learner(dataclasses.replace(world.run(tmp_path), stages=config.stages))


def test_rays_grow_from_a_million_images_to_two_by_eights():
    rays = ReconstructorRun().rays_at
    assert [rays(images) for images in (0, 1_000_000, 1_124_999, 1_125_000, 1_500_000, 1_999_999, 2_000_000, 10**8)] == [
        64, 64, 64, 72, 96, 120, 128, 128,
    ]  # fmt: skip
    assert ReconstructorRun(growth=GrowthConfig(resolution=None)).rays_at(10**8) == 64
    with pytest.raises(ConfigError, match="growth.resolution is 32 rays, fewer than the 64 of model.render_resolution"):
        ReconstructorRun(growth=GrowthConfig(resolution=32))
