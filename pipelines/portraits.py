"""`headfoundry portraits`: make GenHead's training portraits, or take in photographs from a folder or a published record."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from genhead.photographs import check_folder, fingerprint, read_photograph
from genhead.portraits import VERSION, ImageFormat, Portrait, PortraitSet, create_record, decode_portrait, encode_portrait
from genhead.published_records import PublishedRecord
from genhead.studio import STUDIO_VERSION, Studio, StudioConfig
from head3d.head_model import BUILT_IN
from head3d.pictures import grid, save_png
from head3d.run.config import NonNegativeInt, PositiveInt, config_hash, save_yaml, to_dict
from head3d.run.errors import DataError
from head3d.run.runlog import progress
from head3d.run.seeding import numpy_generator

_SHEET = 64  # portraits on the contact sheet


@dataclasses.dataclass(frozen=True)
class PortraitsRun:
    """Make the portraits that GenHead learns from: drawn in the studio, or photographs with labels from a folder."""

    out: Path = Path("runs/portraits")  # the record: a folder with data.mdb, config.yaml and, for the studio, contact_sheet.png
    seed: NonNegativeInt = 0  # of the studio; portrait i depends on the seed and i alone
    count: PositiveInt = 70_000  # portraits to draw; photographs are taken all
    resolution: PositiveInt = 512  # pixels; larger photographs are reduced to it, smaller ones refused
    workers: NonNegativeInt = 2  # processes that draw; 0 draws in this process. The result is the same
    from_folder: Path | None = None  # NAME.png|jpg with NAME.npy (437 numbers) and perhaps NAME_matte.png; None = the studio
    from_lmdb: Path | None = None  # folder of a published portraits record (data.mdb, protobuf entries); None = the studio
    image_format: ImageFormat = "jpeg"  # how pictures are stored: jpeg = quality 95, full colour resolution; png = exact
    studio: StudioConfig = dataclasses.field(default_factory=StudioConfig)

    def __post_init__(self) -> None:
        if self.from_folder is not None and self.from_lmdb is not None:
            raise ValueError("from_folder and from_lmdb are both given; give one")


def main(config: PortraitsRun) -> None:
    """Write the record, or do nothing if it is there from the same settings. Raises DataError if it is there from others."""
    photographs = None if config.from_folder is None else check_folder(config.from_folder, config.resolution)
    record = None if config.from_lmdb is None else PublishedRecord(config.from_lmdb)
    settings = what_decides(config)
    digest = config_hash(settings)
    if (config.out / "data.mdb").exists():
        present = PortraitSet(config.out).metadata
        if present.get("config_hash") != digest:
            raise DataError(
                f"{config.out}: expected portraits made with these settings (hash {digest}), got others "
                f"(hash {present.get('config_hash')}, {present['count']} at {present['resolution']} px; see {config.out}/config.yaml); "
                "choose another --out or delete the folder"
            )
        print(f"{config.out} has {present['count']} portraits made with these settings; nothing to do")
        return
    metadata = {"config_hash": digest, "settings": settings}
    if photographs is not None:
        _write_photographs(
            config, len(photographs), (read_photograph(photograph, config.resolution) for photograph in photographs), metadata
        )
    elif record is not None:
        _write_photographs(config, len(record), (record.portrait(index, config.resolution) for index in range(len(record))), metadata)
    else:
        _write_studio(config, metadata)


def what_decides(config: PortraitsRun) -> dict:
    """The settings that the pictures depend on; for photographs, the state of their folder too."""
    settings = to_dict(config)
    if config.from_folder is not None:
        names, more = ("resolution", "from_folder", "image_format"), {"files": fingerprint(config.from_folder)}
    elif config.from_lmdb is not None:
        names, more = ("resolution", "from_lmdb", "image_format"), {"files": fingerprint(config.from_lmdb)}
    else:
        names, more = ("seed", "count", "resolution", "image_format", "studio"), {"studio_version": STUDIO_VERSION}
    return {name: settings[name] for name in names} | more | {"record_version": VERSION}


def _write_photographs(config: PortraitsRun, count: int, portraits: Iterator[tuple[Portrait, bool]], metadata: dict) -> None:
    """Write `count` portraits, each with whether it has a matte, as they come."""
    metadata |= {"provenance": "photographs", "synthetic": False}
    with create_record(config.out, config.resolution, count, metadata) as writer, progress(count, "photographs", "image") as bar:
        save_yaml(config, writer.folder / "config.yaml")
        for portrait, has_matte in portraits:
            writer.add(encode_portrait(portrait, config.image_format, has_matte))
            bar.update()
    note = f"; {writer.without_matte} have no matte and count as all foreground" if writer.without_matte else ""
    print(f"{config.out}: {count} photographs{note}")


def _write_studio(config: PortraitsRun, metadata: dict) -> None:
    metadata |= {"provenance": "studio", "synthetic": True, "head_model": BUILT_IN}
    with create_record(config.out, config.resolution, config.count, metadata) as writer:
        save_yaml(config, writer.folder / "config.yaml")
        first = []
        with progress(config.count, "portraits", "image") as bar:
            for value in draw(config):
                writer.add(value)
                if len(first) < _SHEET:
                    first.append(decode_portrait(value, "portrait").image)
                bar.update()
        save_png(
            writer.folder / "contact_sheet.png",
            grid(np.stack(first), columns=8),
            {"command": "portraits", "settings": metadata["settings"]},
        )
    print(f"{config.out}: {config.count} portraits at {config.resolution} px, contact sheet {config.out}/contact_sheet.png")


def draw(config: PortraitsRun) -> Iterator[bytes]:
    """The encoded portraits 0 ... count-1 in order, drawn by `config.workers` processes."""
    if config.workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums may depend on the number of threads; the workers use one
        try:
            studio = Studio(config.studio)
            for index in range(config.count):
                yield _portrait(studio, config, index)
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(min(config.workers, config.count), _start_worker, (config,)) as pool:
        yield from pool.imap(_draw_in_worker, range(config.count), chunksize=4)


def _portrait(studio: Studio, config: PortraitsRun, index: int) -> bytes:
    generator = numpy_generator(config.seed, "portrait", index)
    return encode_portrait(studio.portrait(generator, config.resolution), config.image_format)


_worker: tuple[Studio, PortraitsRun] | None = None  # of a pool process, set once when it starts


def _start_worker(config: PortraitsRun) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Studio(config.studio), config


def _draw_in_worker(index: int) -> bytes:
    assert _worker is not None
    return _portrait(*_worker, index)


CONFIG = PortraitsRun
