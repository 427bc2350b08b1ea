"""Configuration: YAML -> checked frozen dataclass -> command-line overrides -> checked again.

pydantic checks types, ranges and choices; tyro reads the command line and writes the help from the fields' comments.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from head3d.run.errors import ConfigError
from head3d.run.files import write_atomic

PositiveInt = Annotated[int, pydantic.Field(gt=0)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]

Config = TypeVar("Config")


def resolve(config_class: type[Config], file: Path | None, arguments: Sequence[str], prog: str) -> Config:
    """The configuration of one command: class defaults, then `file`, then `arguments` ("--section.key", "value", ...).

    `prog` is the command's name in messages. "--help" among the arguments prints every setting and exits with status 0; a flag that
    tyro cannot read prints what is allowed and exits with status 2. Raises ConfigError for what is wrong in the file or out of range.
    """
    import tyro  # a third of a second; `headfoundry --help` does without

    values = {} if file is None else _read_yaml(file)
    where = "the defaults" if file is None else str(file)
    description = (
        f"{config_class.__doc__ or ''}\n\n--config FILE reads settings from a YAML file, --dry-run prints the resolved settings and stops. "
        "What is given here wins over the file."
    )
    config = tyro.cli(
        config_class,
        prog=prog,
        description=description,
        args=_capitalise_booleans(config_class, arguments),
        default=_from_partial(config_class, values, where, tyro.MISSING),
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    return from_dict(config_class, to_dict(config), "the command line" if arguments else where)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON types (paths are strings, tuples lists), in the order of its fields."""
    return _adapter(type(config)).dump_python(config, mode="json", warnings=False)


def from_dict(config_class: type[Config], values: dict[str, Any], where: str) -> Config:
    """Check `values` and build the config.

    Types are strict: "5" is no number, 1.5 no integer; a list may stand for a tuple and text for a path. What a section leaves out is as
    in the default of the field that holds it, not of its class. Raises ConfigError that names `where`, each wrong key and its value, and
    what is allowed.
    """
    return _validate(config_class, values, where)


def load_yaml(config_class: type[Config], path: Path | str) -> Config:
    """Read a config that `save_yaml` or a person wrote. Raises ConfigError as `from_dict`."""
    return from_dict(config_class, _read_yaml(Path(path)), str(path))


def read_settings(path: Path | str) -> dict[str, Any]:
    """A YAML file's mapping, unchecked by any class; {} if it is empty. Raises ConfigError if it is missing or no mapping."""
    return _read_yaml(Path(path))


def save_yaml(config: Any, path: Path | str) -> None:
    """Write a config (or a dict of JSON types) so that `load_yaml` gives an equal one."""
    write_atomic(path, yaml_text(config))


def yaml_text(config: Any) -> str:
    """The config as YAML text, fields in their order."""
    return yaml.dump(_as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Any) -> str:
    """16 hex digits of SHA-256 over the sorted JSON of a config or dict: equal settings, equal hash."""
    text = json.dumps(_as_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_dict(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else to_dict(config)


# Checking


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _validate(kind: Any, values: Any, where: str, prefix: str = "", absent: Sequence[str] = ()) -> Any:
    """`values` as `kind`: a dataclass, or a field's type under the dotted key `prefix`. None if only keys in `absent` are missing."""
    problems = list(_unknown_keys(kind, values, prefix))
    if not problems:
        try:
            # JSON and not Python input: there, strict mode still lets a list be a tuple and text be a path
            return _adapter(kind).validate_json(json.dumps(_completed(kind, values)), strict=True)
        except pydantic.ValidationError as error:
            problems = _explain(error, kind, prefix, absent)
            if not problems:
                return None
        except TypeError as error:
            raise ConfigError(f"{where}: settings are text, numbers, true, false, null, lists and mappings; {error}") from error
    raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))


def _completed(section: Any, values: Any) -> Any:
    """`values` of a section (a dataclass, or the default of a field, an instance), what they leave out of sections below filled in."""
    if not isinstance(values, dict) or not dataclasses.is_dataclass(section):
        return values
    complete = dict(values) if isinstance(section, type) else to_dict(section) | values
    for f in dataclasses.fields(section):
        if f.name in values:
            complete[f.name] = _completed(_default(f) if isinstance(section, type) else getattr(section, f.name), values[f.name])
    return complete


def _default(field: dataclasses.Field) -> Any:
    """MISSING where a field has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _from_partial(config_class: type[Config], values: dict[str, Any], where: str, missing: Any) -> Config:
    """A config for tyro's defaults, where fields that are required and not in `values` are `missing` for the command line to give."""
    fields = dataclasses.fields(config_class)
    absent = [f.name for f in fields if f.name not in values and _is_required(f)]
    config = _validate(config_class, values, where, absent=absent)
    if config is not None:
        return config
    hints = typing.get_type_hints(config_class, include_extras=True)
    config = object.__new__(config_class)  # without its own checks, which wait for the whole
    for f in fields:
        if f.name in absent:
            value = missing
        elif f.name in values:
            value = _validate(hints[f.name], _completed(_default(f), values[f.name]), where, f.name)
        else:
            value = _default(f)
        object.__setattr__(config, f.name, value)
    return config


def _capitalise_booleans(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Let the command line say true and false as YAML does; tyro knows only Python's spelling."""
    switches = set(_boolean_keys(config_class, ""))
    spelled, previous = [], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and flag.removeprefix("--").replace("-", "_") in switches and value in ("true", "false"):
            argument = f"{flag}={value.capitalize()}"
        elif argument in ("true", "false") and previous.removeprefix("--").replace("-", "_") in switches:
            argument = argument.capitalize()
        spelled.append(argument)
        previous = argument
    return spelled


def _boolean_keys(config_class: type, prefix: str) -> Iterator[str]:
    for name, kind in typing.get_type_hints(config_class).items():
        if kind is bool:
            yield prefix + name
        elif dataclasses.is_dataclass(kind):
            yield from _boolean_keys(kind, f"{prefix}{name}.")


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown_keys(kind: Any, values: Any, prefix: str) -> Iterator[str]:
    """A message for each key in `values` that the dataclasses in `kind` do not have. pydantic drops them silently."""
    for config_class in _dataclasses_in(kind):
        if isinstance(values, dict):
            hints = typing.get_type_hints(config_class, include_extras=True)
            for key, value in values.items():
                dotted = f"{prefix}.{key}" if prefix else str(key)
                if key in hints:
                    yield from _unknown_keys(hints[key], value, dotted)
                else:
                    close = [f"{prefix}.{name}" if prefix else name for name in difflib.get_close_matches(str(key), hints, n=3)]
                    hint = f"did you mean {' or '.join(close)}? " if close else ""
                    yield f"unknown key {dotted} (value {_short(value)}); {hint}allowed here: {', '.join(hints)}"
        elif isinstance(values, list):
            for index, value in enumerate(values):
                yield from _unknown_keys(config_class, value, f"{prefix}[{index}]")


def _dataclasses_in(kind: Any) -> list[type]:
    """The dataclass that a field's type holds directly, optionally or in a tuple; none for other types and for a choice between several."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    if typing.get_origin(kind) in (Annotated, typing.Union, types.UnionType, tuple, list):
        found = [config_class for argument in typing.get_args(kind) for config_class in _dataclasses_in(argument)]
        return found if len(set(found)) == 1 else []
    return []


def _explain(error: pydantic.ValidationError, kind: Any, prefix: str, absent: Sequence[str]) -> list[str]:
    """One line a wrong key, but for missing ones in `absent`: the key, what is expected, what was found."""
    expected: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key = _dotted_key(problem["loc"], kind, prefix)
        if problem["type"] == "missing" and key in absent:
            continue
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected.setdefault(key, []).append("a value, it has no default" if problem["type"] == "missing" else message)
        found[key] = "nothing" if problem["type"] == "missing" else _short(problem["input"])
    return [f"{key}: expected {' or '.join(dict.fromkeys(expected[key]))}, got {found[key]}" for key in expected]


def _dotted_key(location: tuple[int | str, ...], kind: Any, prefix: str) -> str:
    """Keep of pydantic's location what the user wrote: keys and list positions, not the names of a union's members."""
    key = prefix
    for step in location:
        inside = _dataclasses_in(kind)
        if isinstance(step, int):
            key += f"[{step}]"
        elif inside and step in (hints := typing.get_type_hints(inside[0], include_extras=True)):
            key, kind = (f"{key}.{step}" if key else step), hints[step]
        elif typing.get_origin(kind) is dict:
            key += f".{step}"
    return key or "settings"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-3 is a number, `no` and `on` are text, dates are text; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"a key must be text, got {key!r}", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"~|null|Null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+0123456789."),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader: builds no objects)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: there is no such configuration file; configs/ holds the ones that come with the project") from error
    except OSError as error:
        raise ConfigError(f"{path}: could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got other bytes at position {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings (key: value), got {type(values).__name__}")
    return values
