"""Stages: what trains, how fast and on which losses, by images seen; frozen bytes, optimiser state, resume across a border."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from datagen.plan import open_plan
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.errors import ConfigError
from head3d.run.runlog import read_metrics
from reconstructor.learner import build
from reconstructor.losses import LossConfig, TermConfig, members_needed
from reconstructor.settings import ReconstructorRun
from reconstructor.stages import StageConfig, check_groups, enter, largest_weights, parameter_groups, stage_at
from reconstructor.train import train

RENDERER = ("decoder", "superresolution")
WARM_UP = (
    StageConfig("warm-up", images=8, freeze=RENDERER, rates={"cross_attention": 2.5}, losses={"opacity": 0.0, "points": 1.0}),
    StageConfig("everything"),
)


@pytest.fixture(scope="module")
def staged(world, tmp_path_factory):
    """A run of four steps whose second half thaws the renderer, saved after every step."""
    config = world.run(tmp_path_factory.mktemp("staged") / "run", stages=WARM_UP, total_images=16, checkpoint_every=4)
    assert train(config) == 0
    return config


def checkpoint_at(config, images_seen):
    folder = config.out / "checkpoints" / f"{images_seen:09d}"
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text())["state"]


def test_every_parameter_is_in_one_group_and_the_cross_attention_has_its_own(world, tmp_path):
    model = build(world.run(tmp_path), open_plan(world.shards), torch.device("cpu"), fresh=False).model
    groups = parameter_groups(model)
    assert list(groups) == ["cross_attention", "background", "architecture", "decoder", "superresolution"]
    assert sorted(id(parameter) for group in groups.values() for parameter in group) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    attention = {names[id(parameter)] for parameter in groups["cross_attention"]}
    assert attention == {name for name in names.values() if "cross_" in name or "_motion." in name}


def test_a_frozen_group_keeps_its_bytes_and_its_optimiser_state_begins_when_it_thaws(staged):
    start = checkpoint_at(staged, 4)[0]
    for images, renderer_steps in ((8, None), (12, 1.0), (16, 2.0)):
        tensors, state = checkpoint_at(staged, images)
        renderer = [name for name in start if name.split("/")[-1].startswith(RENDERER)]
        assert len(renderer) > 10
        same = [torch.equal(start[name], tensors[name]) for name in renderer if name.startswith("model/")]
        assert all(same) if renderer_steps is None else not all(same)
        for group in state["optimizer"]["groups"]:
            steps = {float(tensors[name]) for index in group["params"] if (name := f"optimizer.{index}.step") in tensors}
            frozen_once = group["name"] in RENDERER
            assert steps == ({renderer_steps} - {None} if frozen_once else {images / 4})
            assert group["lr"] == pytest.approx(1e-3 * (2.5 if group["name"] == "cross_attention" and images <= 8 else 1))


def test_a_stage_changes_weights_of_losses_for_its_time_only(staged):
    lines = read_metrics(staged.out)
    assert ["loss/opacity" in line for line in lines] == [False, False, True, True]
    assert [line["schedule/stage"] for line in lines] == [0, 0, 1, 1] and {line["schedule/rays"] for line in lines} == {16}
    assert lines[1]["loss/points"] > 5 * lines[2]["loss/points"]  # weight 1, then 0.1


@pytest.mark.parametrize("stopped_at", [4, 8])
def test_a_run_stopped_inside_a_stage_or_at_its_border_ends_as_one_that_was_not(staged, tmp_path, stopped_at):
    parts = dataclasses.replace(staged, out=tmp_path / "run", checkpoint_every=100)
    train(dataclasses.replace(parts, total_images=stopped_at))
    assert latest_checkpoint(parts.out).images_seen == stopped_at
    train(parts)
    first, second = latest_checkpoint(staged.out), latest_checkpoint(parts.out)
    assert first.tensors.keys() == second.tensors.keys() and first.state == second.state
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_a_group_can_freeze_again_and_then_stands_still(world, tmp_path):
    config = world.run(tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam([{"params": [model.weight], "name": "one"}, {"params": [model.bias], "name": "two"}], 0.1)
    for stage, moves in ((StageConfig(), True), (StageConfig(freeze=("tw?",)), False), (StageConfig(train=("two",)), True)):
        enter(stage, optimizer, config.learning_rate)
        before = model.bias.detach().clone()
        optimizer.zero_grad(set_to_none=True)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert torch.equal(before, model.bias) != moves
    assert not model.weight.requires_grad


def test_the_stage_is_that_of_the_images_seen_when_a_step_starts():
    assert [stage_at(WARM_UP, images).name for images in (0, 7, 8, 10**9)] == ["warm-up", "warm-up", "everything", "everything"]


def test_labels_are_read_and_asked_for_where_any_stage_needs_them(world, tmp_path):
    losses = LossConfig(depth=TermConfig(0.0), opacity=TermConfig(0.0), image=TermConfig(0.0), perceptual=TermConfig(0.0))
    stages = (StageConfig("first", images=8), StageConfig("second", losses={"depth": 2.0}))
    config = world.run(tmp_path, losses=losses, stages=stages)
    assert largest_weights(losses, stages).depth.weight == 2.0
    assert "depth" not in members_needed(config.losses_at(7), 7) and "depth" in members_needed(config.losses_at(8), 8)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((StageConfig("a", images=4),), r"stages\[0\] \(a\): images is 4; the last stage goes on to the end"),
        ((StageConfig("a"), StageConfig("b")), r"stages\[0\] \(a\): images is None; .* each one before it lasts a number"),
        ((StageConfig("a", losses={"dept": 1.0}),), r"stages\[0\] \(a\): there is no loss 'dept'; there are image, .*depth"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused_by_name(stages, message):
    with pytest.raises(ConfigError, match=message):
        ReconstructorRun(stages=stages)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig("a", freeze=("decodr",)), r"stages\[0\] \(a\): 'decodr' matches no group of parameters; there are cross, decoder"),
        (StageConfig("a", rates={"x*": 2.0}), r"'x\*' matches no group"),
        (StageConfig("a", freeze=("*",)), "trains none of the groups cross, decoder"),
    ],
)
def test_a_group_that_does_not_exist_is_refused_with_those_that_do(stage, message):
    with pytest.raises(ConfigError, match=message):
        check_groups([stage], ["cross", "decoder"])
