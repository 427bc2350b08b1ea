"""One training step: the switch, gradients and their precision, draws, the average, a loss that is not finite."""

import dataclasses

import pytest
import torch

from head3d.cameras import frontal
from head3d.labels import Motion, unpack_label
from head3d.run import distributed
from head3d.run.training import Divergence, check_finite
from reconstructor import steps
from reconstructor.architecture import Driver
from reconstructor.steps import loss_terms

ALONE = distributed.Process(0, 1, torch.device("cpu"), True)


def test_with_the_switch_off_the_driver_has_no_influence_and_with_it_on_it_has(world, tmp_path, learner, first_batch):
    config = world.run(tmp_path)
    model = learner(config).model
    with torch.no_grad():
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch = first_batch(config)
    outputs = {}
    for scale in (0.0, 1.0):
        for sign in (1.0, -1.0):
            images = model(
                batch.source_image,
                batch.source_motion * sign,
                Driver(batch.driving_motion * sign),
                torch.full((4,), scale),
                batch.label[:, 25:325],
                Motion.neutral(4),
                frontal(4),
            ).images
            outputs[scale, sign] = images.image
    assert torch.equal(outputs[0.0, 1.0], outputs[0.0, -1.0])
    assert not torch.equal(outputs[1.0, 1.0], outputs[1.0, -1.0])


def test_every_parameter_gets_a_gradient(world, tmp_path, learner, first_batch):
    """All but what the zero-initialised cross-attention output hides until its first step."""
    config = world.run(tmp_path)
    one = learner(config)
    model = one.model
    with torch.no_grad():
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.decoder.density.weight, generator=torch.Generator().manual_seed(0))
    sum(loss_terms(config, one, first_batch(config), 0, torch.Generator())[0].values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_accumulation_gives_the_gradients_of_the_whole_batch(world, tmp_path, learner, first_batch):
    """The reconstructor's by jittered rays, and the discriminator's, of which a group of two samples is never torn."""
    config, gradients = world.run(tmp_path, **world.adversarial(since=0)), []
    for micro in (4, 2):
        one, found = learner(config), []

        def keep(network=one.adversary.network, found=found):
            found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]))

        one.adversary.optimizer.step = keep  # by the pictures, then by the penalty
        steps.step(dataclasses.replace(config, micro_batch=micro), one, first_batch(config), 0, ALONE)
        gradients.append([*found, torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])])
    for whole, by_halves in zip(*gradients, strict=True):
        assert (whole - by_halves).norm() < 1e-4 * whole.norm()


@pytest.fixture
def gradients_of(learner, first_batch):
    """`gradients_of(config)`: loss terms and gradients of the first step, with cross-attention and density awake."""

    def compute(config):
        one, draws = learner(config), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for block in (*one.model.architecture.deexpression, *one.model.architecture.reenactment):
                block.cross_attention.output.weight.normal_(std=0.1, generator=draws)
            one.model.decoder.density.weight.normal_(generator=draws)
        terms, _ = loss_terms(config, one, first_batch(config), 0, torch.Generator().manual_seed(1))
        sum(terms.values()).backward()
        assert all(value.dtype == torch.float32 for value in terms.values())
        gradients = {name: parameter.grad for name, parameter in one.model.named_parameters()}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        return {name: value.item() for name, value in terms.items()}, gradients

    return compute


def test_bfloat16_gives_nearly_the_losses_and_gradients_of_float32_and_recomputing_exactly(world, tmp_path, gradients_of, differing):
    config = world.run(tmp_path)
    terms, gradients = gradients_of(config)
    rounded, rough = gradients_of(dataclasses.replace(config, precision="bfloat16"))
    assert rounded != terms
    assert rounded == {name: pytest.approx(value, rel=0.02) for name, value in terms.items()}
    whole, other = (torch.cat([gradient.flatten() for gradient in one.values()]) for one in (gradients, rough))
    assert torch.nn.functional.cosine_similarity(whole, other, dim=0) > 0.99
    again, recomputed = gradients_of(dataclasses.replace(config, recompute_activations=True))
    assert again == terms
    assert not differing(recomputed, gradients)


def test_recomputing_keeps_less_for_the_gradient(world, tmp_path, learner, first_batch):
    def kept_bytes(recompute):
        config, sizes = world.run(tmp_path, recompute_activations=recompute), {}
        model, batch = learner(config).model, first_batch(config)
        label = unpack_label(batch.label)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            arguments = (Driver(batch.driving_motion), batch.motion_scale, label.shape, label.motion, label.camera)
            output = model(batch.source_image, batch.source_motion, *arguments)
        assert output.images.image.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept_bytes(True) < 0.6 * kept_bytes(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; compiling for a CPU takes minutes")
def test_compiled_parts_give_the_losses_of_the_others(world, tmp_path, gradients_of):
    config = world.run(tmp_path)
    terms, _ = gradients_of(config)
    compiled, _ = gradients_of(dataclasses.replace(config, compile=True))
    assert compiled == {name: pytest.approx(value, rel=1e-3) for name, value in terms.items()}


def test_rays_are_drawn_anew_for_every_step_and_sample(world, tmp_path, monkeypatch, learner, first_batch):
    config, keys = world.run(tmp_path, micro_batch=2), []
    one, batch = learner(config), first_batch(config)
    original = steps.torch_generator
    monkeypatch.setattr(steps, "torch_generator", lambda *key, **device: keys.append(key) or original(*key))
    for seen, rank in ((0, 0), (4, 0), (4, 1)):
        steps.step(config, one, batch, seen, ALONE._replace(rank=rank, world_size=2))
    assert len(keys) == 12 and len(set(keys)) == 12


def test_the_average_follows_the_network_by_its_half_life(world, tmp_path, learner, first_batch):
    config = world.run(tmp_path, ema_images=8.0, ema_ramp=0.0)
    one = learner(config)
    before = one.averaged.decoder.color.weight.clone()
    steps.step(config, one, first_batch(config), 0, ALONE)
    keep = 0.5 ** (4 / 8)
    assert torch.allclose(one.averaged.decoder.color.weight, before * keep + one.model.decoder.color.weight * (1 - keep), atol=1e-7)
    assert not torch.equal(before, one.averaged.decoder.color.weight)


def test_divergence_stops_before_the_weights_are_touched(world, tmp_path, learner, first_batch, differing):
    config = world.run(tmp_path / "run")
    one, batch = learner(config), first_batch(config)
    before = {name: value.clone() for name, value in one.model.weights().items()}
    broken = dataclasses.replace(batch, depth=batch.depth * float("nan"))
    scalars = steps.step(config, one, broken, 0, ALONE)
    assert not differing(one.model.weights(), before)
    with pytest.raises(Divergence, match=r"loss/depth, loss/total is not finite after 4 images; last good checkpoint: none yet"):
        check_finite(scalars, 4, config.out, "")
