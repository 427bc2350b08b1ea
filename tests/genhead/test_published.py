"""The published names, and the published networks' numbers where the reference folder is at hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from genhead.background import BackgroundConfig, BackgroundGenerator
from genhead.parity import compare
from genhead.published import GENHEAD_NAMES, read_recipe, rename
from head3d.networks.stylegan2 import Mapping, Synthesis
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig
from head3d.run.errors import AssetError


def test_every_kind_of_published_name_has_one_place() -> None:
    names = {
        "backbone.mapping.fc1.bias": "mapping.layers.1.bias",
        "backbone.mapping.w_avg": "mapping.w_average",
        "backbone.synthesis.b4.const": "backbone.blocks.4.const",
        "backbone.synthesis.b128.conv0.affine.weight": "backbone.blocks.128.conv0.affine.weight",
        "backbone.synthesis.b128.conv0.noise_const": "backbone.blocks.128.conv0.noise",
        "backbone.synthesis.b128.torgb.affine.bias": "backbone.blocks.128.to_image.affine.bias",
        "background.synthesis.b64.conv1.noise_strength": "background_network.synthesis.blocks.64.conv1.noise_strength",
        "decoder.out_sigma.weight": "decoder.density.weight",
        "superresolution.block1.torgb.weight": "superresolution.blocks.1.to_image.weight",
    }
    dropped = ["superresolution.block0.conv1.noise_const", "superresolution.block0.conv1.noise_strength"]
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate([*names, *dropped])}
    assert rename(tensors, GENHEAD_NAMES, "here") == {ours: tensors[name] for name, ours in names.items()}


def test_foreign_names_and_filters_are_refused() -> None:
    with pytest.raises(AssetError, match=r"here: backbone.encoder.weight \(3,\): expected a tensor of the published GenHead"):
        rename({"backbone.encoder.weight": torch.zeros(3)}, GENHEAD_NAMES, "here")
    with pytest.raises(AssetError, match="expected the 4x4 filter"):
        rename({"superresolution.block0.resample_filter": torch.ones(4, 4)}, GENHEAD_NAMES, "here")


def test_a_recipe_regenerates_its_tensors(tmp_path: Path) -> None:
    entries = [{"key": "a", "shape": [2, 3], "mean": 1.0, "std": 2.0, "seed": 7}, {"key": "b", "shape": [4], "constant": 0.5}]
    (tmp_path / "recipe.json").write_text(json.dumps(entries))
    tensors = read_recipe(tmp_path)
    assert torch.equal(tensors["a"], 1 + 2 * torch.randn(2, 3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(tensors["b"], torch.full((4,), 0.5))


@pytest.mark.parametrize("text", ["[{", "[1]", '[{"key": "a"}]', '[{"key": "a", "shape": [2], "constant": [1, 2, 3]}]'])
def test_a_malformed_recipe_names_its_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssetError, match="no such file"):
        read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(AssetError, match=r"recipe.json: expected a list of entries"):
        read_recipe(tmp_path)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_the_published_networks_give_the_recorded_numbers(parity: Path) -> None:
    """Everything but the deformed rendering between planes and raw image; about 5 s on one core."""
    reference = parity / "genhead"
    recorded = {name: torch.from_numpy(array).float() for name, array in np.load(reference / "io.npz").items() if name != "uv"}
    networks = nn.Module()
    networks.backbone = Synthesis(512, 256, 192)
    networks.mapping = Mapping(512, 325, 512, networks.backbone.num_ws, layers=2)
    networks.background_network = BackgroundGenerator(BackgroundConfig())
    networks.superresolution = SuperResolution(SuperResolutionConfig())
    weights = rename(read_recipe(reference), GENHEAD_NAMES, str(reference))
    decoder = {name: tuple(weights.pop(name).shape) for name in list(weights) if name.startswith("decoder.")}
    assert sorted(decoder.values()) == [(1,), (1, 64), (32,), (32, 64), (64,), (64, 32)]
    networks.load_state_dict(weights)  # strict: each tensor of either side has its partner

    with torch.no_grad():
        condition = torch.cat([recorded["condition_camera"], recorded["shape"]], dim=1)
        ws = networks.mapping(recorded["z"], condition, truncation_psi=0.7)
        assert relative(ws[:, 0], recorded["ws"]) <= 1e-5
        planes = networks.backbone(ws)[:, :, ::16, ::16]
        assert relative(planes, recorded["planes_every16"]) <= 1e-5
        background = networks.background_network(recorded["z"])
        background = functional.interpolate(background, size=(64, 64), mode="bilinear", align_corners=False)
        assert relative(2 * background - 1, recorded["out_background"]) <= 1e-3
        image = networks.superresolution(recorded["out_image"][:1], recorded["out_image_feature"][:1])
    error = (image - recorded["out_image_sr"][:1]).square().mean().item()
    assert 10 * math.log10(4 / error) >= 60


def test_a_folder_of_recordings_without_its_head_is_told_so(tmp_path: Path, parity: Path) -> None:
    folder = tmp_path / "genhead"
    folder.mkdir()
    (folder / "io.npz").symlink_to(parity / "genhead" / "io.npz")
    with pytest.raises(AssetError, match=rf"{tmp_path}/head\.npz: expected the head of the recordings above {folder}, found no such file"):
        compare(folder)
