"""Reading head-model files without running them, and checking what they hold.

FLAME is distributed as a Python pickle, and unpickling can run any code. The reader here resolves an exact list of global
names: numpy arrays, scipy sparse matrices and chumpy nodes (replaced by inert stand-ins that only yield their array), and refuses
every other one. Neither chumpy nor scipy is imported.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE
from head3d.run.errors import AssetError
from head3d.run.pickles import DAMAGE, Inert, Names, plain_names, read_pickle, to_array

COEFFICIENTS = SHAPE_SIZE + EXPRESSION_SIZE
JOINTS = 5
PARENTS = (0, 1, 1, 1)  # of neck, jaw, left eye, right eye
MASK_FILE = "FLAME_masks.pkl"
FLAME_MASKS = {name: f"mask_{name}" for name in ("face", "lips", "left_eyeball", "right_eyeball", "noinmouth")}  # theirs: ours
REQUIRED = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
VERTEX_SETS = (*FLAME_MASKS.values(), "mask_eyelids", "set_eyelids_idxs")
SIMPLIFIED = ("simplified_idxs", "simplified_baris", "simplified_faces")
LANDMARKS = ("landmark_faces", "landmark_barycentric")
OPTIONAL = (*VERTEX_SETS, "ring", *SIMPLIFIED, *LANDMARKS)
REMEDY = "use FLAME's generic_model.pkl or flame2023.pkl as downloaded, or an .npz with the same keys"


def read_head_file(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a .pkl or .npz head model, unchecked. Raises AssetError if it is missing, unsafe or unreadable."""
    if not path.is_file():
        raise AssetError(f'{path}: no such head model file; give a FLAME .pkl or .npz, or "procedural" for the built-in head')
    match path.suffix:
        case ".npz":
            return _read_npz(path)
        case ".pkl":
            arrays = _arrays_of(read_flame_pickle(path), path)
            masks = path.with_name(MASK_FILE)
            if masks.is_file():
                regions = _arrays_of(read_flame_pickle(masks), masks)
                arrays |= {key: regions[name] for name, key in FLAME_MASKS.items() if name in regions}
            return arrays
        case suffix:
            raise AssetError(f"{path}: a head model ends in .pkl or .npz, got {suffix!r}; {REMEDY}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise AssetError(f"{path}: not a readable .npz of plain arrays ({error}); {REMEDY}") from error


def read_flame_pickle(path: Path) -> Any:
    """Unpickle with the names listed in `_names` only. Raises AssetError that names the refused global, or the damage."""
    return read_pickle(path, _names(), "a head model needs only numpy, scipy.sparse and chumpy arrays", REMEDY)


# Stand-ins for the classes of such a file ---------------------------------------------------------------------------------


class _ChumpyArray(Inert):
    """chumpy.ch.Ch: the value is `x`."""

    def array(self) -> np.ndarray:
        return to_array(self.state["x"])


class _ChumpySelect(Inert):
    """chumpy.reordering.Select: entries `idxs` of the flattened `a`, in `preferred_shape`."""

    def array(self) -> np.ndarray:
        picked = to_array(self.state["a"]).ravel()[to_array(self.state["idxs"])]
        shape = self.state.get("preferred_shape")
        return picked if shape is None else picked.reshape(shape)


class _SparseMatrix(Inert):
    """scipy.sparse CSC matrix, made dense."""

    def array(self) -> np.ndarray:
        shape = self.state["_shape"] if "_shape" in self.state else self.state["shape"]
        rows, columns = (int(size) for size in shape)
        values, indices, starts = (to_array(self.state[key]) for key in ("data", "indices", "indptr"))
        if len(starts) != columns + 1 or rows * columns > 10**8:
            raise ValueError(f"sparse matrix of shape {rows, columns} with {len(starts)} column starts")
        dense = np.zeros((rows, columns), dtype=values.dtype)
        np.add.at(dense, (indices, np.repeat(np.arange(columns), np.diff(starts))), values)
        return dense


def _names() -> Names:
    sparse = {(module, "csc_matrix"): _SparseMatrix for module in ("scipy.sparse", "scipy.sparse.csc", "scipy.sparse._csc")}
    chumpy = {("chumpy.ch", "Ch"): _ChumpyArray, ("chumpy", "Ch"): _ChumpyArray, ("chumpy.reordering", "Select"): _ChumpySelect}
    return plain_names() | sparse | chumpy


def _arrays_of(content: object, path: Path) -> dict[str, np.ndarray]:
    """The known keys of an unpickled dictionary as arrays; other entries (bs_type, J, ...) are dropped."""
    if not isinstance(content, dict):
        raise AssetError(f"{path}: expected a dictionary of arrays, got a {type(content).__name__}; {REMEDY}")
    wanted = {*REQUIRED, *OPTIONAL, *FLAME_MASKS}
    arrays = {}
    for key, value in content.items():
        key = key.decode("latin1") if isinstance(key, bytes) else key
        if key in wanted:
            try:
                arrays[key] = to_array(value)
            except DAMAGE as error:
                raise AssetError(f"{path}: cannot read the array {key!r} ({type(error).__name__}: {error}); {REMEDY}") from error
    return arrays


# Checks ------------------------------------------------------------------------------------------------------------------


def check_arrays(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Known arrays with checked kinds, shapes and ranges: float32 values, int64 indices. Unknown keys are dropped.

    Raises AssetError that names `where`, the key, what was expected and what was found.
    """
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise AssetError(f"{where}: keys {missing} are missing (it has {sorted(map(str, arrays))[:12]}); {REMEDY}")
    result = {key: np.asarray(arrays[key]) for key in (*REQUIRED, *OPTIONAL) if key in arrays}
    for group in (SIMPLIFIED, LANDMARKS):
        if 0 < sum(key in result for key in group) < len(group):
            present = [key for key in group if key in result]
            raise AssetError(f"{where}: the keys {list(group)} belong together, got only {present}; give all or none")

    def fail(key: str, expected: str, got: object) -> None:
        raise AssetError(f"{where}: {key}: expected {expected}, got {got}; {REMEDY}")

    def numbers(key: str, *shape: int | None) -> np.ndarray:
        value = result[key]
        if value.dtype.kind not in "fiu":
            fail(key, "numbers", f"dtype {value.dtype}")
        if value.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
            fail(key, f"shape {tuple('any' if size is None else size for size in shape)}", value.shape)
        return value

    def values(key: str, *shape: int | None) -> None:
        value = numbers(key, *shape).astype(np.float32)
        if not np.isfinite(value).all():
            fail(key, "finite values", f"{int((~np.isfinite(value)).sum())} that are not")
        result[key] = value

    def indices(key: str, limit: int, *shape: int | None) -> None:
        value = numbers(key, *shape)
        if value.dtype.kind == "f" and (value != np.floor(value)).any():
            fail(key, "whole numbers", "fractions")
        value = value.astype(np.int64)
        if value.size and (value.min() < 0 or value.max() >= limit):
            fail(key, f"indices in 0..{limit - 1}", f"{value.min()}..{value.max()}")
        result[key] = value

    values("v_template", None, 3)
    count = len(result["v_template"])
    values("shapedirs", count, 3, COEFFICIENTS)
    values("posedirs", count, 3, (JOINTS - 1) * 9)
    values("J_regressor", JOINTS, count)
    values("weights", count, JOINTS)
    indices("f", count, None, 3)
    parents = numbers("kintree_table", 2, JOINTS)[0, 1:]
    if tuple(int(parent) for parent in parents) != PARENTS:
        fail("kintree_table", f"FLAME's joint order (parents of joints 1-4 are {PARENTS})", tuple(parents.tolist()))
    result["kintree_table"] = np.array([[-1, *PARENTS], range(JOINTS)])
    if np.abs(result["weights"].sum(1) - 1).max() > 1e-3:
        fail("weights", "rows that sum to 1", f"sums {result['weights'].sum(1).min():.4g}..{result['weights'].sum(1).max():.4g}")
    for key in VERTEX_SETS:
        if key in result:
            indices(key, count, None)
            result[key] = np.unique(result[key])
    if "ring" in result:
        indices("ring", count + 1, count, None)
    if SIMPLIFIED[0] in result:
        indices("simplified_idxs", count, None, 3)
        values("simplified_baris", len(result["simplified_idxs"]), 3)
        indices("simplified_faces", len(result["simplified_idxs"]), None, 3)
    if LANDMARKS[0] in result:
        indices("landmark_faces", len(result["f"]), 70)
        values("landmark_barycentric", 70, 3)
    return result
