"""Inception-v3 by file: the published names and shapes, its pictures and pools by hand, and what a wrong file is told."""

import os

import pytest
import torch
from safetensors.torch import save_file

from genhead.features import FRECHET_METRICS, chosen_features
from genhead.inception import Block, Inception, prepare, read_inception
from head3d.run.errors import AssetError

# Layer, channels in > out, kernel (height x width), as the published files have them.
FINE = "branch1x1 {0}>64 1x1, branch5x5_1 {0}>48 1x1, branch5x5_2 48>64 5x5, branch3x3dbl_1 {0}>64 1x1, branch3x3dbl_2 64>96 3x3, "
FINE += "branch3x3dbl_3 96>96 3x3, branch_pool {0}>{1} 1x1"
MIDDLE = "branch1x1 768>192 1x1, branch7x7_1 768>{0} 1x1, branch7x7_2 {0}>{0} 1x7, branch7x7_3 {0}>192 7x1, branch7x7dbl_1 768>{0} 1x1, "
MIDDLE += "branch7x7dbl_2 {0}>{0} 7x1, branch7x7dbl_3 {0}>{0} 1x7, branch7x7dbl_4 {0}>{0} 7x1, branch7x7dbl_5 {0}>192 1x7, "
MIDDLE += "branch_pool 768>192 1x1"
COARSE = "branch1x1 {0}>320 1x1, branch3x3_1 {0}>384 1x1, branch3x3_2a 384>384 1x3, branch3x3_2b 384>384 3x1, branch3x3dbl_1 {0}>448 1x1, "
COARSE += "branch3x3dbl_2 448>384 3x3, branch3x3dbl_3a 384>384 1x3, branch3x3dbl_3b 384>384 3x1, branch_pool {0}>192 1x1"
PUBLISHED = {
    "": "Conv2d_1a_3x3 3>32 3x3, Conv2d_2a_3x3 32>32 3x3, Conv2d_2b_3x3 32>64 3x3, Conv2d_3b_1x1 64>80 1x1, Conv2d_4a_3x3 80>192 3x3",
    "Mixed_5b.": FINE.format(192, 32),
    "Mixed_5c.": FINE.format(256, 64),
    "Mixed_5d.": FINE.format(288, 64),
    "Mixed_6a.": "branch3x3 288>384 3x3, branch3x3dbl_1 288>64 1x1, branch3x3dbl_2 64>96 3x3, branch3x3dbl_3 96>96 3x3",
    "Mixed_6b.": MIDDLE.format(128),
    "Mixed_6c.": MIDDLE.format(160),
    "Mixed_6d.": MIDDLE.format(160),
    "Mixed_6e.": MIDDLE.format(192),
    "Mixed_7a.": "branch3x3_1 768>192 1x1, branch3x3_2 192>320 3x3, branch7x7x3_1 768>192 1x1, branch7x7x3_2 192>192 1x7, "
    "branch7x7x3_3 192>192 7x1, branch7x7x3_4 192>192 3x3",
    "Mixed_7b.": COARSE.format(1280),
    "Mixed_7c.": COARSE.format(2048),
}


def published_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a file of weights, without counters and auxiliary classifier."""
    shapes = {"fc.weight": (classes, 2048), "fc.bias": (classes,)}
    for block, layers in PUBLISHED.items():
        for layer in layers.split(", "):
            name, channels, kernel = layer.split()
            inputs, outputs = map(int, channels.split(">"))
            shapes[f"{block}{name}.conv.weight"] = (outputs, inputs, *map(int, kernel.split("x")))
            shapes |= {f"{block}{name}.bn.{entry}": (outputs,) for entry in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def whole_file(classes: int) -> dict[str, torch.Tensor]:
    """A file's tensors, all ones, in a few bytes each."""
    return {name: torch.ones(1).expand(shape) for name, shape in published_shapes(classes).items()}


@pytest.mark.parametrize(("network", "classes", "parameters"), [("fid", 1008, 23_850_960), ("torchvision", 1000, 23_834_568)])
def test_names_shapes_and_parameters_are_the_published_network_s(network, classes, parameters):
    with torch.device("meta"):
        inception = Inception(network)
    own = {name: tuple(value.shape) for name, value in inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert own == published_shapes(classes)
    assert len([name for name in own if name.endswith("conv.weight")]) == 94
    assert sum(parameter.numel() for parameter in inception.parameters()) == parameters  # 27,161,264 with torchvision's auxiliary one
    assert not inception.training


def test_pictures_are_8_bit_299_px_and_in_minus_one_to_one():
    # Twice the side: pixel i lies between pixels 2i and 2i + 1 of the picture, so it is the mean of four.
    levels = torch.zeros(1, 3, 598, 598)
    levels[0, 1, :2, :2] = torch.tensor([[10.0, 20.0], [30.0, 41.0]])
    prepared = prepare(levels / 127.5 - 1)
    assert prepared.shape == (1, 3, 299, 299)
    assert prepared[0, 1, 0, 0].item() == pytest.approx(25.25 / 127.5 - 1, abs=1e-6)
    assert prepared[0, 1, 0, 1].item() == prepared[0, 0, 0, 0].item() == -1
    # Three times the side: no smoothing before the sampling, which meets the middle one of each three; their mean would be a third.
    columns = torch.zeros(1, 3, 897, 897)
    columns[..., 1::3] = 255.0
    assert prepare(columns / 127.5 - 1).eq(1).all()
    assert prepare(torch.full((1, 3, 299, 299), 0.5))[0, 0, 0, 0].item() == pytest.approx(191 / 127.5 - 1, abs=1e-6)  # 191.25 is no level
    assert prepare(torch.full((1, 3, 8, 8), 7.0)).max().item() == pytest.approx(1, abs=1e-6)


def test_pools_treat_the_border_as_their_network_does():
    ones = torch.ones(1, 1, 3, 3)
    inside, counted = (Block(1, (("average",),), count_border=count)(ones)[0, 0] for count in (False, True))
    assert inside.eq(1).all()
    torch.testing.assert_close(counted, torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9)
    ramp = torch.arange(25.0).view(1, 1, 5, 5)
    assert Block(1, (("halved",),), count_border=False)(ramp)[0, 0].tolist() == [[12, 14], [22, 24]]
    assert Block(1, (("largest",),), count_border=False)(ramp)[0, 0, :2, :2].tolist() == [[6, 7], [11, 12]]
    with torch.device("meta"):
        fid, torchvision = Inception("fid"), Inception("torchvision")
    assert [fid.blocks[name][-1][0] for name in ("Mixed_7b", "Mixed_7c")] == ["average", "largest"]
    assert [torchvision.blocks[name][-1][0] for name in ("Mixed_7b", "Mixed_7c")] == ["average", "average"]
    assert torchvision.get_submodule("Mixed_5b").count_border and not fid.get_submodule("Mixed_5b").count_border


def test_a_random_network_tells_pictures_apart_and_a_file_gives_it_back(tmp_path):
    torch.manual_seed(0)
    inception = Inception("fid")
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    found = inception(pictures)
    assert found.shape == (2, 2048) and (found >= 0).all() and not found.requires_grad
    assert (found[0] - found[1]).norm() > 1e-3 * found.norm()
    save_file(inception.state_dict(), tmp_path / "weights.safetensors")
    features = chosen_features(tmp_path / "weights.safetensors", "cpu")
    assert features.metric == "fid" and features.name.startswith("inception-v3-fid-") and len(features.name) == 33
    torch.testing.assert_close(features.extract(pictures[:1]), found[:1], rtol=1e-4, atol=1e-6)


def test_only_the_network_of_fid_gives_a_fid(tmp_path):
    auxiliary = {"AuxLogits.fc.bias": torch.zeros(1000)}
    torch.save(whole_file(1000) | auxiliary, tmp_path / "torchvision.pth")
    torch.save(whole_file(1008), tmp_path / "fid.pt")
    assert read_inception(tmp_path / "fid.pt")[0] == "fid"
    features = chosen_features(tmp_path / "torchvision.pth", "cpu")
    assert features.metric == "frechet_inception" and "no FID" in FRECHET_METRICS["frechet_inception"]
    assert chosen_features(None, "cpu").metric == "frechet"


def _changed(**changes):
    content = whole_file(1008) | changes
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_changed(**{"Mixed_5b.branch1x1.bn.bias": None}), r"do not fit: 1 missing \(Mixed_5b\.branch1x1\.bn\.bias\); give pytorch-fid's"),
        (_changed(**{"Mixed_8a.x": torch.ones(1), "a.b": torch.ones(1)}), r"do not fit: 2 unknown \(Mixed_8a\.x, a\.b\);"),
        (
            _changed(**{"Mixed_6b.branch7x7_2.conv.weight": torch.ones(1).expand(128, 128, 7, 1)}),
            r"1 of other shapes \(Mixed_6b\.branch7x7_2\.conv\.weight \(128, 128, 7, 1\) for \(128, 128, 1, 7\)\)",
        ),
        ({"fc.bias": torch.zeros(1008)}, r"do not fit: \d+ missing \(Conv2d_1a_3x3\.bn\.bias, .*, \.\.\.\); give"),
        ({"fc.bias": torch.zeros(10)}, r"1008 or 1000 classes \(fc\.bias\), got fc\.bias of 10 numbers"),
        ({"weight": torch.zeros(10)}, r"got 1 tensors without fc\.bias"),
        ({"fc.bias": 3}, r"expected a state dict \(tensors by name\), got a dict"),
        ([torch.zeros(1)], r"expected a state dict \(tensors by name\), got a list"),
        (_changed(**{"fc.bias": torch.full((1008,), torch.nan)}), r"expected finite weights, got others in fc\.bias"),
    ],
)
def test_a_wrong_file_is_told_which_tensors_do_not_fit(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(AssetError, match=message) as caught:
        read_inception(tmp_path / "weights.pth")
    assert str(caught.value).startswith(str(tmp_path / "weights.pth"))


def test_files_that_are_none_and_files_that_would_run_something_are_refused(tmp_path, hostile):
    torch.save({"fc.bias": hostile(os.system, f"touch {tmp_path}/ran")}, tmp_path / "hostile.pth")
    with pytest.raises(AssetError, match=r"hostile\.pth: refused to load: .*asks for posix\.system"):
        read_inception(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AssetError, match="there is no such file"):
        read_inception(tmp_path / "missing.pth")
    for name, message in (
        ("a.npz", r"ends in \.pt, \.pth or \.safetensors, got '\.npz'"),
        ("a.safetensors", "expected a safetensors file"),
    ):
        (tmp_path / name).write_bytes(b"\x08nothing")
        with pytest.raises(AssetError, match=message):
            read_inception(tmp_path / name)
