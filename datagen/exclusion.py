"""What somebody looked at and took out of a data set: identities and frames that dataset.json lists as excluded.

A list is a text file:

    identity 17
    frame 0000030004   # half of the head is outside the picture

What stands in it is excluded, what does not is in the set (again). No tar is touched: our readers leave out what is listed, while
foreign readers of the tars see everything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datagen.shards import sample_key
from head3d.run.errors import DataError

_FORMAT = "write `identity NUMBER` or `frame KEY` on each line; notes stand after a #"


class Exclusion(NamedTuple):
    """Frames that readers leave out."""

    identities: frozenset[int] = frozenset()  # with all their frames
    frames: frozenset[str] = frozenset()  # single frames, by key

    def covers(self, identity: int, key: str) -> bool:
        """Whether the frame `key` of that identity is left out."""
        return identity in self.identities or key in self.frames

    def entry(self) -> dict[str, Any]:
        """As dataset.json holds it."""
        return {"identities": sorted(self.identities), "frames": sorted(self.frames)}

    def text(self) -> str:
        """As a list that `read_exclusion` reads."""
        lines = [f"identity {identity}" for identity in sorted(self.identities)] + [f"frame {key}" for key in sorted(self.frames)]
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], where: str) -> Exclusion:
        """Inverse of `entry`; nothing is excluded where there is none. Raises DataError if it is malformed."""
        entry = manifest.get("excluded", {"identities": [], "frames": []})
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"identities", "frames"}
            or not all(isinstance(values, list) for values in entry.values())
            or not all(type(identity) is int for identity in entry["identities"])
            or not all(isinstance(key, str) for key in entry["frames"])
        ):
            raise DataError(
                f"{where}: expected 'excluded' to hold lists 'identities' (numbers) and 'frames' (keys), got {str(entry)[:200]}; "
                "write it again with `headfoundry survey DIR --exclude FILE`"
            )
        return cls(frozenset(entry["identities"]), frozenset(entry["frames"]))

    def strangers(self, identities: int, shard_count: int, shard_frames: Callable[[int], int]) -> list[str]:
        """What is listed but not in a set of so many identities and shards (with so many frames each), in words."""
        return [f"identity {identity}" for identity in sorted(self.identities) if not 0 <= identity < identities] + [
            f"frame {key}" for key in sorted(self.frames) if not _is_frame(key, shard_count, shard_frames)
        ]


def read_exclusion(path: Path) -> Exclusion:
    """The list in a text file. Raises DataError naming file and line if one cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: could not be read as text ({error}); {_FORMAT}") from error
    found: dict[str, set] = {"identity": set(), "frame": set()}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in found or not (words[1].isascii() and words[1].isdecimal()):
            raise DataError(f"{path}, line {number}: expected an identity or a frame, got {line.strip()!r}; {_FORMAT}")
        found[words[0]].add(int(words[1]) if words[0] == "identity" else words[1])
    return Exclusion(frozenset(found["identity"]), frozenset(found["frame"]))


def _is_frame(key: str, shard_count: int, shard_frames: Callable[[int], int]) -> bool:
    """Whether a set has a frame of that key: the last four digits count within the shard."""
    if not (key.isascii() and key.isdecimal() and len(key) > 4):
        return False
    shard, index = int(key[:-4]), int(key[-4:])
    return key == sample_key(shard, index) and shard < shard_count and index < shard_frames(shard)
