"""Image measures against hand-computed numbers and scikit-image."""

import math

import numpy as np
import pytest
import skimage.metrics
import torch

from head3d.image_metrics import PSNR_CEILING_DB, bootstrap_interval, masked_mean, psnr, ssim


def pictures(seed=0, size=24):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    image = (truth + 0.3 * torch.randn(2, 3, size, size, generator=generator)).clamp(-1, 1)
    return image, truth


def test_psnr_of_an_even_error_is_known():
    truth = torch.zeros(1, 3, 4, 4)
    assert psnr(truth + 0.2, truth).item() == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)  # 20 dB
    assert psnr(truth, truth).item() == pytest.approx(PSNR_CEILING_DB, abs=1e-3)


def test_psnr_clamps_what_a_file_could_not_hold():
    assert psnr(torch.full((1, 3, 4, 4), 5.0), torch.ones(1, 3, 4, 4)).item() == pytest.approx(PSNR_CEILING_DB, abs=1e-3)


def test_psnr_counts_only_the_mask():
    truth, image, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    image[..., :2], image[..., 2:], mask[..., :2] = 0.2, 1.0, 1.0
    assert psnr(image, truth, mask).item() == pytest.approx(20.0, abs=1e-4)


def test_an_empty_mask_gives_nan_for_its_sample_only():
    values, mask = torch.ones(2, 1, 3, 3), torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    result = masked_mean(values, mask)
    assert result[0].isnan() and result[1] == 1


def test_psnr_and_ssim_agree_with_scikit_image():
    image, truth = pictures()
    for n in range(2):
        x, y = image[n].double().numpy(), truth[n].double().numpy()
        assert psnr(image, truth)[n].item() == pytest.approx(skimage.metrics.peak_signal_noise_ratio(y, x, data_range=2), abs=1e-4)
        _, full = skimage.metrics.structural_similarity(
            x, y, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert ssim(image, truth)[n].item() == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-5)


def test_ssim_of_equal_pictures_is_one_and_falls_with_noise():
    image, truth = pictures()
    assert torch.allclose(ssim(truth, truth), torch.ones(2), atol=1e-5)
    assert (ssim(image, truth) < ssim((image + truth) / 2, truth)).all()


def test_ssim_mask_weighs_window_centres():
    image, truth = pictures()
    mixed = truth.clone()
    mixed[..., 12:] = image[..., 12:]
    left = torch.zeros(2, 1, 24, 24)
    left[..., :7] = 1  # windows reach 5 px further: columns 5..6 see columns 0..11 only
    assert torch.allclose(ssim(mixed, truth, left), torch.ones(2), atol=1e-5)
    assert (ssim(mixed, truth) < 0.99).all()


def test_the_interval_is_over_identities_and_weighs_them_equally():
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
    mean, low, high = bootstrap_interval(values, torch.tensor([7, 7, 7, 7, 9]), torch.Generator().manual_seed(0))
    assert mean == 3.0 and low == 1.0 and high == 5.0


def test_the_interval_shrinks_with_more_identities_and_skips_nan():
    rng = np.random.default_rng(0)
    width = {}
    for count in (10, 1000):
        values = torch.tensor(rng.normal(size=count))
        values[0] = math.nan
        mean, low, high = bootstrap_interval(values, torch.arange(count), torch.Generator().manual_seed(0))
        assert low < mean < high
        width[count] = high - low
    assert width[1000] == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.1) and width[10] > 4 * width[1000]
    assert all(math.isnan(x) for x in bootstrap_interval(torch.tensor([math.nan]), torch.tensor([0]), torch.Generator()))
