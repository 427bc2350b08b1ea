"""A handful of portraits and a training run of seconds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genhead.game import GameConfig
from genhead.portraits import Portrait, write_portraits
from genhead.train import GenHeadRun
from head3d.cameras import orbit
from head3d.labels import Motion, pack_label
from head3d.networks.discriminator import DiscriminatorConfig

DISCRIMINATOR = DiscriminatorConfig(resolution=16, channel_base=64, channel_max=8, mapping_layers=1)


@pytest.fixture(scope="session")
def portraits(tmp_path_factory) -> Path:
    generator, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("portraits") / "set"
    count = 6
    camera = orbit(torch.linspace(-0.5, 0.5, count), torch.zeros(count), torch.full((count,), 4.17))
    labels = pack_label(camera, torch.randn(count, 300, generator=generator), Motion.neutral(count)).numpy()
    rng = np.random.default_rng(0)
    pictures = [
        Portrait(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), rng.integers(0, 255, (16, 16), dtype=np.uint8), label)
        for label in labels
    ]
    write_portraits(path, pictures, 16, count, {})
    return path


@pytest.fixture(scope="session")
def run_of(tiny_genhead) -> Callable[..., GenHeadRun]:
    """Settings of a run of three steps: `run_of(out, portraits, **changes)`."""

    def build(out: Path, portraits: Path, **changes) -> GenHeadRun:
        run = GenHeadRun(
            out=out,
            portraits=portraits,
            total_images=12,
            log_every=4,
            pictures_every=1000,
            checkpoint_every=4,
            keep=9,
            game=GameConfig(batch=4, r1_every=2, smoothness_every=2, blur_sigma=1.0, blur_images=8, swap_images=8, ema_images=8.0),
            model=tiny_genhead(16),
            discriminator=DISCRIMINATOR,
        )
        return dataclasses.replace(run, **changes)

    return build
