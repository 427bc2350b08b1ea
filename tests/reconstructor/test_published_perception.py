"""LPIPS and ArcFace from files with the published names, filled with made-up numbers."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from head3d.run.errors import AssetError
from reconstructor.published_perception import FACE_POINTS, ArcFace, Lpips, align_faces, load_arcface, load_lpips


def drawn(network, seed=0):
    """Numbers for all of a network's tensors: weights of the usual size, everything else in [0, 1)."""
    draws, found = torch.Generator().manual_seed(seed), {}
    for name, value in network.state_dict().items():
        numbers = torch.rand(value.shape, generator=draws)
        found[name] = value if name.endswith("num_batches_tracked") else numbers
        if value.ndim > 1:
            found[name] = (numbers - 0.4) * 3 / value[0].numel() ** 0.5
    return found


def pictures(count, side, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_on_alexnet_follows_the_paper_layer_by_layer(tmp_path):
    weights = drawn(Lpips("alex"))
    backbone = {name: value for name, value in weights.items() if name.startswith("features.")} | {"classifier.1.weight": torch.ones(2)}
    torch.save(backbone, tmp_path / "alexnet.pth")
    torch.save({name: value for name, value in weights.items() if name.startswith("lin")}, tmp_path / "alex.pth")
    network = load_lpips("alex", [tmp_path / "alexnet.pth", tmp_path / "alex.pth"])
    first, second = pictures(2, 64), pictures(2, 64, 1)

    def layers(images):
        values = (images - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for index, stride, padding, pool in ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)):
            values = F.max_pool2d(values, 3, 2) if pool else values
            values = F.relu(F.conv2d(values, backbone[f"features.{index}.weight"], backbone[f"features.{index}.bias"], stride, padding))
            yield F.normalize(values, dim=1)

    expected = sum(
        (weights[f"lin{k}.model.1.weight"][0] * (a - b).square()).sum(1).mean((1, 2))
        for k, (a, b) in enumerate(zip(layers(first), layers(second), strict=True))
    )
    assert torch.allclose(network(first, second), expected, rtol=1e-4) and torch.equal(network(first, first), torch.zeros(2))


def test_lpips_on_vgg_taps_the_last_layer_of_each_group_and_reads_the_authors_module(tmp_path):
    weights = drawn(Lpips("vgg"))
    convs = sorted({int(name.split(".")[1]) for name in weights if name.startswith("features.")})
    assert convs == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's vgg16
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    renamed = {re.sub(r"features\.(\d+)", lambda found: f"net.slice{slices[int(found[1])]}.{found[1]}", k): v for k, v in weights.items()}
    save_file(
        renamed | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "lins.0.model.1.weight": torch.ones(1, 64, 1, 1)},
        tmp_path / "vgg.safetensors",
    )
    network = load_lpips("vgg", [tmp_path / "vgg.safetensors"])
    with torch.no_grad():
        layers = network.layers(pictures(1, 32))
    assert [tuple(layer.shape[1:]) for layer in layers] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert torch.equal(network.features["28"].weight, weights["features.28.weight"])


def test_arcface_tells_its_depth_from_the_names_and_its_blocks_follow_the_published_order(tmp_path):
    weights = {name: value for name, value in drawn(ArcFace([1, 1, 2, 1])).items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "backbone.pth")
    network = load_arcface(tmp_path / "backbone.pth")
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3, network.layer4)] == [1, 1, 2, 1]
    assert not network.training and network.fc.weight.shape == (512, 512 * 49)
    values = pictures(1, 8).repeat(1, 22, 1, 1)[:, :64]

    def norm(x, name):
        numbers = (weights[f"layer1.0.{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *numbers)

    inner = F.conv2d(norm(values, "bn1"), weights["layer1.0.conv1.weight"], padding=1)
    inner = F.prelu(norm(inner, "bn2"), weights["layer1.0.prelu.weight"])
    inner = norm(F.conv2d(inner, weights["layer1.0.conv2.weight"], stride=2, padding=1), "bn3")
    aside = norm(F.conv2d(values, weights["layer1.0.downsample.0.weight"], stride=2), "downsample.1")
    assert torch.allclose(network.layer1[0](values), inner + aside, rtol=1e-4, atol=1e-4)
    vectors = network(pictures(2, 112))
    assert vectors.shape == (2, 512) and torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_face_is_aligned_by_the_similarity_that_brings_its_points_to_the_template():
    template = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]) / 112
    angle, scale = 0.3, 0.6
    turn = scale * torch.tensor(
        [[torch.tensor(angle).cos(), -torch.tensor(angle).sin()], [torch.tensor(angle).sin(), torch.tensor(angle).cos()]]
    )
    points = template @ turn.T + torch.tensor([0.25, 0.1])
    landmarks = torch.zeros(1, 70, 2)
    landmarks[0, list(FACE_POINTS)] = points
    image = torch.full((1, 3, 128, 128), -1.0)
    middles = (torch.arange(128) + 0.5) / 128
    for channel, (x, y) in enumerate(points[[0, 1, 3]]):  # a soft dot at both eyes and at a corner of the mouth
        image[0, channel] = 2 * torch.exp(-((middles[None] - x).square() + (middles[:, None] - y).square()) / (2 * 0.02**2)) - 1
    face = align_faces(image, landmarks)
    places = (torch.arange(112) + 0.5) / 112
    for channel, expected in enumerate(template[[0, 1, 3]]):
        weights = (face[0, channel] + 1) / (face[0, channel] + 1).sum()
        found = torch.stack([(weights.sum(0) * places).sum(), (weights.sum(1) * places).sum()])
        assert torch.allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features.0.weight": torch.ones(2)}, r"the weights do not fit: .* missing .*; 1 of other shapes \(features.0.weight"),
        ([1, 2], r"expected a state dict \(tensors by name\), got a list"),
        (pickle, r"refused to load|not readable tensors"),
    ],
    ids=["wrong tensors", "a list", "an object"],
)
def test_wrong_files_are_errors_that_say_what_is_needed(tmp_path, content, message):
    path = tmp_path / "alex.pth"
    if content is pickle:
        path.write_bytes(pickle.dumps({"run": print}))
    else:
        torch.save(content, path)
    with pytest.raises(AssetError, match=rf"alex.pth: .*({message})"):
        load_lpips("alex", [path])
    with pytest.raises(
        AssetError, match=rf"alex.pth: .*({message}|expected tensors of an IR-ResNet \(layer1 to layer4\), got features.0.weight)"
    ):
        load_arcface(path)


def test_a_missing_file_and_a_foreign_ending_are_named(tmp_path):
    with pytest.raises(AssetError, match=r"absent.pth: there is no such file; give the state dict of one of insightface's"):
        load_arcface(tmp_path / "absent.pth")
    (tmp_path / "face.onnx").write_bytes(b"")
    with pytest.raises(AssetError, match=r"face.onnx: expected a file that ends in .pt, .pth or .safetensors, got '.onnx'"):
        load_arcface(tmp_path / "face.onnx")
