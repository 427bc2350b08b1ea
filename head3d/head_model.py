"""The head: a FLAME-format model in scene units, its skinning, regions, neighbour table, coarse mesh and landmarks.

FLAME (Li et al., "Learning a model of facial shape and expression from 4D scans", SIGGRAPH Asia 2017): linear shape and expression
offsets, pose-corrective offsets, linear blend skinning over five joints (root, neck, jaw, left eye, right eye). Lengths are
FLAME's metres x 3 and the origin is the neck joint of the canonical mesh (portrait4d, section 0). The root never rotates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from head3d import mesh_regions
from head3d.flame_files import check_arrays, read_head_file
from head3d.labels import SHAPE_SIZE, Motion
from head3d.rasterize import Backend, check_backend
from head3d.rotations import axis_angle_to_matrix

SCENE_UNITS_PER_METRE = 3.0
CANONICAL_JAW_RAD = 0.3  # rotation of the jaw about x in the canonical mesh: the mouth is open, so its inside has a place
NECK_JOINT = 1
BUILT_IN = "procedural"


@dataclass(frozen=True)
class Regions:
    """Sorted vertex ids (int64) of the parts of the mesh."""

    head: Tensor  # everything but the eyeballs
    left_eyeball: Tensor  # the person's left, +x
    right_eyeball: Tensor
    eyeballs: Tensor  # both
    face: Tensor  # front of the face, brow to chin, without ears, neck and eyeballs
    lips: Tensor
    without_inner_mouth: Tensor  # everything that is not inside the mouth (teeth, cavity, inner lip surface)
    eyelids: Tensor


class SimplifiedMesh(NamedTuple):
    """A coarse mesh whose vertices are combinations of three vertices of the full mesh."""

    indices: Tensor  # [n, 3] int64 vertex ids of the full mesh
    barycentric: Tensor  # [n, 3] weights, rows sum to 1
    faces: Tensor  # [f, 3] int64 into the n vertices

    def apply(self, vertices: Tensor) -> Tensor:
        """The coarse vertices [B, n, 3] of full meshes [B, N, 3]."""
        return (vertices[:, self.indices] * self.barycentric[..., None]).sum(2)


class HeadModel(nn.Module):
    """FLAME-format head. All tensors are buffers that no checkpoint stores: a licensed model never leaks into weights."""

    faces: Tensor  # [F, 3] int64
    ring: Tensor  # [N, K] int64: the vertex itself, its edge neighbours, padded with N
    weights: Tensor  # [N, 5] skinning
    file_template: Tensor  # [N, 3] as the file has it: metres, origin not at the neck
    joint_regressor: Tensor  # [5, N] joints from resting vertices
    canonical_vertices: Tensor  # [N, 3] zero parameters but the jaw
    mouth_cap: Tensor  # [c, 3] faces (vertex ids) that close the inner rim of the lips
    content_hash: str  # hex digest of the arrays that the model was made from
    rasterizer: Backend  # what draws its masks and maps

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
        super().__init__()
        self.rasterizer = "torch"
        arrays = check_arrays(arrays, where)
        self.content_hash = _digest(arrays)
        scale = SCENE_UNITS_PER_METRE
        template = arrays["v_template"].astype(np.float64) * scale
        count = len(template)
        regressor = arrays["J_regressor"].astype(np.float64)
        template -= (regressor @ template)[NECK_JOINT]
        coefficient_basis = arrays["shapedirs"].transpose(2, 0, 1) * scale  # [400, N, 3]
        pose_basis = arrays["posedirs"].transpose(2, 0, 1) * scale  # [36, N, 3]

        def buffer(name: str, value: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.as_tensor(np.ascontiguousarray(value)).to(dtype), persistent=False)

        buffer("faces", arrays["f"], torch.int64)
        buffer("weights", arrays["weights"])
        buffer("template", template)
        buffer("file_template", arrays["v_template"])
        buffer("joint_regressor", arrays["J_regressor"])
        buffer("basis", np.concatenate([coefficient_basis, pose_basis]).reshape(-1, count * 3))
        buffer("joint_template", regressor @ template)
        joint_basis = np.matmul(regressor.astype(np.float32), coefficient_basis.astype(np.float32))
        buffer("joint_basis", joint_basis.reshape(len(joint_basis), -1))

        analysis = mesh_regions.analyse(arrays, where)
        self._region_names = tuple(analysis.regions)
        for name, ids in analysis.regions.items():
            buffer(f"region_{name}", ids, torch.int64)
        buffer("ring", analysis.ring, torch.int64)
        buffer("mouth_cap", analysis.mouth_cap, torch.int64)
        buffer("simplified_indices", analysis.simplified_indices, torch.int64)
        buffer("simplified_barycentric", analysis.simplified_barycentric)
        buffer("simplified_faces", analysis.simplified_faces, torch.int64)
        buffer("landmark_corners", arrays["f"][analysis.landmark_faces], torch.int64)
        buffer("landmark_barycentric", analysis.landmark_barycentric)
        with torch.no_grad():
            jaw = torch.tensor([[CANONICAL_JAW_RAD, 0.0, 0.0]])
            canonical = self.vertices(torch.zeros(1, SHAPE_SIZE), Motion.neutral(1)._replace(jaw_pose=jaw))
        self.register_buffer("canonical_vertices", canonical[0], persistent=False)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], where: str = "head model arrays") -> HeadModel:
        """Build from arrays in FLAME's own keys and units (metres); what is optional and absent is computed from the mesh.

        Required: v_template [N,3], shapedirs [N,3,400], posedirs [N,3,36], J_regressor [5,N], weights [N,5], kintree_table [2,5], f [F,3].
        Optional: mask_face, mask_lips, mask_left_eyeball, mask_right_eyeball, mask_noinmouth, mask_eyelids (or set_eyelids_idxs),
        ring, simplified_idxs, simplified_baris, simplified_faces, landmark_faces, landmark_barycentric. Other keys are ignored.
        Raises AssetError naming `where` and the key if something is missing, of the wrong shape or out of range.
        """
        return cls(arrays, where)

    @property
    def regions(self) -> Regions:
        return Regions(**{name: getattr(self, f"region_{name}") for name in self._region_names})

    @property
    def simplified(self) -> SimplifiedMesh:
        return SimplifiedMesh(self.simplified_indices, self.simplified_barycentric, self.simplified_faces)

    def vertices(self, shape: Tensor, motion: Motion) -> Tensor:
        """Posed vertices [B, N, 3] for shape [B, 300] and motion; differentiable in both."""
        with torch.autocast(shape.device.type, enabled=False):
            rotations, joints = self._local_rotations(motion), self._rest_joints(shape, motion)
            corrective = (rotations[:, 1:] - torch.eye(3, device=shape.device)).flatten(1)  # [B, 36]
            coefficients = torch.cat([shape, motion.expression, corrective], dim=1).float()
            resting = torch.addmm(self.template.flatten(), coefficients, self.basis).unflatten(1, (-1, 3))
            linear, shift = self._joint_transforms(rotations, joints)
            # Blending R - I instead of R keeps the zero pose exact and makes reduced matmul precision harmless.
            linear = linear - torch.eye(3, device=shape.device)
            blended = self.weights @ torch.cat([linear.flatten(2), shift], dim=-1)  # [B, N, 12]
            turned = (blended[..., :9].unflatten(-1, (3, 3)) * resting[..., None, :]).sum(-1)
            return resting + turned + blended[..., 9:]

    def joints(self, shape: Tensor, motion: Motion) -> Tensor:
        """Posed joint positions [B, 5, 3]: root, neck, jaw, left eye, right eye."""
        rest = self._rest_joints(shape, motion)
        linear, shift = self._joint_transforms(self._local_rotations(motion), rest)
        return (linear * rest[:, :, None, :]).sum(-1) + shift

    def landmarks(self, vertices: Tensor) -> Tensor:
        """The 68 face landmarks (usual iBUG order) and the right and the left pupil, [B, 70, 3], of posed meshes [B, N, 3]."""
        return (vertices[:, self.landmark_corners] * self.landmark_barycentric[..., None]).sum(2)

    def faces_within(self, vertex_ids: Tensor) -> Tensor:
        """The faces [f, 3] all of whose corners are among `vertex_ids`."""
        inside = torch.zeros(len(self.template), dtype=torch.bool, device=self.faces.device)
        inside[vertex_ids] = True
        return self.faces[inside[self.faces].all(1)]

    def _rest_joints(self, shape: Tensor, motion: Motion) -> Tensor:
        coefficients = torch.cat([shape, motion.expression], dim=1).float()
        return torch.addmm(self.joint_template.flatten(), coefficients, self.joint_basis).unflatten(1, (5, 3))

    def _local_rotations(self, motion: Motion) -> Tensor:
        """[B, 5, 3, 3]; the root's is the identity."""
        root = torch.zeros_like(motion.neck_pose)
        vectors = torch.cat([root, motion.neck_pose, motion.jaw_pose, motion.eye_pose], dim=1)
        return axis_angle_to_matrix(vectors.float().unflatten(1, (5, 3)))

    def _joint_transforms(self, rotations: Tensor, joints: Tensor) -> tuple[Tensor, Tensor]:
        """Rest space -> posed space of every joint: x -> linear x + shift. Jaw and eyes hang on the neck, the neck on the root.

        A joint turns about its own rest position: x -> R (x - J) + J, then its parent's map follows.
        """
        local_shift = joints - (rotations * joints[:, :, None, :]).sum(-1)
        neck, neck_shift = rotations[:, NECK_JOINT, None], local_shift[:, NECK_JOINT, None]
        linear = (neck[..., :, :, None] * rotations[:, 2:, None, :, :]).sum(-2)
        shift = (neck * local_shift[:, 2:, None, :]).sum(-1) + neck_shift
        return torch.cat([rotations[:, :2], linear], 1), torch.cat([local_shift[:, :2], shift], 1)


def load_head_model(path: str | Path | None, rasterizer: Backend = "torch") -> HeadModel:
    """The head from a file, or the built-in one for None or "procedural".

    .npz: arrays as in `HeadModel.from_arrays`, read without unpickling. .pkl: FLAME's own file (`generic_model.pkl`,
    `flame2023.pkl`), read by a restricted unpickler; if FLAME's `FLAME_masks.pkl` lies beside it, its regions are used.
    Raises AssetError if the file is missing, malformed or tries to run code, ConfigError if the rasteriser is not installed.
    """
    check_backend(rasterizer)
    if path is None or str(path) == BUILT_IN:
        from head3d.procedural_head import build_procedural_head

        head = HeadModel.from_arrays(build_procedural_head(), "built-in head")
    else:
        head = HeadModel.from_arrays(read_head_file(Path(path)), str(path))
    head.rasterizer = rasterizer
    return head


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, indices and rounded sums of the values, independent of the file format and of key order.

    Values enter as up to 1024 interleaved sums, rounded to 1e-4: the built-in head is computed and not stored, and its last bits differ
    between processors and thread counts. Two heads that share a hash are the same for every purpose but bit-exact pictures.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        if values.dtype.kind == "f":
            flat = np.pad(values.ravel().astype(np.float64), (0, -values.size % 1024))
            values = np.round(flat.reshape(-1, 1024).sum(0), 4) + 0.0  # no negative zero
        digest.update(values.tobytes())
    return digest.hexdigest()
