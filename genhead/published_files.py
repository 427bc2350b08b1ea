"""Published GenHead and reconstructor files as plain tensors, without running anything inside them.

A published pickle is a dictionary (G_ema, and perhaps G, D, augment_pipe, training_set_kwargs). Its networks are
`torch_utils.persistence._reconstruct_persistent_obj(meta)`, meta = {type, version, module_src, class_name, state}: the original
executes the source text module_src; here it is dropped unread, and the state, a torch module's __dict__ with _parameters,
_buffers and _modules, is all that is kept. Tensors are built here from checked sizes; the bytes below them are a stream of
torch.save, which torch's own weights-only reader takes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from head3d.run.errors import AssetError
from head3d.run.pickles import DAMAGE, Inert, Names, plain_names, read_pickle, read_safetensors, read_torch

NETWORK = "G_ema"  # the averaged generator of a published pickle
REMEDY = "use a published GenHead or reconstructor .pkl as downloaded, or a .pt or .safetensors file with its tensors by name"
_NEEDS = "a published network needs only torch's modules and tensors, numpy arrays and torch_utils.persistence's objects"
_MOST_MODULES = 10_000  # a module may hold itself
_MOST_REPEATED = 10**7  # elements that all tensors together may have beyond those in the file: some repeat a row by a stride of zero
_MOST_TENSORS, _LONGEST_NAME = 10_000, 1_000  # of a network, characters
_TORCH_MODULES = {
    "container": ("Sequential", "ModuleList", "ModuleDict", "ParameterList"),
    "activation": ("Softplus", "Sigmoid", "Tanh", "ReLU", "LeakyReLU", "Softmax", "GELU"),
    "linear": ("Linear", "Identity"),
    "conv": ("Conv2d", "Conv3d", "ConvTranspose2d"),
    "pooling": ("AvgPool2d", "AvgPool3d", "MaxPool2d", "AdaptiveAvgPool2d"),
    "padding": ("ReflectionPad2d", "ReplicationPad2d", "ReplicationPad3d", "ZeroPad2d"),
    "upsampling": ("Upsample",),
    "pixelshuffle": ("PixelShuffle",),
    "normalization": ("LayerNorm",),
    "dropout": ("Dropout",),
}  # torch.nn.modules.<file>.<class>; each becomes the same container
# Of the reconstructor's encoder, by module; each becomes the same container
_ENCODER_MODULES = {
    "torchvision.models.resnet": ("BasicBlock",),
    "segmentation_models_pytorch.encoders.resnet": ("ResNetEncoder",),
    "segmentation_models_pytorch.decoders.deeplabv3.decoder": ("DeepLabV3Decoder", "ASPP", "ASPPConv", "ASPPPooling"),
    "segmentation_models_pytorch.deeplabv3.decoder": ("DeepLabV3Decoder", "ASPP", "ASPPConv", "ASPPPooling"),
}


class PublishedFile(NamedTuple):
    """What a published file holds."""

    tensors: dict[str, Tensor]  # the generator's, by their published names
    skipped: tuple[str, ...]  # other entries of the file: the discriminator, the generator before averaging, settings


def read_published(path: Path) -> PublishedFile:
    """Tensors of a .pkl, .pt, .pth or .safetensors file, unchecked as to what they are.

    Raises AssetError if the file is missing, unsafe (naming the refused global), damaged or without a generator.
    """
    if not path.is_file():
        raise AssetError(f"{path}: there is no such file; {REMEDY}")
    match path.suffix:
        case ".pkl":
            content = read_pickle(path, _names(path), _NEEDS, REMEDY)
            generator, skipped = _generator(content, path)
            return PublishedFile(_module_state(generator, path), skipped)
        case ".pt" | ".pth":
            with path.open("rb") as file:
                content = read_torch(file, path, _NEEDS, REMEDY)
            generator, skipped = _generator(content, path) if isinstance(content, dict) and NETWORK in content else (content, ())
        case ".safetensors":
            generator, skipped = read_safetensors(path), ()
        case suffix:
            raise AssetError(f"{path}: a published network ends in .pkl, .pt, .pth or .safetensors, got {suffix!r}; {REMEDY}")
    if not isinstance(generator, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in generator.items()):
        raise AssetError(f"{path}: expected tensors by name, got {_describe(generator)}; {REMEDY}")
    return PublishedFile(generator, skipped)


def _generator(content: object, path: Path) -> tuple[Any, tuple[str, ...]]:
    """(the averaged generator, names of everything else)."""
    if not isinstance(content, dict) or NETWORK not in content:
        raise AssetError(f"{path}: expected a dictionary with the network {NETWORK!r}, got {_describe(content)}; {REMEDY}")
    return content[NETWORK], tuple(str(name) for name, value in content.items() if name != NETWORK and value is not None)


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return "a dictionary of " + (", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:6]) or "nothing")
    return f"a {type(content).__name__}"


# Stand-ins for the objects of a pickle --------------------------------------------------------------------------------------


class _Module(Inert):
    """A torch module, from torch or with a source of its own; its state is its __dict__."""


class _Settings(dict):
    """dnnlib.util.EasyDict and OrderedDict: made empty and filled, never a copy."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a state for a dictionary of settings")


def _persistent_module(meta: object) -> _Module:
    """torch_utils.persistence._reconstruct_persistent_obj: keeps the state, drops module_src and class_name unread."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise pickle.UnpicklingError("a persistent object that is not of type 'class' with a dictionary as state")
    module = _Module()
    module.__setstate__(meta["state"])
    return module


def _parameter(data: object, *_: object) -> Tensor:
    """torch._utils._rebuild_parameter, as a plain tensor."""
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError(f"a parameter made of a {type(data).__name__}")
    return data


def _text(*arguments: object) -> str:
    """torch.device and the like: only their text is kept."""
    return " ".join(str(argument) for argument in arguments if isinstance(argument, str | int))


def _size(sides: object = ()) -> tuple:
    """torch.Size."""
    if not isinstance(sides, tuple | list):
        raise pickle.UnpicklingError(f"a size made of a {type(sides).__name__}")
    return tuple(sides)


def _names(path: Path) -> Names:
    """All that a published pickle may name; `path` is for the messages of the streams inside."""

    elements = _MOST_REPEATED  # that tensors may have from here on

    def storage(data: object) -> Tensor:
        """torch.storage._load_from_bytes: its elements as a flat tensor."""
        nonlocal elements
        if not isinstance(data, bytes):
            raise pickle.UnpicklingError(f"a storage made of a {type(data).__name__}")
        content = read_torch(io.BytesIO(data), path, _NEEDS, REMEDY)
        if not isinstance(content, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a storage that is a {type(content).__name__}")
        flat = torch.empty(0, dtype=content.dtype).set_(content._untyped_storage)
        elements += flat.numel()
        return flat

    def tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
        """torch._utils._rebuild_tensor(_v2): a view of its storage, and within it."""
        nonlocal elements
        numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
        if not isinstance(storage, Tensor) or any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor whose storage, offset, size or stride is of the wrong kind")
        count = math.prod(size)
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        elements -= count
        if count and (last >= storage.numel() or elements < 0):
            raise pickle.UnpicklingError(f"a tensor of size {size} and stride {stride} at {offset} in a storage of {storage.numel()}")
        return torch.as_strided(storage, size, stride, offset)

    formats = ("float16", "float32", "float64", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
    return (
        plain_names()
        | {("torch", name): name for name in formats}
        | {(f"torch.nn.modules.{file}", name): _Module for file, names in _TORCH_MODULES.items() for name in names}
        | {(module, name): _Module for module, names in _ENCODER_MODULES.items() for name in names}
        | {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_module,
            ("dnnlib.util", "EasyDict"): _Settings,
            ("collections", "OrderedDict"): _Settings,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.storage", "_load_from_bytes"): storage,
            ("torch", "Size"): _size,
            ("torch", "device"): _text,
        }
    )


# A module's state -----------------------------------------------------------------------------------------------------------


def _module_state(module: object, path: Path) -> dict[str, Tensor]:
    """What state_dict() of the original module would give: parameters and persistent buffers by dotted name."""
    try:
        return dict(_entries(module))
    except DAMAGE as error:
        raise AssetError(f"{path}: {NETWORK} is not a torch module as published ({error}); {REMEDY}") from error


def _entries(generator: object) -> Iterator[tuple[str, Tensor]]:
    waiting, visited, found = [("", generator)], 0, 0
    while waiting:
        prefix, module = waiting.pop()
        visited += 1
        if not isinstance(module, _Module) or visited > _MOST_MODULES:
            raise ValueError(f"{prefix or NETWORK}: expected a module, got a {type(module).__name__} as number {visited}")
        parameters, buffers, modules = (_group(module, name, prefix or NETWORK) for name in ("_parameters", "_buffers", "_modules"))
        passing = module.state.get("_non_persistent_buffers_set", ())
        longest = max(map(len, (*parameters, *buffers, *modules)), default=0)
        found += len(parameters) + len(buffers)
        if len(prefix) + longest > _LONGEST_NAME or found > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS} tensors, or names of more than {_LONGEST_NAME} characters")
        for name, value in [*parameters.items(), *((name, value) for name, value in buffers.items() if name not in passing)]:
            if not isinstance(value, Tensor):
                raise ValueError(f"{prefix}{name}: expected a tensor, got a {type(value).__name__}")
            yield f"{prefix}{name}", value
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(modules.items())]


def _group(module: _Module, group: str, where: str) -> dict[str, Any]:
    """The entries of one dictionary of a module that are not None."""
    entries = module.state.get(group)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{where}: expected a dictionary {group}, got a {type(entries).__name__}")
    return {name: value for name, value in entries.items() if value is not None}
