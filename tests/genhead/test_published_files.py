"""Published checkpoint files: what they hold arrives, what they would run does not."""

import io
import json
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genhead.background import BackgroundConfig
from genhead.generator import GenHead, GenHeadConfig, load_genhead
from genhead.published_config import adopt
from genhead.published_files import read_published
from head3d.deformation import DeformationConfig
from head3d.head_model import load_head_model
from head3d.networks.superresolution import SuperResolutionConfig
from head3d.procedural_head import build_procedural_head
from head3d.run.errors import AssetError
from pipelines.__main__ import main

CONFIG = GenHeadConfig(
    z_dim=6,
    w_dim=8,
    plane_resolution=16,
    plane_channels=2,
    feature_channels=4,
    decoder_hidden=5,
    channel_base=64,
    channel_max=8,
    image_resolution=16,
    deformation=DeformationConfig(published=True),
    background=BackgroundConfig(resolution=8, channels=4, z_dim=6, w_dim=7, mapping_layers=3, channel_base=32, channel_max=6),
    superresolution=SuperResolutionConfig(input_resolution=4, feature_channels=4, channels=(3, 2), w_dim=9),
    published=True,
)
TO_PUBLISHED = (  # in order; an expression of its own, so that a slip in the import's table shows
    ("background_network.synthesis.blocks.", "background.synthesis.b"),
    ("background_network.", "background."),
    ("backbone.blocks.", "backbone.synthesis.b"),
    ("superresolution.blocks.", "superresolution.block"),
    ("decoder.hidden.", "decoder.net.0."),
    ("decoder.density.", "decoder.out_sigma."),
    ("decoder.color.", "decoder.out_rgb."),
    ("mapping.layers.", "mapping.fc"),
    ("to_image.", "torgb."),
    ("w_average", "w_avg"),
)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "flame.npz"
    np.savez(path, **build_procedural_head())
    return path


@pytest.fixture(scope="module")
def weights(head_file):
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) for name, value in GenHead(CONFIG, load_head_model(head_file)).weights().items()}


def published_names(weights):
    """The same tensors as the published network has them: its names, its constants, its head."""
    tensors = {}
    for name, value in weights.items():
        name = f"backbone.{name}" if name.startswith("mapping.") else name
        for ours, theirs in TO_PUBLISHED:
            name = name.replace(ours, theirs)
        tensors[f"{name}_const" if name.endswith(".noise") else name] = value
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for name in ("backbone.synthesis.b8", "backbone.synthesis.b8.conv0", "superresolution.block0", "background.synthesis.b8"):
        tensors[f"{name}.resample_filter"] = torch.outer(taps, taps) / 64
    for block, side in ((0, 8), (1, 16)):
        tensors[f"superresolution.block{block}.conv1.noise_const"] = torch.randn(side, side)
        tensors[f"superresolution.block{block}.conv1.noise_strength"] = torch.zeros(())
    return tensors | {"deformer.flame_model.v_template": torch.zeros(7, 3), "deformer.faces": torch.zeros(2, 3, dtype=torch.long)}


@pytest.fixture(scope="module")
def published(weights):
    return published_names(weights)


@pytest.fixture
def original():
    """Modules and classes of the published code by their names, only while a pickle is written."""
    modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the original function ran")

    class EasyDict(dict):
        pass

    class Persistent(nn.Module):
        def __reduce__(self):
            state = dict(self.__dict__) | {"_init_kwargs": EasyDict(resolution=16, dtype=torch.float32, device=torch.device("cpu"))}
            source = "raise AssertionError('module_src ran')"
            meta = dict(type="class", version=6, module_src=source, class_name=type(self).__name__, state=state)  # noqa: C408 (as there)
            return _reconstruct_persistent_obj, (meta,), None

    for value, module in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        value.__module__, value.__qualname__ = module, value.__name__
        setattr(modules[module], value.__name__, value)
    sys.modules.update(modules)
    yield types.SimpleNamespace(Persistent=Persistent, EasyDict=EasyDict, forget=lambda: [sys.modules.pop(name) for name in modules])
    for name in modules:
        sys.modules.pop(name, None)


def network(tensors, original):
    """Nested modules that hold `tensors` by their dotted names; the decoder's hidden layer lies in a Sequential, as published."""
    root = original.Persistent()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Sequential() if step == "net" else original.Persistent())
            module = module._modules[step]
        if leaf in ("w_avg", "noise_const", "resample_filter", "v_template", "faces"):
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value))
    root.register_buffer("scratch", torch.zeros(3), persistent=False)
    return root


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_same(read, tensors):
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_published_pickle_gives_its_state_dict_and_runs_none_of_its_source(tmp_path, published, original, protocol):
    content = {
        "training_set_kwargs": original.EasyDict(path="ffhq", resolution=512, weights=np.float32(0.5), order=np.arange(3)),
        "G": None,
        "D": network({"b4.out.weight": torch.randn(2, 3)}, original),
        "G_ema": network(published, original),
    }
    path = write_pickle(tmp_path / "network-snapshot.pkl", content, protocol)
    original.forget()
    read = read_published(path)
    assert_same(read.tensors, published)
    assert read.skipped == ("training_set_kwargs", "D")
    assert not any(name.startswith(("torch_utils", "dnnlib")) for name in sys.modules)


def test_strided_and_shared_tensors_come_back_equal(tmp_path, original):
    base = torch.randn(4, 6)
    tensors = {"a": base.t(), "b": base[1:3, ::2], "c": base.half(), "d": torch.zeros(0, 3), "e": torch.tensor(2.0, dtype=torch.bfloat16)}
    path = write_pickle(tmp_path / "g.pkl", {"G_ema": network(tensors, original)})
    assert_same(read_published(path).tensors, tensors)


def test_state_dicts_in_torch_and_safetensors_files_give_the_same(tmp_path, published):
    torch.save(published, tmp_path / "a.pt")
    torch.save({"G_ema": published, "cur_nimg": 7}, tmp_path / "b.pth")
    save_file(published, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pth", "c.safetensors"):
        assert_same(read_published(tmp_path / name).tensors, published)
    assert read_published(tmp_path / "b.pth").skipped == ("cur_nimg",)


# ---- the command -------------------------------------------------------------------------------------------------------


def test_the_imported_export_loads_with_the_inferred_configuration_and_every_weight(
    tmp_path, published, weights, original, head_file, capsys
):
    path = write_pickle(tmp_path / "snapshot.pkl", {"D": original.Persistent(), "G_ema": network(published, original)})
    original.forget()
    assert main(["import-published", str(path), "--out", str(tmp_path / "export"), "--head_model", str(head_file)]) == 0
    printed = capsys.readouterr().out
    assert "left out: deformer, 2 tensors of the head model" in printed and "skipped, not needed for making pictures: D" in printed
    genhead = load_genhead(tmp_path / "export")
    assert genhead.config == CONFIG
    assert_same(genhead.weights(), weights)


def test_the_built_in_head_is_refused_for_published_weights(tmp_path, capsys):
    assert main(["import-published", "x.pkl", "--out", str(tmp_path / "export"), "--head_model", "procedural"]) == 2
    assert "expected" not in capsys.readouterr().out and not (tmp_path / "export").exists()


def test_the_published_shapes_are_the_default_configuration(parity):
    tensors = {}
    for entry in json.loads((parity / "genhead/recipe.json").read_text()):
        constant = entry.get("constant")
        tensors[entry["key"]] = torch.empty(entry["shape"], device="meta") if constant is None else torch.tensor(constant)
    assert adopt(tensors, "recipe").config == GenHeadConfig(published=True, deformation=DeformationConfig(published=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("backbone.encoder.weight", torch.zeros(3), r"here: backbone\.encoder\.weight \(3,\): expected a tensor of the published GenHead"),
        ("backbone.mapping.embed.weight", torch.zeros(8, 25), "conditioned on 325 numbers .* got 25"),
        ("backbone.synthesis.b8.conv1.weight", torch.zeros(7, 8, 3, 3), r"expected channels min\(base / size, most\) in backbone"),
        ("decoder.net.0.weight", torch.zeros(5, 3), "expected a decoder of 2 features"),
        ("background.mapping.fc0.weight", torch.zeros(7, 5), r"z_dim, background\.z_dim must be equal, got 6, 5"),
        ("superresolution.block0.conv0.affine.weight", None, "expected a tensor superresolution.* got none"),
        ("backbone.synthesis.b4.conv1.weight", None, r"expected blocks of backbone at 4, 8, 16, \.\.\., got \[8, 16\]"),
        ("backbone.mapping.fc0.weight", torch.zeros(8, 8), "expected a first mapping layer of more than 8 inputs"),
    ],
)
def test_tensors_that_are_no_genhead_are_named(published, name, value, message):
    tensors = {key: tensor for key, tensor in published.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(AssetError, match=message):
        adopt(tensors, "here")


def test_a_missing_bias_and_weights_that_are_not_finite_are_named(tmp_path, published, head_file, capsys):
    command = ["--out", str(tmp_path / "export"), "--head_model", str(head_file)]
    save_file({name: value for name, value in published.items() if name != "decoder.out_rgb.bias"}, tmp_path / "a.safetensors")
    assert main(["import-published", str(tmp_path / "a.safetensors"), *command]) == 2
    assert "1 missing (decoder.color.bias); use a published GenHead or reconstructor .pkl as downloaded" in capsys.readouterr().err
    save_file(published | {"decoder.out_rgb.bias": torch.full((4,), float("nan"))}, tmp_path / "b.safetensors")
    assert main(["import-published", str(tmp_path / "b.safetensors"), *command]) == 2
    assert "expected finite weights, got others in decoder.color.bias" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


# ---- hostile and damaged files -----------------------------------------------------------------------------------------


def hostile_calls(marker):
    return {
        "system": (os.system, f"touch {marker}"),
        "eval": (eval, f"__import__('pathlib').Path('{marker}').touch()"),
        "exec": (exec, f"open('{marker}', 'w')"),
        "getattr": (getattr, 1, "real"),
        "call": (subprocess.call, ["touch", str(marker)]),
        "open": (io.open, str(marker), "w"),
        "load": (torch.load, str(marker)),
        "import_module": (__import__("importlib").import_module, "antigravity"),
        "partial": (__import__("functools").partial, os.system),
    }


@pytest.mark.parametrize("name", list(hostile_calls("")))
@pytest.mark.parametrize("place", ["top", "meta", "settings"])
def test_a_pickle_that_names_a_function_is_refused_by_name_and_nothing_runs(tmp_path, original, hostile, name, place):
    marker = tmp_path / "ran"
    bad = hostile(*hostile_calls(marker)[name])
    module = original.Persistent()
    content = {"G_ema": module}
    match place:
        case "top":
            content["aside"] = bad
        case "meta":
            module.bad = bad
        case "settings":
            content["training_set_kwargs"] = original.EasyDict(bad=bad)
    with pytest.raises(AssetError, match=rf"evil\.pkl: refused to load: the pickle asks for \S+\.{name}, .* nothing of it was run"):
        read_published(write_pickle(tmp_path / "evil.pkl", content))
    assert not marker.exists()


def test_allowed_names_cannot_be_bent(tmp_path, original, hostile):
    for state in (None, [1], "text"):
        text = pickle.dumps(hostile(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, {"type": "class", "state": state}))
        (tmp_path / "bent.pkl").write_bytes(text)
        with pytest.raises(AssetError, match=r"bent\.pkl: not a readable pickle .*persistent object"):
            read_published(tmp_path / "bent.pkl")
    endless = original.Persistent()
    endless.inner = endless.outer = original.Persistent()
    content = pickle.dumps({"G_ema": endless})
    (tmp_path / "good.pkl").write_bytes(content)
    assert read_published(tmp_path / "good.pkl").tensors == {}


def test_other_contents_are_errors_that_say_what_was_found(tmp_path, original):
    write_pickle(tmp_path / "list.pkl", [1])
    write_pickle(tmp_path / "other.pkl", {"G": 1})
    write_pickle(tmp_path / "number.pkl", {"G_ema": 3})
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    (tmp_path / "net.onnx").touch()
    for name, message in (
        ("list.pkl", "expected a dictionary with the network 'G_ema', got a list"),
        ("other.pkl", r"got a dictionary of G \(int\)"),
        ("number.pkl", "G_ema is not a torch module"),
        ("list.pt", "expected tensors by name, got a list"),
        ("net.onnx", r"ends in \.pkl, \.pt, \.pth or \.safetensors, got '\.onnx'"),
        ("nowhere.pkl", "there is no such file"),
    ):
        with pytest.raises(AssetError, match=message):
            read_published(tmp_path / name)


@pytest.mark.parametrize("kind", ["pkl", "pt", "safetensors"])
def test_damaged_and_truncated_files_are_errors_that_name_them(tmp_path, original, kind):
    tensors, path = {"a.weight": torch.randn(64, 8)}, tmp_path / f"net.{kind}"
    match kind:
        case "pkl":
            write_pickle(path, {"G_ema": network(tensors, original)})
        case "pt":
            torch.save(tensors, path)
        case "safetensors":
            save_file(tensors, path)
    whole = path.read_bytes()
    for content in (b"", b"not a network", whole[: len(whole) // 2], whole[:40] + bytes(200) + whole[240:]):
        path.write_bytes(content)
        with pytest.raises(AssetError, match=rf"net\.{kind}"):
            read_published(path)
