"""Forecasts that tests share."""

from pathlib import Path
from typing import Any

from ranks import stage_named

from foveal.forecast.forecast import ClusterSpec, Forecast


def forecast(name: str, file: Path, *overrides: str, ranks: int = 1, **cluster: Any) -> Forecast:
    """A config's forecast on so many ranks of one node; ``cluster`` are fields of ClusterSpec."""
    stage = stage_named(name)
    cfg = stage.config_class.load(file, ["run.dir=runs/none", *overrides])
    fields: dict[str, Any] = {"mfu": 0.4, "write_bytes_per_second": 1e9} | cluster
    return Forecast(stage, stage.functions.build_plan(cfg, ranks), ClusterSpec(1, ranks, **fields))
