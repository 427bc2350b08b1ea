"""Portraits encoded and rendered again: the term's numbers, its place in training."""

import dataclasses

import pytest
import torch

from genhead.autoencoder import AutoencoderConfig, PortraitEncoder, divergence, draw_rays, feature_weight, ray_loss
from genhead.generator import GenHead
from genhead.losses import DiscriminatorParts
from genhead.mesh_truth import mesh_view
from genhead.train import train
from head3d.cameras import frontal, project
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.networks.discriminator import DiscriminatorConfig
from head3d.rendering import HeadImages
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.runlog import read_metrics
from head3d.run.seeding import weights_drawn_from


def test_the_divergence_is_that_of_two_normal_distributions():
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]).log()
    log_variance[0, 0] = 0.0
    # N(1, 1): 1/2. N(0, 2): (2 - 1 - ln 2) / 2 = 0.153426
    assert divergence(mean, log_variance) == pytest.approx((0.5 + 0.1534264) / 2)
    assert divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_pixels_at_eyes_and_lips_count_more_than_hair_and_cheeks():
    head = load_head_model("procedural")
    vertices, camera = head.vertices(torch.zeros(1, 300), Motion.neutral(1)), frontal()
    weight = feature_weight(head, vertices, camera, 64, 3.0)[0, 0]
    assert set(weight.unique().tolist()) == {1.0, 4.0}
    for region in (head.regions.left_eyeball, head.regions.right_eyeball, head.regions.lips):
        x, y = (project(vertices[:, region].mean(1, keepdim=True), camera)[0][0, 0] * 64).long().tolist()
        assert weight[y, x] == 4.0
    assert weight[:8].max() == weight[:, :8].max() == weight[-4:].max() == 1.0
    assert 0.01 < (weight > 1).float().mean() < 0.15


def test_rays_are_drawn_once_each_and_mostly_where_the_weight_is():
    weight = torch.ones(2, 1, 8, 8)
    weight[:, :, 2, 3] = 1e6
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    chosen = draw_rays(weight, 20, draws)
    assert chosen.shape == (2, 20) and all(len(row.unique()) == 20 and 2 * 8 + 3 in row for row in chosen)
    assert torch.equal(draw_rays(weight[1:], 20, [torch.Generator().manual_seed(1)])[0], chosen[1]), "a sample's rays are its own"
    assert draw_rays(weight, 1000, draws).sort().values.tolist() == [list(range(64))] * 2


def test_chosen_rays_are_those_of_the_whole_picture(tiny_genhead):
    generator = torch.Generator().manual_seed(0)
    with weights_drawn_from(generator):
        model = GenHead(tiny_genhead(32), load_head_model("procedural"))
    z, shape, motion, camera = torch.randn(2, 8, generator=generator), torch.zeros(2, 300), Motion.neutral(2), frontal(2)
    jaw = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.0, 0.0]])  # an open mouth, a closed one
    posed = model.pose(shape, motion._replace(jaw_pose=jaw))
    planes, background = model.planes(model.map(z, camera.label(), shape)), model.background(z)
    chosen = torch.stack([torch.randperm(256, generator=generator)[:100] for _ in range(2)])
    whole = model.render(planes, background, posed, camera).images
    strip = model.render_chosen(planes, background, posed, camera, chosen).images
    for name in ("raw", "features", "background", "depth", "opacity", "eye_mask", "mouth_mask", "head_mask"):
        picture = getattr(whole, name).flatten(2)
        expected = picture.gather(2, chosen[:, None].expand(-1, picture.shape[1], -1))
        assert torch.allclose(getattr(strip, name)[:, :, 0], expected, atol=1e-5), name
    mesh = mesh_view(model.head_model, posed.vertices_posed, camera, 16)
    assert torch.equal(mesh.strip(chosen).distance[:, 0, 0], mesh.distance.flatten(1).gather(1, chosen))


def test_the_ray_loss_compares_colour_and_opacity_of_the_same_rays():
    picture = torch.arange(4.0).view(1, 1, 2, 2).expand(1, 3, 2, 2) / 4  # 0, 1/4, 1/2, 3/4
    real = DiscriminatorParts(torch.zeros(1, 3, 4, 4), picture, torch.zeros(1, 3, 4, 4), torch.tensor([[[[-1.0, 0.0], [0.0, 1.0]]]]))
    chosen = torch.tensor([[3, 0]])

    def strip(raw: list[float], opacity: list[float]) -> HeadImages:
        known = {"raw": torch.tensor(raw).expand(1, 3, 1, 2), "opacity": torch.tensor(opacity)[None, None, None]}
        return HeadImages(**{field.name: known.get(field.name, torch.zeros(1)) for field in dataclasses.fields(HeadImages)})

    assert ray_loss(strip([0.75, 0.0], [1.0, 0.0]), real, chosen) == 0
    assert ray_loss(strip([0.25, 0.0], [1.0, 0.0]), real, chosen) == pytest.approx(0.25)
    assert ray_loss(strip([0.75, 0.0], [0.5, 0.0]), real, chosen) == pytest.approx(0.5)


def test_the_encoder_reads_each_picture_alone():
    encoder = PortraitEncoder(DiscriminatorConfig(resolution=16, channel_base=64, channel_max=8), z_dim=5)
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, log_variance = encoder(pictures)
    assert mean.shape == log_variance.shape == (3, 5)
    assert torch.allclose(encoder(pictures[1:2])[0], mean[1:2], atol=1e-5)


def _with_term(run, **changes):
    return dataclasses.replace(run, game=dataclasses.replace(run.game, autoencoder=AutoencoderConfig(weight=10.0, **changes)))


def _tensors(config) -> dict[str, torch.Tensor]:
    return latest_checkpoint(config.out).tensors


def test_alone_it_trains_generator_and_encoder_and_leaves_the_discriminator(tmp_path, portraits, run_of):
    config = _with_term(run_of(tmp_path / "alone", portraits, total_images=8), alone_until=8)
    first = _with_term(run_of(tmp_path / "first", portraits, total_images=4), alone_until=8)
    assert train(config) == train(first) == 0
    early, late = _tensors(first), _tensors(config)
    moved = {name.split("/")[0] for name in late if not name.startswith("optimizer") and not torch.equal(early[name], late[name])}
    assert moved == {"generator", "averaged", "encoder"}
    assert all("adversarial" not in name for line in read_metrics(config.out) for name in line)


def test_it_resumes_bit_for_bit_joins_the_game_and_goes_on_from_its_export(tmp_path, portraits, run_of):
    config = _with_term(run_of(tmp_path / "whole", portraits), alone_until=4)
    assert train(config) == 0
    stopped = dataclasses.replace(config, out=tmp_path / "stopped")
    for images in (4, 8, 12):
        assert train(dataclasses.replace(stopped, total_images=images)) == 0
    ours, theirs = _tensors(stopped), _tensors(config)
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {"autoencoder/rays", "generator/adversarial"} <= read_metrics(config.out)[-1].keys()
    assert (config.out / "pictures").is_dir() and list((config.out / "pictures").glob("*portraits*"))
    onward = dataclasses.replace(config, out=tmp_path / "onward", start_from=config.out / "export", total_images=16)
    assert train(onward) == 0
    name = "encoder/hidden.weight"
    assert 0 < (_tensors(onward)[name] - theirs[name]).abs().max() < 0.01, "one step from the exported encoder, not from noise"


def test_accumulation_changes_no_result(tmp_path, portraits, run_of):
    results = []
    for accumulation in (1, 2):
        run = run_of(tmp_path / str(accumulation), portraits, total_images=8)
        run = dataclasses.replace(run, game=dataclasses.replace(run.game, accumulation=accumulation))
        assert train(_with_term(run)) == 0
        results.append(_tensors(_with_term(run)))
    names = [name for name in results[0] if not name.startswith("optimizer_")]
    assert [name for name in names if not torch.allclose(results[0][name], results[1][name], rtol=1e-4, atol=5e-6)] == []
