"""croissant.json is loaded by the reference reader, and the data card says what the set holds."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import yaml

from datagen.describe import FORBIDDEN, describe
from datagen.exclusion import Exclusion
from datagen.plan import exclude
from datagen.reading import open_dataset
from datagen.verify import VerifyRun, verify
from head3d.run.errors import DataError
from pipelines.__main__ import run_command

# In a process of its own: where it unpacks tars is decided by the environment when it is imported, and named after relative paths
READ = """
import json, sys
import mlcroissant
dataset = mlcroissant.Dataset(sys.argv[1])
def plain(record):
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}
frames = [plain(record) for record in dataset.records("frames")]
pictures = [
    {"key": record["pictures/key"].decode(), "view": record["pictures/view"].decode(), "size": record["pictures/picture"].size}
    for record in dataset.records("pictures")
]
issues = dataset.metadata.ctx.issues
print(json.dumps({"frames": frames, "pictures": pictures, "errors": sorted(issues.errors), "warnings": sorted(issues.warnings)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, undisturbed):
    out = tmp_path_factory.mktemp("described") / "set"
    for name, data in undisturbed.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    describe(out)
    return out


def test_the_reference_reader_loads_frames_and_pictures(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READ), str(folder / "croissant.json")],
        env=os.environ | {"CROISSANT_CACHE": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found, frames = json.loads(done.stdout.splitlines()[-1]), open_dataset(folder).frames
    fields = ("key", "identity", "motion", "kind", "split", "views")
    assert found["frames"] == [{f"frames/{name}": getattr(frame, name) for name in fields} for frame in frames]
    pictures = {(picture["key"], picture["view"]) for picture in found["pictures"]}
    assert pictures == {(frame.key, str(view)) for frame in frames for view in range(frame.views)}
    assert {tuple(picture["size"]) for picture in found["pictures"]} == {(32, 32)}
    assert found["errors"] == [] and not [text for text in found["warnings"] if "datePublished" not in text and "citeAs" not in text]


def test_every_tar_is_listed_with_its_hash_and_every_member_with_type_and_unit(folder):
    record = json.loads((folder / "croissant.json").read_text())
    entries = {entry["@id"]: entry for entry in record["distribution"]}
    tars = sorted(folder.glob("*/*.tar"))
    assert len(tars) == 9
    for path in (*tars, folder / "dataset.json", folder / "index.safetensors"):
        entry = entries[str(path.relative_to(folder))]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["contentSize"] == f"{path.stat().st_size} B" and entry["contentUrl"] == entry["@id"]
    depth = entries["members-depth"]
    assert depth["includes"] == "*.depth.npy" and "uint16 [V x R x R]" in depth["description"] and "scene units" in depth["description"]
    assert [tar["@id"] for tar in depth["containedIn"]] == [f"labels/00000{shard}.tar" for shard in range(3)]
    assert all(use in " ".join(record["rai:dataLimitations"]) for use in FORBIDDEN)


def test_the_card_has_provenance_licence_uses_and_coverage(folder):
    text = (folder / "README.md").read_text()
    manifest = json.loads((folder / "dataset.json").read_text())
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["pretty_name"] == f"head-foundry-{manifest['config_hash']}"
    for part in (manifest["notice"], manifest["licence"], manifest["generator"]["hash"], manifest["head_model"]["hash"], "Seed: 0;"):
        assert part in body
    assert "| all |  | 5 | 7 | 18 |" in body and "Measured on 7 frames of 3 shards" in body and "| very light |" in body
    assert "| `depth` | uint16 V x R x R | scene units |" in body
    for heading in ("What it is for", "What it must not be used for", "Whom it covers", "Limits", "Licence"):
        assert f"\n## {heading}\n" in body


def test_both_files_belong_to_the_set_and_are_the_same_each_time(folder, capsys):
    before = {name: (folder / name).read_bytes() for name in ("croissant.json", "README.md")}
    assert run_command("describe", [str(folder)]) == 0
    assert str(folder / "README.md") in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert verify(VerifyRun(str(folder), rerender=0)) == 0


def test_what_is_excluded_is_said(folder):
    exclude(folder, Exclusion(frozenset([3]), frozenset()))
    describe(folder)
    assert "2 further frames are in the tars but excluded" in (folder / "README.md").read_text()
    exclude(folder, Exclusion())


def test_a_set_without_a_finished_shard_cannot_be_described(tmp_path, undisturbed):
    (tmp_path / "dataset.json").write_bytes(undisturbed["dataset.json"])
    with pytest.raises(DataError, match="no shard is finished yet"):
        describe(tmp_path)
