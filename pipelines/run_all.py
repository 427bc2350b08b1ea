"""`headfoundry demo`: every stage at tiny size, from nothing to a page with a driven head.

Each stage is the command that a user would type, run in a process of its own; a stage that is done says so and ends at once.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import time
from pathlib import Path

from head3d.run.config import NonNegativeInt, PositiveInt
from head3d.run.errors import ConfigError

STAGE_FAILED = 1


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """Run all stages and end with a page."""

    out: Path = Path("runs/demo")  # everything the demo makes
    configs: Path = Path("configs")  # folder with <stage>_<size>.yaml
    size: str = "tiny"  # which settings: tiny runs on two CPU cores
    workers: NonNegativeInt = 2  # data generation processes
    processes: PositiveInt = 2  # training processes (torchrun); each takes its share of every batch


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of the chain."""

    command: str
    title: str  # what it does
    why: str  # what it is for
    arguments: tuple[str, ...]
    has_config: bool = True  # reads configs/<command>_<size>.yaml
    trains: bool = False  # runs in several processes


def stages(config: DemoRun) -> list[Stage]:
    """The chain, with every folder below `config.out`."""
    out = config.out
    portraits, genhead, shards, reconstructor = (str(out / name) for name in ("portraits", "genhead", "shards", "reconstructor"))
    generator = f"{genhead}/export"
    return [
        Stage(
            "head-page",
            "Draw the built-in head",
            "everything below runs without a licensed head model",
            ("--out", str(out / "head.png")),
            False,
        ),
        Stage("portraits", "Photograph made-up people", "the generator learns from single pictures with labels", ("--out", portraits)),
        Stage(
            "genhead",
            "Train the head generator",
            "an adversarial game turns single pictures into 3D heads",
            ("--out", genhead, "--portraits", portraits),
            trains=True,
        ),
        Stage(
            "datagen",
            "Mass-produce labelled heads",
            "many motions and views of each made-up person, with depth and opacity that no photograph has",
            ("--out", shards, "--generator", generator, "--workers", str(config.workers)),
        ),
        Stage("verify", "Check the shards", "every byte is hashed, and some samples are rendered again and compared", (shards,), False),
        Stage(
            "reconstructor",
            "Train the reconstructor",
            "it learns to lift one picture to a head that can be turned and driven",
            ("--out", reconstructor, "--shards", shards, "--generator", generator),
            trains=True,
        ),
        Stage(
            "evaluate",
            "Measure it on people it has not seen",
            "the generator knows the true answer, even across identities",
            ("--out", str(out / "evaluation"), "--reconstructor", f"{reconstructor}/export", "--shards", shards, "--generator", generator),
        ),
        Stage(
            "drive",
            "Drive one picture",
            "one picture in, a moving head out",
            ("--out", str(out / "drive"), "--reconstructor", f"{reconstructor}/export", "--shards", shards),
        ),
        Stage("report", "Write the page", "everything in one place", (str(out),), False),
    ]


def main(config: DemoRun, chain: list[Stage] | None = None) -> int:
    """Run the stages in order (all, or those of `chain`); stops at the first that fails. Exit status 0 or 1."""
    if not config.configs.is_dir():
        raise ConfigError(
            f"--configs: expected a folder with <stage>_{config.size}.yaml, {config.configs} is none; call from the project's folder"
        )
    started, chain = time.monotonic(), chain or stages(config)
    for number, stage in enumerate(chain, 1):
        arguments = ["--config", str(config.configs / f"{stage.command.replace('-', '_')}_{config.size}.yaml")] if stage.has_config else []
        arguments = ["-m", "pipelines", stage.command, *arguments, *stage.arguments]
        if stage.trains and config.processes > 1:
            arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(config.processes), *arguments]
        print(f"\n[{number}/{len(chain)}] {stage.title}: {stage.why}.\n    python {shlex.join(arguments)}", flush=True)
        begun = time.monotonic()
        status = subprocess.run([sys.executable, *arguments], check=False).returncode
        if status:
            print(
                f"{stage.command} ended with status {status}; mend what it says and call the demo again, it goes on from here",
                file=sys.stderr,
            )
            return STAGE_FAILED
        print(f"    done in {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\nAll stages took {time.monotonic() - started:.0f} s. The page: {(config.out / 'index.html').resolve()}")
    return 0


CONFIG = DemoRun
