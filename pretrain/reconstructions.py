"""Pictures of reconstructions: the same images under the same masks at every step, on any number of ranks."""

import logging

from foveal.data.batch import Batch
from foveal.data.sample_images import read_sample_images
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.inspect.picture import Picture
from foveal.inspect.reconstruction import draw_reconstruction_grid
from foveal.training.run import Run
from pretrain.objective import MaskedModelingLoss

_MAX_IMAGES = 8
_log = logging.getLogger(__name__)


def save_reconstructions(step: int, engine: Engine, objective: MaskedModelingLoss, run: Run) -> None:
    """Save a grid of images, their visible patches and reconstructions after a step. A collective.

    The images are of data.val, or of data.train without such a split. Rank 0 reads them, and every rank runs the same
    forward, because an engine that shards weights gathers them in it. No random number of the training is drawn.
    """
    plan, data = run.plan, run.plan.cfg.data
    split = data.val if data.val in plan.dataset.manifest.splits else data.train
    with run.throughput_meter.exclude_time(), engine.eval_mode():
        batch = run.world.on_rank0(lambda: _read_images(run, split))
        if batch is None:
            return
        _, output = objective.predict(engine.model, batch.to(engine.device))
        title = (
            f"After step {step} of {plan.total_steps}: images of {split}, {100 * objective.mask_ratio:.3g} % of their "
            f"patches masked, the same in every picture of this run"
        )
        run.save_picture(
            "reconstruction",
            step,
            lambda: Picture(
                draw_reconstruction_grid(
                    batch.images,
                    output.masked_patch_pred,
                    output.masked_indices,
                    mean=objective.mean,
                    std=objective.std,
                    norm_pix=objective.norm_pix,
                    title=title,
                ),
                "Reconstructions",
                f"{title}. Rows: images. Columns: original, visible patches, prediction.",
            ),
        )


def _read_images(run: Run, split: str) -> Batch | None:
    """Return the images; None, after a warning, if there are none: a picture is no reason to end a run."""
    try:
        batch = read_sample_images(run.plan.dataset, run.plan.cfg.data, split, _MAX_IMAGES)
    except DataError as error:
        _log.warning("no picture of reconstructions: %s", error)
        return None
    return batch if len(batch.ids) else None
