"""The end of an attempt, in words."""


def describe_leave(
    stop_reason: str | None, step: int, total_steps: int, newest_checkpoint: int | None, all_parts: str
) -> str:
    """Return why an attempt left before its run's end, and what of the run is saved.

    ``stop_reason``: the signal, None: another rank was asked. ``newest_checkpoint``: its step. ``all_parts``: such as
    "9 trials" of a run in parts, whose steps are parts; empty: the run has steps of its own.
    """
    progress = f"saved at step {step} of {total_steps}" if newest_checkpoint == step else f"at step {step}"
    if all_parts:
        progress = f"{step} of {all_parts} finished"
    lag = "" if newest_checkpoint in (None, step) else f", the newest checkpoint is of step {newest_checkpoint}"
    return f"asked to leave ({stop_reason or 'another rank'}): {progress}{lag}"
