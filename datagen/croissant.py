"""croissant.json: a data set described for machines (Croissant 1.0, mlcommons.org/croissant, with its responsible-AI terms).

Every tar with its SHA-256, every sort of member with type, shape and unit, and two record sets that can be loaded as they are:
`frames` and `pictures`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from datagen.cache import Tar
from datagen.index import INDEX
from datagen.members import FAMILIES, Member
from datagen.reading import ShardDataset

_WORDS = (
    "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath key md5 "
    "parentField path recordSet references regex repeated replace samplingRate separator source subField transform"
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
    **{word: f"cr:{word}" for word in _WORDS.split()},
}  # of Croissant 1.0
_FORMATS = {"jpg": "image/jpeg", "png": "image/png", "json": "application/json", "npy": "application/x-npy"}


def croissant(dataset: ShardDataset, name: str, statements: dict[str, str | list[str]]) -> dict[str, Any]:
    """The JSON-LD object; `statements` are what people say of the data, by the words of the responsible-AI vocabulary.

    It grows by some 300 bytes for each tar.
    """
    manifest = dataset.manifest
    image = manifest["settings"]["shards"]["image_format"]
    families = {family: [name for name in dataset.tars if name.startswith(f"{family}/")] for family in FAMILIES}
    sets = [_member_set(member, families[member.family], image) for member in dataset.members.values() if families[member.family]]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": f"{manifest['notice']} {len(dataset.frames)} frames of up to {manifest['plan']['identities']} made-up people, "
        "each from several cameras, with the labels that rendering knows.",
        "license": manifest["licence"],
        "version": "1.0.0",
        "url": dataset.storage.address,
        "keywords": ["synthetic", "human heads", "multi-view", "3D"],
        "isLiveDataset": False,
        **{f"rai:{word}": statement for word, statement in statements.items()},
        "distribution": [
            *(_file(dataset, name) for name in ("dataset.json", INDEX)),
            *map(_tar, dataset.tars.values()),
            _SIDECARS,
            *sets,
        ],
        "recordSet": [_frames_records(), _pictures_records()],
    }


def _file(dataset: ShardDataset, name: str) -> dict[str, Any]:
    data = dataset.storage.read(name)
    encoding = "application/json" if name.endswith(".json") else "application/octet-stream"
    return _file_object(name, len(data), encoding, hashlib.sha256(data).hexdigest())


def _tar(tar: Tar) -> dict[str, Any]:
    return _file_object(tar.name, tar.size, "application/x-tar", tar.sha256)


def _file_object(name: str, size: int, encoding: str, sha256: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": encoding,
        "sha256": sha256,
    }


def _member_set(member: Member, tars: list[str], image: str) -> dict[str, Any]:
    """All files of one sort of member, in all tars of its family."""
    extension = member.extension(image).replace("{view}", "*")
    stored = f"{member.dtype} [{' x '.join(map(str, member.shape))}]" if member.kind == "array" else member.kind
    scaled = f"; integers stand for the range {member.scale!r} of dataset.json" if member.scale in ("depth", "box") else ""
    return {
        "@type": "cr:FileSet",
        "@id": _set_id(member.asked),
        "name": _set_id(member.asked),
        "description": "; ".join(filter(None, (member.note, stored, member.unit))) + scaled,
        "containedIn": [{"@id": name} for name in tars],
        "encodingFormat": _FORMATS[extension.rpartition(".")[2]],
        "includes": f"*.{extension}",
    }


def _set_id(asked: str) -> str:
    return "members-" + asked.replace(".{view}", "").replace(".", "-")


def _frames_records() -> dict[str, Any]:
    """A record for each frame, from the sidecars."""
    fields = {
        "key": ("sc:Text", "of the frame's members in the tars"),
        "identity": ("sc:Integer", "who"),
        "motion": ("sc:Integer", "which motion of that person"),
        "kind": ("sc:Text", "static, dynamic or motion-rich"),
        "split": ("sc:Text", "train, val or test, by person"),
        "views": ("sc:Integer", "number of pictures"),
    }
    return {
        "@type": "cr:RecordSet",
        "@id": "frames",
        "name": "frames",
        "description": "one (person, motion) with all its views",
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"frames/{name}",
                "name": name,
                "description": note,
                "dataType": kind,
                "source": {"fileSet": {"@id": _SIDECARS["@id"]}, "extract": {"jsonPath": f"$.samples[*].{name}"}},
            }
            for name, (kind, note) in fields.items()
        ],
    }


_SIDECARS = {
    "@type": "cr:FileSet",
    "@id": "sidecars",
    "name": "sidecars",
    "description": "what each tar of frames holds, and where",
    "encodingFormat": "application/json",
    "includes": "frames/*.json",
}


def _pictures_records() -> dict[str, Any]:
    """A record for each picture; its key is that of its frame."""
    extracts = {
        "key": ("sc:Text", "of the frame", "filename", r"^(\d+)\."),
        "view": ("sc:Text", "number of the view", "filename", r"^\d+\.rgb\.(\d+)\."),
        "picture": ("sc:ImageObject", "the final picture", "content", None),
    }
    return {
        "@type": "cr:RecordSet",
        "@id": "pictures",
        "name": "pictures",
        "description": "one view of one frame",
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"pictures/{name}",
                "name": name,
                "description": note,
                "dataType": kind,
                "source": {"fileSet": {"@id": _set_id("rgb.{view}")}, "extract": {"fileProperty": read}}
                | ({"transform": {"regex": regex}} if regex else {}),
            }
            for name, (kind, note, read, regex) in extracts.items()
        ],
    }
