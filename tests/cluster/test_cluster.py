"""The harness itself: what it brings up is a cluster."""

from collections.abc import Iterator

import pytest
from harness import Cluster


def test_two_nodes_are_idle(cluster: Cluster) -> None:
    nodes = cluster.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").stdout.split("\n")
    assert sorted(filter(None, nodes)) == [f"{node} idle" for node in cluster.nodes]


def test_four_tasks_run_on_two_nodes(cluster: Cluster) -> None:
    show = "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_NTASKS $(uname -n)"
    said = cluster.run("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "sh", "-c", show).stdout
    tasks = sorted(line.split() for line in said.splitlines())
    first, second = cluster.nodes
    assert [task[:3] for task in tasks] == [
        ["0", first, "4"],
        ["1", first, "4"],
        ["2", second, "4"],
        ["3", second, "4"],
    ]
    if cluster.named:
        assert [task[3] for task in tasks] == [first, first, second, second]


def test_accounting_tells_how_a_job_and_its_step_ended(cluster: Cluster) -> None:
    job = cluster.submit("--wrap=srun sh -c 'exit 3'", options=["--nodes=2", "--output=/dev/null"])
    assert cluster.wait(job, timeout=120)["ExitCode"] == "3:0"
    sacct = f"sacct --jobs={job} --noheader --parsable2 --format=JobID,State,ExitCode"
    ended = f"grep -x '{job}|FAILED|3:0' && {sacct} | grep -x '{job}.0|FAILED|3:0'"
    cluster.run("sh", "-c", f"until {sacct} | {ended}; do sleep 0.2; done", timeout=120)  # it lags by a second


@pytest.fixture
def lasting(cluster: Cluster) -> Iterator[str]:
    """A job on both nodes that lasts until it is cancelled; every node can be given jobs again afterwards."""
    job = cluster.submit("--wrap=srun sleep 600", options=["--nodes=2", "--output=/dev/null", "--requeue"])
    cluster.until(lambda: len(cluster.ranks(job)) == 2, "both ranks run")
    yield job
    cluster.run("scancel", job)
    for node in cluster.nodes:
        cluster.machines.start(node)
    cluster.until(lambda: not cluster.orphans(), "Slurm ends what it had given up")
    cluster.all_idle()


def is_down(cluster: Cluster, node: str) -> None:
    cluster.until(lambda: "down" in cluster.state(node), f"{node} is down", timeout=90)


@pytest.mark.thorough
def test_a_node_without_power_has_no_processes_and_the_job_is_requeued(cluster: Cluster, lasting: str) -> None:
    node = cluster.nodes[1]
    cluster.machines.crash(node)
    assert cluster.machines.on(node) == []
    is_down(cluster, node)
    cluster.until(lambda: cluster.job(lasting)["Restarts"] == "1", "the job is requeued")


@pytest.mark.thorough
def test_a_killed_slurmd_leaves_its_ranks_to_go_on(cluster: Cluster, lasting: str) -> None:
    node = cluster.nodes[1]
    cluster.machines.kill_slurmd(node)
    is_down(cluster, node)
    cluster.until(lambda: cluster.job(lasting)["Restarts"] == "1", "the job is requeued")
    assert [rank.node for rank in cluster.ranks(lasting)] == [node]
    assert {each.environment["SLURMD_NODENAME"] for each in cluster.orphans()} == {node}
