"""The reconstructor's time by stage: every stage is there, and its arithmetic is counted."""

import pytest
import torch

from head3d.head_model import load_head_model
from head3d.networks.discriminator import DiscriminatorConfig
from reconstructor.adversary import AdversaryConfig
from reconstructor.products import linear
from reconstructor.settings import GrowthConfig
from reconstructor.speed import _gflop, measure_reconstructor, measure_training


def test_every_stage_and_what_a_user_waits_for_are_timed(world):
    rows = {row.stage: row for row in measure_reconstructor(world.model, load_head_model(None), rays=(8, 16), repeats=1)}
    assert all(row.seconds > 0 for row in rows.values())
    often = {kind: [row.stage for row in rows.values() if row.often == kind] for kind in ("source", "motion", "view")}
    assert often == {
        "source": ["global encoder", "detail encoder", "background", "de-expression"],
        "motion": ["re-enactment", "plane decoder", "neck tables", "motion encoder"],
        "view": ["super-resolution"],
    }
    view = rows["another view, 16 x 16 rays"].gflop
    assert rows["another view, 8 x 8 rays"].gflop < view < rows["driven frame, source cached"].gflop < rows["picture to frame"].gflop
    made_of = [*often["motion"][:2], "another view, 16 x 16 rays"]
    assert rows["driven frame, source cached"].gflop == pytest.approx(sum(rows[stage].gflop for stage in made_of), rel=0.01)


def test_products_are_counted_whichever_library_computes_them():
    features, weight = torch.randn(3, 5, 7), torch.randn(11, 7)
    with torch.no_grad():
        assert _gflop(lambda: linear(features, weight)) == pytest.approx(2 * 3 * 5 * 7 * 11 / 1e9)
    assert _gflop(lambda: linear(features, weight)) == pytest.approx(2 * 3 * 5 * 7 * 11 / 1e9)


def test_a_training_step_is_timed_early_with_every_label_and_late_with_more_rays_and_every_network(world, tmp_path):
    adversary = AdversaryConfig(discriminator=DiscriminatorConfig(resolution=32, channel_base=128, channel_max=8, mapping_layers=1))
    growth = GrowthConfig(resolution=32, since=1_000_000, images=8)
    early, late = measure_training(world.run(tmp_path, growth=growth, adversary=adversary), load_head_model(None), repeats=1)
    assert (early.rays, late.rays) == (16, 32) and min(early.forward_s, early.backward_s, early.update_s) > 0
    pictures = {f"{term}_{name}" for term in ("image", "lpips") for name in ("final", "raw", "foreground", "background")}
    assert set(early.losses) == pictures | {"features", "points", "depth", "opacity"}
    assert set(late.losses) == pictures | {"opacity", "arcface", "adversarial"}
    assert early.discriminator_s == 0 < late.discriminator_s
