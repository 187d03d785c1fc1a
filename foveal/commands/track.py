"""`foveal track`: upload what a run's MLflow has not received."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.atomic import write_json
from foveal.errors import CheckpointError, ConfigError, FovealError
from foveal.renames import translate_settings
from foveal.runs.record import state_after_end
from foveal.strict_yaml import read_yaml
from foveal.tracking import build_uploader, keep_store_of_run
from foveal.tracking.nested import list_nested
from foveal.tracking.sqlite_store import parse_sqlite_path
from foveal.tracking.tail import MetricsTail, read_json_or_empty
from foveal.tracking.tracker import TrackingConfig
from foveal.training.lease import list_attempts

_log = logging.getLogger(__name__)

app = typer.Typer(help="Tracking: sync.", no_args_is_help=True)


@app.callback()
def _track() -> None:
    """Keep `sync` a subcommand although it is the only one."""


@app.command("sync")
def sync(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow than the run's own tracking.uri.")] = None,
) -> None:
    """Upload to MLflow what it does not have of a run and of the trials or folds in it: every metric once, settings, tags and files.

    A run that is under way can be synced too: rows carry timestamps, so a store keeps values sent by both once.
    """
    tree, cfg = _read_tracking_config(run, uri)
    nested = list_nested(run)
    _record_attempt_end(run)
    for folder in nested:
        try:
            _record_attempt_end(folder)
        except CheckpointError as error:
            _log.warning("%s: its end is not recorded: %s", folder, error)
    if not (run / "metrics.jsonl").exists():
        raise CheckpointError(f"{run} has no metrics.jsonl: the run has not begun")
    tail = MetricsTail(os.open(run / "metrics.jsonl", os.O_RDONLY), run / "metrics.jsonl")
    uploader = build_uploader(run, cfg, _resolve_pipeline_dir(run, tree), tail, compares_nested=True)
    if not uploader.upload_all_and_close():
        raise FovealError(
            f"{run} was not delivered: MLflow at {cfg.uri} does not take it (see above); try again when it does, "
            f"or name another with --uri"
        )
    counts = uploader.sync.counts
    inner = f" (with {len(nested)} runs in it)" if nested else ""
    typer.echo(
        f"{run}{inner}: {counts.rows_sent:,} rows and {counts.files_sent:,} files delivered, {counts.rows_already_stored:,} rows were there"
    )
    if given_up := sorted(map(str, uploader.sync.given_up)):
        raise FovealError(f"{len(given_up)} runs in {run} were not delivered (see above): {', '.join(given_up)}")


def _read_tracking_config(run: Path, uri: str | None) -> tuple[dict[str, Any], TrackingConfig]:
    file = run / "config.yaml"
    if not file.exists():
        raise CheckpointError(f"{run} is no run directory (it has no config.yaml)")
    tree = translate_settings(read_yaml(file))[0]
    tracking = tree.get("tracking", {}) | ({} if uri is None else {"uri": uri})
    cfg = TrackingConfig.from_dict(tracking, "--uri" if uri else str(file))
    if cfg.uri is None:
        outer = run.absolute().parent.parent
        if run.absolute() in list_nested(outer) and (outer / "config.yaml").exists():
            raise ConfigError(f"{run} is a part of {outer}, with which it is delivered: foveal track sync {outer}")
        raise ConfigError(f"{file}: tracking.uri is null, so the run has no MLflow; name one with --uri")
    cfg = keep_store_of_run(run, cfg) if uri is None else cfg
    store = parse_sqlite_path(cfg.uri or "")
    if uri is None and store is not None and not store.is_absolute() and not store.exists():
        raise ConfigError(
            f"{file}: there is no {store} here; give the command where the run was started, or name the store with --uri"
        )
    return tree, cfg


def _resolve_pipeline_dir(run: Path, tree: dict[str, Any]) -> str | None:
    """Return the pipeline's folder relative to the run: both settings are relative to where the run was started."""
    section = tree.get("run", {})
    return str(run / os.path.relpath(section["pipeline"], section["dir"])) if section.get("pipeline") else None


def _record_attempt_end(run: Path) -> None:
    """Correct the tags of an attempt that could not close its tracker: its end is in attempts/ only."""
    file, records = run / "tags.json", list_attempts(run)
    tags = read_json_or_empty(file)
    if tags.get("state") != "running" or not records or records[-1].reason is None:
        return
    code = records[-1].exit_code
    state = "finished" if (run / "finished.json").exists() else state_after_end(1 if code is None else code)
    write_json(file, tags | {"state": state, "why_stopped": records[-1].reason})
