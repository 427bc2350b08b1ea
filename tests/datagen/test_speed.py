"""What the log of a run says about the farm's pace."""

import pytest

from datagen.speed import farm_time, measure_farm


def report(worker, ended, pictures=4, **stages):
    return {"worker": worker, "ended": ended, "pictures": pictures, "stages": {"draw": 0.0, "pack": 0.0, "commit": 0.0} | stages}


def test_first_shards_do_not_count_and_paces_of_workers_add_up():
    lines = [
        report("a:1", 10.0, render=99.0),
        report("b:1", 12.0, render=99.0),
        report("b:1", 22.0, render=9.0, draw=0.4, pack=0.2),
        report("a:1", 18.0, render=7.0, commit=0.4),
        report("a:1", 26.0, render=7.0, draw=0.2),
    ]
    found = farm_time(lines)
    assert found.workers == 2
    assert found.seconds == pytest.approx(1 / (8 / 16 + 4 / 10))
    assert found.render_s == pytest.approx(23 / 12) and found.beside_s == pytest.approx(1.2 / 12)


def test_a_farm_is_measured_on_shards_that_it_makes(head_file, tiny_genhead):
    (found,) = measure_farm(tiny_genhead(128), str(head_file), shards=1, workers=(0,))
    assert found.workers == 1 and found.render_s > 0 and found.beside_s > 0 and found.seconds > 0
