"""A tiny untrained generator and a tiny data set of it, made once a session; what several tests of trainings do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.plan import open_plan
from datagen.reading import open_dataset
from datagen.recipes import RecipeConfig
from datagen.render import RenderConfig
from genhead.generator import EXPORT_KIND, GenHead, GenHeadConfig, GenHeadExport
from head3d.head_model import HeadModel, load_head_model
from head3d.networks.discriminator import DiscriminatorConfig
from head3d.run.checkpoint import export_model
from head3d.run.seeding import torch_generator, weights_drawn_from
from reconstructor.adversary import AdversaryConfig
from reconstructor.architectures.portrait4d import Portrait4DConfig
from reconstructor.background import BackgroundConfig
from reconstructor.batches import Batch, BatchStream
from reconstructor.encoders import GlobalEncoderConfig
from reconstructor.learner import Learner, build
from reconstructor.losses import LossConfig, SmoothnessConfig, TermConfig, members_needed
from reconstructor.model import ReconstructorConfig
from reconstructor.order import BatchConfig
from reconstructor.perception import ERRORS_FILE, Perception, PerceptionConfig, PerceptionExport, Role, TrunkConfig
from reconstructor.perception import EXPORT_KIND as PERCEPTION
from reconstructor.perception_errors import READING_UNITS
from reconstructor.settings import ReconstructorRun


def tiny_reconstructor(generator: GenHeadConfig) -> ReconstructorConfig:
    """A network that renders and decodes as `generator` does."""
    return ReconstructorConfig(
        architecture=Portrait4DConfig(
            image_resolution=generator.image_resolution,
            motion="flame",
            global_encoder=GlobalEncoderConfig(base_width=8, stage_blocks=(1, 1), stem_pool=False, pyramid_dilations=(2,), out_width=16),
            detail_stem_width=8,
            detail_width=8,
            detail_layers=1,
            token_width=16,
            heads=2,
            motion_hidden=16,
            motion_tokens=2,
            deexpression_blocks=1,
            reenactment_blocks=1,
            feature_hidden=8,
            feature_width=8,
            decoder_hidden=8,
            plane_channels=generator.plane_channels,
            background=BackgroundConfig(base_width=8, levels=1, channels=generator.feature_channels),
        ),
        decoder_hidden=generator.decoder_hidden,
        feature_channels=generator.feature_channels,
        render_resolution=generator.render_resolution,
        sampling=generator.sampling,
        superresolution=generator.superresolution,
    )


class World(NamedTuple):
    """Folders that all tests of this package read and none writes, and a network of their sizes."""

    generator: Path
    shards: Path
    model: ReconstructorConfig

    def run(self, out: Path, **changes: object) -> ReconstructorRun:
        """Settings of a run of a few steps on these shards."""
        settings = {
            "out": out,
            "shards": self.shards,
            "generator": self.generator,
            "total_images": 16,
            "learning_rate": 1e-3,
            "micro_batch": 4,
            "missing_networks": "drop",
            "log_every": 4,
            "pictures_every": 100,
            "checkpoint_every": 100,
            "keep": 10,
            "batches": BatchConfig(size=4, threads=1, prefetch=2),
            "losses": LossConfig(smoothness=SmoothnessConfig(every=2, points=20)),
            "model": self.model,
        }
        return ReconstructorRun(**settings | changes)

    @staticmethod
    def adversarial(since: int) -> dict[str, Any]:
        """Settings of a run whose adversarial term counts from `since` images on."""
        losses = LossConfig(adversarial=TermConfig(0.01, since=since), smoothness=SmoothnessConfig(every=2, points=20))
        network = DiscriminatorConfig(resolution=32, channel_base=128, channel_max=8, mapping_layers=1)
        return {"losses": losses, "adversary": AdversaryConfig(r1_every=2, discriminator=network)}


@pytest.fixture(scope="session")
def built_in_head() -> HeadModel:
    """The built-in head, computed once."""
    return load_head_model(None)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_genhead: Callable[[int], GenHeadConfig], built_in_head: HeadModel) -> World:
    """An exported generator and shards of 8 identities: half static; of each kind one is held out for test and one for validation."""
    folder = tmp_path_factory.mktemp("world")
    with weights_drawn_from(torch_generator(1, "world")):
        genhead = GenHead(tiny_genhead(32), built_in_head)
    export_model(
        folder / "generator",
        genhead.weights(),
        GenHeadExport(head_model_hash=genhead.head_model.content_hash, model=genhead.config),
        EXPORT_KIND,
        0,
    )
    recipe = RecipeConfig(dynamic_motions=2, dynamic_views=2, static_views=2, val_share=0.25, test_share=0.5, split_rule="modulo")
    config = DatagenRun(
        out=folder / "shards",
        generator=folder / "generator",
        identities=8,
        workers=0,
        page=False,
        recipe=recipe,
        render=RenderConfig(points=30),
        shards=ShardConfig(identities_per_shard=3),
    )
    assert generate(config) == 0
    return World(folder / "generator", folder / "shards", tiny_reconstructor(genhead.config))


@pytest.fixture(scope="session")
def learner() -> Callable[..., Learner]:
    """`learner(config, warm=True)`: what a training of `config` begins with, the warm start or random weights."""

    def begun(config: ReconstructorRun, warm: bool = True) -> Learner:
        return build(dataclasses.replace(config, warm_start=warm), open_plan(config.shards), torch.device("cpu"), fresh=True)

    return begun


@pytest.fixture(scope="session")
def first_batch() -> Callable[[ReconstructorRun], Batch]:
    """`first_batch(config)`: of the data that a training of `config` reads."""

    def read(config: ReconstructorRun) -> Batch:
        with BatchStream(open_dataset(config.shards), config.batches, 0, lambda seen: members_needed(config.losses, seen)) as batches:
            return next(batches)

    return read


@pytest.fixture(scope="session")
def differing() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], list[str]]:
    """`differing(first, second)`: names of the tensors, of which both have the same, that are not equal bit for bit."""

    def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
        assert first.keys() == second.keys()
        return [name for name in first if not torch.equal(first[name], second[name])]

    return compare


@pytest.fixture
def sigterm_in_second_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """`sigterm_in_second_step(trainer)`: the second call of the module's `step` is interrupted by the signal."""

    def arrange(trainer: ModuleType) -> None:
        step, calls = trainer.step, itertools.count(1)

        def interrupted(*arguments: object) -> object:
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        monkeypatch.setattr(trainer, "step", interrupted)

    return arrange


@pytest.fixture(scope="session")
def tiny_perception() -> Callable[..., Perception]:
    """`tiny_perception(folder, role, seed)`: an untrained perception network, exported into `folder` with made-up errors."""

    def build(folder: Path, role: Role = "losses", seed: int = 0) -> Perception:
        trunk = TrunkConfig(16, 8, (1, 1))
        config = PerceptionConfig(trunk=trunk, identity_size=4, hidden=4, motion_trunk=trunk, motion_directions=4, motion_hidden=4)
        with weights_drawn_from(torch_generator("tiny perception", seed)):
            network = Perception(config)
        export_model(folder, network.state_dict(), PerceptionExport(role=role, network=config), PERCEPTION, 1)
        reading = {name: {"unit": unit, "network": 1.5, "mean": 2.5} for name, unit in READING_UNITS.items()}
        identity, motion = {"same": 0.5, "different": 0.1, "separation": 0.9}, {"rank": 0.2, "people": 0, "chance": None}
        errors = {"identities": 7, "pictures": 9, "reading": reading, "identity": identity, "motion": motion}
        (folder / ERRORS_FILE).write_text(json.dumps(errors))
        return network

    return build
