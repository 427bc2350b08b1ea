"""A head of a few hundred vertices and a generator of a few thousand weights: what the farm's tests render with."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.recipes import MotionDraws, RecipeConfig
from datagen.render import RenderConfig
from genhead.generator import EXPORT_KIND, GenHead, GenHeadConfig, GenHeadExport
from head3d.head_model import load_head_model
from head3d.run.checkpoint import export_model


def sphere(rows, columns, radius, centre):
    """Vertices and outward faces of a ball."""
    polar, around = np.linspace(0.15, np.pi - 0.15, rows), np.arange(columns) * 2 * np.pi / columns
    polar, around = (grid.ravel() for grid in np.meshgrid(polar, around, indexing="ij"))
    ball = np.stack([np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], axis=1)
    faces = []
    for row in range(rows - 1):
        for column in range(columns):
            a, b = row * columns + column, row * columns + (column + 1) % columns
            faces += [[a, a + columns, b], [b, a + columns, b + columns]]
    return ball * radius + centre, np.array(faces)


def tiny_head_arrays():
    """A ball with two eyeballs in front and a jaw that carries the lower front, in FLAME's keys and metres."""
    parts = [
        sphere(10, 16, np.array([0.08, 0.11, 0.09]), np.array([0.0, 0.02, 0.0])),
        sphere(5, 6, 0.016, np.array([0.03, 0.04, 0.078])),
        sphere(5, 6, 0.016, np.array([-0.03, 0.04, 0.078])),
    ]
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    vertices = np.concatenate([vertices for vertices, _ in parts])
    faces = np.concatenate([faces + start for (_, faces), start in zip(parts, starts, strict=False)])
    count, skin = len(vertices), np.arange(starts[1])
    left, right = np.arange(starts[1], starts[2]), np.arange(starts[2], starts[3])
    weights = np.zeros((count, 5))
    weights[:, 1] = 1
    lower = (vertices[:, 1] < 0) & (vertices[:, 2] > 0) & np.isin(np.arange(count), skin)
    for joint, ids in ((2, np.flatnonzero(lower)), (3, left), (4, right)):
        weights[ids] = np.eye(5)[joint]
    rng = np.random.default_rng(0)
    regressor = np.zeros((5, count))
    for joint, ids in enumerate((skin, skin, np.flatnonzero(lower), left, right)):
        regressor[joint, ids] = 1 / len(ids)
    front = np.flatnonzero((vertices[:, 2] > 0.05) & np.isin(np.arange(count), skin))
    mouth = front[(np.abs(vertices[front, 0]) < 0.04) & (np.abs(vertices[front, 1] + 0.02) < 0.03)]
    triangle = np.repeat(np.eye(3)[:1], 70, axis=0)
    return {
        "v_template": vertices,
        "shapedirs": rng.standard_normal((count, 3, 400)) * 3e-4,
        "posedirs": np.zeros((count, 3, 36)),
        "J_regressor": regressor,
        "weights": weights,
        "kintree_table": np.array([[-1, 0, 1, 1, 1], range(5)]),
        "f": faces,
        "mask_face": front,
        "mask_lips": mouth,
        "mask_left_eyeball": left,
        "mask_right_eyeball": right,
        "mask_noinmouth": np.setdiff1d(np.arange(count), mouth[:1]),
        "mask_eyelids": front[:2],
        "simplified_idxs": np.repeat(skin[:, None], 3, axis=1),
        "simplified_baris": np.repeat(np.eye(3)[:1], len(skin), axis=0),
        "simplified_faces": faces[(faces < starts[1]).all(1)],
        "landmark_faces": np.arange(70),
        "landmark_barycentric": triangle,
    }


def export_generator(folder: Path, seed: int, head: Path, model: GenHeadConfig) -> Path:
    torch.manual_seed(seed)
    genhead = GenHead(model, load_head_model(head))
    torch.nn.init.normal_(genhead.decoder.density.weight, std=20.0)  # a new decoder has no density anywhere
    return export_model(
        folder, genhead.weights(), GenHeadExport(str(head), genhead.head_model.content_hash, model), EXPORT_KIND, images_seen=0
    )


@pytest.fixture(scope="session")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "tiny.npz"
    np.savez(path, **tiny_head_arrays())
    return path


@pytest.fixture(scope="session")
def generator(tmp_path_factory, head_file, tiny_genhead):
    """Folder of an exported generator."""
    return export_generator(tmp_path_factory.mktemp("generator"), 0, head_file, tiny_genhead(32))


@pytest.fixture(scope="session")
def other_generator(tmp_path_factory, head_file, tiny_genhead):
    """The same network with other weights."""
    return export_generator(tmp_path_factory.mktemp("other_generator"), 1, head_file, tiny_genhead(32))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, run_of, data_files):
    """Bytes of the tiny set, made in one go in this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    assert generate(run_of(out)) == 0
    return data_files(out)


@pytest.fixture
def made_set(tmp_path, undisturbed):
    """A fresh copy of the tiny set."""
    folder = tmp_path / "set"
    for name, data in undisturbed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def run_of(generator):
    """Settings of a tiny run: `run_of(out, **changes)`. Five identities, seven frames, three shards."""

    def build(out, **changes):
        settings = {
            "out": out,
            "generator": generator,
            "identities": 5,
            "workers": 0,
            "device": "cpu",
            "page": False,
            "recipe": RecipeConfig(
                dynamic_motions=2, dynamic_views=3, static_views=2, motion=MotionDraws(expression_std=1.0),
                split_rule="modulo", val_share=0.25, test_share=0.25,
            ),
            "render": RenderConfig(points=20, views_at_once=2),
            "shards": ShardConfig(identities_per_shard=2),
        }  # fmt: skip
        return DatagenRun(**(settings | changes))

    return build


@pytest.fixture(scope="session")
def data_files():
    """Bytes of everything in a folder or behind a URL that is data: all files but the logs and the lock."""

    def read(place):
        filesystem, root = fsspec.core.url_to_fs(str(place), use_listings_cache=False)
        names = {path: path.removeprefix(f"{root}/") for path in sorted(filesystem.find(root))}
        return {name: filesystem.cat_file(path) for path, name in names.items() if name not in ("log.jsonl", "failures.jsonl", ".lock")}

    return read
