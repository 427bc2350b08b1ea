"""What a head model needs to know about its mesh, computed where the file does not say: regions, neighbours, mouth cap, coarse mesh.

Regions come from topology where possible (eyeballs: the vertices that the eye joints carry; mouth: the open rim that the jaw joint
splits) and from proportion otherwise. The unit of proportion is the distance between the eyeball centres, about 62 mm in FLAME.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import dijkstra

from head3d.mesh_landmarks import frontal_layout, place_landmarks
from head3d.run.errors import AssetError

SIMPLIFIED_VERTICES = 730  # as many as the published coarse mesh
RING_LIMIT = 12  # columns of the neighbour table; FLAME needs 10
LIP_REACH = 0.2  # geodesic distance from the mouth's rim that counts as lip, eye distances
EYELID_REACH = 1.35  # distance from an eyeball's centre that counts as eyelid, eyeball radii
FACE_LOW = np.array([-1.15, -1.95, -0.6])  # the face region, eye distances from the middle between the eyes
FACE_HIGH = np.array([1.15, 1.1, 2.0])


@dataclass(frozen=True)
class MeshAnalysis:
    """Everything that follows from the arrays of a head model; ids are int64."""

    regions: dict[str, np.ndarray]  # sorted vertex ids by the names of head_model.Regions
    ring: np.ndarray  # [N, K] the vertex itself, its edge neighbours, padded with N
    mouth_cap: np.ndarray  # [c, 3] faces that close the inner rim of the lips
    simplified_indices: np.ndarray  # [n, 3]
    simplified_barycentric: np.ndarray  # [n, 3]
    simplified_faces: np.ndarray  # [f, 3]
    landmark_faces: np.ndarray  # [70]
    landmark_barycentric: np.ndarray  # [70, 3]


def analyse(arrays: Mapping[str, np.ndarray], where: str) -> MeshAnalysis:
    """Read or compute regions, neighbour table, mouth cap, coarse mesh and landmarks of checked head-model arrays.

    Raises AssetError if the eyeballs or the mouth can neither be read nor found.
    """
    vertices, faces = arrays["v_template"].astype(np.float64), arrays["f"]
    count = len(vertices)
    edges = edge_matrix(vertices, faces)
    regions = _regions(arrays, vertices, faces, edges, where)
    skin = np.setdiff1d(regions["without_inner_mouth"], regions["eyeballs"])
    skin_faces = faces_within(faces, skin, count)
    cap = [triangulate(loop, vertices) for loop in boundary_loops(skin_faces) if np.isin(loop, regions["lips"]).mean() > 0.5]
    if "simplified_idxs" in arrays:
        simplified = (arrays["simplified_idxs"], arrays["simplified_baris"], arrays["simplified_faces"])
    else:
        simplified = simplify(vertices, skin_faces, SIMPLIFIED_VERTICES)
    if "landmark_faces" in arrays:
        landmarks = (arrays["landmark_faces"], arrays["landmark_barycentric"])
    else:
        landmarks = _landmarks(vertices, faces, regions, skin)
    return MeshAnalysis(
        regions=regions,
        ring=arrays["ring"] if "ring" in arrays else ring_table(edges),
        mouth_cap=np.concatenate([np.zeros((0, 3), np.int64), *cap]),
        simplified_indices=simplified[0], simplified_barycentric=simplified[1], simplified_faces=simplified[2],
        landmark_faces=landmarks[0], landmark_barycentric=landmarks[1],
    )  # fmt: skip


def edge_matrix(vertices: np.ndarray, faces: np.ndarray) -> csr_matrix:
    """Symmetric [N, N] matrix of edge lengths (at least 1e-12, so that coinciding neighbours stay neighbours)."""
    pairs = np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    lengths = np.maximum(np.linalg.norm(vertices[pairs[:, 0]] - vertices[pairs[:, 1]], axis=1), 1e-12)
    half = coo_matrix((lengths, (pairs[:, 0], pairs[:, 1])), (len(vertices), len(vertices)))
    return (half + half.T).tocsr()


def ring_table(edges: csr_matrix) -> np.ndarray:
    """[N, K]: every vertex, then its neighbours from near to far, padded with N.

    K is the largest count, but at most `RING_LIMIT`: of a pole where dozens of edges meet, only the nearest neighbours are kept.
    """
    count, row = edges.shape[0], np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    neighbours = edges.indices[np.lexsort((edges.indices, edges.data, row))]
    place = 1 + np.arange(len(row)) - edges.indptr[row]
    table = np.full((count, 1 + int(place.max(initial=0))), count, np.int64)
    table[:, 0] = np.arange(count)
    table[row, place] = neighbours
    return table[:, :RING_LIMIT]


def faces_within(faces: np.ndarray, vertex_ids: np.ndarray, count: int) -> np.ndarray:
    """Faces all of whose corners are among `vertex_ids` of `count` vertices."""
    inside = np.zeros(count, bool)
    inside[vertex_ids] = True
    return faces[inside[faces].all(1)]


def boundary_loops(faces: np.ndarray) -> list[np.ndarray]:
    """Closed walks of vertex ids along edges that belong to one face, in the direction of those faces, longest first."""
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    present = set(map(tuple, directed.tolist()))
    following: dict[int, list[int]] = defaultdict(list)
    for start, end in sorted(present):
        if (end, start) not in present:
            following[start].append(end)
    loops = []
    for first in sorted(following):
        while following[first]:
            walk = [first]
            while following[walk[-1]]:
                walk.append(following[walk[-1]].pop())
                if walk[-1] == first:
                    break
            if walk[-1] == first and len(walk) > 3:
                loops.append(np.array(walk[:-1]))
    return sorted(loops, key=len, reverse=True)


def triangulate(loop: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Close a boundary loop [n] with n - 2 faces, zipping its upper to its lower side from one mouth corner (x) to the other.

    The faces continue the surface that the loop bounds: they look the same way.
    """
    loop = loop[::-1]  # shared edges run opposite in the two faces that share them
    loop = np.roll(loop, -int(vertices[loop, 0].argmin()))
    turn = int(vertices[loop, 0].argmax())
    forward, backward = loop[: turn + 1], np.concatenate([loop[:1], loop[turn:][::-1]])
    i = j = 0
    faces = []
    while i < len(forward) - 1 or j < len(backward) - 1:
        advance = j == len(backward) - 1 or (i < len(forward) - 1 and vertices[forward[i + 1], 0] <= vertices[backward[j + 1], 0])
        if advance:
            faces.append((forward[i], forward[i + 1], backward[j]))
            i += 1
        else:
            faces.append((forward[i], backward[j + 1], backward[j]))
            j += 1
    kept = [face for face in faces if len(set(face)) == 3]
    return np.array(kept, np.int64).reshape(-1, 3)


def simplify(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A coarse mesh of about `target` vertices of the full one: the dual of the geodesic Voronoi cells of farthest-point samples.

    Returns indices [n, 3] (one vertex, thrice), weights [n, 3] (1, 0, 0), faces [f, 3] into the n samples.
    """
    used = np.unique(faces)
    samples = farthest_points(vertices[used], min(target, len(used)))
    seeds = used[samples]
    _, _, source = dijkstra(edge_matrix(vertices, faces), indices=seeds, min_only=True, return_predecessors=True)
    label = np.full(len(vertices), -1)
    label[seeds] = np.arange(len(seeds))
    owner = np.where(source >= 0, label[np.maximum(source, 0)], -1)  # -9999 marks what no seed reaches
    coarse = owner[faces]
    distinct = (coarse[:, 0] != coarse[:, 1]) & (coarse[:, 1] != coarse[:, 2]) & (coarse[:, 2] != coarse[:, 0])
    coarse = coarse[distinct & (coarse >= 0).all(1)]
    _, first = np.unique(np.sort(coarse, axis=1), axis=0, return_index=True)
    coarse = coarse[np.sort(first)]
    kept, coarse = np.unique(coarse, return_inverse=True)
    indices = np.repeat(seeds[kept][:, None], 3, axis=1)
    return indices, np.tile(np.array([[1.0, 0.0, 0.0]], np.float32), (len(kept), 1)), coarse.reshape(-1, 3)


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Indices [count]: each point the farthest from those before it, the lowest point (y) first."""
    chosen = np.empty(count, np.int64)
    chosen[0] = points[:, 1].argmin()
    nearest = np.full(len(points), np.inf)
    for i in range(1, count):
        nearest = np.minimum(nearest, ((points - points[chosen[i - 1]]) ** 2).sum(1))
        chosen[i] = nearest.argmax()
    return chosen


def _regions(
    arrays: Mapping[str, np.ndarray], vertices: np.ndarray, faces: np.ndarray, edges: csr_matrix, where: str
) -> dict[str, np.ndarray]:
    def given(*keys: str) -> np.ndarray | None:
        return next((arrays[key] for key in keys if key in arrays), None)

    count, weights = len(vertices), arrays["weights"]
    eyeballs = []
    for key, joint in (("mask_left_eyeball", 3), ("mask_right_eyeball", 4)):
        ids = given(key)
        ids = np.flatnonzero(weights[:, joint] > 0.5) if ids is None else ids
        if not len(ids):
            raise AssetError(f"{where}: no vertex is carried by eye joint {joint} and {key} is absent; eyeballs are needed: add {key}")
        eyeballs.append(ids)
    left, right = eyeballs
    both = np.union1d(left, right)
    head = np.setdiff1d(np.arange(count), both)
    centre_left, centre_right = vertices[left].mean(0), vertices[right].mean(0)
    middle, unit = (centre_left + centre_right) / 2, np.linalg.norm(centre_left - centre_right)

    lips, outside = given("mask_lips"), given("mask_noinmouth")
    if lips is None or outside is None:
        rim = _mouth_rim(faces_within(faces, head, count), weights)
        if rim is None:
            raise AssetError(
                f"{where}: the mesh has no open mouth rim between upper and lower lip, so its mouth cannot be found; "
                "add the vertex sets mask_lips and mask_noinmouth (everything but the inside of the mouth)"
            )
        if lips is None:
            reach = dijkstra(edges, indices=rim, min_only=True, limit=LIP_REACH * unit)
            lips = np.intersect1d(np.flatnonzero(np.isfinite(reach)), head)
        if outside is None:
            # The lips fold inward at the rim: their inner side looks away from the viewer.
            inner = lips[vertex_normals(vertices, faces)[lips, 2] < 0]
            outside = np.setdiff1d(np.arange(count), inner)
    face = given("mask_face")
    if face is None:
        scaled = (vertices - middle) / unit
        inside = ((scaled > FACE_LOW) & (scaled < FACE_HIGH)).all(1)
        face = np.intersect1d(np.intersect1d(np.flatnonzero(inside), head), outside)
    eyelids = given("mask_eyelids", "set_eyelids_idxs")
    if eyelids is None:
        near = np.zeros(count, bool)
        for ids, centre in ((left, centre_left), (right, centre_right)):
            radius = np.linalg.norm(vertices[ids] - centre, axis=1).max()
            near |= np.linalg.norm(vertices - centre, axis=1) < EYELID_REACH * radius
        eyelids = np.intersect1d(np.flatnonzero(near), head)
    return {
        "head": head, "left_eyeball": left, "right_eyeball": right, "eyeballs": both, "face": np.unique(face),
        "lips": np.unique(lips), "without_inner_mouth": np.unique(outside), "eyelids": np.unique(eyelids),
    }  # fmt: skip


def _mouth_rim(faces: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """The longest boundary loop with vertices that follow the jaw (weight > 0.5) and vertices that do not; None if there is none."""
    for loop in boundary_loops(faces):
        jaw = weights[loop, 2]
        if jaw.max() > 0.5 > jaw.min() and weights[loop, 0].max() < 0.5:
            return loop
    return None


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted, not normalised, [N, 3]."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    result = np.zeros_like(vertices)
    for i in range(3):
        np.add.at(result, faces[:, i], normal)
    return result


def _landmarks(vertices: np.ndarray, faces: np.ndarray, regions: dict[str, np.ndarray], skin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, right = vertices[regions["left_eyeball"]].mean(0), vertices[regions["right_eyeball"]].mean(0)
    middle, unit = (left + right) / 2, np.linalg.norm(left - right)
    lips = vertices[np.intersect1d(regions["lips"], skin)]
    candidates = vertices[regions["face"]]
    nose = (np.abs(candidates[:, 0] - middle[0]) < 0.25 * unit) & (candidates[:, 1] < middle[1]) & (candidates[:, 1] > lips[:, 1].max())
    nose_tip = candidates[nose][candidates[nose, 2].argmax()] if nose.any() else middle
    layout = frontal_layout(right[:2], left[:2], lips[:, :2], nose_tip[:2])
    count = len(vertices)
    skin_faces = faces_within(faces, np.union1d(regions["face"], regions["lips"]), count)
    return place_landmarks(layout, vertices, skin_faces, faces_within(faces, regions["eyeballs"], count), faces)
