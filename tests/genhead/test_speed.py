"""The generator's time by stage: every stage is there, and the parts make the whole."""

import pytest

from genhead.speed import _split, measure_stages
from head3d.head_model import load_head_model


def test_stages_add_up_and_the_decoder_s_arithmetic_is_counted(tiny_genhead):
    rows = measure_stages(tiny_genhead(16), load_head_model(None), batches=(1, 2), repeats=1)
    for batch in (1, 2):
        parts = {row.stage: row for row in rows if row.batch == batch and row.stage != "all" and " x " not in row.stage}
        (whole,) = (row for row in rows if row.batch == batch and row.stage == "all")
        assert whole.seconds_per_image == pytest.approx(sum(row.seconds_per_image for row in parts.values() if "images" not in row.stage))
        # 64 rays x 7 samples, each 4 x 8 + 8 x (1 + 6) multiply-adds in the head branch at least
        assert parts["rays"].gflop_per_image >= 2 * 64 * 7 * (4 * 8 + 8 * 7) / 1e9
    assert rows[-2].stage == "identity of 4 motions x 4 views" and rows[-2].seconds_per_image > 0


def test_queries_are_split_evenly_over_the_runs():
    assert _split([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
