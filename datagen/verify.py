"""`headfoundry verify FOLDER`: read every byte of a data set again, and render a few samples from their recipes.

Nothing is changed. Each damaged, missing or foreign file is named; the exit status is 1 if there is any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from datagen.exclusion import Exclusion
from datagen.index import INDEX, Index
from datagen.ledger import LEDGER
from datagen.members import FAMILIES, Family, Member, decode, encode_sample, json_bytes
from datagen.plan import Plan, manifest_text, versions
from datagen.reading import index_of_sidecars, read_manifest
from datagen.recipes import IdentityRecipe, draw_identity
from datagen.render import IdentityRenderer, render_frame, render_shared, reproducible
from datagen.shards import read_sidecar, remedy, sample_key, shard_name, sidecar_name
from datagen.storage import Storage, in_threads, open_storage
from datagen.worker import load_planned_generator
from head3d.cameras import Camera
from head3d.image_metrics import PSNR_CEILING_DB
from head3d.labels import check_label, pack_label
from head3d.run.config import NonNegativeInt
from head3d.run.errors import DataError, FoundryError
from head3d.run.runlog import progress
from head3d.run.seeding import numpy_generator

COMPANIONS = (
    "dataset.json",
    INDEX,
    "index.html",
    "croissant.json",
    "README.md",
    "log.jsonl",
    LEDGER,
    ".lock",
)  # beside the families
SHARDS_AT_ONCE = 4  # that are read and checked; each holds one tar in memory
SAME_PICTURE_DB = 40.0  # PSNR that counts as the same picture or map on another processor or with other package versions
COMPARED = ("rgb", "opacity", "depth", "foreground")  # what must then be alike: the rest follows from it, or is a choice among many


@dataclasses.dataclass(frozen=True)
class VerifyRun:
    """Check a folder of shards."""

    folder: tyro.conf.Positional[str]  # data set to check: a folder, or a URL that fsspec opens
    rerender: NonNegativeInt = 2  # frames to render again from their recipes and to compare
    generator: Path | None = None  # exported generator, if it is no longer where dataset.json says


@dataclasses.dataclass
class Check:
    """One row of the table."""

    name: str
    checked: int = 0
    note: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)  # each begins with the file's path


def verify(config: VerifyRun) -> int:
    """Check everything, print a table and the problems. Returns 0 if there are none, else 1.

    Raises DataError if the folder is not there.
    """
    storage = open_storage(config.folder)
    if not storage.names(""):
        raise DataError(f"{storage.where()}: there is no such folder, or nothing in it; give the folder or URL of a data set")
    checks = check_dataset(storage, config)
    width = max(len(check.name) for check in checks)
    print(f"{storage.where()}\n{'check':<{width}}  {'checked':>8}  {'problems':>8}")
    for check in checks:
        print(f"{check.name:<{width}}  {check.checked:>8}  {len(check.problems):>8}  {check.note}".rstrip())
    problems = [problem for check in checks for problem in check.problems]
    for problem in problems:
        print(f"  {problem}")
    print("everything is as it was written" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def check_dataset(storage: Storage, config: VerifyRun) -> list[Check]:
    """All checks of one data set."""
    settings, files = Check("settings and index", checked=1), Check("files there, none foreign")
    tars, samples = Check("tars: SHA-256, members"), Check("samples: type, shape, range, recipe")
    again = Check("rendered again")
    checks = [settings, files, tars, samples, again]
    try:
        manifest, plan = _check_settings(storage, settings)
    except FoundryError as error:
        settings.problems.append(str(error))
        for check in checks[1:]:
            check.note = "left out: mend dataset.json first"
        return checks
    there = _check_files(storage, plan, files)
    with progress(plan.shard_count, "verify", unit="shard") as bar:
        for found in in_threads(lambda shard: _check_shard(storage, plan, shard, there), range(plan.shard_count), SHARDS_AT_ONCE):
            for whole, part in zip((tars, samples), found, strict=True):
                whole.checked += part.checked
                whole.problems += part.problems
            bar.update(1)
    if not tars.problems and not files.problems:
        try:
            _check_index(storage, settings)
        except FoundryError as error:
            settings.problems.append(str(error))
        _check_rendering(storage, config, plan, again)
    elif config.rerender:
        again.note = "left out: mend the files first"
    return checks


def _check_shard(storage: Storage, plan: Plan, shard: int, there: set[str]) -> tuple[Check, Check]:
    """What there is of one shard: its tars, and their samples."""
    tars, samples = Check("tars"), Check("samples")
    recipes = {identity: draw_identity(plan.recipe, plan.seed, identity) for identity in plan.shard_identities(shard)}
    for family in plan.families(shard):
        if {shard_name(family, shard), sidecar_name(family, shard)} <= there:
            try:
                sidecar = _checked_sidecar(storage, plan, family, shard, recipes)
                _check_tar(storage, plan, sidecar, recipes, tars, samples)
            except FoundryError as error:
                tars.problems.append(str(error))
    return tars, samples


def _check_settings(storage: Storage, check: Check) -> tuple[dict[str, Any], Plan]:
    """dataset.json and its plan. Raises FoundryError if they cannot be trusted."""
    path, manifest = storage.where("dataset.json"), read_manifest(storage)
    if storage.read("dataset.json") != manifest_text(manifest).encode():
        raise DataError(f"{path}: its content is not what its content_sha256 was made from; the file was changed, restore it")
    plan, excluded = Plan.from_manifest(manifest, path), Exclusion.from_manifest(manifest, path)
    strangers = excluded.strangers(plan.identities, plan.shard_count, plan.shard_frames)
    check.problems += [f"{path}: excludes {stranger}, which the set does not have" for stranger in strangers]
    if any(excluded):
        check.note = f"excluded: {len(excluded.identities)} identities, {len(excluded.frames)} frames"
    return manifest, plan


def _check_files(storage: Storage, plan: Plan, check: Check) -> set[str]:
    """Missing and foreign files. Returns the names that are there and belong there."""
    expected = {"dataset.json", INDEX}
    for shard in range(plan.shard_count):
        for family in plan.families(shard):
            expected |= {shard_name(family, shard), sidecar_name(family, shard)}
    found = {name.removeprefix("/") for folder in ("", *FAMILIES) for name in storage.names(folder)}
    again = "call the same `headfoundry datagen` command again"
    check.problems += [f"{storage.where(name)}: missing; {again}" for name in sorted(expected - found)]
    check.problems += [
        f"{storage.where(name)}: foreign: no file of this data set has this name; move it away"
        for name in sorted(found - expected - {*COMPANIONS, *FAMILIES})
    ]
    check.checked = len(expected)
    return found & expected


def _checked_sidecar(storage: Storage, plan: Plan, family: Family, shard: int, recipes: dict[int, IdentityRecipe]) -> dict[str, Any]:
    """A sidecar that states what the plan says. Raises DataError if it does not."""
    name = sidecar_name(family, shard)
    path, sidecar = storage.where(name), read_sidecar(storage, family, shard)
    if not all(map(_is_entry, sidecar["samples"])) or storage.read(name) != json_bytes(sidecar):
        raise DataError(f"{path}: not as it was written: bytes have changed; {remedy(path)}")
    for fact, value in plan.sidecar_facts(shard).items():
        if sidecar.get(fact) != value:
            raise DataError(f"{path}: expected {fact} {value}, got {sidecar.get(fact)}; {remedy(path)}")
    if family == "identities":
        expected = [{"identity": identity} for identity in recipes]
    else:
        expected = [_about(recipe, motion) for recipe in recipes.values() for motion in range(len(recipe.motions))]
    expected = [{"key": sample_key(shard, index), **about} for index, about in enumerate(expected)]
    found = [{name: value for name, value in sample.items() if name != "members"} for sample in sidecar["samples"]]
    if found != expected:
        raise DataError(
            f"{path}: its samples are not those of the plan: expected {len(expected)}, got {len(found)}, or others of that number; "
            f"{remedy(path)}"
        )
    return sidecar


def _is_entry(sample: Any) -> bool:
    """Whether a sidecar's sample states where its members lie: (offset, size, CRC-32) by extension."""
    members = sample.get("members") if isinstance(sample, dict) else None
    return isinstance(members, dict) and all(
        isinstance(place, list) and len(place) == 3 and all(type(number) is int for number in place) for place in members.values()
    )


def _about(recipe: IdentityRecipe, motion: int) -> dict[str, Any]:
    views = len(recipe.motions[motion].cameras)
    return {"identity": recipe.identity, "motion": motion, "kind": recipe.kind, "split": recipe.split, "views": views}


def _check_tar(
    storage: Storage, plan: Plan, sidecar: dict[str, Any], recipes: dict[int, IdentityRecipe], tars: Check, samples: Check
) -> None:
    """One tar against its sidecar, and its samples against the member table and their recipes. Raises DataError for the tar's problem."""
    family, shard = sidecar["family"], sidecar["shard"]
    path, data = storage.where(shard_name(family, shard)), storage.read(shard_name(family, shard))
    tars.checked += 1
    if len(data) != sidecar["bytes"]:
        raise DataError(f"{path}: expected {sidecar['bytes']} bytes, got {len(data)}: cut short or replaced; {remedy(path)}")
    damaged = [
        f"key {sample['key']}, member {extension!r} at byte {offset}"
        for sample in sidecar["samples"]
        for extension, (offset, size, checksum) in sample["members"].items()
        if zlib.crc32(data[offset : offset + size]) != checksum
    ]
    if hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
        places = "; ".join(damaged[:5]) or "outside all members"
        raise DataError(f"{path}: the SHA-256 does not match, bytes have changed: {places}; {remedy(path)}")
    own_path = storage.where(sidecar_name(family, shard))
    if damaged:
        raise DataError(f"{own_path}: states places or checksums that are not those of its tar: {'; '.join(damaged[:5])}; {remedy(path)}")
    stated = [
        (f"{sample['key']}.{name}", offset, size)
        for sample in sidecar["samples"]
        for name, (offset, size, _) in sorted(sample["members"].items())
    ]
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            held = [(info.name, info.offset_data, info.size) for info in archive]
    except tarfile.TarError as error:
        raise DataError(f"{path}: no tar ({error}); {remedy(path)}") from error
    if held != stated:
        there, said = next(pair for pair in itertools.zip_longest(held, stated) if pair[0] != pair[1])
        raise DataError(f"{own_path}: its members are not those of its tar; first difference: {said} where {there} is; {remedy(path)}")
    for sample in sidecar["samples"]:
        samples.checked += 1
        files = {name: data[offset : offset + size] for name, (offset, size, _) in sample["members"].items()}
        for problem in _sample_problems(plan, family, sample, files, recipes[sample["identity"]]):
            samples.problems.append(f"{path}: key {sample['key']}, {problem}")


def _sample_problems(plan: Plan, family: Family, sample: dict[str, Any], files: dict[str, bytes], recipe: IdentityRecipe) -> Iterator[str]:
    """What is wrong with one sample of the family, by the member table."""
    sizes = plan.sizes(recipe.kind) | {"V": sample.get("views")}
    expected: dict[str, Member] = {}
    for member in plan.members(recipe.kind, family):
        extension = member.extension(plan.shards.image_format)
        for view in range(sample["views"] if "{view}" in extension else 1):
            expected[extension.format(view=view)] = member
    if set(expected) != set(files):
        yield f"members: expected {sorted(expected)}, got {sorted(files)}"
        return
    for extension, member in expected.items():
        try:
            value = decode(files[extension], extension)
        except ValueError as error:
            yield f"member {extension!r}: could not be decoded ({error})"
            continue
        if member.kind == "json":
            if value["identity"] != recipe.identity or value["motion"] != sample["motion"] or value["seed"] != plan.seed:
                yield f"member {extension!r}: it is of another frame than its place says"
            continue
        shape = tuple(sizes[side] if isinstance(side, str) else side for side in member.shape)
        if value.shape != shape or value.dtype != member.dtype:
            yield f"member {extension!r}: expected {member.dtype} {shape}, got {value.dtype} {value.shape}"
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            yield f"member {extension!r}: it holds numbers that are not finite"
        elif member.limits is not None and value.size and (value.min() < member.limits[0] or value.max() > member.limits[1]):
            low, high = member.limits
            yield f"member {extension!r}: expected numbers in [{low:g}, {high:g}], got {value.min():.3g} to {value.max():.3g}"
        elif member.name == "label":
            yield from _label_problems(value, recipe, sample["motion"])


def _label_problems(labels: np.ndarray, recipe: IdentityRecipe, motion: int) -> Iterator[str]:
    """The label must be well-formed and what the recipe draws, to the rounding of another processor."""
    try:
        for view, label in enumerate(labels):
            check_label(label, f"member 'label.npy', view {view}")
    except DataError as error:
        yield str(error)
        return
    drawn = recipe.motions[motion]
    views = len(drawn.cameras)
    expected = pack_label(Camera.from_label(drawn.cameras), recipe.shape.expand(views, -1), drawn.motion.repeat_interleave(views)).numpy()
    error = float(np.abs(labels - expected).max())
    if error > 1e-4:
        yield f"member 'label.npy': differs from the recipe by {error:.3g}"


def _check_index(storage: Storage, check: Check) -> None:
    check.checked += 1
    path, data, index = storage.where(INDEX), storage.read(INDEX), index_of_sidecars(storage)
    if data == index.to_bytes():
        return
    try:
        listed = Index.from_bytes(data, path).sidecars()
    except DataError:  # no index at all
        listed = index.sidecars()
    others = [storage.where(name) for name, digest in index.sidecars().items() if listed.get(name) != digest]
    check.problems.append(
        f"{path}: differs from the sidecars{' ' if others else ''}{', '.join(others[:5])}; "
        "call the same `headfoundry datagen` command again to rebuild it"
    )


def _check_rendering(storage: Storage, config: VerifyRun, plan: Plan, check: Check) -> None:
    """Render frames again, spread over the data set by its own hash, and compare them with what is stored."""
    if not config.rerender:
        check.note = "not asked for"
        return
    try:
        device = plan.device if torch.cuda.is_available() else "cpu"
        genhead = load_planned_generator(plan, config.generator or Path(plan.generator.folder), device)
    except FoundryError as error:
        check.problems.append(f"{error}. Give --generator FOLDER, or --rerender 0 to do without")
        return
    exact, worst = 0, PSNR_CEILING_DB
    for shard, index in progress(_choose_frames(plan, config.rerender), "verify: render", unit="frame"):
        sidecars = {family: read_sidecar(storage, family, shard) for family in plan.families(shard)}
        sample = sidecars["frames"]["samples"][index]
        recipe = draw_identity(plan.recipe, plan.seed, sample["identity"])
        with reproducible():
            renderer = IdentityRenderer(genhead, recipe, plan.render.precision)
            frame, shared = render_frame(renderer, plan.render, sample["motion"]), render_shared(renderer, plan.render)
        check.checked += 1
        stored, made = {}, {}
        for family, sidecar in sidecars.items():
            of_identity = family == "identities"
            place = sample["identity"] - plan.shard_identities(shard).start if of_identity else index
            members = sidecar["samples"][place]["members"]
            places = {name: (offset, offset + size) for name, (offset, size, _) in members.items()}
            stored |= {f"{family}/{name}": storage.read(shard_name(family, shard), *place) for name, place in places.items()}
            encoded = encode_sample(plan.members(recipe.kind, family), shared if of_identity else frame, plan.scales, plan.shards)
            made |= {f"{family}/{name}": value for name, value in encoded.items()}
        different = sorted(name for name in made if made[name] != stored[name])
        exact += not different
        extensions = {name: name.partition("/")[2] for name in made}
        compared = [name for name, extension in extensions.items() if extension.partition(".")[0] in COMPARED and name in stored]
        quality = min(_psnr(*(decode(side[name], extensions[name]) for side in (made, stored))) for name in compared)
        worst = min(worst, quality)
        same_stack = sidecars["frames"].get("versions") == versions(device, genhead.head_model.rasterizer)
        if different and (same_stack or quality < SAME_PICTURE_DB):
            check.problems.append(
                f"{storage.where(shard_name('frames', shard))}: key {sample['key']}: rendered again, {', '.join(different[:5])} differ "
                f"(down to {quality:.1f} dB, "
                f"{'same program and processor: bit-exact expected' if same_stack else f'expected at least {SAME_PICTURE_DB:g} dB'})"
            )
    check.note = f"{exact} bit-exact" + ("" if exact == check.checked else f", the least alike {worst:.1f} dB")


def _choose_frames(plan: Plan, count: int) -> list[tuple[int, int]]:
    """(shard, index in it) of frames to render again: drawn by the data set's own hash, so that everybody checks the same."""
    counts = [plan.shard_frames(shard) for shard in range(plan.shard_count)]
    chosen = numpy_generator(plan.hash, "verify").choice(sum(counts), min(count, sum(counts)), replace=False)
    starts = np.cumsum([0, *counts])
    shards = np.searchsorted(starts, chosen, side="right") - 1
    return [(int(shard), int(frame - starts[shard])) for shard, frame in sorted(zip(shards, chosen, strict=True))]


def _psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Of two pictures or maps as they are stored, dB; the peak is the largest integer of their type, or 1. 0 if their shapes differ."""
    if first.shape != second.shape:
        return 0.0
    peak = np.iinfo(first.dtype).max if first.dtype.kind in "iu" else 1.0
    error = float(np.mean(((first.astype(np.float64) - second) / peak) ** 2))
    return PSNR_CEILING_DB if error == 0 else min(PSNR_CEILING_DB, -10 * math.log10(error))
