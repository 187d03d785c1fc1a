"""The description of a run that a tracking store shows above everything else, in Markdown, from the run's files."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foveal.redact import redact
from foveal.renames import translate_metrics
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs
from foveal.runs.results import is_result
from foveal.tracking.tail import read_json_or_empty, read_step_rows

_VERBS = {"pretrain": "Pretraining", "distill": "Distillation", "finetune": "Fine-tuning"}
# Of a comparison: what the results were reached with, and their spread.
_SECONDARY = ("lr_per_256", "_lowest", "_highest")
_MAX_RESULTS, _AND = 6, ", "
_MAX_TEXT = 7000  # characters; MLflow takes 8,000 in a tag
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def escape(text: object) -> str:
    """Return a text of a user as plain text in Markdown, in one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def read_results(run_dir: Path) -> dict[str, float]:
    """Return the results of a finished run; else those of the newest evaluation; else none. By logged name."""
    summary: Mapping[str, Any] = translate_metrics(read_json_or_empty(run_dir / "finished.json").get("summary", {}))
    if not summary:
        for row in read_step_rows(run_dir / "metrics.jsonl"):
            summary = row if "loss" not in row else summary
    return {name: float(value) for name, value in summary.items() if is_result(name, value)}


def main_results(results: Mapping[str, float]) -> dict[str, float]:
    """Return the results that say how good a model is: those of evaluations, if there are any; no spread, no rates."""
    main = {name: value for name, value in results.items() if not name.endswith(_SECONDARY)}
    evaluated = {name: value for name, value in main.items() if name.startswith(("val_", "holdout_", "fold_"))}
    return evaluated or main


def describe_run(
    run_dir: Path,
    stage: str,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    inputs: RunInputs | None,
    results: Mapping[str, float],
) -> str:
    """Return a short description: what is trained on what, how it went, where it lies."""
    lines = [
        _describe_work(stage, settings, inputs),
        "",
        *_describe_state(tags),
        *_describe_results(main_results(results)),
        *_describe_schedule(settings),
        *(_describe_dataset(dataset) for dataset in (inputs.datasets if inputs else ())),
        *(_describe_model(model) for model in (inputs.models if inputs else ())),
        f"- directory: `{_code(run_dir)}`",
    ]
    text = redact("\n".join(lines))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


def _describe_work(stage: str, settings: Mapping[str, Any], inputs: RunInputs | None) -> str:
    """Return what is trained: a model of timm with its sizes, else the model that the run starts from."""
    model = settings.get("model.name") or settings.get("backbone.model") or settings.get("model")
    start = next((entry for entry in (inputs.models if inputs else ()) if entry.role == "init"), None)
    what = ""
    if start is not None:
        what = f" of {escape(Path(start.inputs.run if start.inputs else start.path).name)}"
    elif isinstance(model, str):
        size = [f"{settings[name]} {word}" for name, word in _SIZES.items() if settings.get(name) is not None]
        what = f" of {escape(model)}{f' ({_AND.join(size)})' if size else ''}"
    return f"**{_VERBS.get(stage, 'Training')}**{what}"


def _describe_schedule(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("epochs") is not None:
        rate = settings.get("optim.lr_per_256")
        yield (
            f"- {settings['epochs']} epochs, {settings.get('batch.global_size', '?')} images a step"
            f"{f', learning rate {rate} per 256 images' if rate is not None else ''}"
        )


_SIZES = {"model.width": "wide", "model.depth": "deep", "model.patch": "pixels a patch"}


def _describe_dataset(data: DatasetInput) -> str:
    verb = "trains on" if data.role == "training" else "is evaluated on"
    used = f"{data.num_used:,} of {data.num_images:,}" if data.num_used != data.num_images else f"{data.num_images:,}"
    classes = f", {data.num_classes:,} classes" if data.num_classes else ""
    return f"- {verb} {used} images of {escape(data.name)}, split {escape(data.split)}{classes}"


def _describe_model(model: ModelInput) -> str:
    step = f" at step {model.step:,}" if model.step else ""
    return f"- {escape(model.role)}: `{_code(model.path)}` ({escape(model.stage)}{step})"


def _describe_state(tags: Mapping[str, str]) -> Iterator[str]:
    state, reason = tags.get("state", "running"), tags.get("why_stopped", "")
    if state == "saved-and-left":
        yield f"**Saved and left as asked** ({escape(reason)}); the next attempt goes on from its checkpoint."
        yield ""
    elif state not in ("running", "finished"):
        yield f"**{escape(state).capitalize()}**: {escape(reason)}"
        yield ""


def _describe_results(results: Mapping[str, float]) -> Iterator[str]:
    """The most important results, in a line: the page shows all of them below, and the first lines of the description."""
    if results:
        shown = [f"{escape(name)} **{value:.4g}**" for name, value in list(results.items())[:_MAX_RESULTS]]
        yield f"{', '.join(shown)}{f', and {len(results) - _MAX_RESULTS} more' if len(results) > _MAX_RESULTS else ''}"
        yield ""


def _code(text: object) -> str:
    """Return a text between backticks: it can hold neither a backtick nor a line break."""
    return str(text).replace("`", "'").replace("\n", " ").replace("\r", " ")
