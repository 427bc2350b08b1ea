"""Unpickling without running anything: an exact list of names, each of which builds an inert container, and no other.

numpy's own classes are not handed out: a file could make an array of object pointers over bytes of its choice, or change a
number format after an array was made with it. Arrays, number formats and scalars are stand-ins that give up plain numbers only.

A small file must not fill the memory either: it may number its objects only as far as it has operations, what its calls are given is
rationed by its own size, and messages never spell out a value of the file, which may hold itself a billion times.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from head3d.run.errors import AssetError

# What unpickling a damaged file raises; UnicodeError is a ValueError, Index- and KeyError are LookupErrors, RecursionError a RuntimeError.
DAMAGE = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)
_NUMBERS = re.compile("b1|[iu][1248]|f[248]")

_RATION = (
    4  # times the file's size: what calls may be given in all; a byte string of protocol 2 passes two, and its text may be half as long
)
_RATION_LEAST = 1 << 20  # bytes, of a small file

Names = Mapping[tuple[str, str], Any]  # (module, name) in the file -> what it is here: an inert class, a function or a value


def brief(value: object) -> str:
    """A value of the file for a message: short text and numbers as they are, of everything else the kind."""
    if isinstance(value, str | bytes):
        return repr(value[:60])
    return repr(value) if value is None or isinstance(value, bool | float) else f"a {getattr(value, '__name__', type(value).__name__)}"


class Inert:
    """Stands in for a class of the file; keeps the state and never acts on it."""

    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *_: object) -> None:
        self.state = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"state of {type(self).__name__} is a {type(state).__name__}, expected a dict")
        self.state = state

    def array(self) -> np.ndarray:
        raise NotImplementedError


class _NumberFormat(Inert):
    """numpy.dtype(code, align, copy): bool, integer and float formats; others are kept and cannot be read."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "=", "|")):
            raise pickle.UnpicklingError(f"state of a number format is {brief(state)}")
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not (isinstance(self.code, str) and _NUMBERS.fullmatch(self.code)):
            raise ValueError(f"an array of format {brief(self.code)}, expected plain numbers")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array(Inert):
    """numpy.ndarray, whose state is (version, shape, number format, column order, bytes)."""

    content: tuple[Any, ...] = ()

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) in (4, 5)):
            raise pickle.UnpicklingError(f"state of an array is a {type(state).__name__}, expected a tuple of five")
        self.content = state[-4:]

    def array(self) -> np.ndarray:
        """The numbers, in the processor's byte order. Raises ValueError or TypeError if the entries do not belong together."""
        shape, number_format, by_column, data = self.content
        if not isinstance(number_format, _NumberFormat):
            raise TypeError(f"an array's number format is a {type(number_format).__name__}")
        dtype = number_format.dtype()
        data = encode_latin1(data) if isinstance(data, str) else data
        if not isinstance(data, bytes) or len(data) != math.prod(int(size) for size in shape) * dtype.itemsize:
            raise ValueError(f"an array of {len(shape)} dimensions and format {dtype} with another number of bytes than its shape says")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")
        return array.astype(dtype.newbyteorder("="))


def to_array(value: object) -> np.ndarray:
    """Numbers of a stand-in, or of plain numbers and lists. Raises what `Inert.array` raises."""
    return value.array() if isinstance(value, Inert) else np.asarray(value)


def _empty_array(kind: object, shape: object, typecode: object) -> _Array:
    """numpy's _reconstruct, for plain arrays only; their contents arrive as state."""
    if kind is not _Array or shape != (0,):
        raise pickle.UnpicklingError(f"array reconstruction of {brief(kind)} with shape {brief(shape)}")
    return _Array()


def _scalar(number_format: object, data: object = b"") -> int | float | bool:
    """numpy.core.multiarray.scalar as a Python number."""
    data = encode_latin1(data) if isinstance(data, str) else data
    if not isinstance(number_format, _NumberFormat) or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of {brief(number_format)}")
    (value,) = np.frombuffer(data, number_format.dtype())
    return value.item()


def encode_latin1(text: object, encoding: object = "latin1") -> bytes:
    """_codecs.encode as protocol 2 uses it for byte strings."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {brief(encoding)} of {brief(text)}")
    return codecs.latin_1_encode(text)[0]


def _no_bytes() -> bytes:
    """bytes(), as protocol 2 writes an empty byte string."""
    return b""


def _set(items: object = ()) -> set:
    """set(list), as protocol 2 writes it."""
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError(f"a set of {brief(items)}")
    return set(items)


def _reconstructor(kind: object, base: object, state: object) -> Inert:
    """copy_reg._reconstructor, for the inert classes only."""
    if not (isinstance(kind, type) and issubclass(kind, Inert)) or base is not object or state is not None:
        raise pickle.UnpicklingError(f"reconstruction of {brief(kind)}")
    return kind()


def plain_names() -> dict[tuple[str, str], Any]:
    """Names of Python and numpy that any file of arrays may use."""
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _NumberFormat,
        ("_codecs", "encode"): encode_latin1,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[module, "_reconstruct"] = _empty_array
        names[module, "scalar"] = _scalar
    for module in ("__builtin__", "builtins"):
        names[module, "set"] = _set
        names[module, "object"] = object
        names[module, "bytes"] = _no_bytes
    for module in ("copy_reg", "copyreg"):
        names[module, "_reconstructor"] = _reconstructor
    return names


class _Function:
    """A function handed to the file: it can be called as far as its ration goes, but not changed through a state."""

    __slots__ = ("_function", "_take")

    def __init__(self, function: Callable[..., Any], take: Callable[[int], None]) -> None:
        self._function, self._take = function, take

    def __call__(self, *arguments: object) -> Any:
        self._take(sum(len(argument) for argument in arguments if isinstance(argument, str | bytes | list | tuple | dict)))
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"a state for the function {self._function.__name__}")


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path, names: Names, needs: str, remedy: str) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._path, self._names, self._needs, self._remedy = path, names, needs, remedy
        self._ration = max(_RATION * path.stat().st_size, _RATION_LEAST)

    def find_class(self, module: str, name: str) -> Any:
        try:
            value = self._names[module, name]
        except KeyError:
            raise AssetError(
                f"{self._path}: refused to load: the pickle asks for {module}.{name}, but {self._needs}; nothing of it was run. "
                f"Do not use this file; {self._remedy}"
            ) from None
        return _Function(value, self._take) if callable(value) and not isinstance(value, type) else value

    def _take(self, size: int) -> None:
        """Raise UnpicklingError once the file's calls have been given more than a file of this size needs."""
        self._ration -= size
        if self._ration < 0:
            raise pickle.UnpicklingError(f"calls that copy more than {_RATION} times the file")

    def persistent_load(self, pid: object) -> Any:
        raise AssetError(f"{self._path}: refused to load: the pickle refers to an external object, {brief(pid)}; {self._remedy}")


def _check_memo(file: BinaryIO) -> None:
    """Raise UnpicklingError if the pickle remembers an object under a number beyond its operations: five bytes could ask for 64 GB."""
    for count, (operation, argument, position) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"memo {argument} at byte {position}, after {count} operations")
    file.seek(0)


def read_pickle(path: Path, names: Names, needs: str, remedy: str) -> Any:
    """Unpickle with `names` only. Raises AssetError that names the refused global, or the damage.

    `needs` says in the message what such a file is made of ("a head model needs only ..."), `remedy` what to use instead.
    """
    try:
        with path.open("rb") as file:
            _check_memo(file)
            return _RestrictedUnpickler(file, path, names, needs, remedy).load()
    except OSError as error:
        raise AssetError(f"{path}: could not be read: {error.strerror}; {remedy}") from error
    except DAMAGE as error:
        raise AssetError(f"{path}: not a readable pickle ({type(error).__name__}: {error}); download the file again") from error


def _check_records(file: BinaryIO, path: Path, remedy: str) -> None:
    """Raise AssetError if `file` is a zip whose records are packed or lie over one another: a megabyte could hold gigabytes of zeros."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as records:
            entries = records.infolist()
        packed = [
            entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
        ]
        size = file.seek(0, io.SEEK_END)
        if packed or sum(entry.file_size for entry in entries) > size:
            found = f"{brief(packed[0])} is packed" if packed else "they are longer than the file"
            raise AssetError(f"{path}: refused to load: expected records stored as torch.save writes them, but {found}; {remedy}")
    file.seek(0)


def read_torch(file: BinaryIO, path: Path, needs: str, remedy: str) -> Any:
    """torch.load of tensors and nothing else, on the CPU. Raises AssetError that names `path` and the refused global, or the damage.

    `needs` and `remedy` as for `read_pickle`.
    """
    try:
        _check_records(file, path, remedy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes on old formats
            return torch.load(file, map_location="cpu", weights_only=True)
    except AssetError:
        raise
    except Exception as error:  # whatever torch trips over in a damaged stream
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise AssetError(
                f"{path}: refused to load: a torch stream in it asks for {refused[1]}, but {needs}; nothing of it was run. "
                f"Do not use this file; {remedy}"
            ) from None
        first_line = str(error).strip().split("\n")[0]
        raise AssetError(f"{path}: not readable tensors of torch ({type(error).__name__}: {first_line}); download it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that the user brought, by name. Raises AssetError if it is damaged or no such file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AssetError(f"{path}: expected a safetensors file: {error}; download it again") from error


def read_state_dict(path: Path, remedy: str) -> dict[str, Tensor]:
    """Tensors by name from a .pt, .pth or .safetensors file, on the CPU.

    Raises AssetError naming the file, what it is instead, and `remedy`.
    """
    if not path.is_file():
        raise AssetError(f"{path}: there is no such file; {remedy}")
    match path.suffix:
        case ".pt" | ".pth":
            with path.open("rb") as file:
                content = read_torch(file, path, "a state dict needs only torch's tensors", remedy)
        case ".safetensors":
            content = read_safetensors(path)
        case suffix:
            raise AssetError(f"{path}: expected a file that ends in .pt, .pth or .safetensors, got {suffix!r}; {remedy}")
    if not isinstance(content, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise AssetError(f"{path}: expected a state dict (tensors by name), got a {type(content).__name__}; {remedy}")
    return content
