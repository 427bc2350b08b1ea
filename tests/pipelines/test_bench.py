"""`headfoundry bench` writes its table with machine and versions."""

import json

from genhead.speed import StageTime
from pipelines.bench import BenchRun, main, print_generator


def test_the_table_is_written_with_machine_versions_and_limits(tmp_path, capsys):
    main(BenchRun(out=tmp_path / "bench.json", repeats=1, genhead=0))
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["machine"]["processor"] and record["versions"]["torch"] and record["date"] and record["peak_memory_mb"] > 10
    parts = {row["part"]: row for row in record["rows"]}
    assert all(row["seconds"] > 0 for row in parts.values()) and parts["planes: sample those points"]["limit_s"] > 0
    assert "deformation: 64 x 64 x 48 points" in capsys.readouterr().out


def test_stages_are_printed_by_batch(capsys):
    print_generator([StageTime("planes", 4, 0.75, 120.0), StageTime("masks", 4, 0.06, 0.0)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["planes", "4", "0.750", "120.0"] and lines[-1].split() == ["masks", "4", "0.060", "-"]
