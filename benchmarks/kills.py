"""Kill data generation at random, twenty times, and compare every byte with an undisturbed run.

    python benchmarks/kills.py [--kills 20] [--workers 2] [--seed 0] [--out FILE.json]

A kill is SIGKILL to one worker, or to the program that hands out the shards and, up to two seconds later, to what it leaves of Ray, as
when a machine goes down by and by; then the same command is called again. Who and when are drawn from the seed; a moment is some shards
and a part of a second after the last kill. At the end the set is made twice more, by one process and by five workers, and compared.
Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from head3d.run.files import write_atomic
from head3d.run.seeding import numpy_generator

ROOT = Path(__file__).resolve().parent.parent
LOGS = {"log.jsonl", "failures.jsonl", ".lock"}  # no part of the data
LIMIT_S = 600.0  # without a new shard, after which something hangs


def main() -> int:
    """Exit status 0 if all bytes are equal, nothing is left behind and all kills could be made."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--kills", type=int, default=20, help="how many")
    arguments.add_argument("--workers", type=int, default=2, help="Ray workers")
    arguments.add_argument("--seed", type=int, default=0, help="of who is killed, and when")
    arguments.add_argument("--out", type=Path, default=None, help="where the result is written as JSON")
    options, begun = arguments.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed, whole, five = (Path(folder) / name for name in ("killed", "whole", "five"))
        shards = 2 * options.kills + 2 * options.workers  # so that the last kill finds work
        kills = disturb(killed, shards, options.workers, options.kills, numpy_generator(options.seed, "kills"))
        for out, workers in ((whole, 0), (five, 5)):
            finish(run(out, shards, workers), out)
        expected = digests(whole)
        different = {out.name: differing(digests(out), expected) for out in (killed, five)}
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kills": len(kills),
            "kills_of_the_driver": kills.count("driver"),
            "workers": options.workers,
            "seed": options.seed,
            "shards": shards,
            "files_compared": len(expected),
            "files_that_differ_after_the_kills": len(different["killed"]),
            "files_that_differ_with_five_workers": len(different["five"]),
            "minutes": round((time.monotonic() - begun) / 60, 1),
        }
    print(json.dumps(result, indent=1))
    for out, names in different.items():
        if names:
            print(f"{out}: {len(names)} of {len(expected)} files differ, are missing or left over: {', '.join(names[:5])}")
    if options.out is not None:
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")
    return 1 if any(different.values()) or len(kills) < options.kills else 0


def run(out: Path, shards: int, workers: int) -> subprocess.Popen:
    """The command, on a small set: two identities a shard."""
    command = [sys.executable, "-m", "pipelines", "datagen", "--config", "configs/datagen_tiny.yaml", "--out", str(out)]
    command += ["--generator", "pretrained/genhead-tiny", "--device", "cpu", "--identities", str(2 * shards), "--workers", str(workers)]
    command += ["--shards.identities_per_shard", "2", "--page", "false"]
    with said_by(out).open("a") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)


def said_by(out: Path) -> Path:
    """Where a run says what it does."""
    return out.with_suffix(".txt")


def disturb(out: Path, shards: int, workers: int, count: int, rng: np.random.Generator) -> list[str]:
    """Run to the end with `count` kills. Returns who was killed, in order."""
    kills: list[str] = []
    driver = run(out, shards, workers)
    try:
        while len(kills) < count and reached(out, made_shards(out) + int(rng.integers(1, 3)), driver):
            victim = "driver" if rng.random() < 0.3 else "worker"
            time.sleep(rng.uniform(0, 0.5))
            descendants = {pid: name_of(pid) for pid in children(driver.pid)}
            candidates = sorted(pid for pid, name in descendants.items() if name.startswith("ray::ShardMaker"))
            if victim == "driver":
                driver.kill()
                driver.wait()
                time.sleep(rng.uniform(0, 2))  # workers go on meanwhile
                end(descendants)
                driver = run(out, shards, workers)
            elif candidates:
                os.kill(candidates[int(rng.integers(len(candidates)))], signal.SIGKILL)
            else:
                continue
            kills.append(victim)
            print(f"kill {len(kills)}: {victim}, after {made_shards(out)} of {shards} shards", flush=True)
        finish(driver, out)
    finally:
        driver.kill()
    return kills


def made_shards(out: Path) -> int:
    """Shards whose last file, the record of their frames, is there."""
    return len(list((out / "frames").glob("*.json")))


def reached(out: Path, shards: int, driver: subprocess.Popen) -> bool:
    """Wait for so many shards. False if the run ends before."""
    deadline = time.monotonic() + LIMIT_S
    while made_shards(out) < shards:
        if driver.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise SystemExit(f"no new shard within {LIMIT_S:g} s")
        time.sleep(0.02)
    return True


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it ended meanwhile
            continue
    found, fringe = set(), {pid}
    while fringe:
        fringe = {child for child, parent in parents.items() if parent in fringe}
        found |= fringe
    return found


def name_of(pid: int) -> str:
    """How a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def end(processes: dict[int, str]) -> None:
    """Kill what still runs of the processes, and wait until none does. Numbers are used again, by others."""
    deadline = time.monotonic() + LIMIT_S
    while running := [pid for pid, name in processes.items() if name and name_of(pid) == name]:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise SystemExit(f"still running after SIGKILL: {running}")
        time.sleep(0.1)


def finish(driver: subprocess.Popen, out: Path) -> None:
    """Wait for a run to end well."""
    if driver.wait():
        raise SystemExit(f"the run ended with status {driver.returncode}:\n{said_by(out).read_text()[-5000:]}")


def differing(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Names of files that are not in both with the same content."""
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that is data, and of whatever should not be there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
