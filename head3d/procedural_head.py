"""The built-in head: a complete head in FLAME's own format, made by code alone, so that everything runs without a licence or a download.

It has what the published pipeline needs of FLAME (same keys, joint order, component counts, frame and size) but its own mesh: cranium,
face, ears, neck, lids, two eyeballs, a mouth with teeth and tongue. `head3d.head_model` loads it like a user's FLAME file.
"""

from __future__ import annotations

import functools

import numpy as np

from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE
from head3d.procedural import assembly as parts
from head3d.procedural import components, regions, sculpt
from head3d.procedural.components import BLINK_CLOSES_AT as BLINK_CLOSES_AT

# Index of each named component. Coefficients count standard deviations; blinks close the eye at BLINK_CLOSES_AT and open it wider below 0.
_SHAPE_NAMES = (
    "head_width", "head_height", "face_length", "nose_length", "nose_width", "jaw_width", "chin", "brow", "eye_spacing", "eye_size",
    "lip_thickness", "mouth_width", "cheek_bones", "forehead", "nose_bridge", "cheek_flesh", "ear_size", "neck_width",
)  # fmt: skip
_EXPRESSION_NAMES = (
    "smile", "pucker", "brow_raise", "blink_left", "blink_right", "frown", "mouth_corners_down", "mouth_stretch", "upper_lip_raise",
    "lower_lip_down", "cheek_puff", "mouth_left", "squint", "lips_press",
)  # fmt: skip
SHAPES: dict[str, int] = {name: index for index, name in enumerate(_SHAPE_NAMES)}
EXPRESSIONS: dict[str, int] = {name: index for index, name in enumerate(_EXPRESSION_NAMES)}
_METRES_PER_MM = 1e-3
_DECIMALS = (
    8  # hundredths of a micrometre: what lies below differs between linear-algebra libraries and would change the head's content hash
)


@functools.cache
def build_procedural_head() -> dict[str, np.ndarray]:
    """Arrays of the built-in head in FLAME's keys and units (metres, y up, face to +z); treat them as read-only.

    v_template [N, 3], shapedirs [N, 3, 400] (300 identity, 100 expression), posedirs [N, 3, 36] (zero), J_regressor [5, N],
    weights [N, 5], kintree_table [2, 5], f [F, 3]; landmark_faces [70], landmark_barycentric [70, 3] (iBUG's 68, right and left
    pupil); vertex sets mask_* (face, lips, eyelids, noinmouth, left_eyeball, right_eyeball, iris, pupil, scalp, neck, ears, nose, brows,
    beard, upper_teeth, lower_teeth, tongue, mouth_cavity); names_shape and names_expression of the first components.
    Skin vertices come first, eyeballs last. Built once a process, in about two seconds.
    """
    head = parts.assemble()
    below = parts.below_mouth(head)
    names_shape, shape = components.shape_components(head, SHAPE_SIZE)
    names_expression, expression = components.expression_components(head, below, EXPRESSION_SIZE)
    assert names_shape == list(_SHAPE_NAMES) and names_expression == list(_EXPRESSION_NAMES)
    landmark_faces, landmark_weights = regions.landmarks(head)
    directions = np.concatenate([shape, expression], axis=2) * _METRES_PER_MM
    origin = sculpt.NECK_JOINT * [0.0, 1.0, 0.0]  # the neck joint's height; depth stays midway between the ears
    arrays = {
        "v_template": np.round((head.points - origin) * _METRES_PER_MM, _DECIMALS).astype(np.float32),
        "shapedirs": np.round(directions, _DECIMALS).astype(np.float32),
        "posedirs": np.zeros((len(head.points), 3, 36), np.float32),
        "J_regressor": np.round(parts.joint_regressor(head), _DECIMALS).astype(np.float32),
        "weights": np.round(parts.skinning_weights(head, below), 6).astype(np.float32),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.int64),
        "f": head.faces.astype(np.int64),
        "landmark_faces": landmark_faces.astype(np.int64),
        "landmark_barycentric": np.round(landmark_weights, 6).astype(np.float32),
        "names_shape": np.array(names_shape),
        "names_expression": np.array(names_expression),
    }
    arrays |= {f"mask_{name}": ids.astype(np.int64) for name, ids in regions.masks(head).items()}
    for values in arrays.values():
        values.setflags(write=False)
    return arrays
