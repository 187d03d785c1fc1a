"""Charts of the results of runs that consist of several: probes, trials, folds. Rank 0 draws; a failure is a warning."""

from collections.abc import Mapping, Sequence

from finetune.evaluation_details import warn_of_failure
from foveal.training.run import Run


def save_probe_chart(run: Run, top1: Mapping[tuple[str, int], float], num_images: int) -> None:
    """Draw the top-1 accuracy of every probe by (kind, layer) on data.val; layer 0: there is one feature only."""
    layers = sorted({layer for _, layer in top1})
    series = {
        kind: {str(layer): [top1[kind, layer]] for layer in layers if (kind, layer) in top1}
        for kind in dict.fromkeys(kind for kind, _ in top1)
    }
    _save(
        run, "probes", series, [str(layer) for layer in layers], x="block", y="top-1", subject=f"{num_images:,} images"
    )


def save_trial_chart(run: Run, values: Mapping[tuple[str, float], Sequence[float]], y: str) -> None:
    """Draw a number of every seed by (arm, learning rate)."""
    rates = list(dict.fromkeys(rate for _, rate in values))
    series = {
        arm: {f"{rate:g}": values[arm, rate] for rate in rates if (arm, rate) in values}
        for arm in dict.fromkeys(arm for arm, _ in values)
    }
    runs = sum(map(len, values.values()))
    _save(run, "trials", series, [f"{rate:g}" for rate in rates], x="lr_per_256", y=y, subject=f"{runs} runs")


def save_fold_chart(run: Run, values: Mapping[int, Sequence[float]], y: str) -> None:
    """Draw a number of every fold, of every repeat by its seed."""
    folds = [str(number) for number in range(max(map(len, values.values())))]
    series = {
        f"seed {seed}": {fold: [value] for fold, value in zip(folds, of_seed, strict=False)}
        for seed, of_seed in values.items()
    }
    runs = sum(map(len, values.values()))
    _save(run, "folds", series, folds, x="fold", y=y, subject=f"{runs} runs", connected=False)


def _save(
    run: Run,
    name: str,
    series: Mapping[str, Mapping[str, Sequence[float]]],
    positions: Sequence[str],
    *,
    x: str,
    y: str,
    subject: str,
    connected: bool = True,
) -> None:
    if run.world.rank != 0 or not series:
        return
    with warn_of_failure(f"the picture '{name}'"):
        from foveal.inspect.series import draw_series  # matplotlib's import takes a while

        title = f"Results of {name}"
        picture = draw_series(series, positions, title=title, x=x, y=y, subject=subject, connected=connected)
        run.save_picture(name, run.plan.total_steps, lambda: picture)
