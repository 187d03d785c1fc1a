"""The length of a run: epochs, warm-up and intervals for a time budget."""

import math
from dataclasses import dataclass

from foveal.commands.init.data_facts import DataFacts
from foveal.commands.init.draft import Draft
from foveal.commands.init.recipe import Request
from foveal.commands.init.speed import Speed

_START_SECONDS = {True: 60.0, False: 15.0}  # imports, first batch and export: with GPUs, and on CPUs
_EVALUATION_SHARE = 0.15  # of the time, at most
_MAX_EVALUATIONS = 5
_WARMUP_SHARE, _MIN_WARMUP_STEPS, _MAX_WARMUP_EPOCHS = 0.06, 20, 40
_MAX_PRETRAINING_EPOCHS = 1600  # MAE's longest schedule
# Fine-tuning overfits a small set long before a budget ends: passes over many labels, or steps over few.
_MAX_FINETUNING_EPOCHS, _MAX_FINETUNING_STEPS = 50, 400
_FEW_STEPS = 100
_CHECKPOINT_SECONDS = 1800.0  # between checkpoints, at most
_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class Length:
    """The length of a run in epochs, steps and seconds, and why it is not the budget's, if so."""

    epochs: int
    steps: int
    seconds: float
    note: str = ""


def set_schedule(draft: Draft, facts: DataFacts, request: Request, speed: Speed, steps_per_epoch: int) -> Length:
    """Set epochs, warm-up and intervals so that the run takes the budget; return its length."""
    start_seconds, trainings = _START_SECONDS[request.on_gpu], request.num_trainings
    usable = max(1.0, (request.seconds - start_seconds) / trainings)
    evaluation_seconds = speed.evaluation_seconds * _count_evaluated_images(facts, request)
    evaluations = 0
    if evaluation_seconds:
        evaluations = min(_MAX_EVALUATIONS, int(_EVALUATION_SHARE * usable / evaluation_seconds))
    epoch_seconds = speed.step_seconds * steps_per_epoch
    epochs = max(1, int((usable - evaluations * evaluation_seconds) / epoch_seconds + 0.25))
    limit, note = _MAX_PRETRAINING_EPOCHS, "MAE's longest schedule"
    if request.stage == "finetune":
        limit = max(_MAX_FINETUNING_EPOCHS, math.ceil(_MAX_FINETUNING_STEPS / steps_per_epoch))
        note = "more passes over so few labels would not help"
    if epochs > limit:
        epochs = limit
    elif epoch_seconds > usable:
        note = "one epoch takes longer than the budget"
    else:
        note = ""
    steps = epochs * steps_per_epoch
    if steps < _FEW_STEPS:
        note = f"{note + ', and ' if note else ''}so few steps teach little: give it more time"
    seconds = start_seconds + trainings * (steps * speed.step_seconds + evaluations * evaluation_seconds)
    times = f"{trainings} times " if trainings > 1 else ""
    reason = f"{times}{steps:,} steps in about {format_seconds(seconds)}{f'; {note}' if note else ''}"
    draft.set("epochs", epochs, reason)
    warmup = max(_WARMUP_SHARE * epochs, _MIN_WARMUP_STEPS / steps_per_epoch)
    draft.set(
        "optim.warmup_epochs",
        round(min(warmup, _MAX_WARMUP_EPOCHS, epochs / 4), 2),
        draft.reasons.get("optim.warmup_epochs", ""),
    )
    every = _round_down(max(1, min(math.ceil(steps / 4), int(_CHECKPOINT_SECONDS / speed.step_seconds))))
    draft.set("checkpoint", {"every": every, "keep": 2})
    log = {"every": _round_down(max(1, min(steps // 20, round(_LOG_SECONDS / speed.step_seconds), 100)))}
    if request.stage == "pretrain":
        log["images_every"] = math.ceil(steps / 4)
    draft.set("log", log)
    if evaluations:
        what = "k-NN accuracy on val" if request.stage != "finetune" and facts.num_classes > 1 else "on val"
        draft.set("evaluate_every", math.ceil(steps / evaluations), f"steps; {what}")
    return Length(epochs, steps, seconds, note)


def _count_evaluated_images(facts: DataFacts, request: Request) -> int:
    """Return the images that one evaluation reads: those of val and, for k-NN, the training images that are compared."""
    if not facts.num_val:
        return 0
    is_knn = request.stage != "finetune" and facts.num_classes > 1
    return 2 * facts.num_val + min(sum(facts.class_counts), 50_000) if is_knn else facts.num_val


def _round_down(number: int) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above a number."""
    power = 10 ** (len(str(number)) - 1)
    return max(power * digit for digit in (1, 2, 5) if power * digit <= number)


def format_seconds(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
