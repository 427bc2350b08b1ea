"""The animatable reconstructor: the switch, the cacheable split, and the published network."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from head3d.run.errors import AssetError, ConfigError
from reconstructor.architecture import Driver, repeat
from reconstructor.architectures.portrait4d import Portrait4D, Portrait4DConfig
from reconstructor.background import BackgroundConfig
from reconstructor.blocks import MotionBlock
from reconstructor.encoders import GlobalEncoderConfig
from reconstructor.published import load_published

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "parity" / "reconstructor"

TINY = Portrait4DConfig(
    image_resolution=64,
    motion="flame",
    global_encoder=GlobalEncoderConfig(8, (1, 1, 1), stem_pool=False, pyramid_dilations=(1, 2, 3), out_width=16),
    detail_stem_width=8,
    detail_width=8,
    detail_layers=2,
    token_width=64,
    motion_hidden=32,
    motion_tokens=4,
    deexpression_blocks=1,
    reenactment_blocks=1,
    feature_hidden=16,
    feature_width=12,
    decoder_hidden=16,
    plane_channels=8,
    background=BackgroundConfig(4, 2, channels=8),
)


def build(trained: bool, config: Portrait4DConfig = TINY) -> Portrait4D:
    """A tiny network; `trained` gives the cross-attention a non-zero output, as after some steps."""
    generator = torch.Generator().manual_seed(0)
    model = Portrait4D(config, generator).eval()
    if trained:
        with torch.no_grad():
            for block in model.modules():
                if isinstance(block, MotionBlock):
                    block.cross_attention.output.weight.normal_(0, 0.1, generator=generator)
    return model


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, 64, 64, generator=generator) * 2 - 1
    return image, torch.randn(batch, 109, generator=generator), torch.randn(batch, 109, generator=generator)


def drive(model, image, source_motion, driving_motion, scale):
    """The planes of it all."""
    return model.planes(model.encode_source(image, source_motion, scale), model.driving_motion(driving_motion), scale)


def differs(first: torch.Tensor, second: torch.Tensor) -> bool:
    return float((first - second).abs().max()) > 1e-3 * float(first.std())


def test_motion_tokens_start_as_large_as_the_numbers_that_they_are_made_of():
    model = Portrait4D(TINY, torch.Generator().manual_seed(0))
    motion = torch.randn(256, TINY.motion_dim, generator=torch.Generator().manual_seed(1))
    for tokens in (model.source_motion(motion), model.driving_motion(motion)):
        assert 0.7 < tokens.std() < 1.4  # 0.02 by the rule for linear layers


def test_shapes_and_ranges_follow_from_the_config():
    model = build(trained=False)
    image, source_motion, driving_motion = inputs()
    features = model.encode_image(image)
    assert [tuple(part.shape) for part in features] == [(2, 16, 16, 16), (2, 8, 32, 32), (2, 8, 64, 64)]
    assert (features.background >= 0).all()
    assert (features.background <= 1).all()
    planes = drive(model, image, source_motion, driving_motion, torch.ones(2))
    assert planes.shape == (2, 3, 8, TINY.plane_resolution, TINY.plane_resolution)
    assert TINY.plane_resolution == 32
    assert torch.isfinite(planes).all()
    assert planes.std() > 0.05


@torch.no_grad()
def test_with_scale_zero_neither_motion_has_any_effect():
    model = build(trained=True)
    image, first, second = inputs()
    off = torch.zeros(2)
    assert torch.equal(drive(model, image, first, second, off), drive(model, image, second, -first, off))


@torch.no_grad()
def test_with_scale_one_both_motions_matter():
    model = build(trained=True)
    image, first, second = inputs()
    on = torch.ones(2)
    planes = drive(model, image, first, second, on)
    assert differs(planes, drive(model, image, second, second, on))
    assert differs(planes, drive(model, image, first, first, on))


@torch.no_grad()
def test_the_switch_travels_with_its_sample():
    model = build(trained=True)
    image, first, second = inputs()
    mixed = drive(model, image, first, second, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(mixed[0], drive(model, image, first, second, torch.ones(2))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], drive(model, image, first, second, torch.zeros(2))[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batch_mates_do_not_matter():
    model = build(trained=True)
    image, first, second = inputs(3)
    scale = torch.tensor([1.0, 0.0, 1.0])
    together = drive(model, image, first, second, scale)
    background = model.encode_image(image).background
    for k in range(3):
        one = slice(k, k + 1)
        torch.testing.assert_close(model.encode_image(image[one]).background, background[one], atol=1e-5, rtol=1e-5)
        alone = drive(model, image[one], first[one], second[one], scale[one])
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_untrained_network_is_static_because_cross_attention_starts_at_zero():
    model = build(trained=False)
    image, first, second = inputs()
    assert torch.equal(drive(model, image, first, second, torch.ones(2)), drive(model, image, first, second, torch.zeros(2)))


@torch.no_grad()
def test_one_cached_source_serves_many_frames():
    model = build(trained=True)
    image, source_motion, _ = inputs(1)
    source = model.encode_source(image, source_motion, torch.ones(1))
    assert source.tokens.shape == (1, 64, TINY.token_width)
    driving = torch.randn(3, 109, generator=torch.Generator().manual_seed(1))
    together = model.planes(repeat(source, 3), model.driving_motion(driving), torch.ones(3))
    for k in range(3):
        alone = drive(model, image, source_motion, driving[k : k + 1], torch.ones(1))
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_background_and_detail_reach_the_result_without_the_motion():
    model = build(trained=True)
    image, first, second = inputs(1)
    source, on = model.encode_source(image, first, torch.ones(1)), torch.ones(1)
    driver = model.encode_driver(Driver(second), source, None)
    planes = model.planes(source, driver, on)
    assert torch.equal(model.planes(source._replace(background=1 - source.background), driver, on), planes)
    assert differs(model.planes(source._replace(detail=-source.detail), driver, on), planes)


@torch.no_grad()
def test_without_deexpression_blocks_the_source_s_motion_has_no_effect_and_no_parameters():
    model = build(trained=True, config=dataclasses.replace(TINY, deexpression_blocks=0, reenactment_blocks=2))
    image, first, second = inputs()
    planes = drive(model, image, first, second, torch.ones(2))
    assert torch.equal(planes, drive(model, image, first + 1, second, torch.ones(2)))
    assert differs(planes, drive(model, image, first, second + 1, torch.ones(2)))
    assert not any("source_motion" in name or "deexpression" in name for name in model.state_dict())


def gradients(model: Portrait4D, scale: torch.Tensor) -> tuple[set[str], set[str]]:
    """Names of the parameters that get a gradient, and of those that get none or only zeros."""
    image, first, second = inputs()
    source = model.encode_source(image, first, scale)
    (model.planes(source, model.driving_motion(second), scale).square().mean() + source.background.mean()).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    return reached, {name for name, _ in model.named_parameters()} - reached


def test_every_parameter_learns_once_cross_attention_is_open():
    _, silent = gradients(build(trained=True), torch.ones(2))
    assert silent == set()


def test_at_the_first_step_only_what_stands_before_the_zero_projection_waits():
    model = build(trained=False)
    reached, silent = gradients(model, torch.ones(2))
    assert all(name.startswith(("source_motion.", "driving_motion.")) or ".cross_" in name for name in silent)
    assert {name for name in reached if ".cross_" in name} == {
        f"{stack}.0.cross_attention.output.{kind}" for stack in ("deexpression", "reenactment") for kind in ("weight", "bias")
    }


def test_static_samples_teach_the_motion_branch_nothing():
    _, silent = gradients(build(trained=True), torch.zeros(2))
    assert silent == {
        name
        for name, _ in build(trained=True).named_parameters()
        if name.startswith(("source_motion.", "driving_motion.")) or ".cross_" in name
    }


def test_weights_depend_on_the_generator_alone():
    first, second = build(trained=False), build(trained=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=False))


def test_published_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Portrait4D(Portrait4DConfig())

    def count(*parts: torch.nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    phi = count(model.patch_embed, model.source_motion, model.driving_motion, model.deexpression, model.reenactment, model.feature_head)
    assert count(model.global_encoder) == 25_992_512
    assert phi == 172_209_504
    assert count(model.plane_decoder) == 15_902_688
    assert count(model.background) == 8_687_328
    assert count(model) == 223_112_288


def test_published_network_gives_published_shapes():
    with torch.device("meta"):
        model = Portrait4D(Portrait4DConfig())
        image = torch.empty(1, 3, 512, 512)
        assert [tuple(part.shape) for part in model.encode_image(image)] == [(1, 256, 64, 64), (1, 96, 256, 256), (1, 32, 512, 512)]
        assert drive(model, image, torch.empty(1, 548), torch.empty(1, 548), torch.empty(1)).shape == (1, 3, 32, 256, 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_width": 1000, "heads": 3}, "token_width"),
        ({"image_resolution": 100}, "image_resolution"),
    ],
)
def test_impossible_sizes_are_refused_with_the_key(change, words):
    with pytest.raises(ConfigError, match=words):
        Portrait4DConfig(**change)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(AssertionError, match="64, 64"):
        build(trained=False).encode_image(torch.zeros(1, 3, 32, 32))


def published_shapes() -> dict[str, torch.Tensor]:
    if not (REFERENCE / "recipe.json").is_file():
        pytest.skip(f"no reference numbers of the published reconstructor at {REFERENCE}")
    entries = json.loads((REFERENCE / "recipe.json").read_text())
    return {entry["key"]: torch.empty(entry["shape"], device="meta") for entry in entries}


def test_every_published_tensor_has_its_place():
    with torch.device("meta"):
        model = Portrait4D(Portrait4DConfig())
    load_published(model, published_shapes(), "recipe")


def test_a_published_file_that_does_not_fit_is_refused_by_name():
    with torch.device("meta"):
        model = Portrait4D(Portrait4DConfig())
    tensors = published_shapes()
    tensors["background.out_conv.bias"] = torch.empty(7, device="meta")
    with pytest.raises(AssetError, match=r"some\.pkl.*background\.out\.bias is \(7,\), expected \(32,\)"):
        load_published(model, tensors, "some.pkl")
    with pytest.raises(AssetError, match=r"missing background\.out\.bias"):
        load_published(model, {name: value for name, value in published_shapes().items() if name != "background.out_conv.bias"}, "some.pkl")
