"""Settings of early stopping and best-checkpoint selection, and their checks."""

from finetune.config import EarlyStoppingConfig
from foveal.data.config import LabelKind
from foveal.data.sampling.subset import eval_split
from foveal.errors import ConfigError
from foveal.training.config import StageConfig

TASK_METRICS: dict[LabelKind, tuple[str, ...]] = {  # metrics of an evaluation, without prefix
    "class": ("top1", "top5", "loss"),
    "classes": ("map", "f1", "loss"),
    "mask": ("miou", "pixels", "loss"),
    "boxes": ("map", "map_50", "map_75", "loss"),
}


def evaluation_metric_names(cfg: StageConfig, *, adversarial: bool) -> list[str]:
    """Return the logged names of an evaluation's metrics, on data.val or the fold and on the holdout if any."""
    metrics = (*TASK_METRICS[cfg.data.labels], *(("robust_top1",) if adversarial else ()))
    prefixes = (eval_split(cfg.data).metric_prefix, *(("holdout",) if cfg.data.holdout_per_class else ()))
    return [f"{prefix}_{metric}" for prefix in prefixes for metric in metrics]


def check_early_stopping(
    early_stopping: EarlyStoppingConfig | None, evaluate_every: int, cfg: StageConfig, *, adversarial: bool = False
) -> None:
    """Raise ConfigError if early stopping or the plateau schedule follows a metric that is not logged."""
    names = ", ".join(evaluation_metric_names(cfg, adversarial=adversarial))
    if early_stopping is None:
        if cfg.optim.schedule == "plateau":
            raise ConfigError(
                f"optim.schedule=plateau follows early_stopping.metric, and there is no early_stopping: set it to one "
                f"of {names} (early_stopping.patience=null trains to the end)"
            )
        return
    if early_stopping.metric not in names.split(", "):
        can_hold_out = cfg.data.labels == "class" and not cfg.data.holdout_per_class
        hint = "; data.holdout_per_class adds the metrics of the holdout" if can_hold_out else ""
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is not among what every evaluation logs: {names}{hint}"
        )
    if not evaluate_every:
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is logged only at the end, because evaluate_every=0: set "
            f"evaluate_every to the steps between evaluations, each of which logs {names}"
        )


def evaluate_every_science(early_stopping: EarlyStoppingConfig | None, evaluate_every: int) -> dict[str, str]:
    """Return ``evaluate_every`` as science if evaluations decide how the run continues, else nothing."""
    return {} if early_stopping is None else {"evaluate_every": str(evaluate_every)}
