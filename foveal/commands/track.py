"""`foveal track`: what a run's tracking server has not heard yet."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.atomic import write_json
from foveal.config import read_yaml
from foveal.errors import CheckpointError, ConfigError, Diverged, FovealError, Superseded
from foveal.tracking import courier_of
from foveal.tracking.sqlite_store import file_of
from foveal.tracking.tail import Tail, read_json
from foveal.tracking.tracker import State, TrackingConfig
from foveal.training.lease import attempts_of

app = typer.Typer(help="Tracking: sync.", no_args_is_help=True)


@app.callback()
def _track() -> None:
    """Keeps `sync` a word of its own while it is the only one."""


@app.command("sync")
def sync(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow than the run's own tracking.uri.")] = None,
) -> None:
    """Deliver to MLflow what it does not have of a run: every number once, settings, tags and files.

    A run that is being written may be synced too: rows carry their times, so that a store keeps what both deliver once.
    """
    tree, cfg = _settings(run, uri)
    _say_how_it_ended(run)
    if not (run / "metrics.jsonl").exists():
        raise CheckpointError(f"{run} has no metrics.jsonl: the run has not begun")
    tail = Tail(os.open(run / "metrics.jsonl", os.O_RDONLY), run / "metrics.jsonl")
    courier = courier_of(run, cfg, _pipeline(run, tree), tail)
    if not courier.finish():
        raise FovealError(
            f"{run} was not delivered: MLflow at {cfg.uri} does not take it (see above); try again when it does, "
            f"or name another with --uri"
        )
    count = courier.delivery.count
    typer.echo(f"{run}: {count.sent:,} rows and {count.files:,} files delivered, {count.there:,} rows were there")


def _settings(run: Path, uri: str | None) -> tuple[dict[str, Any], TrackingConfig]:
    file = run / "config.yaml"
    if not file.exists():
        raise CheckpointError(f"{run} is no run directory (it has no config.yaml)")
    tree = read_yaml(file)
    tracking = tree.get("tracking", {}) | ({} if uri is None else {"uri": uri})
    cfg = TrackingConfig.checked(tracking, "--uri" if uri else str(file))
    if cfg.uri is None:
        raise ConfigError(f"{file}: tracking.uri is null, so the run has no MLflow; name one with --uri")
    store = file_of(cfg.uri)
    if uri is None and store is not None and not store.is_absolute() and not store.exists():
        raise ConfigError(
            f"{file}: there is no {store} here; give the command where the run was started, or name the store with --uri"
        )
    return tree, cfg


def _pipeline(run: Path, tree: dict[str, Any]) -> str | None:
    """The pipeline's folder from here: both paths in the settings begin where the run was started."""
    place = tree.get("run", {})
    return str(run / os.path.relpath(place["pipeline"], place["dir"])) if place.get("pipeline") else None


def _say_how_it_ended(run: Path) -> None:
    """An attempt that could not close its tracker has told its directory only."""
    file, told = run / "tags.json", attempts_of(run)
    tags = read_json(file)
    if tags.get("state") != "running" or not told or told[-1].why is None:
        return
    states: dict[int | None, State] = {
        0: "saved-and-left",
        Diverged.exit_code: "diverged",
        Superseded.exit_code: "superseded",
    }
    state = "finished" if (run / "finished.json").exists() else states.get(told[-1].code, "failed")
    write_json(file, tags | {"state": state, "why_stopped": told[-1].why})
