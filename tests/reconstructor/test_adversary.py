"""The discriminator's game over rendered heads, against numbers computed by hand."""

import math

import pytest
import torch
from torch import nn

from genhead.train import DISCRIMINATOR_FOLDER, DISCRIMINATOR_KIND, DiscriminatorExport
from head3d.cameras import frontal
from head3d.labels import Motion, pack_label
from head3d.networks.discriminator import Discriminator, DiscriminatorConfig
from head3d.rasterize import correspondence_map
from head3d.rendering import HeadImages
from head3d.run import distributed
from head3d.run.checkpoint import Checkpoint, export_model
from head3d.run.errors import AssetError, ConfigError
from reconstructor.adversary import Adversary, AdversaryConfig, show
from reconstructor.batches import Batch
from reconstructor.losses import LossConfig
from reconstructor.steps import micro_batches

B, S, R = 2, 16, 8
SMALL = DiscriminatorConfig(resolution=S, channel_base=64, channel_max=8, mapping_layers=1)
ALONE = distributed.Process(0, 1, torch.device("cpu"), True)


class Sum(nn.Module):
    """logit = w * (sum of all ten channels) / S^2: its derivative by every pixel of the stacked input is w / S^2."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)), requires_grad=False)

    def forward(self, images, camera):
        assert images.shape[1:] == (10, S, S) and camera.shape == (len(images), 25)
        return self.weight * images.sum((1, 2, 3))[:, None] / S**2


def full(value, *shape):
    return torch.full((B, *shape), float(value))


def judged(head, raw_side=R):
    """Fakes of 0.5 with raw -0.25 and opacity 0.75; reals of 0.1 with opacity 0.5; a neutral head before the camera, its jaw open."""
    camera, motion = frontal(B), Motion.neutral(B)
    motion.jaw_pose[:, 0] = 0.4
    label = pack_label(camera, torch.zeros(B, 300), motion)
    leaves = {"image": full(0.5, 3, S, S), "raw": full(-0.25, 3, raw_side, raw_side), "opacity": full(0.75, 1, raw_side, raw_side)}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    images = HeadImages(**leaves, features=None, foreground=None, background=None, depth=None, rays=None)
    empty = dict.fromkeys(("source_image", "source_motion", "driving_motion", "motion_scale", "identity"))
    return show(head, images, Batch(image=full(0.1, 3, S, S), opacity=full(0.5, 1, R, R), label=label, **empty)), leaves, camera, motion


def test_it_sees_picture_raw_correspondence_and_opacity_and_the_true_ones_at_the_same_sizes(built_in_head):
    shown, leaves, camera, motion = judged(built_in_head)
    truth = correspondence_map(built_in_head, built_in_head.vertices(torch.zeros(B, 300), motion), camera, S)
    assert truth.abs().sum() > 0
    for parts, values in ((shown.fake, (0.5, -0.25, 0.5)), (shown.real, (0.1, 0.1, 0.0))):
        assert torch.equal(parts.correspondence, truth)
        for tensor, value, shape in zip((parts.image, parts.raw, parts.opacity), values, ((3, S), (3, R), (1, R)), strict=True):
            assert torch.allclose(tensor, full(value, shape[0], shape[1], shape[1]), atol=1e-6)
    assert torch.equal(shown.camera, camera.label())
    grown, *_ = judged(built_in_head, raw_side=S)
    assert grown.real.raw.shape[-1] == grown.real.opacity.shape[-1] == S  # as the rendering resolution
    adversary = Adversary(AdversaryConfig(discriminator=SMALL), 0, None)
    adversary.loss(shown).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves.values())
    assert all(parameter.grad is None for parameter in adversary.network.parameters())


def test_both_losses_and_the_penalty_have_the_values_computed_by_hand(built_in_head):
    shown = judged(built_in_head, raw_side=S)[0].detach()
    config = AdversaryConfig(learning_rate=0.17, r1_every=16, discriminator=SMALL)
    adversary = Adversary(config, 0, None)
    adversary.network = Sum(2.0)
    adversary.optimizer = torch.optim.SGD(adversary.network.parameters(), lr=0.1)
    mapped = shown.real.correspondence[0].sum().item() / S**2
    fake, real = 2 * (3 * 0.5 - 3 * 0.25 + mapped + 0.5), 2 * (3 * 0.1 + 3 * 0.1 + mapped + 0.0)
    assert adversary.loss(shown).item() == pytest.approx(math.log1p(math.exp(-fake)), rel=1e-5)
    scalars = adversary.step([(shown, 1.0)], 1, ALONE)
    expected = math.log1p(math.exp(fake)) + math.log1p(math.exp(-real))
    assert scalars["discriminator/adversarial"] == pytest.approx(expected, rel=1e-5)
    assert scalars["discriminator/fake_logits"] == pytest.approx(fake, rel=1e-5) and "discriminator/r1" not in scalars
    slope = fake / 2 / (1 + math.exp(-fake)) - real / 2 / (1 + math.exp(real))
    assert adversary.network.weight.item() == pytest.approx(2 - 0.1 * slope, rel=1e-5)
    weight = 2.0
    adversary.network.weight.data.fill_(weight)
    adversary.optimizer.param_groups[0]["lr"] = 0.0
    # 1/2 (1 * 3 S^2 + 1 * 3 S^2 + 10 * 3 S^2 + 1 * S^2) (w / S^2)^2 = 18.5 w^2 / S^2, sixteen times
    assert adversary.step([(shown, 1.0)], 32, ALONE)["discriminator/r1"] == pytest.approx(16 * 18.5 * weight**2 / S**2, rel=1e-5)
    assert not adversary.network.weight.requires_grad and adversary.network.weight.grad is None


def test_micro_batches_count_by_their_share_and_a_loss_that_is_not_finite_changes_nothing(built_in_head):
    shown = judged(built_in_head)[0].detach()
    adversary = Adversary(AdversaryConfig(discriminator=SMALL), 0, None)
    adversary.network = Sum(1.0)
    brighter = shown._replace(fake=shown.fake._replace(image=shown.fake.image + 1))  # three more by the sum
    scalars = adversary.step([(shown, 0.75), (brighter, 0.25)], 1, ALONE)
    alone = adversary.network(shown.fake.stack(), shown.camera).mean().item()
    assert scalars["discriminator/fake_logits"] == pytest.approx(alone + 3 * 0.25, rel=1e-5)
    adversary.optimizer = torch.optim.SGD(adversary.network.parameters(), lr=0.1)
    broken = shown._replace(fake=shown.fake._replace(image=shown.fake.image * math.nan))
    before = adversary.network.weight.item()
    assert math.isnan(adversary.step([(broken, 1.0)], 1, ALONE)["discriminator/adversarial"])
    assert adversary.network.weight.item() == before


def test_the_rate_is_corrected_for_the_penalty_s_own_steps():
    """c = 16/17 on the rate, and as the power of both betas (portrait4d, section 6.9)."""
    group = Adversary(AdversaryConfig(discriminator=SMALL), 0, None).optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(1e-4 * 16 / 17) and group["eps"] == 1e-5
    assert group["betas"] == pytest.approx((0.9 ** (16 / 17), 0.999 ** (16 / 17)))
    term, config = LossConfig().adversarial, AdversaryConfig()
    assert (term.weight, term.since, config.r1_every) == (0.01, 1_000_000, 16)
    assert (config.r1.image, config.r1.correspondence, config.r1.opacity) == (1.0, 10.0, 1.0)


def test_it_begins_as_the_generators_where_asked_and_another_design_or_none_is_refused(tmp_path):
    other = Discriminator(SMALL)
    export_model(tmp_path / DISCRIMINATOR_FOLDER, other.state_dict(), DiscriminatorExport(SMALL), DISCRIMINATOR_KIND, 0)
    warm = Adversary(AdversaryConfig(warm_start=True, discriminator=SMALL), 0, tmp_path)
    cold = Adversary(AdversaryConfig(discriminator=SMALL), 0, tmp_path)
    same = lambda one: all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.parameters(), strict=True))  # noqa: E731
    warm.begin()
    cold.begin()
    assert same(warm) and not same(cold)
    late = Adversary(AdversaryConfig(warm_start=True, discriminator=SMALL), 0, tmp_path)
    late.restore(Checkpoint(tmp_path, 0, {"model/weight": torch.zeros(1)}, {}, {}))  # of a run that was to end before the term began
    assert same(late)
    wider = DiscriminatorConfig(resolution=S, channel_base=128, channel_max=8, mapping_layers=1)
    with pytest.raises(ConfigError, match="other settings than adversary.discriminator.* --adversary.warm_start false"):
        Adversary(AdversaryConfig(warm_start=True, discriminator=wider), 0, tmp_path).begin()
    with pytest.raises(AssetError, match="there is no such folder"):
        Adversary(AdversaryConfig(warm_start=True, discriminator=SMALL), 0, tmp_path / "elsewhere").begin()


def test_what_was_packed_comes_back_with_equal_steps_after_it(built_in_head):
    shown = judged(built_in_head)[0].detach()
    first, second = (Adversary(AdversaryConfig(discriminator=SMALL), seed, None) for seed in (0, 1))
    first.step([(shown, 1.0)], 0, ALONE)
    tensors, state = first.pack()
    second.restore(Checkpoint(None, 0, {name: value.clone() for name, value in tensors.items()}, state, {}))
    for one in (first, second):
        one.step([(shown, 1.0)], 16, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))


def test_sizes_and_groups_that_do_not_fit_are_refused_by_name():
    config = AdversaryConfig(discriminator=SMALL)
    config.check(S, batch=8, processes=2, micro_batch=2)
    with pytest.raises(ConfigError, match="resolution is 16, but the pictures are 64 px; make it 64, .*--losses.adversarial.weight 0"):
        config.check(64, batch=8, processes=2, micro_batch=2)
    for batch, processes, micro in ((6, 2, 2), (8, 2, 1)):
        with pytest.raises(ConfigError, match=f"group_size is 2: batches.size {batch} .* {processes} processes, and micro_batch {micro}"):
            config.check(S, batch, processes, micro)


def test_micro_batches_hold_whole_groups_of_the_minibatch_deviation():
    """Of eight samples, n and n + 4 are a group; in a micro-batch of four, its first and third, second and fourth."""
    assert [rows.tolist() for rows in micro_batches(8, 4, 2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [rows.tolist() for rows in micro_batches(8, 3, 2)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [rows.tolist() for rows in micro_batches(5, 2, 1)] == [[0, 1], [2, 3], [4]]
