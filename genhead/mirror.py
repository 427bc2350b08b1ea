"""Labels of mirrored portraits: what a picture flipped left to right shows, in the same head model.

The picture's mirror image is the mirrored head (x -> -x) seen by the mirrored camera. A rotation R becomes M R M with
M = diag(-1, 1, 1): an axis-angle (x, y, z) becomes (x, -y, -z), and left and right eye change places. Shape and expression have no
closed form in a FLAME file, so they are found from its mesh: each vertex i has a partner p(i), the vertex nearest to its mirror image on
the template, and the mirrored head of coefficients c is the least-squares solution c' of T + B c' = M (T + B c)_p, identity and
expression apart, which is linear in c. What the model cannot express is measured on posed meshes, and refused if it is large. (The
published set was made by fitting the flipped photographs anew; that needs their tracker.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from head3d.cameras import Camera
from head3d.head_model import HeadModel
from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE, Motion, pack_label, unpack_label
from head3d.nearest import VertexIndex
from head3d.run.errors import AssetError, DataError

PARTNER_LIMIT = 0.03  # scene units (1 cm): a template with vertices farther from their mirror image is not symmetric enough
UNPAIRED_LIMIT = 0.05  # share of vertices that need not be their partner's partner: narrow slits, like lids and lips, confuse a few
ERROR_LIMIT = 0.003  # scene units (1 mm), mean distance over the vertices of posed meshes


class LabelMirror:
    """Mirrors labels [B, 437] of one head model, on the CPU."""

    def __init__(self, head: HeadModel) -> None:
        """Raises AssetError if the template has no left and right that correspond."""
        self.head = head
        template = head.template.double().cpu()
        self.flip = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
        self.partners = VertexIndex(template[None]).query((template * self.flip)[None])[0]  # [N]
        distance = (template[self.partners] * self.flip - template).norm(dim=1).max().item()
        unpaired = (self.partners[self.partners] != torch.arange(len(template))).double().mean().item()
        if distance > PARTNER_LIMIT or unpaired > UNPAIRED_LIMIT:
            raise AssetError(
                f"head model of content {head.content_hash[:16]}: expected a template whose left and right correspond, but a vertex lies "
                f"{distance:.3g} scene units (limit {PARTNER_LIMIT:g}) from the nearest one to its mirror image, and {unpaired:.1%} of the "
                f"vertices (limit {UNPAIRED_LIMIT:.0%}) are not their partner's partner; train without --sampling.mirror, or fit flipped "
                "photographs and import them as portraits of their own"
            )
        basis = head.basis.double().cpu().unflatten(1, (-1, 3))
        asymmetry = template[self.partners] * self.flip - template
        shapes, expressions = basis[:SHAPE_SIZE], basis[SHAPE_SIZE : SHAPE_SIZE + EXPRESSION_SIZE]
        self._shape_offset = _least_squares(shapes, asymmetry[None])[0]
        self._shape, self._expression = self._linear(shapes), self._linear(expressions)

    def _linear(self, basis: Tensor) -> Tensor:
        """A [K, K] with c' = c A for a basis [K, N, 3]; directions that move no vertex stay as they are."""
        moves_nothing = torch.eye(len(basis), dtype=basis.dtype) - _least_squares(basis, basis)
        return _least_squares(basis, basis[:, self.partners] * self.flip) + moves_nothing

    def __call__(self, labels: Tensor) -> Tensor:
        """Labels [B, 437] of the pictures flipped left to right."""
        camera, shape, motion = unpack_label(labels)
        mirrored = Motion(
            expression=(motion.expression.double() @ self._expression).to(labels.dtype),
            neck_pose=_mirror_axis_angle(motion.neck_pose),
            jaw_pose=_mirror_axis_angle(motion.jaw_pose),
            eye_pose=torch.cat([_mirror_axis_angle(motion.eye_pose[:, 3:]), _mirror_axis_angle(motion.eye_pose[:, :3])], dim=1),
        )
        shape = (shape.double() @ self._shape + self._shape_offset).to(labels.dtype)
        return pack_label(mirror_camera(camera), shape, mirrored)

    @torch.no_grad()
    def error(self, labels: Tensor) -> Tensor:
        """Distance [B, N] in scene units between the meshes of the mirrored labels and the mirrored meshes of labels [B, 437]."""
        device = self.head.template.device
        meshes = []
        for some in (labels, self(labels)):
            _, shape, motion = unpack_label(some.to(device))
            meshes.append(self.head.vertices(shape, motion).double().cpu())
        return (meshes[1] - meshes[0][:, self.partners] * self.flip).norm(dim=-1)

    def check(self, labels: Tensor, most: int = 64) -> str:
        """A sentence with the error of up to `most` evenly spaced labels. Raises DataError if its mean is beyond ERROR_LIMIT."""
        error = self.error(labels[:: -(-len(labels) // most)])
        said = (
            f"meshes of mirrored labels differ from the mirrored meshes by {error.mean():.2g} scene units in the mean and "
            f"{error.max():.2g} at most"
        )
        if not error.mean() <= ERROR_LIMIT:
            raise DataError(
                f"{said} (limit of the mean {ERROR_LIMIT}): the head model cannot show these heads mirrored; train without "
                "--sampling.mirror, or fit flipped photographs and import them as portraits of their own"
            )
        return said


def mirror_camera(camera: Camera) -> Camera:
    """The camera that sees the mirrored world as the flipped picture: M c2w M, principal point cx -> 1 - cx, skew negated."""
    flip = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=camera.c2w.dtype, device=camera.c2w.device)
    intrinsics = camera.intrinsics.clone()
    intrinsics[:, 0, 1] = -intrinsics[:, 0, 1]
    intrinsics[:, 0, 2] = 1 - intrinsics[:, 0, 2]
    return Camera(flip[:, None] * camera.c2w * flip, intrinsics)


def _mirror_axis_angle(rotation: Tensor) -> Tensor:
    return rotation * rotation.new_tensor([1.0, -1.0, -1.0])


def _least_squares(basis: Tensor, targets: Tensor) -> Tensor:
    """Coefficients [J, K] of the basis [K, N, 3] nearest to targets [J, N, 3]; of several the shortest."""
    basis, targets = basis.flatten(1), targets.flatten(1)
    return targets @ basis.T @ torch.linalg.pinv(basis @ basis.T, hermitian=True, rtol=1e-10)
