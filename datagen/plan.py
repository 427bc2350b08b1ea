"""The plan of a data set: everything its shards depend on, and dataset.json.

The settings that decide bytes are hashed, as they are stored; a folder holds shards of one hash only. A setting that a set does not
state, because it came into this program later, has its default there, so a new one needs the default that leaves bytes as they were. How
many identities there are, how many shards carry labels, which folder it is and who does the work are outside the hash: they decide which
files exist, not what is in them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from datagen.exclusion import Exclusion
from datagen.labels import members_of
from datagen.members import FAMILIES, Family, Member, Scales, ShardConfig, json_bytes, member_entries
from datagen.reading import read_manifest
from datagen.recipes import KINDS, Kind, RecipeConfig, deciding_settings, frame_count, view_count
from datagen.render import RenderConfig
from datagen.shards import SCHEMA, read_sidecar, shard_name, sidecar_name
from datagen.storage import Storage, open_storage
from genhead.generator import GenHeadConfig
from head3d.rasterize import Backend
from head3d.run.config import config_hash, from_dict, to_dict
from head3d.run.errors import ConfigError, DataError

_UNITS = (
    "lengths in scene units (FLAME metres x 3), origin at the canonical neck joint, y up, face to +z; "
    "angles in radians; depth along unit rays"
)
_NOTICE = "Synthetic: every picture was made by a neural network. None shows a real person or event."


@dataclasses.dataclass(frozen=True)
class GeneratorFacts:
    """Which generator and head model rendered the data."""

    folder: str  # exported generator, as the user gave it
    hash: str  # of its weights
    settings: dict[str, Any]  # its GenHeadConfig
    head_model: str  # path of a FLAME-format file, or "procedural"
    head_hash: str  # of the head model's arrays


@dataclasses.dataclass(frozen=True)
class Plan:
    """A data set: who is in it and how every byte is made."""

    identities: int
    seed: int
    labels_share: float  # of the shards, the first ones, that carry the labels family
    recipe: RecipeConfig
    render: RenderConfig
    shards: ShardConfig
    generator: GeneratorFacts
    scales: Scales
    licence: str
    device: str  # "cpu" or "cuda": where it is rendered first; a picture's last bit depends on it
    rasterizer: Backend  # what draws masks first; their edges depend on it in one pixel of ten thousand
    recorded: dict[str, Any] | None = None  # the settings as dataset.json states them, where it lacks some that came later

    def __post_init__(self) -> None:
        side, largest = self.render.motion_rich_side, self.generator.settings["image_resolution"]
        if self.recipe.motion_rich_share > 0 and side > largest:
            raise ConfigError(
                f"render.motion_rich_side: expected at most {largest} px, the generator's pictures, got {side}; set it lower, or "
                "recipe.motion_rich_share to 0"
            )

    @property
    def shard_count(self) -> int:
        return math.ceil(self.identities / self.shards.identities_per_shard)

    def shard_identities(self, shard: int) -> range:
        """The identity numbers of one shard; the last shard may be shorter."""
        size = self.shards.identities_per_shard
        return range(shard * size, min((shard + 1) * size, self.identities))

    def shard_frames(self, shard: int) -> int:
        return sum(frame_count(self.recipe, identity) for identity in self.shard_identities(shard))

    def shard_pictures(self, shard: int) -> int:
        """Views of all its frames."""
        return sum(frame_count(self.recipe, identity) * view_count(self.recipe, identity) for identity in self.shard_identities(shard))

    def families(self, shard: int) -> tuple[Family, ...]:
        """The families that a shard has."""
        labelled = shard < math.ceil(self.labels_share * self.shard_count - 1e-9)
        held = {member.family for kind in KINDS for member in self.members(kind)}
        return tuple(family for family in FAMILIES if family in held and (family != "labels" or labelled))

    def members(self, kind: Kind, family: Family | None = None) -> tuple[Member, ...]:
        """What samples of identities of one kind hold, of one family or of all."""
        return members_of(self.render.labels_of(kind), family)

    def sizes(self, kind: Kind) -> dict[str, int]:
        """What the letters in the members' shapes stand for; all but V, which is the sample's number of views."""
        model = self.generator.settings
        return {
            "S": self.render.motion_rich_side if kind == "motion-rich" else model["image_resolution"],
            "R": model["render_resolution"],
            "C": model["feature_channels"],
            "P": model["plane_channels"],
            "T": model["plane_resolution"],
            "N": self.render.points,
        }

    def settings(self) -> dict[str, Any]:
        """What decides bytes, and nothing else, as dataset.json states it."""
        return self.settings_in_full() if self.recorded is None else self.recorded

    def settings_in_full(self) -> dict[str, Any]:
        """The same with every setting that this program has."""
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "recipe": deciding_settings(self.recipe),
            "render": to_dict(self.render),
            "shards": to_dict(self.shards),
            "generator": {"hash": self.generator.hash, "model": self.generator.settings},
            "head_model": self.generator.head_hash,
        }

    def as_recorded(self, there: dict[str, Any] | None) -> Plan:
        """The plan for going on with the set that a dataset.json describes: one of the same settings, with its hash."""
        return self if there is None or there["config_hash"] == self.hash else dataclasses.replace(self, recorded=there["settings"])

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of `settings`."""
        return config_hash(self.settings())

    def sidecar_facts(self, shard: int) -> dict[str, Any]:
        """What a shard's sidecars state of the plan."""
        identities = self.shard_identities(shard)
        return {"config_hash": self.hash, "identities": [identities.start, len(identities)]}

    def manifest(self, versions: dict[str, str]) -> dict[str, Any]:
        """The content of dataset.json, given what renders the set (see `versions`)."""
        return {
            "schema": SCHEMA,
            "synthetic": True,
            "notice": _NOTICE,
            "licence": self.licence,
            "config_hash": self.hash,
            "settings": self.settings(),
            "generator": {"folder": self.generator.folder, "hash": self.generator.hash},
            "head_model": {"source": self.generator.head_model, "hash": self.generator.head_hash},
            "plan": {
                "identities": self.identities,
                "shards": self.shard_count,
                "labels_share": self.labels_share,
                "frames": sum(frame_count(self.recipe, identity) for identity in range(self.identities)),
            },
            "depth": {"near": self.scales.near, "far": self.scales.far},
            "box_side": self.scales.box_side,
            "units": _UNITS,
            "members": member_entries(members_of(name for kind in KINDS for name in self.render.labels_of(kind))),
            "split_rule": f"{self.recipe.split_rule}: {self.recipe.val_share:g} of the identities val, {self.recipe.test_share:g} test",
            "versions": versions,
            "excluded": Exclusion().entry(),
        }  # fmt: skip

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], where: str) -> Plan:
        """Inverse of `manifest`; settings that it does not state have their defaults.

        Raises DataError if something else is missing or its hash is another, and ConfigError if a setting is unknown here.
        """
        try:
            settings = manifest["settings"]
            if config_hash(settings) != manifest["config_hash"]:
                raise DataError(
                    f"{where}: its settings have the hash {config_hash(settings)}, it states {manifest['config_hash']}; the file was "
                    "changed, restore it"
                )
            plan = cls(
                identities=manifest["plan"]["identities"],
                seed=settings["seed"],
                labels_share=manifest["plan"]["labels_share"],
                recipe=from_dict(RecipeConfig, settings["recipe"], where),
                render=from_dict(RenderConfig, settings["render"], where),
                shards=from_dict(ShardConfig, settings["shards"], where),
                generator=GeneratorFacts(
                    folder=manifest["generator"]["folder"],
                    hash=manifest["generator"]["hash"],
                    settings=to_dict(from_dict(GenHeadConfig, settings["generator"]["model"], where)),
                    head_model=manifest["head_model"]["source"],
                    head_hash=manifest["head_model"]["hash"],
                ),
                scales=Scales(manifest["depth"]["near"], manifest["depth"]["far"], manifest["box_side"]),
                licence=manifest["licence"],
                device=manifest["versions"]["device"],
                rasterizer=manifest["versions"].get("rasterizer", "torch"),
            )
        except KeyError as error:
            raise DataError(f"{where}: the entry {error} is missing; the file was changed or comes from another program") from error
        return plan.as_recorded(manifest)


def open_plan(place: Storage | Path | str) -> Plan:
    """The plan of the data set in a folder or at a URL, from its dataset.json."""
    return Plan.from_manifest(read_manifest(place), open_storage(place).where("dataset.json"))


def check_folder(storage: Storage, plan: Plan) -> dict[str, Any] | None:
    """The dataset.json that is there if it holds shards of the same settings; None if the place is free or nothing was finished in it.

    Raises ConfigError if it has another hash, or more identities than are asked for now. More identities than before, or more
    labels, extend the set.
    """
    path = storage.where("dataset.json")
    there = read_manifest(storage) if storage.size("dataset.json") is not None else None
    if there is None or not _holds_shards(storage, there["plan"]["shards"]):
        return None
    changed = differences(Plan.from_manifest(there, path).settings_in_full(), plan.settings_in_full())
    if changed:
        changed = ", ".join(changed[:5])
        raise ConfigError(
            f"{path}: this folder holds shards of other settings (hash {there['config_hash']}, now {plan.hash}); changed: {changed}. "
            "Choose another --out, or set these as they were"
        )
    if there["plan"]["identities"] > plan.identities or there["plan"]["labels_share"] > plan.labels_share:
        raise ConfigError(
            f"{path}: this folder was planned with {there['plan']['identities']} identities and labels for a share of "
            f"{there['plan']['labels_share']:g}, now {plan.identities} and {plan.labels_share:g}; a set can grow but not shrink: "
            "choose another --out, or ask for at least as many"
        )
    return there


def claim_folder(storage: Storage, plan: Plan, there: dict[str, Any] | None, versions: dict[str, str]) -> None:
    """Write dataset.json, before the first shard or when the set grows.

    there: what `check_folder` found; versions: of what rendered, or will render, the first shards.
    """
    content = plan.manifest(versions)
    if there is not None:
        if there["plan"] == content["plan"]:
            return
        content["excluded"] = Exclusion.from_manifest(there, storage.where("dataset.json")).entry()
    storage.write("dataset.json", manifest_text(content))


def exclude(place: Storage | Path | str, exclusion: Exclusion) -> None:
    """Write a dataset.json that leaves out what `exclusion` lists and nothing else.

    Raises DataError if it lists what the set has not.
    """
    storage = open_storage(place)
    plan = open_plan(storage)
    strangers = exclusion.strangers(plan.identities, plan.shard_count, plan.shard_frames)
    if strangers:
        raise DataError(
            f"{storage.where()}: expected identities below {plan.identities} and keys of frames of this set, got "
            f"{', '.join(strangers[:5])}{f' and {len(strangers) - 5} more' if len(strangers) > 5 else ''}; correct the list"
        )
    storage.write("dataset.json", manifest_text(read_manifest(storage) | {"excluded": exclusion.entry()}))


def manifest_text(content: dict[str, Any]) -> str:
    """dataset.json as text, with the SHA-256 of everything else in it, so that `verify` sees any change."""
    content = {name: value for name, value in content.items() if name != "content_sha256"}
    digest = hashlib.sha256(json_bytes(content)).hexdigest()
    return json.dumps(content | {"content_sha256": digest}, indent=1, sort_keys=True) + "\n"


def _holds_shards(storage: Storage, shards: int) -> bool:
    """Whether any family of any shard is committed; asked for by name, and usually answered by the first."""
    names = (sidecar_name(family, shard) for shard in range(shards) for family in FAMILIES)
    return any(size is not None for size in storage.each(storage.size, names))


def shard_is_done(storage: Storage, plan: Plan, shard: int) -> bool:
    """Whether every family of a shard is committed, of this plan, and as long as its sidecar says.

    Raises ConfigError if a sidecar is of other settings.
    """
    for family in plan.families(shard):
        content = read_sidecar(storage, family, shard)
        if content is None:
            return False
        if content["config_hash"] != plan.hash:
            raise ConfigError(
                f"{storage.where(sidecar_name(family, shard))}: expected a shard of settings {plan.hash}, got {content['config_hash']}; "
                "two data sets are mixed here: choose another --out, or delete this file and its tar"
            )
        if content["identities"] != plan.sidecar_facts(shard)["identities"]:
            return False
        if content["bytes"] != storage.size(shard_name(family, shard)):
            return False
    return True


def versions(device: str, rasterizer: Backend) -> dict[str, str]:
    """What the last bit of a picture may depend on beside the settings."""
    packages = ("torch", "numpy", "scipy", "simplejpeg", "pillow", "webdataset")
    return {
        "device": device,
        "rasterizer": rasterizer,
        "processor": torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Dotted settings that differ, as 'key: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for name in dict.fromkeys([*old, *new])
            for text in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [f"{key}: {old} -> {new}"]
