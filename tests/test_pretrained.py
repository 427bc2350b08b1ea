"""The shipped small networks are what their cards and the tiny configurations say."""

import json
from pathlib import Path

import torch

from genhead.generator import load_genhead
from genhead.mesh_truth import depth_error, flat_face, mesh_view
from genhead.parity import psnr_db
from genhead.train import GenHeadRun
from head3d.cameras import frontal, orbit
from head3d.labels import Motion
from head3d.run.checkpoint import exported_config, exported_images_seen
from head3d.run.config import load_yaml
from reconstructor.avatar import Avatar
from reconstructor.evaluate import EvaluateRun
from reconstructor.model import load_reconstructor
from reconstructor.perception import EXPORT_KIND as PERCEPTION
from reconstructor.perception import PerceptionExport, load_errors, load_perception
from reconstructor.perception_errors import rotation_angle
from reconstructor.settings import ReconstructorRun

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "pretrained" / "genhead-tiny"
RECONSTRUCTOR = ROOT / "pretrained" / "reconstructor-tiny"


def test_the_tiny_configuration_goes_on_from_it():
    config = load_yaml(GenHeadRun, ROOT / "configs" / "genhead_tiny.yaml")
    assert config.start_from == FOLDER.relative_to(ROOT)
    assert load_genhead(FOLDER).config == config.model
    assert config.total_images > exported_images_seen(FOLDER)


def test_its_card_says_how_many_images_it_has_seen_and_it_stays_small():
    assert f"{exported_images_seen(FOLDER):,} images" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12e6
    assert json.loads((FOLDER / "model.json").read_text(encoding="utf-8"))["half"] is True


def test_it_draws_an_opaque_head_whose_mouth_darkens_when_the_jaw_opens():
    genhead = load_genhead(FOLDER)
    z = torch.randn(4, genhead.config.z_dim, generator=torch.Generator().manual_seed(0))
    shape, camera = torch.zeros(4, 300), frontal(4)
    pictures = []
    for jaw in (0.0, 0.3):
        motion = Motion.neutral(4)._replace(jaw_pose=torch.tensor([[jaw, 0.0, 0.0]]).repeat(4, 1))
        with torch.no_grad():
            pictures.append(genhead(z, shape, motion, camera, truncation_psi=0.7).images)
    closed, opened = pictures
    eighth = closed.opacity.shape[-1] // 8
    middle = slice(3 * eighth, 5 * eighth)
    assert closed.opacity[:, :, middle, middle].min() > 0.9 and closed.opacity[:, :, :eighth, :eighth].mean() < 0.5
    mouth = opened.mouth_mask > 0.5
    assert mouth.any() and (opened.raw - closed.raw).abs().mean(1, keepdim=True)[mouth].mean() > 0.1


def test_its_faces_lie_on_the_mesh_nearer_than_a_flat_face():
    genhead = load_genhead(FOLDER)
    z, shape, camera = torch.randn(4, genhead.config.z_dim, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 300), frontal(4)
    depth = genhead(z, shape, Motion.neutral(4), camera, truncation_psi=0.7).images.depth
    mesh = mesh_view(genhead.head_model, genhead.pose(shape, Motion.neutral(4)).vertices_posed, camera, depth.shape[-1])
    assert (depth_error(depth, mesh) < 0.6 * depth_error(flat_face(mesh), mesh)).all()


def test_bfloat16_gives_the_same_pictures_depth_and_opacity():
    genhead = load_genhead(FOLDER)
    z, shape, camera = torch.randn(4, genhead.config.z_dim, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 300), frontal(4)
    with torch.no_grad():
        ws, posed = genhead.map(z, camera.label(), shape, 0.7), genhead.pose(shape, Motion.neutral(4))
        exact, rounded = (
            genhead.render(genhead.planes(ws, precision=p), genhead.background(z, p), posed, camera, precision=p).images
            for p in ("float32", "bfloat16")
        )
    assert 45 < psnr_db(rounded.image, exact.image, 2.0) < 70  # 70: the setting does something
    assert psnr_db(rounded.opacity, exact.opacity, 1.0) > 42  # outlines of 128 x 128 planes are steep: 43 dB here, 45 with those of 64
    seen = exact.opacity > 0.5
    assert psnr_db(rounded.depth[seen], exact.depth[seen], 1.3) > 45


def test_the_tiny_evaluation_asks_a_perception_network_that_never_shares_people_with_the_one_for_losses():
    folder = ROOT / "pretrained" / "perception-tiny"
    assert load_yaml(EvaluateRun, ROOT / "configs" / "evaluate_tiny.yaml").perception == folder.relative_to(ROOT) / "evaluation"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    draws = torch.Generator().manual_seed(0)
    for role in ("losses", "evaluation"):
        network, errors = load_perception(folder / role, role), load_errors(folder / role)
        assert f"{exported_images_seen(folder / role):,} images" in card
        assert f"{errors['pictures']:,} pictures of the {errors['identities']} people" in card
        for name in ("rotation_deg", "landmarks", "jaw_deg", "face_mm"):
            assert errors["reading"][name]["network"] < 0.6 * errors["reading"][name]["mean"]
        told = errors["motion"]
        assert errors["identity"]["separation"] > 0.95 and told["rank"] < 0.25
        assert told["told_by_motion_vector_linear"] < 0.25 * told["told_by_identity_embedding_linear"]
        assert network.motion(torch.rand(1, 3, 64, 64, generator=draws)).shape == (1, 548)
    configs = [exported_config(folder / role, PerceptionExport, PERCEPTION) for role in ("losses", "evaluation")]
    assert configs[0].data_hash == configs[1].data_hash  # one set, of which each role sees its own people


def test_the_shipped_perception_network_sees_the_generator_s_heads_turn():
    genhead, network = load_genhead(FOLDER), load_perception(ROOT / "pretrained" / "perception-tiny" / "evaluation", "evaluation")
    z, yaw = torch.randn(3, genhead.config.z_dim, generator=torch.Generator().manual_seed(2)), torch.tensor([-0.5, 0.0, 0.5])
    camera = orbit(yaw, torch.zeros(3), torch.full((3,), 4.1))
    with torch.no_grad():
        pictures = genhead(z[:1].repeat(3, 1), torch.zeros(3, 300), Motion.neutral(3), camera, truncation_psi=0.7).images.image
        rotation = network.read(pictures).rotation
    truth = camera.c2w[:, :3, :3].mT
    assert rotation_angle(rotation, truth).mean() < 14  # 19 for who always says the front


def test_the_tiny_training_of_the_reconstructor_goes_on_from_the_shipped_one_which_is_small():
    config, exported = load_yaml(ReconstructorRun, ROOT / "configs" / "reconstructor_tiny.yaml"), load_reconstructor(RECONSTRUCTOR)
    assert config.start_from == RECONSTRUCTOR.relative_to(ROOT) and config.perception == Path("pretrained/perception-tiny/losses")
    assert exported.config == config.model and config.total_images > exported_images_seen(RECONSTRUCTOR)
    assert f"{exported_images_seen(RECONSTRUCTOR):,} images" in (RECONSTRUCTOR / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in RECONSTRUCTOR.rglob("*") if path.is_file()) < 12e6


@torch.no_grad()
def test_the_shipped_reconstructor_turns_and_drives_people_of_the_generator():
    """From one picture from the front, the side view with an open mouth is nearer to the truth than to other people, and as open."""
    genhead, reconstructor = load_genhead(FOLDER), load_reconstructor(RECONSTRUCTOR)
    network = load_perception(ROOT / "pretrained" / "perception-tiny" / "evaluation", "evaluation")
    people = 4
    z, shape = torch.randn(people, genhead.config.z_dim, generator=torch.Generator().manual_seed(3)), torch.zeros(people, 300)
    front, side = (orbit(torch.full((people,), yaw), torch.zeros(people), torch.full((people,), 4.1)) for yaw in (0.0, 0.4))
    opened = Motion.neutral(people)._replace(jaw_pose=torch.tensor([[0.25, 0.0, 0.0]]).repeat(people, 1))
    sources = genhead(z, shape, Motion.neutral(people), front, truncation_psi=0.7).images.image
    truth = genhead(z, shape, opened, side, truncation_psi=0.7).images.image
    heads = [Avatar.from_image(reconstructor, picture[None]) for picture in sources]
    driven = torch.cat([head.drive(opened.select(slice(1)), side.select(slice(1))).image for head in heads])
    still = torch.cat([head.drive(Motion.neutral(1), side.select(slice(1))).image for head in heads])
    error = (driven[:, None] - truth[None]).abs().mean((2, 3, 4))  # [reconstruction, truth]
    assert (error.argmin(1) == torch.arange(people)).all()
    assert (error.diagonal() < (sources - truth).abs().mean((1, 2, 3))).all()
    jaw = [network.read(pictures).jaw_pose[:, 0] for pictures in (driven, still, truth)]
    assert (jaw[0] - jaw[1]).mean() > 0.1 and (jaw[0] - jaw[2]).abs().mean() < 0.06
