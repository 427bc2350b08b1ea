"""Sets that a program made which did not know a setting of this one."""

import dataclasses
import json

import pytest

from datagen.generate import generate
from datagen.members import json_bytes
from datagen.plan import manifest_text, open_plan
from datagen.reading import open_dataset, write_index
from datagen.verify import VerifyRun, verify
from head3d.run.config import config_hash
from head3d.run.errors import ConfigError, DataError


@pytest.fixture
def older_set(made_set):
    """A set that states neither how precisely it is rendered nor the side of the box, both of which have their defaults."""
    path = made_set / "dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["render"]["precision"], manifest["settings"]["generator"]["model"]["sampling"]["box_side"]
    manifest["config_hash"] = config_hash(manifest["settings"])
    path.write_text(manifest_text(manifest))
    for sidecar in made_set.glob("*/*.json"):
        sidecar.write_bytes(json_bytes(json.loads(sidecar.read_bytes()) | {"config_hash": manifest["config_hash"]}))
    write_index(made_set)
    return made_set


def test_a_set_that_lacks_a_setting_is_whole_and_is_extended_under_its_own_hash(older_set, run_of, capsys):
    before = open_plan(older_set)
    assert before.render.precision == "float32" and "precision" not in before.settings()["render"]
    assert verify(VerifyRun(str(older_set), rerender=1)) == 0, capsys.readouterr().out
    assert generate(run_of(older_set, identities=7)) == 0
    assert "made 2 shards now" in capsys.readouterr().out  # the third, which was short, and the fourth
    assert open_plan(older_set) == dataclasses.replace(before, identities=7) and len(open_dataset(older_set).frames) > 7
    hashes = {json.loads(sidecar.read_bytes())["config_hash"] for sidecar in older_set.glob("*/*.json")}
    assert hashes == {before.hash}
    assert verify(VerifyRun(str(older_set), rerender=0)) == 0


def test_a_setting_that_differs_from_the_default_of_one_that_is_lacking_is_refused_by_name(older_set, run_of):
    run = run_of(older_set)
    with pytest.raises(ConfigError, match="holds shards of other settings .* changed: render.precision: float32 -> bfloat16"):
        generate(dataclasses.replace(run, render=dataclasses.replace(run.render, precision="bfloat16")))


def test_a_setting_that_was_changed_by_hand_is_found(made_set):
    path = made_set / "dataset.json"
    path.write_text(path.read_text().replace('"precision": "float32"', '"precision": "bfloat16"'))
    with pytest.raises(DataError, match="its settings have the hash .* the file was changed, restore it"):
        open_plan(made_set)
