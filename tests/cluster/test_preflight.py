"""Job scripts that look at their nodes first: a bad one is named, and on request the job goes on without it."""

import json
import re
import sys
from pathlib import Path

import pytest
from harness import Cluster

from foveal.data.pack import pack_digits

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ONE_RANK = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
SHORT = ("epochs=1", "batch.global_size=128", "tracking.uri=null", "log.images_every=0", "checkpoint.every=0")
# The node of the first start has hardly any shared memory, as in a container that was started with Docker's defaults.
LAUNCHER = """\
#!/bin/sh
[ -e bad ] || echo "$SLURMD_NODENAME" > bad
[ "$(cat bad)" = "$SLURMD_NODENAME" ] || exec "$@"
exec unshare --mount sh -c 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"' sh "$@"
"""


@pytest.fixture
def checkout(cluster: Cluster, tmp_path: Path) -> Path:
    """A folder that sbatch can be called in, with one node that should not train."""
    if not cluster.named:
        pytest.skip("no mount namespaces here: a node cannot have a /dev/shm of its own")
    (tmp_path / "slurm").mkdir()
    for file in (ROOT / "slurm").glob("*.sh"):
        (tmp_path / "slurm" / file.name).symlink_to(file)
    (tmp_path / "slurm/environment.sh").unlink()
    ours = (ROOT / "slurm/environment.sh").read_text()
    (tmp_path / "slurm/environment.sh").write_text(f"{ours}\nranks=(./launcher python)\n")
    (tmp_path / "launcher").write_text(LAUNCHER)
    (tmp_path / "launcher").chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pack_digits(tmp_path / "data/digits")
    return tmp_path


def ended(cluster: Cluster, checkout: Path, *options: str, **environment: str) -> tuple[dict[str, str], str]:
    line = ("slurm/pretrain_mae.sh", "digits", *SHORT)
    own = {"OMP_NUM_THREADS": "1", "FOVEAL_PAUSES": "0", **environment}
    job = cluster.submit(*line, options=[*ONE_RANK, *options], cwd=checkout, env=own)
    facts = cluster.wait(job, timeout=240)
    return facts, cluster.output(job)


def test_a_bad_node_is_named_and_the_job_goes_on_without_it(cluster: Cluster, checkout: Path) -> None:
    facts, said = ended(cluster, checkout, FOVEAL_EXCLUDE_BAD_NODE="1")
    bad = (checkout / "bad").read_text().strip()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
    assert re.search(rf"^foveal: suspect node {bad}: .*/dev/shm has 8 MB free", said, re.MULTILINE)
    assert f"\nbad nodes: {bad}\n" in said
    assert "foveal: exit code 6, requeued" in said
    assert facts["ExcNodeList"] == bad
    assert {facts["NodeList"]} == set(cluster.nodes) - {bad}
    run = checkout / "runs/digits"
    assert json.loads((run / "finished.json").read_text())["summary"]["step"] == 11
    assert [file.name for file in sorted((run / "attempts").glob("????.json"))] == ["0001.json"], (
        "nothing trained there"
    )


def test_gpus_that_torch_does_not_see_end_the_job_before_it_trains(cluster: Cluster, checkout: Path) -> None:
    """And a job of ``sbatch --export=NONE`` has what environment.sh gives it, on every rank."""
    with (checkout / "slurm/environment.sh").open("a") as ours:
        ours.write(f"PATH={Path(sys.executable).parent}:$PATH\nranks=(python)\n")
    facts, said = ended(cluster, checkout, "--export=NONE", "--gpus-per-node=4")
    node = facts["NodeList"]
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "6:0", "0"), said
    assert re.search(rf"^foveal: suspect node {node}: .*Slurm gave .*4 GPUs, torch sees", said, re.MULTILINE)
    assert f"\nbad nodes: {node}\n" in said
    assert "not requeued: a bad node is named above; with FOVEAL_EXCLUDE_BAD_NODE=1" in said.splitlines()[-1]
    assert not (checkout / "runs").exists()
