"""The shared layers against plain formulas and hand-written tables."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from head3d.run.errors import ConfigError
from reconstructor.background import BackgroundConfig, BackgroundNetwork
from reconstructor.blocks import (
    Attention,
    FeatureHead,
    MixFeedForward,
    MotionBlock,
    PatchEmbed,
    PlaneDecoder,
    TransformerBlock,
    initialize,
    to_map,
    to_tokens,
    with_coordinates,
)
from reconstructor.encoders import DetailEncoder, GlobalEncoder, GlobalEncoderConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(module: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """`module` with every parameter drawn, none at a special value."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator)
    return module.eval()


def test_coordinates_are_x_to_the_right_then_y_downwards_from_minus_one_to_one():
    placed = with_coordinates(torch.zeros(2, 3, 2, 3))
    assert placed.shape == (2, 5, 2, 3)
    assert torch.equal(placed[1, 3], torch.tensor([[-1.0, 0, 1], [-1, 0, 1]]))
    assert torch.equal(placed[1, 4], torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))


def test_tokens_run_row_by_row_and_the_map_is_their_inverse():
    features = torch.arange(12.0).view(1, 2, 2, 3)
    tokens = to_tokens(features)
    assert torch.equal(tokens[0, :, 0], torch.arange(6.0))
    assert torch.equal(to_map(tokens, (2, 3)), features)


def attention_by_hand(module: Attention, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v, head by head."""
    width = tokens.shape[2]
    keys_values = module.key_value(context)
    q, k, v = module.query(tokens), keys_values[..., :width], keys_values[..., width:]
    size = width // module.heads
    heads = []
    for head in range(module.heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return module.output(torch.cat(heads, dim=-1))


@torch.no_grad()
def test_attention_is_softmax_attention_head_by_head():
    module = filled(Attention(8, heads=2))
    tokens, context = torch.randn(2, 6, 8, generator=seeded(1)), torch.randn(2, 5, 8, generator=seeded(2))
    torch.testing.assert_close(module(tokens, context), attention_by_hand(module, tokens, context))


@torch.no_grad()
def test_key_reduction_merges_square_patches_of_the_grid():
    module = filled(Attention(8, heads=2, reduction=2))
    tokens = torch.randn(1, 4 * 6, 8, generator=seeded(1))
    patches = []
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            corner = [tokens[:, (row + i) * 6 + column + j] for i in (0, 1) for j in (0, 1)]
            weight = module.merge.weight.permute(2, 3, 0, 1).reshape(4, 8, 8)
            patches.append(sum(part @ weight[k].T for k, part in enumerate(corner)) + module.merge.bias)
    context = module.merge_norm(torch.stack(patches, dim=1))
    torch.testing.assert_close(module(tokens, tokens, (4, 6)), attention_by_hand(module, tokens, context))


@torch.no_grad()
def test_feed_forward_mixes_each_channel_with_its_eight_neighbours_only():
    module = filled(MixFeedForward(4, ratio=2))
    tokens = torch.randn(1, 3 * 3, 4, generator=seeded(1))
    hidden = module.expand(tokens)
    centre = (hidden[0] * module.depthwise.weight[:, 0].reshape(8, 9).T).sum(0) + module.depthwise.bias
    corner = (
        sum(hidden[0, row * 3 + column] * module.depthwise.weight[:, 0, row + 1, column + 1] for row in (0, 1) for column in (0, 1))
        + module.depthwise.bias
    )
    out = module(tokens, (3, 3))
    torch.testing.assert_close(out[0, 4], module.contract(F.gelu(centre)))
    torch.testing.assert_close(out[0, 0], module.contract(F.gelu(corner)))


@torch.no_grad()
def test_motion_block_looks_at_motion_first_then_at_itself_then_feeds_forward():
    block = filled(MotionBlock(8, heads=2, ratio=2), std=0.2)
    tokens, motion, scale = torch.randn(2, 4, 8, generator=seeded(1)), torch.randn(2, 3, 8, generator=seeded(2)), torch.tensor([1.0, 0.5])
    x = tokens + scale.view(2, 1, 1) * attention_by_hand(block.cross_attention, block.cross_norm(tokens), motion)
    x = x + attention_by_hand(block.self_attention, block.self_norm(x), block.self_norm(x))
    x = x + block.feed_forward(block.feed_forward_norm(x), (2, 2))
    torch.testing.assert_close(block(tokens, (2, 2), motion, scale), x)


@torch.no_grad()
def test_motion_block_without_scale_is_the_plain_block():
    block = filled(MotionBlock(8, heads=2, ratio=2))
    plain = TransformerBlock(8, heads=2, ratio=2)
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if not name.startswith("cross_")})
    tokens, motion = torch.randn(2, 4, 8, generator=seeded(1)), torch.randn(2, 3, 8, generator=seeded(2))
    assert torch.equal(block(tokens, (2, 2), motion, torch.zeros(2)), plain(tokens, (2, 2)))


def test_patches_halve_the_grid_and_every_token_has_mean_zero_and_variance_one_at_the_start():
    tokens, grid = PatchEmbed(3, 16)(torch.randn(2, 3, 8, 12, generator=seeded()))
    assert grid == (4, 6)
    assert tokens.shape == (2, 24, 16)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 24), atol=1e-2, rtol=0)


@torch.no_grad()
def test_pixel_shuffle_turns_four_neighbouring_channels_into_a_two_by_two_block():
    head = FeatureHead(4, hidden=3, out_channels=1, doublings=0)
    nn.init.zeros_(head.out.weight)
    head.out.weight[0, 0, 1, 1] = 1
    nn.init.zeros_(head.out.bias)
    tokens = torch.arange(8.0).view(1, 2, 4)
    assert torch.equal(head(tokens, (1, 2))[0, 0], torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7]]))


@pytest.mark.parametrize(("doublings", "side"), [(0, 8), (1, 16), (2, 32)])
def test_feature_head_doubles_the_map_once_by_shuffling_and_then_by_interpolation(doublings, side):
    assert FeatureHead(16, 6, 5, doublings)(torch.zeros(1, 16, 16), (4, 4)).shape == (1, 5, side, side)


@torch.no_grad()
def test_plane_decoder_gives_three_planes_whose_channels_are_consecutive():
    decoder = filled(PlaneDecoder(6, 5, 4, 16, plane_channels=3, blocks=1, heads=2, ratio=2, reduction=2))
    features, detail = torch.randn(1, 6, 16, 16, generator=seeded(1)), torch.randn(1, 5, 16, 16, generator=seeded(2))
    flat: list[torch.Tensor] = []
    decoder.out.register_forward_hook(lambda module, inputs, output: flat.append(output))
    planes = decoder(features, detail)
    assert planes.shape == (1, 3, 3, 16, 16)
    assert torch.equal(planes[:, 1], flat[0][:, 3:6])


def test_plane_decoder_may_give_more_pixels_than_its_features_have():
    decoder = filled(PlaneDecoder(6, 5, 4, 16, plane_channels=3, blocks=1, heads=2, ratio=2, reduction=2, upscale=2))
    features, detail = torch.randn(1, 6, 16, 16, generator=seeded(1)), torch.randn(1, 5, 16, 16, generator=seeded(2))
    flat: list[torch.Tensor] = []
    decoder.out.register_forward_hook(lambda module, inputs, output: flat.append(output))
    planes = decoder(features, detail)
    assert planes.shape == (1, 3, 3, 32, 32)
    assert torch.equal(planes[0, 2, 1, 7::2, 4::2], flat[0][0, 4 * 7 + 2, 3:, 2:])  # odd row, even column: the third sub-pixel


def test_block_size_is_the_published_one():
    with torch.device("meta"):
        block = MotionBlock(1024, heads=4, ratio=2)
        plain = TransformerBlock(1024, heads=4, ratio=2)
    assert sum(p.numel() for p in block.parameters()) == 12_620_800
    assert sum(p.numel() for p in plain.parameters()) == 8_420_352  # LP3D's block


def test_initialisation_zeroes_the_cross_attention_output_and_depends_on_the_generator_alone():
    first, second, other = (MotionBlock(16, heads=2, ratio=2) for _ in range(3))
    for block, seed in ((first, 1), (second, 1), (other, 2)):
        initialize(block, 16, seeded(seed))
    assert not first.cross_attention.output.weight.any()
    assert not first.cross_attention.output.bias.any()
    assert first.self_attention.output.weight.any()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=False))
    assert not torch.equal(first.cross_attention.query.weight, other.cross_attention.query.weight)


def test_initial_spread_is_the_published_one_at_published_width():
    layers = nn.Sequential(nn.Linear(1024, 512), nn.Conv2d(64, 128, 3), nn.Conv2d(256, 256, 3, groups=256))
    initialize(layers, 1024, seeded())
    spreads = [float(layer.weight.detach().std()) for layer in layers]
    assert spreads == pytest.approx([0.02, math.sqrt(2 / (9 * 128)), math.sqrt(2 / 9)], rel=0.05)


@pytest.mark.parametrize(("stage_blocks", "pool", "stride"), [((1, 1), True, 8), ((2, 1, 1, 1), True, 8), ((1, 1, 1), False, 4)])
def test_global_encoder_keeps_its_stride_whatever_its_depth(stage_blocks, pool, stride):
    config = GlobalEncoderConfig(4, stage_blocks, pool, (1, 2, 3), out_width=6)
    features = GlobalEncoder(config)(torch.randn(2, 5, 32, 32, generator=seeded()))
    assert config.output_stride == stride
    assert features.shape == (2, 6, 32 // stride, 32 // stride)
    assert (features >= 0).all()


def test_global_encoder_has_the_published_dilations_and_size():
    with torch.device("meta"):
        encoder = GlobalEncoder(GlobalEncoderConfig())
    assert [stage[0].conv1.dilation[0] for stage in encoder.stages] == [1, 1, 2, 4]
    assert [stage[-1].conv2.dilation[0] for stage in encoder.stages] == [1, 1, 2, 4]
    assert [stage[0].conv1.stride[0] for stage in encoder.stages] == [1, 2, 1, 1]
    assert sum(p.numel() for p in encoder.parameters()) == 25_992_512


def test_tempered_residual_branches_keep_the_signal_through_a_deep_encoder():
    encoder = GlobalEncoder(GlobalEncoderConfig(16, (8, 8), True, (1, 2, 3), out_width=16))
    initialize(encoder, 1024, seeded())
    encoder.temper_residuals()
    stem = F.relu(encoder.stem(torch.randn(1, 5, 64, 64, generator=seeded(1))))
    features = encoder.stages[1](encoder.stages[0](encoder.pool(stem)))
    assert 0.3 < features.std() / stem.std() < 6


def test_an_encoder_of_one_stage_is_refused_with_its_key():
    with pytest.raises(ConfigError, match="stage_blocks"):
        GlobalEncoderConfig(stage_blocks=(3,))


def test_detail_encoder_halves_the_image_once_and_has_the_published_size():
    assert DetailEncoder(4, 6, layers=2)(torch.zeros(1, 5, 16, 16)).shape == (1, 6, 8, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in DetailEncoder(64, 96, layers=4).parameters()) == 320_256


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_background_has_the_images_size_and_lies_between_zero_and_one(levels):
    network = filled(BackgroundNetwork(BackgroundConfig(4, levels, channels=6)))
    background = network(torch.randn(2, 5, 32, 32, generator=seeded(1)))
    assert background.shape == (2, 6, 32, 32)
    assert (background >= 0).all()
    assert (background <= 1).all()
    assert background.std() > 0


@torch.no_grad()
def test_background_skips_join_maps_of_equal_size_after_the_upsampled_ones():
    network = filled(BackgroundNetwork(BackgroundConfig(4, 1, channels=2)))
    image = torch.randn(1, 5, 8, 8, generator=seeded(1))

    def act(conv: nn.Conv2d, features: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(conv(features), 0.01)

    top = act(network.stem, image)
    bottom = network.shrink[0](act(network.down[0], top))
    middle = act(network.middle, bottom)
    up = network.grow[0](F.interpolate(act(network.up[0], torch.cat((middle, bottom), 1)), scale_factor=2))
    up = network.grow[1](F.interpolate(act(network.up[1], torch.cat((up, top), 1)), scale_factor=2))
    torch.testing.assert_close(network.logits(image), network.out(up))
