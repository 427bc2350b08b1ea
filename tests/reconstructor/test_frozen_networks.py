"""Which network judges which term, where gradients go, and what is refused."""

import dataclasses
import re

import pytest
import torch

from head3d.cameras import project
from head3d.labels import unpack_label
from head3d.rendering import HeadImages
from head3d.run.errors import AssetError, ConfigError
from head3d.run.files import sha256_of_file
from reconstructor import frozen_networks
from reconstructor.batches import Batch
from reconstructor.frozen_networks import NetworkFiles, check_networks, frozen_network_losses, load_frozen_networks
from reconstructor.losses import LossConfig, TermConfig
from reconstructor.published_perception import align_faces

B, S, R = 2, 32, 16
BOTH = LossConfig(identity=TermConfig(1.0))
PICTURES = {"image": (3, S), "raw": (3, R), "foreground": (5, R), "background": (5, R)}


def numbers(seed, *shape):
    return torch.rand(B, *shape, generator=torch.Generator().manual_seed(seed))


def rendered():
    leaves = {name: numbers(k, channels, side, side).requires_grad_() for k, (name, (channels, side)) in enumerate(PICTURES.items())}
    rest = dict.fromkeys(("features", "depth", "opacity", "rays"))
    return HeadImages(**leaves, **rest)


def batch():
    label = torch.zeros(B, 437)
    label[:, :16] = torch.tensor([1.0, 0, 0, 0.1, 0, 1, 0, 0, 0, 0, 1, 4.2, 0, 0, 0, 1])
    label[:, 16:25] = torch.tensor([4.76, 0, 0.5, 0, 4.76, 0.5, 0, 0, 1])
    empty = dict.fromkeys(("source_image", "source_motion", "driving_motion", "motion_scale", "identity"))
    return Batch(image=numbers(7, 3, S, S), opacity=numbers(8, 1, R, R), background=numbers(9, 3, R, R), label=label, **empty)


def test_our_network_takes_both_terms_and_sends_gradients_to_the_rendered_pictures_alone(tmp_path, tiny_perception, built_in_head):
    reference = tiny_perception(tmp_path)
    networks = load_frozen_networks(NetworkFiles(tmp_path, (), None), BOTH, built_in_head)
    assert [network.name for network in networks] == ["perceptual", "identity"]
    images, truth = rendered(), batch()
    terms = frozen_network_losses(BOTH, networks, images, truth, 0)
    assert set(terms) == {"perceptual_final", "perceptual_raw", "perceptual_foreground", "perceptual_background", "identity"}
    with torch.no_grad():
        assert terms["perceptual_final"].item() == pytest.approx(reference.perceptual_distance(images.image, truth.image).mean().item())
        assert terms["perceptual_background"].item() == pytest.approx(
            reference.perceptual_distance(images.background[:, :3], truth.background).mean().item()
        )
        cosine = (reference.identity(images.image) * reference.identity(truth.image)).sum(1).mean()
        assert terms["identity"].item() == pytest.approx(1 - cosine.item(), abs=1e-6)
    sum(terms.values()).backward()
    assert all(getattr(images, name).grad.abs().sum() > 0 for name in PICTURES)
    assert not images.foreground.grad[:, 3:].any()  # pictures, not features
    ours = networks.perceptual.distance.__self__
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in ours.parameters())


def test_published_weights_take_their_terms_under_their_own_names(tmp_path, tiny_perception, built_in_head, monkeypatch):
    """ArcFace is shown rendered and true face, both cut out by where the label's projected landmarks are."""
    tiny_perception(tmp_path / "ours")
    files = [tmp_path / name for name in ("vgg.pth", "vgg16.pth", "arcface.pth")]
    for file in files:
        file.write_text(file.name)
    faces = []

    class Recorder(torch.nn.Module):
        def forward(self, pictures, truth=None):
            faces.append(pictures)
            return torch.nn.functional.normalize(pictures.flatten(1), dim=1) if truth is None else (pictures - truth).abs().mean((1, 2, 3))

    loaded = []
    monkeypatch.setattr(frozen_networks, "load_lpips", lambda *given: loaded.append(given) or Recorder())
    monkeypatch.setattr(frozen_networks, "load_arcface", lambda *given: loaded.append(given) or Recorder())
    networks = load_frozen_networks(NetworkFiles(tmp_path / "ours", tuple(files[:2]), files[2]), BOTH, built_in_head)
    assert loaded == [("vgg", tuple(files[:2])), (files[2],)]
    images, truth = rendered(), batch()
    terms = frozen_network_losses(BOTH, networks, images, truth, 0)
    assert set(terms) == {"lpips_final", "lpips_raw", "lpips_foreground", "lpips_background", "arcface"}
    camera, shape, motion = unpack_label(truth.label)
    landmarks, _ = project(built_in_head.landmarks(built_in_head.vertices(shape, motion)), camera)
    assert torch.allclose(faces[-2], align_faces(truth.image, landmarks)) and torch.allclose(
        faces[-1], align_faces(images.image, landmarks)
    )
    terms["arcface"].backward()
    assert images.image.grad.abs().sum() > 0
    hashes = networks.weights_hashes()
    assert hashes["arcface"] == sha256_of_file(files[2])[:16] and hashes.keys() == {"lpips", "arcface"}
    files[0].write_text("other weights")
    again = load_frozen_networks(NetworkFiles(None, tuple(files[:2]), files[2]), BOTH, built_in_head).weights_hashes()
    assert again["lpips"] != hashes["lpips"] and again["arcface"] == hashes["arcface"]
    mixed = load_frozen_networks(NetworkFiles(tmp_path / "ours", tuple(files[:2]), None), BOTH, built_in_head)
    assert [network.name for network in mixed] == ["lpips", "identity"]


def test_a_term_with_a_weight_and_no_network_is_refused_or_named_as_dropped(built_in_head):
    nothing = NetworkFiles(None, (), None)
    message = (
        r"losses.perceptual: no network .* --perception DIR .* --lpips FILE FILE .*; losses.identity: .* --arcface FILE .*weights to 0"
    )
    with pytest.raises(ConfigError, match=message):
        check_networks(nothing, LossConfig(), "refuse")
    notes = check_networks(nothing, LossConfig(), "drop")
    assert [re.match(r"(.*?): .*; this run does without the term$", note)[1] for note in notes] == ["losses.perceptual", "losses.identity"]
    networks = load_frozen_networks(nothing, LossConfig(), built_in_head)
    assert tuple(networks) == (None, None) and networks.weights_hashes() == {}
    assert frozen_network_losses(LossConfig(), networks, rendered(), batch(), 400_000) == {}
    silent = dataclasses.replace(LossConfig(), perceptual=TermConfig(0.0), identity=TermConfig(0.0))
    assert check_networks(nothing, silent, "refuse") == []
    with pytest.raises(ConfigError, match="losses.identity: no network tells people apart") as caught:
        check_networks(dataclasses.replace(nothing, lpips=("vgg.pth",)), LossConfig(), "refuse")
    assert "losses.perceptual" not in str(caught.value)


def test_the_network_that_evaluates_and_files_that_are_not_there_are_refused(tmp_path, tiny_perception, built_in_head):
    tiny_perception(tmp_path / "judge", "evaluation")
    with pytest.raises(AssetError, match="expected a perception network trained with --role losses, got evaluation"):
        load_frozen_networks(NetworkFiles(tmp_path / "judge", (), None), BOTH, built_in_head)
    with pytest.raises(AssetError, match="missing.pth"):
        load_frozen_networks(NetworkFiles(None, (tmp_path / "missing.pth",), None), BOTH, built_in_head)
    silent = dataclasses.replace(BOTH, perceptual=TermConfig(0.0), identity=TermConfig(0.0))
    assert tuple(load_frozen_networks(NetworkFiles(tmp_path / "judge", (), None), silent, built_in_head)) == (None, None)  # not even opened
