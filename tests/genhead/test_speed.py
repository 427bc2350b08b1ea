"""The generator's time by stage and precision: every stage is there, and the parts make the whole."""

import pytest

from genhead.speed import _split, measure_generator
from head3d.head_model import load_head_model


@pytest.fixture(scope="module")
def times(tiny_genhead):
    return measure_generator(tiny_genhead(16), load_head_model(None), batches=(2,), repeats=1)


def test_stages_add_up_and_the_decoder_s_arithmetic_is_counted(times):
    for precision in ("float32", "bfloat16"):
        *parts, whole = (row for row in times.stages if (row.batch, row.precision) == (2, precision))
        assert len(parts) == 8 and whole.stage == "all"
        for column in ("seconds_per_image", "gflop_per_image", "floor_s"):
            assert getattr(whole, column) == pytest.approx(sum(getattr(row, column) for row in parts))
        arithmetic = {row.stage: row.gflop_per_image for row in parts}
        # 64 rays x 7 samples, each 4 x 8 + 8 x (1 + 6) multiply-adds in the head branch, and at most as many in the part branch; the
        # sum over 7 samples of 6 colours is counted too
        head = 2 * 64 * 7 * (4 * 8 + 8 * 7) / 1e9
        assert head <= arithmetic["rays"] < 3 * head
        assert arithmetic["deformation"] == 0 and arithmetic["super-resolution"] > 0


def test_an_identity_is_timed_in_both_precisions_and_its_pictures_are_compared(times):
    exact, rounded = times.identities
    assert (exact.precision, exact.psnr_db, rounded.precision) == ("float32", None, "bfloat16")
    assert 30 < rounded.psnr_db < 90
    assert exact.seconds_per_image > 0 and exact.peak_memory_mb >= rounded.peak_memory_mb > 10


def test_queries_are_split_evenly_over_the_runs():
    assert _split([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
