"""Settings: files, command line, and what a user reads when one is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from head3d.run.config import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config_hash,
    from_dict,
    load_yaml,
    resolve,
    save_yaml,
    to_dict,
)
from head3d.run.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Network:
    """The network's sizes."""

    widths: tuple[PositiveInt, ...] = (64, 32)  # channels of each block
    activation: Literal["relu", "lrelu"] = "lrelu"  # after each block
    rate: PositiveFloat = 1e-3  # learning rate
    dropout: Fraction = 0.0  # share of units set to zero
    bias: bool = True  # add a bias


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training."""

    network: Network = dataclasses.field(default_factory=Network)
    steps: PositiveInt = 1  # how many


@dataclasses.dataclass(frozen=True)
class Run:
    """Train it."""

    out: Path  # the run's folder
    seed: NonNegativeInt = 0  # of every draw
    head_model: str | Path | None = None  # a file; none for the built-in head
    network: Network = dataclasses.field(default_factory=Network)
    extra: Network | None = None
    heads: tuple[Network, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: {"image": 1.0})
    small: Stage = dataclasses.field(default_factory=lambda: Stage(Network(widths=(4,), rate=0.5), steps=9))

    def __post_init__(self):
        if self.seed == 13:
            raise ValueError("13 brings bad luck")


@dataclasses.dataclass(frozen=True)
class Check:
    """Check a folder."""

    folder: tyro.conf.Positional[Path]  # what to check
    samples: PositiveInt = 4  # how many to look at


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_command_line(tmp_path):
    file = write(tmp_path, "out: runs/x\nseed: 3\nnetwork: {widths: [8], rate: 2e-3}\nextra: {dropout: 0.5}\n")
    config = resolve(Run, file, ["--seed", "4", "--network.widths", "16", "8", "--network.bias", "false", "--head-model", "a.npz"], "train")
    expected = Run(Path("runs/x"), 4, "a.npz", Network(widths=(16, 8), rate=2e-3, bias=False), Network(dropout=0.5))
    assert config == expected
    assert isinstance(config.out, Path) and isinstance(config.network.widths, tuple)


@pytest.mark.parametrize("out", ["", "out: a\n"])
def test_what_a_section_leaves_out_is_as_in_the_default_of_its_field(tmp_path, out):
    file = write(tmp_path, f"{out}small: {{network: {{rate: 0.25}}}}\nextra: {{dropout: 0.5}}\n")
    config = resolve(Run, file, [] if out else ["--out", "a"], "train")
    assert config.small == Stage(Network(widths=(4,), rate=0.25), steps=9)
    assert config.extra == Network(dropout=0.5)  # the default is none: what the class says
    assert load_yaml(Run, write(tmp_path, "out: a\nsmall: {steps: 2}")).small == Stage(Network(widths=(4,), rate=0.5), steps=2)
    with pytest.raises(ConfigError, match=r"small\.network\.pace"):
        resolve(Run, write(tmp_path, f"{out}small: {{network: {{pace: 0.25}}}}"), [], "train")


def test_a_setting_without_default_may_come_from_either_side(tmp_path):
    assert resolve(Run, None, ["--out", "a"], "train") == Run(Path("a"))
    assert resolve(Run, write(tmp_path, "out: a"), [], "train") == Run(Path("a"))
    assert resolve(Check, None, ["shards", "--samples", "2"], "check") == Check(Path("shards"), 2)
    assert resolve(Check, write(tmp_path, "samples: 2"), ["shards"], "check") == Check(Path("shards"), 2)


def test_a_setting_that_nobody_gives_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        resolve(Run, None, [], "train")
    assert stopped.value.code == 2 and "--out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"old.yaml: out: expected a value, it has no default, got nothing"):
        from_dict(Run, {}, "old.yaml")


def test_help_lists_every_setting_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        resolve(Run, None, ["--help"], "headfoundry train")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stopped.value.code == 0
    for text in ("headfoundry train", "Train it.", "--network.widths", "channels of each block (default: 64 32)", "{relu,lrelu}",
                 "learning rate (default: 0.001)", "the run's folder (required)", "--config FILE", "--dry-run"):  # fmt: skip
        assert text in shown


def test_an_unknown_key_is_named_with_value_file_and_what_is_allowed(tmp_path):
    file = write(tmp_path, "out: x\nsed: 3\nnetwork: {width: [8]}\nheads: [{}, {rat: 1}]\nextra: {zzz: 0}\n")
    with pytest.raises(ConfigError) as error:
        resolve(Run, file, [], "train")
    lines = str(error.value).splitlines()
    assert lines == [
        f"{file}: unknown key sed (value 3); did you mean seed? allowed here: out, seed, head_model, network, extra, heads, weights, small",
        f"{file}: unknown key network.width (value [8]); did you mean network.widths? "
        "allowed here: widths, activation, rate, dropout, bias",
        f"{file}: unknown key heads[1].rat (value 1); did you mean heads[1].rate? allowed here: widths, activation, rate, dropout, bias",
        f"{file}: unknown key extra.zzz (value 0); allowed here: widths, activation, rate, dropout, bias",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seed: "3"', "seed: expected a valid integer, got '3'"),
        ("seed: 1.5", "seed: expected a valid integer, got 1.5"),
        ("seed: true", "seed: expected a valid integer, got True"),
        ("seed: -1", "seed: expected greater than or equal to 0, got -1"),
        ("seed: 13", "13 brings bad luck"),
        ("out: 3", "out: expected a valid string, got 3"),
        ("head_model: 3", "head_model: expected a valid string, got 3"),
        ("network: 3", "network: expected an object, got 3"),
        ("network: {activation: gelu}", "network.activation: expected 'relu' or 'lrelu', got 'gelu'"),
        ("network: {dropout: 1.01}", "network.dropout: expected less than or equal to 1, got 1.01"),
        ("network: {rate: .inf}", "network.rate: expected a finite number, got inf"),
        ("network: {bias: no}", "network.bias: expected a valid boolean, got 'no'"),
        ("network: {widths: [8, 0]}", "network.widths[1]: expected greater than 0, got 0"),
        ("network: {widths: 8}", "network.widths: expected a valid array, got 8"),
        ("heads: [{}, {rate: 0}]", "heads[1].rate: expected greater than 0, got 0"),
        ("weights: {image: much}", "weights.image: expected a valid number, got 'much'"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_expectation(tmp_path, text, message):
    file = write(tmp_path, text if "out:" in text else f"out: x\n{text}")
    with pytest.raises(ConfigError) as error:
        resolve(Run, file, [], "train")
    assert str(file) in str(error.value) and message in str(error.value)


def test_every_wrong_value_is_told_at_once_even_if_something_is_missing(tmp_path):
    with pytest.raises(ConfigError) as error:
        resolve(Run, write(tmp_path, "seed: -1\nnetwork: {rate: fast, dropout: 2}"), ["--out", "x"], "train")
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == ["seed", "network.rate", "network.dropout"]


def test_the_range_of_a_setting_on_the_command_line_is_checked():
    with pytest.raises(ConfigError, match=r"the command line: network.rate: expected greater than 0, got -1.0"):
        resolve(Run, None, ["--out", "x", "--network.rate", "-1"], "train")


@pytest.mark.parametrize("arguments", [["--seed", "x"], ["--sed", "1"], ["--network.activation", "gelu"]])
def test_a_wrong_flag_on_the_command_line_ends_with_status_2_and_its_name(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        resolve(Run, None, ["--out", "x", *arguments], "train")
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected a mapping of settings"),
        ("seed: 1\nseed: 2", "the key seed is given twice"),
        ("seed: [1", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("1: 2", "a key must be text"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_yaml(Run, file)
    assert str(file) in str(error.value) and message in str(error.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: there is no such configuration file"):
        load_yaml(Run, tmp_path / "absent.yaml")


def test_yaml_is_read_as_in_version_1_2(tmp_path):
    config = load_yaml(Run, write(tmp_path, "out: no\nhead_model: 2020-01-01\nnetwork: {rate: 1e-4}\nextra: ~\n"))
    assert config == Run(Path("no"), head_model="2020-01-01", network=Network(rate=1e-4))


networks = st.builds(
    Network,
    widths=st.lists(st.integers(1, 1 << 40), max_size=3).map(tuple),
    activation=st.sampled_from(["relu", "lrelu"]),
    rate=st.floats(min_value=1e-300, allow_infinity=False),
    dropout=st.floats(0, 1),
    bias=st.booleans(),
)
text_of_any_kind = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@given(
    st.builds(
        Run,
        out=text_of_any_kind.map(Path),
        seed=st.integers(14),
        head_model=st.none() | text_of_any_kind | st.sampled_from(["1e3", "true", "null", "~", "0x1", "1_000", "12:30", "-"]),
        network=networks,
        extra=st.none() | networks,
        heads=st.lists(networks, max_size=2).map(tuple),
        weights=st.dictionaries(text_of_any_kind, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    )
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_yaml(config, path)
    assert load_yaml(Run, path) == config
    assert from_dict(Run, to_dict(config), "memory") == config
    assert config_hash(load_yaml(Run, path)) == config_hash(to_dict(config))


def test_the_hash_depends_on_values_and_not_on_their_order():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1}) != config_hash({"a": 1, "b": [3]})
    assert len(config_hash(Run(Path("x")))) == 16
