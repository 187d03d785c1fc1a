"""The harness itself: what it brings up is a cluster."""

from harness import Cluster


def test_two_nodes_are_idle(cluster: Cluster) -> None:
    nodes = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.split("\n")
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
    if cluster.namespaces:
        assert [task[3] for task in tasks] == [first, first, second, second]


def test_accounting_tells_how_a_job_and_its_step_ended(cluster: Cluster) -> None:
    job = cluster.submit("--wrap=srun sh -c 'exit 3'", options=["--nodes=2", "--output=/dev/null"])
    assert cluster.wait(job, timeout=30)["ExitCode"] == "3:0"
    sacct = f"sacct --jobs={job} --noheader --parsable2 --format=JobID,State,ExitCode"
    ended = f"grep -x '{job}|FAILED|3:0' && {sacct} | grep -x '{job}.0|FAILED|3:0'"
    cluster.run("sh", "-c", f"until {sacct} | {ended}; do sleep 0.2; done", timeout=20)  # it lags by a second
