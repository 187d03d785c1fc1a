"""`foveal status` beside a real Slurm: it shows what the controller and the accounting say of a run's job."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster
from processes import ROOT
from run_directories import leave_without_word, make_run

from foveal.runs.pipeline import PlannedStage, write_pipeline

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(300)]


def test_jobs_of_runs_and_of_stages_that_wait(cluster: Cluster, tmp_path: Path) -> None:
    def look() -> dict[str, Any]:
        words = [sys.executable, "-m", "foveal.cli", "status", str(tmp_path), "--json"]
        return json.loads(cluster.run(*words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}).stdout)

    job = cluster.submit("--wrap=sleep 600", options=["--nodes=2", "--output=/dev/null", "--time=30"])
    held = cluster.submit("--wrap=true", options=["--output=/dev/null", f"--dependency=afterok:{job}"])
    run = make_run(tmp_path / "one")
    leave_without_word(run, host=cluster.nodes[0], job=job, cluster="foveal")
    write_pipeline(
        tmp_path, [PlannedStage("one", "pretrain", run, job), PlannedStage("two", "distill", tmp_path / "2", held)]
    )
    cluster.until(lambda: cluster.job(job)["JobState"] == "RUNNING", "the job runs")
    seen = look()
    (one,), (two,) = seen["runs"], seen["not_begun"]
    assert (one["state"], one["job"]["id"], one["job"]["state"]) == ("running", job, "RUNNING")
    assert one["job"]["nodes"]
    assert 1700 < one["job"]["seconds_left"] <= 1800
    assert (two["job"]["state"], two["job"]["reason"]) == ("PENDING", "Dependency")
    cluster.run("scancel", job, held)
    cluster.wait(job)
    one = look()["runs"][0]
    assert (one["state"], one["reason"]) == ("killed", f"its job {job} is CANCELLED")
