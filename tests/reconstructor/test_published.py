"""Published reconstructor files come in under our names, and what comes in is driven by vectors of an encoder that is not here."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from head3d.deformation import DeformationConfig
from head3d.head_model import load_head_model
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig
from head3d.procedural_head import build_procedural_head
from head3d.run.errors import AssetError, ConfigError, DataError
from head3d.run.seeding import torch_generator, weights_drawn_from
from head3d.surface import SurfaceConfig
from pipelines.__main__ import main
from reconstructor.drive import DriveRun, MeshConfig, drive
from reconstructor.evaluate import EvaluateRun, evaluate
from reconstructor.model import Reconstructor, load_reconstructor
from reconstructor.published import PORTRAIT4D_NAMES, PUBLISHED, adopt

TO_PUBLISHED = (  # of the renderer, in order
    ("superresolution.blocks.", "superresolution.block"),
    ("decoder.hidden.", "decoder.net.0."),
    ("decoder.density.", "decoder.out_sigma."),
    ("decoder.color.", "decoder.out_rgb."),
    ("to_image.", "torgb."),
)


def published_names():
    """Our names of the architecture's tensors -> the published ones, for up to four blocks and layers."""
    found = {}
    for pattern, ours in PORTRAIT4D_NAMES:
        parts = re.split(r"(\(\\d\+\)|\(weight\|bias\))", pattern)
        choices = [{r"(\d+)": "0123", "(weight|bias)": ("weight", "bias")}.get(part, (part,)) for part in parts]
        for choice in itertools.product(*choices):
            name = re.sub(r"\\(.)", r"\1", "".join(choice))
            found[re.fullmatch(pattern, name).expand(ours)] = name
    return found


@pytest.fixture(scope="module")
def network(world, tmp_path_factory):
    """A small network of the published kind (image motion, two blocks of super-resolution), its head file, and both as published."""
    path = tmp_path_factory.mktemp("head") / "flame.npz"
    np.savez(path, **build_procedural_head())
    superresolution = SuperResolutionConfig(input_resolution=8, feature_channels=world.model.feature_channels, channels=(4, 3), w_dim=5)
    config = dataclasses.replace(
        world.model,
        architecture=dataclasses.replace(world.model.architecture, motion="image"),
        deformation=DeformationConfig(published=True),
        superresolution=superresolution,
    )
    with weights_drawn_from(torch_generator("published")):
        model = Reconstructor(config, load_head_model(str(path)))
    names, tensors = published_names(), {"w_avg": torch.randn(5, generator=torch_generator("w")), "deformer.uv": torch.zeros(2)}
    for name, value in model.weights().items():
        own = name
        for ours, theirs in TO_PUBLISHED:
            own = own.replace(ours, theirs)
        tensors[names[name.removeprefix("architecture.")] if name.startswith("architecture.") else own] = value.clone()
    return model.eval(), path, tensors


@pytest.fixture(scope="module")
def imported(network, tmp_path_factory):
    model, head, tensors = network
    folder = tmp_path_factory.mktemp("imported")
    save_file(tensors, folder / "network.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.import_published.PUBLISHED", model.config)
        command = ["import-published", str(folder / "network.safetensors"), "--out", str(folder / "export"), "--head_model", str(head)]
        assert main(command) == 0
    return folder / "export"


@torch.no_grad()
def test_an_imported_reconstructor_has_the_weights_and_paints_with_w_avg_as_published(network, imported):
    model, _, tensors = network
    ours = load_reconstructor(imported)
    assert ours.config == model.config
    for part in ("architecture", "decoder"):
        expected, found = getattr(model, part).state_dict(), getattr(ours, part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    published = SuperResolution(dataclasses.replace(model.config.superresolution, style="given"))
    published.load_state_dict(model.superresolution.state_dict())
    generator = torch_generator("picture")
    raw, features = torch.rand(1, 3, 8, 8, generator=generator), torch.rand(1, published.config.feature_channels, 8, 8, generator=generator)
    expected = published(raw, features, tensors["w_avg"][None])
    assert torch.allclose(ours.superresolution(raw, features), expected, atol=1e-5)
    assert not torch.allclose(model.superresolution(raw, features), expected, atol=1e-2)


def test_the_published_shapes_are_those_of_the_default_network(parity, built_in_head):
    tensors = {}
    for entry in json.loads((parity / "reconstructor/recipe.json").read_text()):
        constant = entry.get("constant") if entry["key"].endswith("resample_filter") else None
        tensors[entry["key"]] = torch.empty(entry["shape"], device="meta") if constant is None else torch.tensor(constant)
    with torch.device("meta"):
        network = Reconstructor(PUBLISHED, built_in_head)
    found = adopt(tensors, "recipe")
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in network.weights().items()}


def test_what_is_unknown_or_missing_in_a_published_reconstructor_is_named(network, tmp_path, capsys, monkeypatch):
    model, head, tensors = network
    with pytest.raises(AssetError, match="here: encoder_detail.fancy"):
        adopt(tensors | {"encoder_detail.fancy": torch.zeros(1)}, "here")
    with pytest.raises(AssetError, match="expected w_avg of the 5 numbers that superresolution.blocks.0.* takes, got none"):
        adopt({name: value for name, value in tensors.items() if name != "w_avg"}, "here")
    monkeypatch.setattr("pipelines.import_published.PUBLISHED", model.config)
    save_file({name: value for name, value in tensors.items() if name != "background.out_conv.bias"}, tmp_path / "a.safetensors")
    assert main(["import-published", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out"), "--head_model", str(head)]) == 2
    assert "1 missing (architecture.background.out.bias)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_vectors_in_files_drive_it_and_nothing_else_does(imported, world, tmp_path):
    vectors = torch.randn(3, 548, generator=torch_generator("vectors")).numpy()
    np.savez(tmp_path / "motion.npz", vector=vectors, neck_pose=np.linspace(0, 0.3, 9).reshape(3, 3))
    np.savez(tmp_path / "source.npz", vector=vectors[:1])
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "face.png")
    settings = DriveRun(
        out=tmp_path / "out",
        reconstructor=imported,
        source=str(tmp_path / "face.png"),
        motion=str(tmp_path / "motion.npz"),
        source_vector=tmp_path / "source.npz",
        outputs=("frames", "mesh"),
        mesh=MeshConfig(surface=SurfaceConfig(resolution=8, threshold=0.3)),  # an untrained field is dense everywhere
    )
    assert drive(settings) == 0
    frames = sorted((tmp_path / "out" / "frames").iterdir())
    assert len(frames) == 3 and len({path.read_bytes() for path in frames}) == 3
    for changes in ({"source_vector": None}, {"motion": str(tmp_path / "out" / "frames")}):
        with pytest.raises(ConfigError, match="an encoder that is not here .*--source_vector FILE.npz"):
            drive(dataclasses.replace(settings, out=tmp_path / "other", **changes))
    with pytest.raises(DataError, match="motion.npz: expected one motion vector"):
        drive(dataclasses.replace(settings, out=tmp_path / "other", source_vector=tmp_path / "motion.npz"))
    with pytest.raises(ConfigError, match="an encoder that is not here"):
        evaluate(EvaluateRun(out=tmp_path / "evaluation", reconstructor=imported, shards=world.shards, generator=world.generator))
