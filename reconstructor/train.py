"""Train the reconstructor on streamed shards: one loop, images seen as the clock, the same command resumes.

shards --BatchStream--> source picture, motions, switch, target labels         half static (switch 0), half dynamic (switch 1)
motion_vectors.py       -> what the attention is told of both motions; the labels' FLAME motion, or read off pictures
Reconstructor           -> pictures, features, depth, opacity, planes
losses.py               -> eq. 4 with exact labels; Adam; averaged weights
every so often          -> scalars, pictures, checkpoint; at the end the averaged reconstructor in RUN/export
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from datagen.cache import ShardCache, open_caches
from datagen.plan import open_plan
from head3d.run import distributed
from head3d.run.checkpoint import latest_checkpoint
from head3d.run.training import is_finished, open_run, process_group
from reconstructor.batches import BatchStream
from reconstructor.frozen_networks import check_networks
from reconstructor.learner import begin, build, check_data, circumstances, export, restore, save
from reconstructor.losses import members_needed
from reconstructor.mixture import open_mixture, places_of
from reconstructor.preview import preview_batch, preview_picture
from reconstructor.settings import ADVICE, ReconstructorRun
from reconstructor.steps import Stopwatch, step


def train(config: ReconstructorRun) -> int:
    """Train until total_images, a stop signal or divergence. Returns the exit status: 0 unless something failed.

    A finished run is not repeated; a started one goes on from its newest checkpoint, bit for bit on one machine.
    """
    with process_group(config.threads) as process, open_caches(config.cache, places_of(config.shards)) as caches:
        return _train(config, process, caches)


def _train(config: ReconstructorRun, process: distributed.Process, caches: Sequence[ShardCache | None]) -> int:
    data = open_mixture(config.shards)
    notes = check_networks(config.network_files(), config.losses_of_all_stages(), config.missing_networks) + check_data(config, data)
    if config.has_adversary:
        sizes = (config.model.architecture.image_resolution, config.batches.size, process.world_size, config.micro_batch)
        config.adversary.check(*sizes)
    for note in notes if process.is_main else ():
        print(note)
    saved = latest_checkpoint(config.out)
    learner = build(config, open_plan(places_of(config.shards)[0]), process.device, fresh=saved is None)
    around = circumstances(data, learner.frozen, learner.vectors)
    images_seen = restore(config, learner, saved, around) if saved else begin(config, learner)
    if is_finished(config, images_seen, process):
        return 0
    preview = learner.vectors.of_batch(preview_batch(config, data.datasets[0]).to(process.device))
    stream = BatchStream(
        data.through(caches),
        config.batches,
        config.seed,
        lambda seen: members_needed(config.losses_at(seen), seen),
        samples_seen=images_seen,
        rank=process.rank,
        world_size=process.world_size,
        driver_image="driver_image" in learner.model.architecture.needs or learner.vectors.kind == "image",
    )
    size, watch, window = config.batches.size, Stopwatch(process.device), (images_seen, time.perf_counter())
    with open_run("reconstructor", config, size, ADVICE, saved, images_seen, process) as run, stream as batches:
        while run.goes_on:
            watch.start()
            batch = next(batches).to(process.device)
            watch.lap("data_wait")
            run.advance(step(config, learner, batch, run.images_seen, process, watch))
            if run.due(config.log_every):
                means, seconds = run.means.take(), time.perf_counter() - window[1]
                shares = {name: spent / seconds for name, spent in watch.take().items()}
                speed = {f"speed/{name}_share": share for name, share in shares.items()}
                if config.batches.damaged == "replace":  # samples so far, of all processes
                    here = {"data/replaced_samples": stream.replaced * process.world_size}
                    speed |= distributed.mean_scalars(here, process.device)
                speed["speed/images_per_s"] = (run.images_seen - window[0]) / seconds
                run.log.scalars(run.images_seen, means | speed | config.schedule_at(run.images_seen - size))
                run.bar.set_postfix(loss=f"{means['loss/total']:.3f}", **{name: f"{share:.0%}" for name, share in shares.items()})
                window = (run.images_seen, time.perf_counter())
            if process.is_main and run.due(config.pictures_every):
                run.log.image(run.images_seen, "preview", preview_picture(learner.averaged, preview, config.rays_at(run.images_seen)))
            if process.is_main and (run.stopping or run.due(config.checkpoint_every)):
                save(config, learner, run.images_seen, {"circumstances": around} | run.state())
    if process.is_main and not run.stopping:
        export(config, learner, run.images_seen)
    return 0
