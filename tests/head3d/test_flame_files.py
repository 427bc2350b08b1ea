"""Reading FLAME's pickle without running it."""

import collections
import io
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.sparse

from head3d.flame_files import check_arrays, read_flame_pickle, read_head_file
from head3d.run.errors import AssetError


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def flame_dictionary(arrays):
    """As in FLAME's file: extra keys, a sparse joint regressor, unsigned tables."""
    content = dict(arrays) | {"bs_type": "lrotmin", "bs_style": "lbs", "J": np.zeros((5, 3))}
    content["J_regressor"] = scipy.sparse.csc_matrix(arrays["J_regressor"])
    content["f"] = arrays["f"].astype(np.uint32)
    return content


def assert_equal_arrays(loaded, arrays):
    assert set(loaded) == set(arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_plain_pickle_with_a_sparse_regressor_loads_equal_to_its_source(tmp_path, small_head_arrays, protocol):
    path = write(tmp_path / "generic_model.pkl", flame_dictionary(small_head_arrays), protocol)
    assert_equal_arrays(read_head_file(path), small_head_arrays)


def test_an_npz_loads_equal_to_its_source(tmp_path, small_head_arrays):
    np.savez(tmp_path / "head.npz", **small_head_arrays)
    assert_equal_arrays(read_head_file(tmp_path / "head.npz"), small_head_arrays)


@pytest.fixture
def chumpy():
    """Modules named like chumpy's, only while pickles are written."""

    class Ch:
        def __init__(self, **state):
            self.__dict__ = state

    class Select(Ch):
        pass

    modules = {name: types.ModuleType(name) for name in ("chumpy", "chumpy.ch", "chumpy.reordering")}
    for kind, module in ((Ch, "chumpy.ch"), (Select, "chumpy.reordering")):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        setattr(modules[module], kind.__name__, kind)
    sys.modules.update(modules)
    yield types.SimpleNamespace(Ch=Ch, Select=Select)
    for name in modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("protocol", [0, 2])
def test_chumpy_nodes_yield_their_arrays_without_chumpy(tmp_path, small_head_arrays, chumpy, protocol):
    content = flame_dictionary(small_head_arrays)
    content["v_template"] = chumpy.Ch(x=small_head_arrays["v_template"], dirty=set())
    shapes = small_head_arrays["shapedirs"]
    base = np.concatenate([shapes, np.zeros_like(shapes[..., :3])], axis=-1)
    picked = np.arange(base.size).reshape(base.shape)[..., :400].ravel()
    content["shapedirs"] = chumpy.Select(a=chumpy.Ch(x=base), idxs=picked, preferred_shape=shapes.shape)
    path = write(tmp_path / "model.pkl", content, protocol)
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        sys.modules.pop(name)
    assert_equal_arrays(read_head_file(path), small_head_arrays)
    assert "chumpy" not in sys.modules


def test_the_mask_file_beside_the_model_gives_its_regions(tmp_path, small_head_arrays):
    path = write(tmp_path / "generic_model.pkl", flame_dictionary(small_head_arrays))
    write(tmp_path / "FLAME_masks.pkl", {"face": np.arange(7), "lips": np.arange(3), "scalp": np.arange(9)})
    loaded = read_head_file(path)
    assert loaded["mask_face"].tolist() == list(range(7)) and loaded["mask_lips"].tolist() == [0, 1, 2]
    assert "scalp" not in loaded


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "system"),
        (eval, ("__import__('pathlib').Path('{marker}').touch()",), "eval"),
        (exec, ("1",), "exec"),
        (getattr, (1, "real"), "getattr"),
        (subprocess.call, (["touch", "{marker}"],), "call"),
        (np.load, ("{marker}",), "load"),
        (collections.OrderedDict, (), "OrderedDict"),
        (io.open, ("{marker}", "w"), "open"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_names_a_function_is_refused_by_name_and_nothing_runs(tmp_path, function, arguments, name, protocol):
    marker = tmp_path / "ran"
    arguments = tuple(a.replace("{marker}", str(marker)) if isinstance(a, str) else a for a in arguments)
    path = write(tmp_path / "evil.pkl", {"v_template": Hostile(function, *arguments)}, protocol)
    # The pickle may spell the module in Python 2's way (__builtin__, commands), so the function's name is what is compared.
    with pytest.raises(AssetError, match=rf"evil\.pkl: refused to load: the pickle asks for \S+\.{name},"):
        read_flame_pickle(path)
    assert not marker.exists()


def test_allowed_names_cannot_be_bent(tmp_path):
    marker = tmp_path / "ran"
    for text in (
        b"c_codecs\nencode\n(Vtext\nVutf-8\ntR.",  # another codec
        b"ccopy_reg\n_reconstructor\n(c__builtin__\nset\nc__builtin__\nobject\nNtR.",  # another class
        b"cnumpy.core.multiarray\n_reconstruct\n(cchumpy.ch\nCh\n(I0\ntS'b'\ntR.",  # another array class
        b"cnumpy\nlib.npyio.load\n(S'x'\ntR.",  # a dotted name
        b"Pevil\n.",  # a persistent reference
    ):
        path = tmp_path / "bent.pkl"
        path.write_bytes(text)
        with pytest.raises(AssetError, match=r"bent\.pkl"):
            read_flame_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("damage", [b"", b"not a pickle", b"\x80\x02}q\x00(X\x05\x00\x00"])
def test_a_damaged_pickle_is_an_error_that_names_the_file(tmp_path, damage):
    path = tmp_path / "broken.pkl"
    path.write_bytes(damage)
    with pytest.raises(AssetError, match=r"broken\.pkl.*(not a readable pickle|expected a dictionary)"):
        read_head_file(path)


def test_a_truncated_pickle_is_an_error_that_names_the_file(tmp_path, small_head_arrays):
    path = write(tmp_path / "short.pkl", flame_dictionary(small_head_arrays))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(AssetError, match=r"short\.pkl.*not a readable pickle"):
        read_head_file(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_an_error_that_names_the_file(tmp_path, small_head_arrays, save):
    path = tmp_path / "head.npz"
    save(path, **small_head_arrays)
    whole = path.read_bytes()
    for content in (b"", whole[:5000], whole[:5000] + bytes(100) + whole[5100:]):
        path.write_bytes(content)
        with pytest.raises(AssetError, match=r"head\.npz: not a readable \.npz of plain arrays"):
            read_head_file(path)


def test_an_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", v_template=np.array([{}], dtype=object))
    with pytest.raises(AssetError, match=r"objects\.npz"):
        read_head_file(tmp_path / "objects.npz")


def test_missing_files_and_foreign_endings_say_what_to_give(tmp_path):
    with pytest.raises(AssetError, match='no such head model file.*"procedural"'):
        read_head_file(tmp_path / "nowhere.pkl")
    (tmp_path / "head.obj").touch()
    with pytest.raises(AssetError, match=r"ends in \.pkl or \.npz, got '\.obj'"):
        read_head_file(tmp_path / "head.obj")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("shapedirs", lambda a: a[..., :300], r"shapedirs: expected shape .*400.*got \(1644, 3, 300\)"),
        ("weights", lambda a: a * 2, "weights: expected rows that sum to 1"),
        ("f", lambda a: a + 1000, r"f: expected indices in 0\.\.1643"),
        ("v_template", lambda a: np.where(a > 0, np.nan, a), "v_template: expected finite values"),
        ("v_template", lambda a: a.astype(str), "v_template: expected numbers"),
        ("kintree_table", lambda a: a[:, ::-1], "kintree_table: expected FLAME's joint order"),
        ("J_regressor", lambda a: a.T, "J_regressor: expected shape"),
    ],
)
def test_wrong_arrays_are_named(small_head_arrays, key, change, message):
    with pytest.raises(AssetError, match=rf"my head: {message}"):
        check_arrays(small_head_arrays | {key: change(small_head_arrays[key])}, "my head")


def test_missing_and_half_given_keys_are_named(small_head_arrays):
    without = {key: value for key, value in small_head_arrays.items() if key != "posedirs"}
    with pytest.raises(AssetError, match=r"\['posedirs'\] are missing"):
        check_arrays(without, "my head")
    with pytest.raises(AssetError, match="belong together"):
        check_arrays(small_head_arrays | {"landmark_faces": np.zeros(70, int)}, "my head")
