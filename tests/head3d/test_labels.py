"""The 437-number label."""

import numpy as np
import pytest
import torch

from head3d.cameras import frontal
from head3d.labels import LABEL_SIZE, Motion, check_label, pack_label, unpack_label
from head3d.run.errors import DataError


def _label() -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    motion = Motion(*(torch.randn(1, n, generator=generator) for n in (100, 3, 3, 6)))
    return pack_label(frontal(), torch.randn(1, 300, generator=generator), motion)[0].numpy()


def test_fields_lie_at_the_published_offsets():
    label = torch.arange(LABEL_SIZE, dtype=torch.float32)[None]
    camera, shape, motion = unpack_label(label)
    assert camera.c2w[0, 0, 0] == 0 and camera.intrinsics[0, 0, 0] == 16
    assert [part[0, 0].item() for part in (shape, *motion)] == [25, 325, 425, 428, 431]
    assert torch.equal(pack_label(camera, shape, motion), label)


def test_motion_vector_is_expression_jaw_eyes():
    motion = Motion(torch.full((1, 100), 1.0), torch.full((1, 3), 2.0), torch.full((1, 3), 3.0), torch.full((1, 6), 4.0))
    assert motion.vector()[0].tolist() == [1.0] * 100 + [3.0] * 3 + [4.0] * 6


def test_a_good_label_is_returned_as_float32():
    assert check_label(_label().astype(np.float64), "a.npy").dtype == np.float32


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x[:436], "437 numbers"),
        (lambda x: np.where(np.arange(437) == 30, np.nan, x), "[30]"),
        (lambda x: np.where(np.arange(437) == 0, 3.0, x), "rotation"),
        (lambda x: np.concatenate([x[:16].reshape(4, 4).T.ravel(), x[16:]]), "transposed"),
        (lambda x: np.where(np.arange(437) == 16, -512.0, x), "divided by the image size"),
        (lambda x: x.astype("U8"), "float32"),
    ],
)
def test_a_bad_label_is_refused_with_its_file_and_remedy(spoil, says):
    with pytest.raises(DataError, match="a.npy") as caught:
        check_label(spoil(_label()), "a.npy")
    assert says in str(caught.value)
