"""Lines of a plan as --check and the start of a run print them: a label of ten characters, and a sentence."""

from foveal.checkpoint.config import CheckpointConfig
from foveal.config import height_and_width
from foveal.data.sampling.lanes import explain_lanes
from foveal.data.sampling.order import SampleOrder
from foveal.training.config import StageConfig


def order_line(order: SampleOrder, window: int) -> str:
    """Return the line about the order of samples; it has the reason for other lanes than 32."""
    reason = explain_lanes(order.num_lanes, order.batch_size, order.source_sizes)
    return f"order     {order.num_lanes} lanes{reason}, each shuffled within {window} shards, for any number of ranks"


def warning_lines(cfg: StageConfig, world_size: int, microbatch_size: int) -> list[str]:
    """Return lines about settings that work and are probably not meant."""
    optim, batch, lines = cfg.optim, cfg.batch, []
    if optim.warmup_epochs >= cfg.epochs:
        lines.append(
            f"beware    optim.warmup_epochs={optim.warmup_epochs:g} is all of the run, epochs={cfg.epochs}: the "
            f"learning rate only rises"
        )
    rank_images = batch.global_size // world_size
    if microbatch_size < min(batch.max_micro_size, rank_images) / 4:
        lines.append(
            f"beware    microbatches of {microbatch_size} are slow: no larger number up to "
            f"batch.max_micro_size={batch.max_micro_size} divides the {rank_images} images of a rank in a step"
        )
    return lines


def checkpoint_line(checkpoint: CheckpointConfig) -> str:
    """Return the line about checkpoints, which a run without an interval writes at its end only."""
    every = f"every {checkpoint.every} steps and " if checkpoint.every else ""
    kept = f"; the newest {checkpoint.keep} stay" if checkpoint.keep > 1 else "; the newest stays"
    return f"save      {every}at the end or on a request to stop{kept}"


def resize_lines(trained_size: int | tuple[int, int] | None, image_size: int | tuple[int, int]) -> list[str]:
    """Return a line if the initial weights were trained at another image size (``trained_size``), in pixels."""
    if trained_size is None:
        return []
    old, new = (" x ".join(map(str, height_and_width(size))) for size in (trained_size, image_size))
    return [f"resized   from images of {old} to {new} pixels"]
