"""The record of a run's final evaluation: evaluation.json, and pictures that are drawn from it.

Rank 0 writes and draws. What fails there is one warning: no picture is worth a run. matplotlib is imported when a
picture is due: its import takes a while, and without it a run only lacks its pictures.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from finetune.evaluation_details import EvaluationDetails, Facts, replace_nonfinite, warn_of_failure
from finetune.task import FinetunePlan
from foveal.atomic import read_json, write_json
from foveal.data.sample_images import read_images_by_id
from foveal.data.sampling.sources import SampleSource
from foveal.data.sampling.subset import SplitSubset, eval_split
from foveal.inspect.picture import Picture
from foveal.timeouts import read_with_timeout
from foveal.training.run import Run

FILE_NAME = "evaluation.json"
_SOURCE_SECONDS = 60.0  # for a fork's source, which may lie on other storage


def save_evaluation(run: Run, details: EvaluationDetails | None, step: int, metrics: Mapping[str, float]) -> None:
    """Write evaluation.json of the run's last evaluation and draw its pictures. Every rank calls it."""
    if details is None:
        return
    with run.throughput_meter.exclude_time():
        describe = details.collect(run, step)
        if run.world.rank == 0:
            with warn_of_failure("evaluation.json of the final evaluation"):
                _publish(run, _complete_facts(run, describe(), step, metrics))


def keep_evaluation(
    run: Run, details: EvaluationDetails | None, step: int, metrics: Mapping[str, float], folder: Path
) -> None:
    """Keep the facts of the best evaluation so far in ``folder``, beside its weights. Every rank calls it.

    A later attempt shows them at the end, although it did not evaluate that step itself.
    """
    if details is None:
        return
    describe = details.collect(run, step)
    if run.world.rank == 0:
        with warn_of_failure(f"evaluation.json of step {step}"):
            write_json(folder / FILE_NAME, _complete_facts(run, describe(), step, metrics))


def publish_kept_evaluation(run: Run, export_folder: Path, step: int) -> None:
    """Move evaluation.json, which came with the best weights, out of the export, and draw its pictures."""
    if run.world.rank == 0:
        with run.throughput_meter.exclude_time(), warn_of_failure("evaluation.json of the best evaluation"):
            facts = _take_kept_facts(run, export_folder / FILE_NAME, step)
            if facts is not None:
                _publish(run, facts)


def _take_kept_facts(run: Run, kept: Path, step: int) -> Facts | None:
    """Return the facts of the best evaluation, and remove their file; None if it was one of an older version.

    The best of a fork may be the source's, whose export has its facts no more.
    """
    if kept.exists():
        facts = read_json(kept)
        kept.unlink()
        return facts
    fork = run.plan.fork
    if fork is None or step > fork.start_step:  # an evaluation of its own
        return None
    source = Path(fork.run) / FILE_NAME
    facts = read_with_timeout(source, _SOURCE_SECONDS, lambda: read_json(source) if source.exists() else {})
    return facts if facts.get("step") == step else None


def _complete_facts(run: Run, facts: Facts, step: int, metrics: Mapping[str, float]) -> Facts:
    """Return a task's facts with those of every evaluation, as JSON: the keys come in the order of the file."""
    plan = _plan_of(run)
    head: Facts = {"step": step, "split": eval_split(plan.cfg.data).split, "num_images": facts["num_images"]}
    head |= {"classes": list(plan.classes), "metrics": dict(metrics), "confusion": None}
    return replace_nonfinite(head | facts)


def _publish(run: Run, facts: Facts) -> None:
    _add_sample_keys(_plan_of(run), facts)
    file = run.path / FILE_NAME
    write_json(file, facts)
    run.tracker.log_file(file)
    if run.is_part:
        return  # a comparison of many runs shows their results side by side
    drawings: dict[str, Callable[[Facts], Picture | None]] = {
        "confusion": _draw_confusion,
        "per-class": _draw_class_results,
        "calibration": _draw_calibration,
        "mistakes": partial(_draw_mistakes, plan=_plan_of(run)),
    }
    with run.progress.activity("drawing the evaluation"):
        for name, draw in drawings.items():
            with warn_of_failure(f"the picture '{name}'"):
                picture = draw(facts)
                if picture is not None:
                    run.save_picture(name, facts["step"], lambda picture=picture: picture)


def _add_sample_keys(plan: FinetunePlan, facts: Facts) -> None:
    """Give every mistake the key of its sample, by which people find it."""
    with warn_of_failure("the keys of the worst mistakes"):
        counts = plan.dataset.samples_per_shard(facts["split"])
        source = SampleSource(plan.dataset, facts["split"], SplitSubset(counts, None))
        for row in facts.get("mistakes") or ():
            location = source.locate_sample(row["id"])
            row["key"] = location.shard_index.key(location.index_row)


# --- pictures ---


def _draw_confusion(facts: Facts) -> Picture | None:
    from foveal.inspect.confusion import draw_confusion

    part = facts.get("confusion_excerpt")
    if part is None and facts["confusion"] is not None:
        counts = facts["confusion"]
        part = {"classes": facts["classes"], "counts": counts, "support": [sum(row) for row in counts]}
    if part is None or not part["classes"]:
        return None
    return draw_confusion(
        part["counts"],
        part["classes"],
        facts["most_confused"],
        support=part["support"],
        num_classes=len(facts["classes"]),
        unit=facts["unit"],
        subject=_subject(facts),
    )


def _draw_class_results(facts: Facts) -> Picture | None:
    from foveal.inspect.class_results import draw_class_results

    return draw_class_results(facts["per_class"], unit=facts["unit"], subject=_subject(facts))


def _draw_calibration(facts: Facts) -> Picture | None:
    from foveal.inspect.calibration import draw_calibration

    calibration = facts.get("calibration")
    if calibration is None:
        return None
    return draw_calibration(calibration["bins"], calibration["expected_error"], subject=_subject(facts))


def _draw_mistakes(facts: Facts, plan: FinetunePlan) -> Picture | None:
    """Draw the images of the worst mistakes, which are read again, with their captions."""
    from foveal.inspect.mistakes import draw_captioned_images

    rows = {row["id"]: row for row in facts.get("mistakes") or () if row.get("caption")}
    if not rows:
        return None
    label_field = None if plan.label_reader is None else plan.label_reader.field
    batch = read_images_by_id(plan.dataset, plan.cfg.data, facts["split"], list(rows), label_field)
    shown = [rows[sample_id] for sample_id in batch.ids.tolist()]
    if not shown:
        return None
    sheet = draw_captioned_images(batch.images, [row["caption"] for row in shown])
    described = "; ".join(", ".join(row["caption"]) for row in shown[:3])
    return Picture(
        sheet,
        "Worst mistakes",
        f"The {len(shown)} images of highest loss that are predicted wrongly, of {_subject(facts)}. First: "
        f"{described}.",
    )


def _subject(facts: Facts) -> str:
    return f"{facts['num_images']:,} images of {facts['split']} after step {facts['step']:,}"


def _plan_of(run: Run) -> FinetunePlan:
    assert isinstance(run.plan, FinetunePlan)
    return run.plan
