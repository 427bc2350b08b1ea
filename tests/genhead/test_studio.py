"""The studio: draws, meshes, pictures, and the command that fills a record with them."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter

from genhead.portraits import PortraitSet
from genhead.studio import Studio, StudioConfig
from genhead.studio_background import draw_background
from genhead.studio_hair import SkullMap, hair_meshes
from genhead.studio_people import Garment, HairStyle, draw_label, draw_look, lab_to_linear, linear, skin_colour
from head3d.cameras import project
from head3d.labels import check_label, pack_label, unpack_label
from head3d.rasterize import rasterize
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator
from pipelines.portraits import PortraitsRun, main


@pytest.fixture(scope="module")
def studio():
    torch.set_num_threads(1)
    return Studio(StudioConfig(supersampling=2))


def generator(index: int) -> np.random.Generator:
    return numpy_generator(5, "portrait", index)


# ---- draws -------------------------------------------------------------------------------------------------------------


def test_white_and_mid_grey_convert_as_the_standards_say():
    np.testing.assert_allclose(lab_to_linear(np.array([100.0, 0, 0])), 1, atol=2e-3)
    np.testing.assert_allclose(lab_to_linear(np.array([50.0, 0, 0])), 0.1842, atol=1e-3)  # ((50 + 16) / 116)^3
    np.testing.assert_allclose(linear([255, 128, 0]), [1, 0.21586, 0], atol=1e-4)


def test_skin_covers_the_range_from_deep_to_light_and_is_always_redder_than_blue():
    draws = [skin_colour(generator(index)) for index in range(300)]
    angles = np.array([angle for _, angle in draws])
    assert np.histogram(angles, bins=6, range=(-55, 57))[0].min() > 25
    colours = np.stack([colour for colour, _ in draws])
    assert (colours[:, 0] > colours[:, 1]).all() and (colours[:, 1] > colours[:, 2]).mean() > 0.97
    assert np.corrcoef(angles, colours.sum(1))[0, 1] > 0.95


def test_labels_are_valid_and_follow_the_published_statistics():
    labels = np.concatenate([pack_label(*draw_label(generator(i), 0.2, 1.0)).numpy() for i in range(300)])
    for label in labels:
        check_label(label, "drawn")
    parts = unpack_label(torch.from_numpy(labels))
    radius = parts.camera.c2w[:, :3, 3].norm(dim=1)
    assert abs(float(radius.mean()) - 4.17) < 0.03 and 0.1 < float(radius.std()) < 0.2
    uv, _ = project(torch.zeros(300, 1, 3), parts.camera)
    assert float((uv - 0.5).abs().max()) < 0.05
    assert (parts.motion.neck_pose == 0).all() and (parts.motion.jaw_pose[:, 0] >= 0).all()
    assert (parts.motion.eye_pose[:, :3] == parts.motion.eye_pose[:, 3:]).all()
    yaw = torch.atan2(parts.camera.c2w[:, 0, 3], parts.camera.c2w[:, 2, 3])
    assert 0.03 < float((yaw.abs() > 0.62).float().mean()) < 0.2


def test_looks_use_every_hair_style_and_garment():
    looks = [draw_look(generator(index)) for index in range(300)]
    assert {look.hair_style for look in looks} == set(get_args(HairStyle))
    assert {look.garment for look in looks} == set(get_args(Garment))
    assert 0.05 < np.mean([look.glasses is not None for look in looks]) < 0.3


def test_a_backdrop_is_in_range_and_the_same_picture_at_every_resolution():
    for index in range(12):
        small, large = draw_background(24, generator(index)), draw_background(96, generator(index))
        assert small.shape == (24, 24, 3) and small.min() >= 0 and small.max() <= 1
        reduced = large.reshape(24, 4, 24, 4, 3).mean((1, 3))
        assert np.abs(reduced - small).mean() < 0.02


# ---- meshes ------------------------------------------------------------------------------------------------------------


def test_the_skull_map_of_a_sphere_is_its_radius_in_every_direction():
    unit = np.random.default_rng(0).normal(size=(4000, 3))
    sphere = 80 * unit / np.linalg.norm(unit, axis=1, keepdims=True)
    skull = SkullMap(sphere, np.arange(4000), np.zeros(3))
    polar, azimuth = np.random.default_rng(1).uniform(0, [[np.pi], [2 * np.pi]], (2, 50))
    np.testing.assert_allclose(skull.radius(skull.fit(1.5 * sphere), polar, azimuth), 120, rtol=1e-6)


def test_hair_lies_outside_the_skull_it_was_made_for(studio):
    vertices = studio.atlas.template
    radii = studio._skull.fit(vertices)
    for index in range(40):
        for mesh in hair_meshes(draw_look(generator(index)), studio._skull, radii)[:1]:
            offset = mesh.vertices - studio._skull.centre
            radius = np.linalg.norm(offset, axis=1)
            polar, azimuth = np.arccos(offset[:, 1] / radius), np.arctan2(offset[:, 0], offset[:, 2])
            assert (radius - studio._skull.radius(radii, polar, azimuth)).min() > 0.5  # mm


# ---- pictures ----------------------------------------------------------------------------------------------------------


def test_landmarks_of_the_label_fall_on_the_matte(studio):
    for index in range(6):
        portrait = studio.portrait(generator(index), 64)
        label = unpack_label(torch.from_numpy(portrait.label)[None])
        landmarks = studio.head.landmarks(studio.head.vertices(label.shape, label.motion))
        pixels = (project(landmarks, label.camera)[0][0] * 64).long().clamp(0, 63).numpy()
        near = maximum_filter(portrait.matte, 3)  # landmarks of the jaw line lie on the outline itself
        assert (near[pixels[:, 1], pixels[:, 0]] > 128).all()
        assert (portrait.matte[pixels[17:, 1], pixels[17:, 0]] > 100).mean() > 0.95


def test_the_matte_covers_the_silhouette_of_the_posed_head(studio):
    for index in range(6):
        portrait = studio.portrait(generator(index), 64)
        label = unpack_label(torch.from_numpy(portrait.label)[None])
        raster = rasterize(studio.head.vertices(label.shape, label.motion), studio.head.faces, label.camera, 128)
        silhouette = (raster.face_ids[0] >= 0).float().view(64, 2, 64, 2).mean((1, 3)).numpy()
        assert (portrait.matte[silhouette == 1] == 255).all()
        assert portrait.matte.mean() / 255 > silhouette.mean()


def test_the_backdrop_is_untouched_where_the_matte_is_empty_and_edges_are_soft(studio):
    label, look = draw_label(generator(3), 0.0, 1.0), draw_look(generator(3))
    black, white = (studio.picture(label, look, np.full((64, 64, 3), value, np.float32)) for value in (0.0, 1.0))
    empty, full = black[1] == 0, black[1] == 255
    assert (black[0][empty] == 0).all() and (white[0][empty] == 255).all()
    np.testing.assert_array_equal(black[0][full], white[0][full])
    assert 0.01 < (~empty & ~full).mean() < 0.2


def test_every_hair_style_and_garment_can_be_drawn_with_glasses_and_beard(studio):
    base = draw_look(generator(0))
    label = draw_label(generator(0), 1.0, 1.0)
    pictures = []
    for style, garment in zip(get_args(HairStyle), get_args(Garment) * 3, strict=False):
        look = base._replace(
            hair_style=style, garment=garment, glasses=np.zeros(3, np.float32), beard_m=0.01, freckles=0.5, cloth_pattern=len(pictures) % 3
        )
        pictures.append(studio.picture(label, look, np.zeros((32, 32, 3), np.float32))[0])
    assert len({picture.tobytes() for picture in pictures}) == len(get_args(HairStyle))


# ---- the command -------------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_file_and_a_second_call_does_nothing(tmp_path, capsys):
    runs = [
        PortraitsRun(out=tmp_path / f"workers_{n}", count=5, resolution=32, workers=n, studio=StudioConfig(supersampling=1)) for n in (0, 2)
    ]
    for run in runs:
        main(run)
    first, second = ((run.out / "data.mdb").read_bytes() for run in runs)
    assert first == second
    assert (runs[0].out / "contact_sheet.png").exists() and PortraitSet(runs[0].out).metadata["synthetic"] is True
    stamp = (runs[0].out / "data.mdb").stat().st_mtime_ns
    main(dataclasses.replace(runs[0], workers=7))
    assert "nothing to do" in capsys.readouterr().out and (runs[0].out / "data.mdb").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="expected portraits made with these settings .* got others .* choose another --out"):
        main(dataclasses.replace(runs[0], seed=1))
    fewer = dataclasses.replace(runs[0], out=tmp_path / "fewer", count=2)
    main(fewer)  # a portrait does not depend on how many there are
    for got, want in zip(PortraitSet(fewer.out)[1], PortraitSet(runs[0].out)[1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_folder_of_studio_pictures_comes_in_as_photographs(tmp_path, studio):
    folder = tmp_path / "in"
    folder.mkdir()
    portraits = [studio.portrait(generator(index), 32) for index in range(2)]
    for index, portrait in enumerate(portraits):
        Image.fromarray(portrait.image).save(folder / f"{index}.png")
        np.save(folder / f"{index}.npy", portrait.label)
    Image.fromarray(portraits[0].matte).save(folder / "0_matte.png")
    run = PortraitsRun(out=tmp_path / "out", resolution=32, from_folder=folder, image_format="png")
    main(run)
    read = PortraitSet(run.out)
    for got, want in zip(read[0], portraits[0], strict=True):
        np.testing.assert_array_equal(got, want)
    assert read.has_matte().tolist() == [True, False] and read.metadata["without_matte"] == 1 and read.metadata["synthetic"] is False
    np.save(folder / "1.npy", np.zeros(3))
    with pytest.raises(DataError, match="a label has 437 numbers"):
        main(dataclasses.replace(run, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
