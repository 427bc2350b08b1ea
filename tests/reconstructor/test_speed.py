"""The reconstructor's time by stage: every stage is there, and its arithmetic is counted."""

import pytest
import torch

from head3d.head_model import load_head_model
from reconstructor.products import linear
from reconstructor.speed import _gflop, measure_reconstructor


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
