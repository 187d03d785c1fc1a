"""By which number a run is judged while it goes on, and what of that can be refused before it begins."""

from foveal.config import Config, science
from foveal.data import LabelKind
from foveal.data.sampling.subset import eval_split
from foveal.errors import ConfigError
from foveal.training.plan import StageConfig


class EarlyStoppingConfig(Config):
    """What the evaluations on the way are for: to stop when they get no better, and to leave the best one's weights."""

    metric: str = science(
        description="The number that judges, such as val_top1 or holdout_loss; higher is better, unless it ends in loss."
    )
    patience: int | None = science(
        description="Evaluations after the best one, at the last of which the run stops; null: it goes on to the end.",
        ge=1,
    )


TASK_METRICS: dict[LabelKind, tuple[str, ...]] = {  # of an evaluation
    "class": ("top1", "top5", "loss"),
    "classes": ("map", "f1", "loss"),
    "mask": ("miou", "pixels", "loss"),
    "boxes": ("map", "map_50", "map_75", "loss"),
}


def evaluation_metric_names(cfg: StageConfig, *, adversarial: bool) -> list[str]:
    """The names under which the numbers of an evaluation are logged: of val or the fold, and of what is held out."""
    numbers = (*TASK_METRICS[cfg.data.labels], *(("robust_top1",) if adversarial else ()))
    parts = (eval_split(cfg.data).metric_prefix, *(("holdout",) if cfg.data.holdout_per_class else ()))
    return [f"{part}_{number}" for part in parts for number in numbers]


def check_early_stopping(
    early_stopping: EarlyStoppingConfig | None, evaluate_every: int, cfg: StageConfig, *, adversarial: bool = False
) -> None:
    """Refuse what judges by a number that nobody logs. Raises: ConfigError."""
    names = ", ".join(evaluation_metric_names(cfg, adversarial=adversarial))
    if early_stopping is None:
        if cfg.optim.schedule == "plateau":
            raise ConfigError(
                f"optim.schedule=plateau follows early_stopping.metric, and there is no early_stopping: set it to one of {names} "
                f"(early_stopping.patience=null goes on to the end)"
            )
        return
    if early_stopping.metric not in names.split(", "):
        more = cfg.data.labels == "class" and not cfg.data.holdout_per_class
        hint = "; data.holdout_per_class adds those of the part that is held out" if more else ""
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is not among what every evaluation logs: {names}{hint}"
        )
    if not evaluate_every:
        raise ConfigError(
            f"early_stopping.metric={early_stopping.metric} is logged only at the end, because evaluate_every=0: say how many steps lie "
            f"between evaluations, each of which logs {names}"
        )


def early_stopping_science(early_stopping: EarlyStoppingConfig | None, evaluate_every: int) -> dict[str, str]:
    """The cadence of evaluations is science where they decide how a run goes on."""
    return {} if early_stopping is None else {"evaluate_every": str(evaluate_every)}
