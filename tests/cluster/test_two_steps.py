"""Two runs in one allocation, as steps beside each other: each has its own ranks, however late they come."""

from pathlib import Path

import pytest
from harness import Cluster
from processes import ROOT, column, rows_of
from ranks import Ranks, stage_named

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(600)]

# Rank 1 of the first step and rank 0 of the second come late, as from a cold disk.
SCRIPT = """\
for seed in 1 2; do
    export late=$((2 - seed)) seed
    srun --ntasks=2 --exact --cpus-per-task=1 sh -c 'test $SLURM_PROCID != $late || sleep 4
        exec python -m pretrain.run "$0" seed=$seed run.dir=run-$seed "$@"' "$@" &
done
wait
"""


def test_two_steps_of_a_job_train_apart(
    cluster: Cluster, configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{SCRIPT}")
    settings = ("tracking.uri=null", "run.stop_at_step=6")
    options = ["--nodes=1", "--ntasks=4", "--cpus-per-task=1", "--output=job.log"]
    stale = {"MASTER_ADDR": "node.of.yesterday.invalid", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = cluster.submit("job.sh", str(configs["pretrain"]), *settings, options=options, cwd=tmp_path, env=stale)
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()
    said = (tmp_path / "job.log").read_text()
    assert said.count("MASTER_ADDR=node.of.yesterday.invalid is no address of") == 2, said
    for seed in (1, 2):
        alone = one_rank.train(
            stage_named("pretrain"), configs["pretrain"], tmp_path / f"alone-{seed}", f"seed={seed}", *settings[1:]
        )
        rows = rows_of(tmp_path / f"run-{seed}")
        assert column(rows, "step") == [1, 2, 3, 4, 5, 6]
        assert column(rows, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
