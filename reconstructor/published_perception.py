"""Published perception networks for who has their weights: LPIPS (on AlexNet or VGG-16) and ArcFace (IR-ResNet).

Written after the papers and the published names of the tensors; no weights come with this project, so the tests check formulas and not
values. Files are .safetensors, or .pt and .pth read with torch's `weights_only`: nothing in them runs. They are other rulers than
`perception.Perception` and keep their own names in every table.

PD-FGC, the published motion encoder, is not here: what is known of it (portrait4d, section 6.2) leaves the inside of its trunk and the
names of its tensors open, so a file of it could be neither read nor checked. Vectors that it computed elsewhere go in as `vector` of
`Avatar.from_image` and `Avatar.drive`, and in files to the drive command.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.head_model import HeadModel
from head3d.run.checkpoint import fill_weights
from head3d.run.errors import AssetError
from head3d.run.pickles import read_state_dict
from reconstructor.perception import true_reading

Backbone = Literal["alex", "vgg"]


class _Conv(NamedTuple):
    """A convolution of a backbone, and what stands before it."""

    index: int  # in torchvision's `features`
    inputs: int  # channels
    outputs: int
    kernel: int
    stride: int
    padding: int
    pool: tuple[int, int] | None = None  # kernel and stride of the max-pool before it
    tapped: bool = True  # LPIPS compares what its ReLU gives


def _vgg() -> tuple[_Conv, ...]:
    """VGG-16: the last convolution of every group is tapped (relu1_2, 2_2, 3_3, 4_3, 5_3)."""
    convs, index, inputs = [], 0, 3
    for group, (count, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        for k in range(count):
            convs.append(_Conv(index, inputs, width, 3, 1, 1, (2, 2) if group and k == 0 else None, k == count - 1))
            index, inputs = index + 2, width
        index += 1  # the pool
    return tuple(convs)


_CONVS: dict[Backbone, tuple[_Conv, ...]] = {
    "alex": (
        _Conv(0, 3, 64, 11, 4, 2),
        _Conv(3, 64, 192, 5, 1, 2, (3, 2)),
        _Conv(6, 192, 384, 3, 1, 1, (3, 2)),
        _Conv(8, 384, 256, 3, 1, 1),
        _Conv(10, 256, 256, 3, 1, 1),
    ),
    "vgg": _vgg(),
}
# The mean and deviation of the backbones' training pictures, for pictures in [-1, 1]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """LPIPS version 0.1 (arXiv:1801.03924, eq. 1): learned weights on squared differences of channel-normalised features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        convs = _CONVS[backbone]
        self.features = nn.ModuleDict({str(c.index): nn.Conv2d(c.inputs, c.outputs, c.kernel, c.stride, c.padding) for c in convs})
        for number, width in enumerate(c.outputs for c in convs if c.tapped):
            linear = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{number}", nn.ModuleDict({"model": nn.ModuleDict({"1": linear})}))

    def layers(self, pictures: Tensor) -> list[Tensor]:
        """The tapped layers of pictures [B, 3, H, W] in [-1, 1], channels of unit length at every pixel."""
        shift, scale = (pictures.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        values, layers = (pictures - shift) / scale, []
        for spec in _CONVS[self.backbone]:
            if spec.pool:
                values = F.max_pool2d(values, *spec.pool)
            values = F.relu(self.features[str(spec.index)](values))
            if spec.tapped:
                layers.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return layers

    def forward(self, pictures: Tensor, truth: Tensor) -> Tensor:
        """Distance [B] of pictures [B, 3, H, W] in [-1, 1]; the sum over layers of the spatial mean of w . (a - b)^2."""
        total = 0.0
        for number, (first, second) in enumerate(zip(self.layers(pictures), self.layers(truth), strict=True)):
            linear = self.get_submodule(f"lin{number}.model.1")
            total = total + linear((first - second).square()).mean((1, 2, 3))
        return total


def load_lpips(backbone: Backbone, files: Sequence[Path]) -> Lpips:
    """LPIPS from the authors' linear weights (`lin0.model.1.weight`, ...) and torchvision's backbone (`features.0.weight`, ...), two
    files, or from one file of the authors' whole module (`net.slice1.0.weight`, ..., `lin0.model.1.weight`, ...).

    Raises AssetError naming the files and the tensors that are missing or of another shape. Tensors of a classifier are ignored.
    """
    remedy = f"give the authors' {backbone}.pth of version 0.1 and torchvision's {backbone} weights, or one file with both"
    found = {}
    for path in files:
        for name, value in read_state_dict(path, remedy).items():
            found[re.sub(r"^net\.slice\d+\.", "features.", name)] = value.float()
    network = Lpips(backbone)
    wanted = {name: value for name, value in found.items() if re.match(r"features\.|lin\d+\.", name)}
    fill_weights(network, wanted, " and ".join(map(str, files)), remedy)
    return network.eval().requires_grad_(False)


class _FaceBlock(nn.Module):
    """IR-ResNet's block: x + bn(conv_s(prelu(bn(conv(bn(x)))))), the shortcut by a 1 x 1 convolution where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)) if stride > 1 else None
        )

    def forward(self, features: Tensor) -> Tensor:
        inner = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(features))))))
        return inner + (features if self.downsample is None else self.downsample(features))


class ArcFace(nn.Module):
    """The IR-ResNet that insightface publishes for ArcFace: aligned faces of 112 x 112 -> 512 numbers. Tensors have its names."""

    def __init__(self, blocks: Sequence[int]) -> None:
        """blocks of the four stages: 2 2 2 2 (IR-18), 3 4 6 3 (34), 3 4 14 3 (50), 3 13 30 3 (100)."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        inputs = 64
        for stage, count in enumerate(blocks):
            outputs = 64 * 2**stage
            members = [_FaceBlock(outputs if k else inputs, outputs, 1 if k else 2) for k in range(count)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*members))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * 49, 512)
        self.features = nn.BatchNorm1d(512)
        self.eval()

    def forward(self, faces: Tensor) -> Tensor:
        """Unit vectors [B, 512] of aligned faces [B, 3, 112, 112], RGB in [-1, 1]; see `align_faces`."""
        assert faces.shape[1:] == (3, 112, 112), f"faces must be [B, 3, 112, 112], got {tuple(faces.shape)}"
        values = self.prelu(self.bn1(self.conv1(faces)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            values = stage(values)
        return F.normalize(self.features(self.fc(self.bn2(values).flatten(1))), dim=1)


def load_arcface(file: Path) -> ArcFace:
    """ArcFace from a state dict of insightface's IR-ResNet; how deep it is shows in the names.

    Raises AssetError naming the file and the tensors that are missing, unknown or of another shape.
    """
    remedy = "give the state dict of one of insightface's IR-ResNets (backbone.pth)"
    found = read_state_dict(file, remedy)
    blocks = [len({name.split(".")[1] for name in found if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)]
    if 0 in blocks:
        raise AssetError(f"{file}: expected tensors of an IR-ResNet (layer1 to layer4), got {', '.join(sorted(found)[:3])}, ...; {remedy}")
    network = ArcFace(blocks)
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}  # not in all files
    fill_weights(network, counters | {name: value.float() for name, value in found.items()}, str(file), remedy)
    return network.eval().requires_grad_(False)


FACE_POINTS = (68, 69, 30, 48, 54)  # of the 70 landmarks: right and left pupil, nose tip, corners of the mouth
# Where ArcFace's training faces have them, pixels of 112 x 112 (insightface's template)
_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))


def align_faces(pictures: Tensor, landmarks: Tensor) -> Tensor:
    """Faces [B, 3, 112, 112] as ArcFace wants them, of pictures [B, 3, H, W] with landmarks [B, 70, 2] in [0, 1].

    The similarity of least squares from the template to the five points (Umeyama 1991 in the plane, in closed form) says where every
    pixel comes from; what lies outside is black (-1). Differentiable in the pictures.
    """
    template = landmarks.new_tensor(_TEMPLATE) / 112
    points = landmarks[:, FACE_POINTS]
    centre, middle = template.mean(0), points.mean(1)
    flat, seen = template - centre, points - middle[:, None]
    # Complex numbers: seen = a flat with a = sum(conj(flat) seen) / sum |flat|^2; a turn and a scale
    size = flat.square().sum()
    cosine = (flat * seen).sum((1, 2)) / size
    sine = (flat[:, 0] * seen[..., 1] - flat[:, 1] * seen[..., 0]).sum(1) / size
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # [B, 2, 2]
    # From [0, 1] to grid_sample's [-1, 1] on both sides: u = (g + 1) / 2
    offset = middle - (turn @ centre[:, None])[..., 0]
    shift = 2 * offset - 1 + turn.sum(2)
    places = F.affine_grid(torch.cat([turn, shift[..., None]], dim=2), [len(pictures), 3, 112, 112], align_corners=False)
    return F.grid_sample(pictures + 1, places, align_corners=False) - 1


UNITS = {
    "lpips": "LPIPS on AlexNet from the truth, the picture's whole area, lower is better",
    "arcface_cosine": "cosine of the ArcFace embeddings of picture and source, higher is better",
}


class PublishedNetworks(NamedTuple):
    """What an evaluation asks beside our own network; None where there are no files."""

    lpips: Lpips | None
    arcface: ArcFace | None
    head: HeadModel  # the labels', whose landmarks place ArcFace's crop

    @torch.no_grad()
    def measures(
        self,
        images: Tensor,  # [B, 3, S, S] in [-1, 1]
        label: Tensor,  # [B, 437] of what they show
        truth: Tensor,  # [B, 3, S, S]
        source: Tensor,  # [B, 3, S, S] and its label
        source_label: Tensor,  # [B, 437]
    ) -> dict[str, Tensor]:
        """Measure -> [B] on the CPU, in the units of UNITS."""
        device = self.head.landmark_corners.device
        images, label, truth, source, source_label = (values.to(device) for values in (images, label, truth, source, source_label))
        found = {}
        if self.lpips is not None:
            found["lpips"] = self.lpips(images, truth)
        if self.arcface is not None:
            first, second = (
                self.arcface(align_faces(pictures, true_reading(labels, self.head).landmarks))
                for pictures, labels in ((images, label), (source, source_label))
            )
            found["arcface_cosine"] = (first * second).sum(1)
        return {name: values.cpu() for name, values in found.items()}


def load_published_networks(lpips: Sequence[Path], arcface: Path | None, head: HeadModel) -> PublishedNetworks:
    """Those that there are files of, on the head's device. Raises AssetError as `load_lpips` and `load_arcface`."""
    device = head.landmark_corners.device
    return PublishedNetworks(
        load_lpips("alex", lpips).to(device) if lpips else None, load_arcface(arcface).to(device) if arcface else None, head
    )
