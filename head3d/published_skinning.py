"""Linear blend skinning in the order of float32 operations of the FLAME layer that published releases share.

`HeadModel.vertices` computes the same vertices with fewer operations; the two agree to about 1e-7. The published neck stage lets the last
bit decide between equally near triangles (neck_field.py), so reproducing it takes the last bit of the mesh too. Matrix products must
also add in the same order, which the layout of their operands decides; another BLAS or processor may still differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from head3d.head_model import NECK_JOINT, SCENE_UNITS_PER_METRE, HeadModel
from head3d.labels import Motion

PARENTS = (None, 0, 1, 1, 1)  # root, neck, jaw, left eye, right eye


@torch.no_grad()
def published_vertices(head: HeadModel, shape: Tensor, motion: Motion) -> Tensor:
    """Posed vertices [B, N, 3] in scene units for shape [B, 300]; `HeadModel.vertices` up to rounding. No gradient."""
    with torch.autocast(shape.device.type, enabled=False):
        return _skin(head, shape, motion)


def _skin(head: HeadModel, shape: Tensor, motion: Motion) -> Tensor:
    batch = shape.shape[0]
    coefficients = torch.cat([shape, motion.expression], dim=1).float()
    coefficient_basis = head.basis[: coefficients.shape[1]].T.contiguous()  # [3 N, 400]: this layout decides the order of the sums
    pose_basis = head.basis[coefficients.shape[1] :].T.contiguous()  # [3 N, 36]

    shaped = _centred_template(head) + (coefficients @ coefficient_basis.T).unflatten(1, (-1, 3))
    joints = _regress(head, shaped)
    rotations = _rodrigues(torch.cat([torch.zeros_like(motion.neck_pose), *motion[1:]], dim=1).float().reshape(-1, 3))
    rotations = rotations.view(batch, -1, 3, 3)
    corrective = (rotations[:, 1:] - torch.eye(3, device=shape.device)).flatten(1)
    resting = (corrective @ pose_basis.T).unflatten(1, (-1, 3)) + shaped

    transforms = _joint_transforms(rotations, joints)  # [B, 5, 4, 4]
    blended = torch.matmul(head.weights.expand(batch, -1, -1), transforms.flatten(2)).unflatten(2, (4, 4))
    homogeneous = torch.cat([resting, torch.ones_like(resting[..., :1])], dim=-1)
    return torch.matmul(blended, homogeneous[..., None])[..., :3, 0]


def _centred_template(head: HeadModel) -> Tensor:
    """[N, 3] the file's template in scene units, float32, minus its posed neck joint (which the jaw does not move)."""
    template = head.file_template * SCENE_UNITS_PER_METRE
    root, neck = _regress(head, template[None])[0, : NECK_JOINT + 1]
    return template - ((neck - root) + root)


def _regress(head: HeadModel, vertices: Tensor) -> Tensor:
    """Joints [B, 5, 3] of resting vertices [B, N, 3]."""
    return torch.einsum("bnc,jn->bjc", vertices, head.joint_regressor)


def _rodrigues(vectors: Tensor) -> Tensor:
    """[M, 3] -> [M, 3, 3]; the length is that of the vector + 1e-8, so that zero needs no case of its own."""
    angle = (vectors + 1e-8).norm(dim=1, keepdim=True)
    x, y, z = (vectors / angle).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).unflatten(1, (3, 3))
    identity = torch.eye(3, device=vectors.device)
    return identity + angle.sin()[:, None] * cross + (1 - angle.cos()[:, None]) * torch.bmm(cross, cross)


def _joint_transforms(rotations: Tensor, joints: Tensor) -> Tensor:
    """Rest space -> posed space of every joint [B, 5, 4, 4]: the chain of (R, bone), then minus its image of the resting joint."""
    chain: list[Tensor] = []
    for j, parent in enumerate(PARENTS):
        local = rotations.new_zeros(len(rotations), 4, 4)
        local[:, :3, :3] = rotations[:, j]
        local[:, :3, 3] = joints[:, j] if parent is None else joints[:, j] - joints[:, parent]
        local[:, 3, 3] = 1
        chain.append(local if parent is None else torch.matmul(chain[parent], local))
    transforms = torch.stack(chain, dim=1)
    resting = torch.cat([joints, torch.zeros_like(joints[..., :1])], dim=-1)[..., None]
    shift = transforms[..., 3:] - torch.matmul(transforms, resting)
    return torch.cat([transforms[..., :3], shift], dim=-1)
