"""The command line: headfoundry COMMAND --config FILE [--section.key value ...].

`python -m pipelines` is the same thing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from head3d.run.errors import ConfigError, FoundryError
from head3d.run.memory import restart_tuned


class Command(NamedTuple):
    """A row of the command table. The module has CONFIG, a frozen dataclass, and main(config) -> exit status or None."""

    module: str  # imported when its command is called, so that help is quick
    summary: str


COMMANDS = {
    "demo": Command("pipelines.run_all", "run the whole chain at tiny size and write runs/demo/index.html"),
    "head-page": Command("pipelines.head_page", "render a page of the head model: neutral, components, gaze, jaw, neck"),
    "portraits": Command("pipelines.portraits", "make GenHead's training portraits, or take in photographs from a folder"),
    "genhead": Command("pipelines.genhead", "train the 3D head generator on portraits"),
    "plan": Command("pipelines.plan", "forecast hours, bytes, requests and cost of a large data set, and what is full first"),
    "datagen": Command("pipelines.datagen", "produce labelled multi-view shards with a trained generator"),
    "verify": Command("pipelines.verify", "check a folder of shards and re-render samples from their recipes"),
    "survey": Command("pipelines.survey", "look at a folder of shards on one page, and exclude what should not be read"),
    "describe": Command("pipelines.describe", "write croissant.json and a data card for a folder of shards"),
    "reconstructor": Command("pipelines.reconstructor", "train the one-shot reconstructor on shards"),
    "perception": Command("pipelines.perception", "train a measurement network and a motion encoder on shards"),
    "evaluate": Command("pipelines.evaluate", "measure a reconstructor on held-out identities, or a generator"),
    "ablation": Command("pipelines.ablation", "train variants of the reconstructor, measure all in the same way, print the table"),
    "drive": Command("pipelines.drive", "animate one picture with a sequence of motions"),
    "report": Command("pipelines.report", "gather a run's pictures, curves and numbers into one page"),
    "import-published": Command("pipelines.import_published", "turn a published checkpoint into an export, running nothing in it"),
    "parity": Command("pipelines.parity", "compare the published architecture with reference numbers"),
    "bench": Command("pipelines.bench", "time the parts that set the pace beside what the machine could do"),
}

_USAGE = """usage: headfoundry COMMAND [--config FILE] [--section.key value ...] [--dry-run]

{commands}

headfoundry COMMAND --help   lists every setting of a command with its meaning and default
--config FILE                reads settings from a YAML file; settings on the command line win over it
--dry-run                    prints the resolved settings as YAML and stops
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 the user's to mend (one message on stderr), 130 interrupted."""
    own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if own_process:
        restart_tuned()
    try:
        return run_command(arguments[0], arguments[1:])
    except FoundryError as error:
        print(f"headfoundry: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headfoundry: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Resolve the settings of one command and call it. Raises FoundryError for what the user can mend."""
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    file, dry_run, settings = split_arguments(arguments)
    # Read when NumPy is loaded, and inherited by workers: what linear algebra computes, as the built-in head, has the same bits in all.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from head3d.run.config import resolve, yaml_text

    module = importlib.import_module(COMMANDS[name].module)
    config = resolve(module.CONFIG, file, settings, prog=f"headfoundry {name}")
    if dry_run:
        print(yaml_text(config), end="")
        return 0
    return module.main(config) or 0


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """Take `--config FILE` and `--dry-run` out: (file, dry run, the settings that are left)."""
    file, dry_run, settings = None, False, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--config" or argument.startswith("--config="):
            value = next(remaining, "") if argument == "--config" else argument.removeprefix("--config=")
            if not value or value.startswith("--"):
                raise ConfigError("--config expects a YAML file, got nothing; configs/ holds the ones that come with the project")
            if file is not None:
                raise ConfigError(f"--config is given twice, {file} and {value}; give one file and override single settings")
            file = Path(value)
        else:
            settings.append(argument)
    return file, dry_run, settings


def usage() -> str:
    """The text of `headfoundry --help`."""
    width = max(map(len, COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
