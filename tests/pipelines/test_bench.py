"""`headfoundry bench` writes its table with machine and versions."""

import json

from datagen.speed import FarmTime
from genhead.speed import GeneratorTimes, IdentityTime, StageTime
from pipelines.bench import BenchRun, main, print_farm, print_generator, print_reading, print_reconstructor, print_training
from reconstructor import speed
from reconstructor.reading_speed import ReadingTime


def test_the_table_is_written_with_machine_versions_and_limits(tmp_path, capsys):
    main(BenchRun(out=tmp_path / "bench.json", repeats=1, genhead=0, farm=0, reconstructor=0, training=0, reading=0))
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["machine"]["processor"] and record["versions"]["torch"] and record["date"] and record["peak_memory_mb"] > 10
    parts = {row["part"]: row for row in record["rows"]}
    assert all(row["seconds"] > 0 for row in parts.values()) and parts["planes: sample those points"]["limit_s"] > 0
    assert "deformation: 64 x 64 x 48 points" in capsys.readouterr().out


def test_the_generator_is_printed_by_precision_stage_and_batch(capsys):
    identities = [IdentityTime("float32", 0.75, None, 2000.0), IdentityTime("bfloat16", 0.5, 51.26, 1500.0)]
    stages = [StageTime("planes", "bfloat16", 4, 0.75, 120.0, 0.25), StageTime("masks", "float32", 4, 0.06, 0.0, 0.0)]
    print_generator(GeneratorTimes(identities, stages))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-5:-3] == [["float32", "0.750", "-", "2000"], ["bfloat16", "0.500", "51.3", "1500"]]
    assert lines[-2:] == [["planes", "bfloat16", "4", "0.750", "0.250", "120.0"], ["masks", "float32", "4", "0.060", "-", "-"]]


def test_the_farm_is_printed_with_its_overhead_and_how_workers_add_up(capsys):
    print_farm([FarmTime(1, 2.0, 1.9, 0.038), FarmTime(2, 1.04, 2.0, 0.05)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-3:] == ["2.000", "2.0%", "1.00"] and lines[-1].split()[-3:] == ["1.040", "2.5%", "1.92"]
    print_farm([])
    assert capsys.readouterr().out == ""


def test_stages_of_the_reconstructor_are_printed_with_how_often_they_run(capsys):
    print_reconstructor([speed.StageTime("plane decoder", "motion", 1.5, 600.25)])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["plane", "decoder", "motion", "1.500", "600.2"]


def test_a_training_step_is_printed_by_its_parts_and_their_sum(capsys):
    print_training([speed.TrainingTime("late", 128, ("image_final",), 10.0, 30.5, 1.5, 2.25, 9001.0)])
    expected = ["late,", "128", "x", "128", "rays", "10.00", "30.50", "1.50", "2.25", "44.25", "9001"]
    assert capsys.readouterr().out.splitlines()[-1].split() == expected


def test_reading_is_printed_beside_decoding_from_memory_and_with_its_share_of_a_step(capsys):
    step = speed.TrainingTime("early", 64, (), 5.0, 11.5, 1.0, 0.0, 9000.0)
    rows = [ReadingTime(side, 3.25, 0.045, 0.06, 0.05, 0.08, 0.75, 0.91, 0.56, 0.13) for side in (512, 64)]
    print_reading(rows, [step])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][-1] == "0.04500" and lines[3][-2:] == ["0.06000", "75%"]
    assert lines[4][-2:] == ["0.05000", "91%"] and lines[5][-2:] == ["0.08000", "56%"] and lines[6][-1] == "0.13000"
    assert lines[7][-1] == "0.19%", "0.13 of 4 x 16.5 + 1 + 0.13 seconds"
    assert len(lines) == 8 + 7, "a step is known of the published sizes alone"
    print_reading([], [step])
    assert capsys.readouterr().out == ""
