"""The Frechet distance against closed forms, and what its features can tell apart."""

import numpy as np
import pytest
import scipy.linalg
import torch

from genhead.features import Features, Statistics, frechet_distance, random_convolution_features, reference_statistics, statistics
from genhead.portraits import Portrait, PortraitSet, write_portraits
from head3d.labels import LABEL_SIZE


def _gaussian(mean, covariance) -> Statistics:
    return Statistics(np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64))


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        (([0], [[1]]), ([3], [[4]]), 9 + (1 - 2) ** 2),  # one dimension: (m1 - m2)^2 + (s1 - s2)^2
        (([1, 2], [[4, 0], [0, 9]]), ([1, 4], [[1, 0], [0, 25]]), 4 + (2 - 1) ** 2 + (3 - 5) ** 2),
        (([0, 0], [[0, 0], [0, 0]]), ([1, 1], [[2, 1], [1, 3]]), 2 + 5),  # a point: the other's mean square distance from it
        (([0, 0], [[5, 4], [4, 5]]), ([0, 0], [[10, 6], [6, 10]]), (3 - 4) ** 2 + (1 - 2) ** 2),  # along the diagonals: 9, 1 and 16, 4
    ],
)
def test_the_distance_of_gaussians_that_can_be_computed_by_hand(first, second, distance):
    assert frechet_distance(_gaussian(*first), _gaussian(*second)) == pytest.approx(distance, abs=1e-9)
    assert frechet_distance(_gaussian(*second), _gaussian(*first)) == pytest.approx(distance, abs=1e-9)


def test_covariances_that_do_not_commute_agree_with_the_root_of_their_product():
    rng = np.random.default_rng(0)
    (a, b), (m, n) = rng.standard_normal((2, 6, 9)), rng.standard_normal((2, 6))
    a, b = a @ a.T, b @ b.T
    expected = np.square(m - n).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(Statistics(m, a), Statistics(n, b)) == pytest.approx(expected, rel=1e-9)


def test_fewer_pictures_than_features_are_no_trouble_and_a_set_is_at_no_distance_from_itself():
    few = statistics(torch.randn(5, 30, generator=torch.Generator().manual_seed(0)))
    assert 0 <= frechet_distance(few, few) < 1e-5
    shifted = Statistics(few.mean + 0.1, few.covariance)
    assert frechet_distance(few, shifted) == pytest.approx(30 * 0.01, abs=1e-5)  # roots of rounding errors of 1e-16


def test_statistics_by_hand_and_in_batches():
    rows = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 2.0]])
    found = statistics(rows)
    np.testing.assert_allclose(found.mean, [2, 2])
    np.testing.assert_allclose(found.covariance, [[4, 2], [2, 4]])  # divided by N - 1
    in_batches = statistics(iter([rows[:1], rows[1:]]))
    assert np.array_equal(in_batches.mean, found.mean) and np.array_equal(in_batches.covariance, found.covariance)


def test_features_have_the_stated_size_and_are_the_same_in_every_run():
    extract = random_convolution_features().extract
    assert extract(torch.zeros(2, 3, 64, 64)).shape == (2, 32 * 4 + 48)
    assert extract(torch.zeros(1, 3, 16, 16)).shape == (1, 32 * 2 + 48)
    ramp = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    found = extract(ramp)
    torch.testing.assert_close(extract(ramp.repeat(2, 1, 1, 1)), found.repeat(2, 1))
    # The thumbnail's first number is the mean of rows 0-3 and columns 0-3 of the first channel: entries 0..51 of 768, mean 25.5.
    assert found[0, 0].item() == pytest.approx(-1 + 2 * 25.5 / 767, abs=1e-6)


def _stripes(count: int, width: int, seed: int) -> torch.Tensor:
    """Pictures of vertical stripes at random places: the same colours for every width."""
    starts = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed))
    columns = ((torch.arange(32) + starts[:, None]) // width % 2).float() * 2 - 1
    return columns[:, None, None].expand(-1, 3, 32, -1)


def test_the_distance_sees_texture_and_colour_and_grows_with_the_change():
    extract = random_convolution_features().extract
    thin = statistics(extract(_stripes(200, 2, 0)))
    same = frechet_distance(thin, statistics(extract(_stripes(200, 2, 1))))
    wide = frechet_distance(thin, statistics(extract(_stripes(200, 4, 2))))
    dim = [frechet_distance(thin, statistics(extract(_stripes(200, 2, 3) * (1 - amount)))) for amount in (0.1, 0.3, 0.6)]
    assert 20 * same < wide and same < dim[0] < dim[1] < dim[2]


@pytest.fixture
def portraits(tmp_path) -> PortraitSet:
    pictures = [
        Portrait(np.full((16, 16, 3), 40 * i, np.uint8), np.zeros((16, 16), np.uint8), np.zeros(LABEL_SIZE, np.float32)) for i in range(6)
    ]
    write_portraits(tmp_path / "set", pictures, 16, 6, {"of": "grey"}, image_format="png")
    return PortraitSet(tmp_path / "set")


def test_references_are_two_disjoint_sets_and_the_mean_of_the_first(portraits):
    level = Features("frechet", "level", lambda pictures: pictures.mean((2, 3)))
    found = reference_statistics(portraits, 3, 0, level, batch=2, cache=None)
    total = np.mean([40 * i / 127.5 - 1 for i in range(6)])
    assert (found.first.mean[0] + found.second.mean[0]) / 2 == pytest.approx(total, abs=1e-6)
    assert found.first.mean[0] != pytest.approx(found.second.mean[0])
    np.testing.assert_allclose(found.mean_picture.mean, found.first.mean, atol=1e-6)
    assert (found.mean_picture.covariance == 0).all()


def test_references_are_kept_in_a_file_named_for_what_they_depend_on(portraits, tmp_path):
    level = Features("frechet", "level", lambda pictures: pictures.mean((2, 3)))
    first = reference_statistics(portraits, 3, 0, level, 2, tmp_path / "kept")

    def refuse(pictures):
        raise AssertionError("computed again")

    same, another = Features("frechet", "level", refuse), Features("frechet", "other", refuse)
    again = reference_statistics(portraits, 3, 0, same, 2, tmp_path / "kept")
    assert all(np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance) for a, b in zip(first, again, strict=True))
    for other in ((3, 1, same), (2, 0, same), (3, 0, another)):
        with pytest.raises(AssertionError, match="computed again"):
            reference_statistics(portraits, *other, 2, tmp_path / "kept")
