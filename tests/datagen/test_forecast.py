"""The forecast of a large data set, against numbers computed by hand."""

import math

import pytest

from datagen.forecast import Farm, Work, forecast, measure
from datagen.generate import generate
from head3d.run.errors import ConfigError, DataError
from pipelines.__main__ import run_command
from pipelines.plan import PlanRun, resolve_work

# 1,000 people, 10 a shard, 4 pictures each; 1 MB and 4 MB a person: 100 shards of 10 MB and 40 MB
WORK = Work(
    identities=1000,
    identities_per_shard=10,
    pictures_per_identity=4.0,
    frames_per_identity=2.0,
    bytes_per_identity={"frames": 1e6, "labels": 4e6},
    labels_share=1.0,
)
# 40 pictures take 20 s; 8 workers share 8 Gbit/s, so 50 MB take 0.4 s; 4 files put and asked for are 8 requests of 0.05 s
FARM = Farm(
    workers=8,
    seconds_per_picture=0.5,
    workers_per_node=8,
    node_gbit=8.0,
    store_gbit=4.0,
    store_writes_per_s=1000.0,
    latency_s=0.05,
    start_s=30.0,
    lost_per_hour=0.0,
)


def test_counts_bytes_and_requests():
    result = forecast(WORK, FARM)
    assert (result.shards, result.pictures, result.frames, result.bytes) == (100, 4000, 2000, 5e9)
    assert result.writes == 100 * 4 and result.reads == 100 * (1 + 3 * 2)


def test_the_time_is_rounds_of_shards_between_reading_what_is_there_and_writing_the_index():
    result = forecast(WORK, FARM)
    assert result.render_s == 20 and result.put_s == pytest.approx(0.4 + 0.4) and result.shard_s == pytest.approx(20.8)
    assert result.rounds == 13 and result.limit == "workers"  # 100 shards among 8
    assert result.seconds == pytest.approx(30 + 100 * 0.05 / 32 + 13 * 20.8 + 100 * 2 * 0.05 / 32)


def test_what_all_workers_share_is_full_at_the_number_that_reaches_its_pace():
    result = forecast(WORK, FARM)
    full = {pace.name: pace.full_at for pace in result.paces}
    # 4 Gbit/s take 10 shards of 50 MB a second; 1,000 writes/s are 250 shards; the driver takes 1.7 ms for each
    assert full == pytest.approx({"storage network": 10 * 20.8, "storage writes": 250 * 20.8, "driver": 20.8 / 0.0017, "shards": 100})
    assert [pace.name for pace in result.paces] == ["shards", "storage network", "storage writes", "driver"]


def test_beyond_that_number_more_workers_do_not_help():
    slow = FARM._replace(store_gbit=0.1)  # 5 GB take 400 s, eight workers 270 s
    eight, hundred = (forecast(WORK, slow._replace(workers=workers)) for workers in (8, 100))
    assert eight.limit == hundred.limit == "storage network" and eight.seconds == hundred.seconds
    assert eight.seconds == pytest.approx(30 + 100 * 0.05 / 32 + 400 + 100 * 2 * 0.05 / 32)
    assert eight.paces[0].name == "storage network" and eight.paces[0].full_at == pytest.approx(0.25 * 20.8)


def test_a_share_of_labels_counts_for_bytes_and_requests():
    result = forecast(WORK._replace(labels_share=0.25), FARM)
    assert result.bytes == 1e9 + 1e9 and result.writes == 100 * 2 + 25 * 2 and result.reads == 100 * (1 + 3 * 1.25)


def test_a_large_file_is_put_in_parts():
    large = WORK._replace(identities_per_shard=100)  # labels of 400 MB: 8 parts of 50 MiB, a beginning and an end
    assert forecast(large, FARM).writes == 10 * (1 + 1 + 10 + 1)


def test_lost_workers_cost_the_time_of_work_that_begins_anew():
    hours = FARM._replace(seconds_per_picture=90.0, lost_per_hour=0.5)  # a shard of 3600.8 s
    rate, work_s = 0.5 / 3600, 3600.8
    expected = (math.exp(rate * work_s) - 1) * (1 / rate + 30)
    assert forecast(WORK, hours).shard_s == pytest.approx(expected) and expected > 1.29 * work_s
    assert forecast(WORK, FARM._replace(lost_per_hour=1e-9)).shard_s == pytest.approx(20.8, rel=1e-6)


def test_a_small_set_is_measured_from_its_log_and_sidecars(tmp_path, run_of):
    assert generate(run_of(tmp_path / "set")) == 0
    found = measure(tmp_path / "set")
    assert (found.identities_per_shard, found.pictures_per_identity, found.frames_per_identity) == (2, 18 / 5, 7 / 5)
    sizes = {family: sum(path.stat().st_size for path in (tmp_path / "set" / family).glob("*.tar")) for family in found.bytes_per_identity}
    assert found.bytes_per_identity == {family: size / 5 for family, size in sizes.items()} and len(sizes) == 3
    log = tmp_path / "set" / "log.jsonl"
    lines = ['{"shard": 0, "seconds": 99}', '{"shard": 1, "seconds": 4}', '{"shard": 0, "seconds": 2}', '{"shard": 7, "seconds": 1}']
    log.write_text("\n".join(lines) + "\n")
    # Shard 0 was made twice; shard 7 is not there; shards 0 and 1 hold 8 pictures each
    assert measure(tmp_path / "set").seconds_per_picture == pytest.approx(6 / 16)
    log.unlink()
    with pytest.raises(DataError, match=r"log.jsonl: expected a line for each finished shard .*or all the numbers by hand"):
        measure(tmp_path / "set")


def test_numbers_that_are_given_win_over_measured_ones_and_are_missed_without(tmp_path, run_of):
    assert generate(run_of(tmp_path / "set", identities=2)) == 0
    work, seconds = resolve_work(PlanRun(measured=str(tmp_path / "set"), seconds_per_picture=7.0, label_kb_per_identity=5.0))
    assert seconds == 7 and work.bytes_per_identity["labels"] == 5000 and work.frames_per_identity == 1.5
    with pytest.raises(ConfigError, match="--measured DIR .* got neither for identities_per_shard, .*shared_kb_per_identity"):
        resolve_work(PlanRun(seconds_per_picture=7.0))


def test_the_command_states_what_is_full_first(capsys):
    settings = {
        "identities": "1e3", "workers": 8, "seconds_per_picture": 0.5, "identities_per_shard": 10, "pictures_per_identity": 4,
        "frames_per_identity": 2, "frame_kb_per_identity": 1000, "label_kb_per_identity": 4000, "shared_kb_per_identity": 0,
        "node_gbit": 8, "store_gbit": 4, "store_writes_per_s": 1000, "start_s": 30, "gpu_hour_price": 3600,
    }  # fmt: skip
    assert run_command("plan", [word for name, value in settings.items() for word in (f"--{name}", str(value))]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line[:26].strip(): line[26:] for line in reversed(lines)}
    assert said["shards"] == "100 of 10 people, 50 MB each" and said["bytes"] == "5 GB: frames 1 GB, labels 4 GB"
    assert said["time"].startswith("0:05:01") and said["full first"] == "shards, at 100 workers"
    assert said["cost"].startswith("2,407 for GPUs")  # 8 GPUs for 300.87 s at 1 a second
    assert sum(line.startswith("then ") for line in lines) == 3


def test_half_a_person_is_an_error():
    with pytest.raises(ValueError, match="identities: expected a whole number, got 1.5"):
        PlanRun(identities=1.5)
