"""A second architecture goes through the shared model, trainer and avatar by the protocol alone."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from head3d.cameras import frontal
from head3d.labels import Motion, unpack_label
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.errors import ConfigError
from head3d.run.runlog import read_metrics
from reconstructor import model as modelling
from reconstructor.architectures.portrait4d import Portrait4DConfig
from reconstructor.avatar import Avatar
from reconstructor.model import load_reconstructor
from reconstructor.stages import StageConfig
from reconstructor.train import train


@dataclasses.dataclass(frozen=True)
class ToyConfig(Portrait4DConfig):
    """Settings of `ToyLift`: those of the other, with stages of its own."""

    @property
    def stages(self):
        return (StageConfig("lift", images=4, freeze=("tint",)), StageConfig("drive", freeze=("superresolution",)))


class LiftCode(NamedTuple):
    planes: Tensor
    background: Tensor


class ToyLift(nn.Module):
    """Lifts the source by one convolution; the driver's picture, lifted and drawn from the front by the same network, tints it."""

    needs = frozenset({"driver_image"})
    groups = {"tint": ("tint.*",)}  # noqa: RUF012

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lift = nn.Conv2d(3, 3 * config.plane_channels, 3, stride=2, padding=1)
        self.tint = nn.Linear(3, config.plane_channels)
        self.behind = nn.Conv2d(3, config.background_channels, 1)

    def encode_source(self, image, motion, motion_scale):
        assert motion is None
        return LiftCode(self.lift(image).unflatten(1, (3, -1)), torch.sigmoid(self.behind(image)))

    def encode_driver(self, driver, source, render):
        assert driver.motion is None  # it does not say that it needs one
        with torch.no_grad():
            lifted = self.encode_source(driver.image, None, None)
            seen = render(lifted.planes, lifted.background, frontal(len(driver.image))).image
        return self.tint(seen.mean((2, 3)))

    def planes(self, source, driver, motion_scale):
        return source.planes + (motion_scale[:, None] * driver)[:, None, :, None, None]

    def extra_losses(self, source, driver, planes, images, batch, render):
        made = self.encode_source(images.image, None, None).planes  # as a loss that reads its own pictures does
        again = render(planes, source.background, unpack_label(batch.label).camera).raw
        return {"tint": driver.square().mean() * 0.1, "again": (again.square().mean() + made.square().mean()) * 0.1}


@pytest.fixture
def toy(world, monkeypatch, tmp_path):
    monkeypatch.setattr(modelling, "Portrait4D", ToyLift)
    settings = world.model.architecture
    config = ToyConfig(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})
    return world.run(tmp_path / "run", total_images=8, model=dataclasses.replace(world.model, architecture=config))


def test_a_toy_architecture_trains_and_is_exported_through_the_one_trainer(toy):
    assert train(toy) == 0
    assert all(line["loss/tint"] > 0 and line["loss/again"] > 0 for line in read_metrics(toy.out))
    saved = latest_checkpoint(toy.out)
    steps = {g["name"]: float(saved.tensors[f"optimizer.{g['params'][0]}.step"]) for g in saved.state["optimizer"]["groups"]}
    assert steps == {"tint": 1, "architecture": 2, "decoder": 2, "superresolution": 1}  # by its own stages
    model = load_reconstructor(toy.out / "export")
    assert isinstance(model.architecture, ToyLift)
    first, second = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    avatar, rest = Avatar.from_image(model, first), Motion.neutral(1)
    driven = [avatar.drive(rest, frontal(), image=image).image for image in (second, -second)]
    with pytest.raises(ConfigError, match=r"expected driver_image, which this architecture \(ToyLift\) reads, got none"):
        avatar.pose(rest)
    assert not torch.equal(*driven)  # the driver's picture reaches it, and the motion, which is at rest, would not
