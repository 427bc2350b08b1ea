"""The picture that a training shows of itself."""

from datagen.reading import open_dataset
from reconstructor.preview import preview_batch, preview_picture


def test_the_preview_shows_source_driver_output_truth_depths_and_a_novel_view(world, tmp_path, learner):
    config = world.run(tmp_path)
    batch = preview_batch(config, open_dataset(config.shards))
    picture = preview_picture(learner(config).averaged, batch)
    assert picture.shape == (len(batch) * 34 - 2, 7 * 34 - 2, 3)
    assert (picture[:32, :32].astype(float) - 127.5 * (1 + batch.source_image[0].permute(1, 2, 0).numpy())).max() < 1
