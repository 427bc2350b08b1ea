"""Checkpoints come back bit for bit, appear whole, and say what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from head3d.run.checkpoint import (
    export_model,
    exported_hash,
    latest_checkpoint,
    load_exported,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from head3d.run.errors import AssetError, ConfigError, DataError
from head3d.run.seeding import numpy_generator, torch_generator


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model's settings."""

    width: int = 4  # channels


class Training:
    """Three kinds of state: parameters, optimizer, generators."""

    def __init__(self):
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            for index, parameter in enumerate(self.net.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch_generator("weights", index)))
        body, head = list(self.net[:2].parameters()), list(self.net[2:].parameters())
        groups = [{"params": body}, {"params": head, "lr": 0.03, "betas": (0.0, 0.99)}]
        self.optimizer = torch.optim.Adam(groups, lr=0.01, weight_decay=0.1, amsgrad=True)
        self.noise, self.order = torch_generator("noise"), numpy_generator("order")
        self.images_seen = 0

    def step(self):
        scale = float(self.order.random())
        loss = (self.net(torch.randn(5, 3, generator=self.noise)) * scale).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.images_seen += 5

    def save(self, folder):
        moments, settings = pack_optimizer(self.optimizer, "adam")
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()} | moments | {"noise": self.noise.get_state()}
        state = {"adam": settings, "order": self.order.bit_generator.state}
        return save_checkpoint(folder, self.images_seen, tensors, state, Tiny(), keep=2)

    def load(self, folder):
        saved = latest_checkpoint(folder)
        self.net.load_state_dict({name.removeprefix("net."): v for name, v in saved.tensors.items() if name.startswith("net.")})
        unpack_optimizer(self.optimizer, "adam", saved.tensors, saved.state["adam"])
        self.noise.set_state(saved.tensors["noise"])
        self.order.bit_generator.state = saved.state["order"]
        self.images_seen = saved.images_seen

    def everything(self):
        tensors = pack_optimizer(self.optimizer, "adam")[0] | self.net.state_dict() | {"noise": self.noise.get_state()}
        return tensors, self.optimizer.state_dict()["param_groups"], self.order.bit_generator.state, self.images_seen


def test_six_steps_equal_three_and_three_more_after_a_save_bit_for_bit(tmp_path):
    uninterrupted, first, second = Training(), Training(), Training()
    for _ in range(6):
        uninterrupted.step()
    for _ in range(3):
        first.step()
    first.save(tmp_path)
    second.step()  # what it did before is forgotten
    second.load(tmp_path)
    for _ in range(3):
        second.step()
    tensors, *others = second.everything()
    expected_tensors, *expected_others = uninterrupted.everything()
    assert others == expected_others
    assert tensors.keys() == expected_tensors.keys()
    for name, value in expected_tensors.items():
        assert torch.equal(tensors[name], value), name
    assert not torch.equal(first.net[0].weight, second.net[0].weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.5, 0.9)),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
    ],
)
def test_other_optimizers_go_on_as_if_nothing_had_happened(make, tmp_path):
    results = []
    for interrupted in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = make([parameter])
        for step in range(4):
            if interrupted and step == 2:
                tensors, state = pack_optimizer(optimizer, "o")
                saved = save_checkpoint(tmp_path, 2, tensors, state, Tiny(), keep=1)
                loaded = latest_checkpoint(tmp_path)
                assert saved == loaded.folder
                optimizer = make([parameter])
                unpack_optimizer(optimizer, "o", loaded.tensors, loaded.state)
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "half": whole.half(), "bfloat": whole.bfloat16(), "integers": torch.arange(3), "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(0.1), "empty": torch.zeros(0, 3), "whole": whole, "same": whole, "transposed": whole.T, "row": whole[1],
        "nan": torch.tensor(float("nan")),
    }  # fmt: skip
    state = {"number": 0.1, "text": "ü", "nested": {"list": [1, None, True]}}
    folder = save_checkpoint(tmp_path, 1234, tensors, state, {"width": 3}, keep=1)
    loaded = latest_checkpoint(tmp_path)
    assert (loaded.folder, loaded.images_seen, loaded.state, loaded.config) == (folder, 1234, state, {"width": 3})
    assert folder == tmp_path / "checkpoints" / "000001234"
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "state.json", "tensors.safetensors"]
    assert loaded.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded.tensors[name].dtype == value.dtype and torch.equal(loaded.tensors[name].nan_to_num(7), value.nan_to_num(7)), name
    assert (folder / "tensors.safetensors").stat().st_size < 2000  # a row is stored as a row, not with the storage behind it


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for images in (900, 1000, 20, 1_000_000_000):
        save_checkpoint(tmp_path, images, {"x": torch.tensor(images)}, {}, Tiny(), keep=2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["000001000", "1000000000"]
    assert latest_checkpoint(tmp_path).images_seen == 1_000_000_000


def test_saving_twice_at_the_same_point_replaces(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"x": torch.tensor(value)}, {}, Tiny(), keep=3)
    assert latest_checkpoint(tmp_path).tensors["x"] == 2.0


def test_a_run_without_checkpoint_starts_from_the_beginning(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_save_that_is_killed_half_way_is_never_seen_and_swept_by_the_next(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, Tiny(), keep=5)
    program = (
        "import os, signal, sys, torch; from head3d.run import checkpoint\n"
        "checkpoint.save_yaml = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save_checkpoint(sys.argv[1], 2, {'x': torch.tensor(2.0)}, {}, {}, keep=5)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert latest_checkpoint(tmp_path).images_seen == 1
    save_checkpoint(tmp_path, 3, {"x": torch.tensor(3.0)}, {}, Tiny(), keep=5)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000000001", "000000003"]


@pytest.fixture
def small_files():
    """The system refuses to let any file grow beyond a megabyte, as a full disk would in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_that_the_disk_refuses_leaves_the_one_before_it(tmp_path, small_files):
    save_checkpoint(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, Tiny(), keep=1)
    with pytest.raises(DataError, match=r"000000002: could not be written: .*free space"):
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(1 << 19)}, {}, Tiny(), keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["000000001"]


def test_an_export_that_the_disk_refuses_leaves_nothing(tmp_path, small_files):
    with pytest.raises(DataError, match=r"model.safetensors: could not be written: .*free space"):
        export_model(tmp_path, {"x": torch.zeros(1 << 19)}, Tiny(), "tiny", 0)
    assert os.listdir(tmp_path) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tensors.safetensors", truncate, "damaged: expected SHA-256"),
        ("tensors.safetensors", flip_a_bit, "damaged: expected SHA-256"),
        ("tensors.safetensors", Path.unlink, "could not be read: No such file"),
        ("state.json", truncate, "damaged: expected JSON"),
        ("state.json", lambda path: path.write_text("{}"), "damaged: expected the keys images_seen, state, tensors_sha256"),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "damaged: expected JSON"),
        ("state.json", Path.unlink, "could not be read: No such file"),
        ("config.yaml", Path.unlink, "there is no such configuration file"),
        ("config.yaml", lambda path: path.write_text("a: ["), "not valid YAML"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_with_file_and_remedy(tmp_path, name, damage, message):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(9)}, {}, Tiny(), keep=5)
    folder = save_checkpoint(tmp_path, 2, {"x": torch.ones(9)}, {}, Tiny(), keep=5)
    damage(folder / name)
    with pytest.raises(AssetError) as error:
        latest_checkpoint(tmp_path)
    text = str(error.value)
    assert str(folder / name) in text and message in text
    assert f"delete the folder {folder}" in text and "goes on from 000000001" in text


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(9)}, {}, Tiny(), keep=1)
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(AssetError, match=r"expected format 1, got 99.*starts from the beginning"):
        latest_checkpoint(tmp_path)


def test_an_optimizer_over_other_parameters_is_refused():
    def optimizer(*sizes):
        made = torch.optim.Adam([torch.nn.Parameter(torch.ones(size)) for size in sizes])
        for parameter in made.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        return made

    tensors, state = pack_optimizer(optimizer(3, 4), "adam")
    with pytest.raises(AssetError, match=r"optimizer adam: expected groups of \[1\] parameters, the checkpoint has \[2\]"):
        unpack_optimizer(optimizer(3), "adam", tensors, state)
    with pytest.raises(AssetError, match=r"parameter 1 has shape \(5,\), its exp_avg in the checkpoint \(4,\)"):
        unpack_optimizer(optimizer(3, 5), "adam", tensors, state)


@pytest.mark.parametrize("half", [False, True])
def test_an_exported_model_comes_back_as_float32_with_its_config(tmp_path, half):
    weights = {"w": torch.randn(3, 4, generator=torch_generator(1)), "steps": torch.tensor(7)}
    export_model(tmp_path / "model", weights, Tiny(width=9), "tiny", 640, half)
    state, config = load_exported(tmp_path / "model", Tiny, "tiny")
    assert config == Tiny(width=9)
    assert state["w"].dtype == torch.float32 and state["steps"] == 7
    assert torch.equal(state["w"], weights["w"].half().float() if half else weights["w"])
    assert sorted(os.listdir(tmp_path / "model")) == ["config.yaml", "model.json", "model.safetensors"]
    assert json.loads((tmp_path / "model" / "model.json").read_text())["images_seen"] == 640


def test_whoever_may_read_the_settings_of_an_export_may_read_its_weights(tmp_path):
    folder = export_model(tmp_path, Training().net.state_dict(), Tiny(), "net", images_seen=0)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.yaml").stat().st_mode


def test_equal_weights_have_an_equal_hash(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        export_model(tmp_path / name, {"x": torch.tensor(value)}, Tiny(), "tiny", 0)
    assert exported_hash(tmp_path / "a") == exported_hash(tmp_path / "b") != exported_hash(tmp_path / "c")
    assert len(exported_hash(tmp_path / "a")) == 16


def test_an_export_that_was_broken_off_is_no_model(tmp_path, monkeypatch):
    export_model(tmp_path, {"x": torch.tensor(1.0)}, Tiny(), "tiny", 0)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("head3d.run.checkpoint.save_yaml", stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path, {"x": torch.tensor(2.0)}, Tiny(), "tiny", 0)
    with pytest.raises(AssetError, match=r"model.json: could not be read.*training command"):
        load_exported(tmp_path, Tiny, "tiny")


def test_a_wrong_model_folder_is_an_error_with_remedy(tmp_path):
    with pytest.raises(AssetError, match=r"absent: there is no such folder; give the folder of a finished tiny model"):
        load_exported(tmp_path / "absent", Tiny, "tiny")
    export_model(tmp_path, {"x": torch.ones(9)}, {"width": 4, "depth": 5}, "tiny", 0)
    with pytest.raises(AssetError, match=r"expected a model of kind 'genhead', got 'tiny'"):
        load_exported(tmp_path, Tiny, "genhead")
    with pytest.raises(ConfigError, match=r"config.yaml: unknown key depth \(value 5\)"):
        load_exported(tmp_path, Tiny, "tiny")
    flip_a_bit(tmp_path / "model.safetensors")
    with pytest.raises(AssetError, match=r"model.safetensors: damaged"):
        load_exported(tmp_path, Tiny, "tiny")


def test_numbers_of_numpy_generators_survive_json(tmp_path):
    generator = np.random.default_rng(3)
    save_checkpoint(tmp_path, 0, {}, generator.bit_generator.state, Tiny(), keep=1)
    expected = generator.random(4)
    again = np.random.default_rng()
    again.bit_generator.state = latest_checkpoint(tmp_path).state
    assert (again.random(4) == expected).all()
