"""Checkpoints and exported models: safetensors, JSON and YAML only, so that loading one never runs code.

RUN/checkpoints/000012800/{tensors.safetensors, state.json, config.yaml}   to go on training; the number is images seen
DIR/{model.safetensors, config.yaml, model.json}                           a model for use
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from head3d.run.config import from_dict, read_settings, save_yaml
from head3d.run.errors import AssetError, ConfigError
from head3d.run.files import atomic_folder, atomic_path, remove_folder, sha256_of_file, sweep_temporary, write_atomic

Config = TypeVar("Config")

_FORMAT = 1  # raised when what the files mean changes
_TENSORS, _STATE, _CONFIG = "tensors.safetensors", "state.json", "config.yaml"
_MODEL, _RECORD = "model.safetensors", "model.json"


class Checkpoint(NamedTuple):
    """One saved state of a training run."""

    folder: Path
    images_seen: int
    tensors: dict[str, Tensor]  # on the CPU
    state: dict[str, Any]  # JSON types
    config: dict[str, Any]  # the run's settings when it was saved


def save_checkpoint(
    run_folder: Path | str,
    images_seen: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    config: Any,
    keep: int,
) -> Path:
    """Write a checkpoint whole or not at all, delete all but the newest `keep` >= 1, and return its folder.

    `tensors` may be on any device and share memory; `state` is JSON; `config` is a config dataclass or dict. One process of a run
    calls this. Raises DataError if the disk refuses; earlier checkpoints then stay.
    """
    assert keep >= 1 and images_seen >= 0, f"expected keep >= 1 and images_seen >= 0, got {keep} and {images_seen}"
    parent = Path(run_folder) / "checkpoints"
    if parent.is_dir():
        sweep_temporary(parent)
    folder = parent / f"{images_seen:09d}"
    with atomic_folder(folder) as temporary:
        _write_tensors(temporary / _TENSORS, tensors)
        record = {
            "format": _FORMAT,
            "images_seen": images_seen,
            "tensors_sha256": sha256_of_file(temporary / _TENSORS),
            "state": state,
        }
        (temporary / _STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        save_yaml(config, temporary / _CONFIG)
    for outdated in _checkpoint_folders(parent)[:-keep]:
        remove_folder(outdated)
    return folder


def latest_checkpoint(run_folder: Path | str) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if there is none yet.

    Raises AssetError, naming the file and what to do, if that checkpoint is damaged: going back to an older one is the user's choice.
    """
    folders = _checkpoint_folders(Path(run_folder) / "checkpoints")
    if not folders:
        return None
    folder = folders[-1]
    fallback = f"the run then goes on from {folders[-2].name}" if len(folders) > 1 else "the run then starts from the beginning"
    remedy = f"delete the folder {folder} and call the same command again; {fallback}"
    record = _read_record(folder / _STATE, {"images_seen", "tensors_sha256", "state"}, remedy)
    tensors = _read_tensors(folder / _TENSORS, record["tensors_sha256"], remedy)
    return Checkpoint(folder, record["images_seen"], tensors, record["state"], _read_config(folder / _CONFIG, remedy))


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (tensors named "{prefix}.{parameter index}.{quantity}", JSON) for `save_checkpoint`."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, quantities in packed["state"].items():
        for name, value in quantities.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"groups": packed["param_groups"], "numbers": numbers}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    prefix: str,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Put back what `pack_optimizer` took, into an optimizer built over the same parameters. Steps after it are bit-equal.

    Settings like the learning rate come back as saved. Raises AssetError if the parameters do not match in number or shape.
    """
    quantities: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, quantity = name.removeprefix(prefix + ".").split(".", 1)
            quantities.setdefault(int(index), {})[quantity] = value
    for name, value in state["numbers"].items():
        index, quantity = name.split(".", 1)
        quantities.setdefault(int(index), {})[quantity] = value
    own_groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (state["groups"], own_groups))
    remedy = "continue with the settings the run was started with, or give another output folder"
    if sizes != own_sizes:
        raise AssetError(f"optimizer {prefix}: expected groups of {own_sizes} parameters, the checkpoint has {sizes}; {remedy}")
    for index, values in quantities.items():
        for quantity, value in values.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameters[index].shape:
                raise AssetError(
                    f"optimizer {prefix}: parameter {index} has shape {tuple(parameters[index].shape)}, "
                    f"its {quantity} in the checkpoint {tuple(value.shape)}; {remedy}"
                )
    groups = [
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}
        for group, own in zip(state["groups"], own_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": quantities, "param_groups": groups})


def export_model(
    folder: Path | str,
    model_state: dict[str, Tensor],
    config: Any,
    kind: str,
    images_seen: int,
    half: bool = False,
) -> Path:
    """Write a model for use: weights, config, and the record model.json last, which makes it valid. Returns the folder.

    `kind` says what the weights are (for example "genhead"); `half` stores floating-point tensors as float16.
    """
    folder = Path(folder)
    (folder / _RECORD).unlink(missing_ok=True)
    tensors = {name: value.half() if half and value.is_floating_point() else value for name, value in model_state.items()}
    with atomic_path(folder / _MODEL) as temporary:
        _write_tensors(temporary, tensors)
        digest = sha256_of_file(temporary)
    save_yaml(config, folder / _CONFIG)
    record = {"format": _FORMAT, "kind": kind, "images_seen": images_seen, "half": half, "tensors_sha256": digest}
    write_atomic(folder / _RECORD, json.dumps(record, indent=1) + "\n")
    return folder


def load_exported(folder: Path | str, config_class: type[Config], kind: str) -> tuple[dict[str, Tensor], Config]:
    """Read what `export_model` wrote: (state dict on the CPU, floating-point tensors as float32; config).

    Raises AssetError if the folder is no finished export, damaged, or of another kind.
    """
    record, remedy = _read_export(Path(folder), kind)
    tensors = _read_tensors(Path(folder) / _MODEL, record["tensors_sha256"], remedy)
    config = from_dict(config_class, _read_config(Path(folder) / _CONFIG, remedy), str(Path(folder) / _CONFIG))
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}, config


def exported_config(folder: Path | str, config_class: type[Config], kind: str) -> Config:
    """The config of an exported model, whose weights are not read. Raises AssetError as `load_exported`."""
    _, remedy = _read_export(Path(folder), kind)
    return from_dict(config_class, _read_config(Path(folder) / _CONFIG, remedy), str(Path(folder) / _CONFIG))


def _read_export(folder: Path, kind: str) -> tuple[dict[str, Any], str]:
    """The record of an export, and what to do about an export that is damaged."""
    remedy = f"give the folder of a finished {kind} model, or export it again by calling its training command"
    if not folder.is_dir():
        raise AssetError(f"{folder}: there is no such folder; {remedy}")
    record = _read_record(folder / _RECORD, {"kind", "images_seen", "tensors_sha256"}, remedy)
    if record["kind"] != kind:
        raise AssetError(f"{folder / _RECORD}: expected a model of kind {kind!r}, got {record['kind']!r}; {remedy}")
    return record, remedy


def fill_weights(
    module: torch.nn.Module, weights: dict[str, Tensor], where: str, remedy: str = "use the config.yaml that lies beside the weights"
) -> None:
    """Copy a whole state dict into `module`. Raises AssetError naming `where`, the keys or shapes that do not fit, and the remedy."""
    own = module.state_dict()
    missing, foreign = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and value.shape != weights[name].shape
    ]
    if missing or foreign or shapes:
        kinds = (("missing", missing), ("unknown", foreign), ("of other shapes", shapes))
        found = "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in kinds if names)
        raise AssetError(f"{where}: the weights do not fit: {found}; {remedy}")
    module.load_state_dict(weights)


def exported_hash(folder: Path | str) -> str:
    """16 hex digits that identify an exported model's weights, from its record. Raises AssetError if there is no finished export."""
    remedy = "give the folder of a finished model"
    return _read_record(Path(folder) / _RECORD, {"tensors_sha256"}, remedy)["tensors_sha256"][:16]


def exported_images_seen(folder: Path | str) -> int:
    """Images that an exported model was trained on. Raises AssetError if there is no finished export."""
    return _read_record(Path(folder) / _RECORD, {"images_seen"}, "give the folder of a finished model")["images_seen"]


def newest_checkpoint_folder(run_folder: Path | str) -> Path | None:
    """Where `latest_checkpoint` would read, unread; None if there is no checkpoint."""
    return next(reversed(_checkpoint_folders(Path(run_folder) / "checkpoints")), None)


def _checkpoint_folders(parent: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not parent.is_dir():
        return []
    return sorted((entry for entry in parent.iterdir() if entry.name.isdecimal()), key=lambda entry: int(entry.name))


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another, as safetensors demands."""
    seen: set[int] = set()
    owned = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        owned[name] = value.clone() if address in seen or value.untyped_storage().nbytes() > value.nbytes else value
        seen.add(address)
    return owned


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode  # as every file of this user gets; safetensors would keep it from all others
    try:
        save_file(_own_memory(tensors), path)
        path.chmod(mode)
    except SafetensorError as error:  # its own class, also for a full disk; as OSError it is reported like every failed write
        raise OSError(str(error)) from error


def _read_tensors(path: Path, expected_sha256: str, remedy: str) -> dict[str, Tensor]:
    try:
        found = sha256_of_file(path)
        if found != expected_sha256:
            raise AssetError(f"{path}: damaged: expected SHA-256 {expected_sha256[:16]}..., got {found[:16]}...; {remedy}")
        return load_file(path)
    except OSError as error:
        raise AssetError(f"{path}: could not be read: {error.strerror}; {remedy}") from error
    except SafetensorError as error:
        raise AssetError(f"{path}: expected a safetensors file: {error}; {remedy}") from error


def _read_record(path: Path, keys: set[str], remedy: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"{path}: could not be read: {error.strerror}; {remedy}") from error
    except ValueError as error:  # also what is not UTF-8
        raise AssetError(f"{path}: damaged: expected JSON: {error}; {remedy}") from error
    if not isinstance(record, dict) or not keys <= record.keys():
        raise AssetError(f"{path}: damaged: expected the keys {', '.join(sorted(keys))}; {remedy}")
    if record.get("format") != _FORMAT:
        raise AssetError(f"{path}: expected format {_FORMAT}, got {record.get('format')!r}: another version wrote it; {remedy}")
    return record


def _read_config(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_settings(path)
    except ConfigError as error:
        raise AssetError(f"{error}; {remedy}") from error
