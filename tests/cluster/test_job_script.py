"""What the job scripts make of the end of their ranks, on a real Slurm; a few lines stand in for a stage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Cluster

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = {"nodes": "2", "ntasks-per-node": "2", "cpus-per-task": "1", "gpus-per-node": "0", "job-name": "stand-in"}
# It is found before the stage that it stands in for, because it lies in the folder where sbatch is called.
STAND_IN = """
import json, os, signal, sys, time
if "--check" in sys.argv:
    sys.exit(0)
rank, starts = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
heard = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: heard.append(signal.Signals(number).name))
print("start", starts, "rank", rank, "on", os.environ["SLURMD_NODENAME"], flush=True)
def slurm():
    from foveal.distributed import preemption
    return preemption
def until_asked(seconds=60):
    end = time.monotonic() + seconds
    while not heard and time.monotonic() < end:
        time.sleep(0.02)
"""


@dataclass(frozen=True)
class Ended:
    """A job that is over: what Slurm says of it, what it wrote, and where its starts were."""

    facts: dict[str, str]
    output: str

    @property
    def nodes(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for start, node in re.findall(r"start (\d+) rank \d+ on (\S+)", self.output):
            found.setdefault(int(start), set()).add(node)
        return found

    @property
    def ours(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("foveal: ")]


@dataclass(frozen=True)
class Checkout:
    """A folder that sbatch can be called in, with a stage that does what it is given, on nodes that nobody examines."""

    cluster: Cluster
    folder: Path

    def submit(self, ranks: str, env: Mapping[str, str] | None = None, **options: str) -> str:
        """Submit a job whose ranks run these lines."""
        (self.folder / "pretrain/run.py").write_text(STAND_IN + ranks)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in (RESOURCES | options).items()]
        env = {"FOVEAL_PREFLIGHT": "0", **(env or {})}
        return self.cluster.submit("slurm/pretrain_mae.sh", options=given, cwd=self.folder, env=env)

    def ended(self, job: str) -> Ended:
        return Ended(self.cluster.wait(job, timeout=240), self.cluster.output(job))


@pytest.fixture
def checkout(cluster: Cluster, tmp_path: Path) -> Checkout:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/__init__.py").touch()
    return Checkout(cluster, tmp_path)


@pytest.mark.parametrize("code", [2, 3, 4, 7])
def test_what_another_start_would_not_mend_ends_the_job_with_its_code(code: int, checkout: Checkout) -> None:
    """One rank fails; the others are killed with other codes, of which srun returns the highest."""
    ended = checkout.ended(checkout.submit(f"sys.exit({code}) if rank == 1 else time.sleep(60)\n"))
    assert (ended.facts["JobState"], ended.facts["ExitCode"]) == ("FAILED", f"{code}:0"), ended.output
    assert ended.facts["Restarts"] == "0"
    assert len(ended.ours) == 1
    assert ended.ours[0].startswith(f"foveal: exit code {code}, not requeued: ")


def test_a_killed_rank_requeues_the_job_and_its_dependants_wait(checkout: Checkout) -> None:
    job = checkout.submit("if rank == 2 and not starts: os.kill(os.getpid(), 9)\nif not starts: time.sleep(60)\n")
    after = {"dependency": f"afterok:{job}", "kill-on-invalid-dep": "yes"}
    options = [f"--{name}={value}" for name, value in ({"output": "/dev/null"} | after).items()]
    waiting = checkout.cluster.submit("--wrap=true", options=options)
    ended = checkout.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "1"), ended.output
    assert re.fullmatch(r"foveal: exit code \d+, requeued; first to fail: \S+: task 2: Killed", ended.ours[0])
    last = checkout.cluster.wait(waiting, timeout=60)
    assert last["JobState"] == "COMPLETED"
    assert last["StartTime"] >= ended.facts["EndTime"]


def test_the_suspect_node_is_excluded_on_request_as_long_as_others_are_left(checkout: Checkout) -> None:
    ranks = "if starts < 2: sys.exit(5)\n"
    ended = checkout.ended(checkout.submit(ranks, env={"FOVEAL_EXCLUDE_BAD_NODE": "1"}, nodes="1"))
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "2"), ended.output
    first, second = ended.nodes[0], ended.nodes[1]
    assert first != second
    assert ended.nodes[2] == second
    assert {ended.facts["ExcNodeList"]} == first
    assert "would be left" in ended.ours[-1]


def test_the_run_may_name_the_suspect_itself(checkout: Checkout) -> None:
    other = "other = '{}' if os.environ['SLURMD_NODENAME'] == '{}' else '{}'\n"
    first, second = checkout.cluster.nodes
    ranks = other.format(second, first, first) + (
        "if not starts: sys.stderr.write(f'foveal: suspect node {other}: it is slow\\n'); sys.exit(5)\n"
    )
    ended = checkout.ended(checkout.submit(ranks, env={"FOVEAL_EXCLUDE_BAD_NODE": "1"}, nodes="1"))
    assert ended.nodes[0] == ended.nodes[1]
    assert {ended.facts["ExcNodeList"]} == set(checkout.cluster.nodes) - ended.nodes[0]


def test_without_a_request_no_node_is_excluded_and_there_is_a_last_start(checkout: Checkout) -> None:
    ended = checkout.ended(checkout.submit("sys.exit(1)\n", env={"FOVEAL_MAX_RESTARTS": "1"}))
    assert (ended.facts["JobState"], ended.facts["ExitCode"]) == ("FAILED", "1:0")
    assert (ended.facts["Restarts"], ended.facts["ExcNodeList"]) == ("1", "(null)")
    assert "max_restarts" in ended.ours[-1]


@pytest.mark.parametrize("code", [0, 1])
def test_a_cancelled_job_is_not_requeued(code: int, checkout: Checkout) -> None:
    job = checkout.submit(f"until_asked(); sys.exit({code})\n")
    checkout.cluster.until(lambda: checkout.cluster.output(job).count("start 0") == 4, "all ranks are there", 60)
    checkout.cluster.run("scancel", job)
    ended = checkout.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("CANCELLED", "0"), ended.output
    assert all("not requeued: the job was cancelled" in line for line in ended.ours)


def test_a_preempted_job_knows_its_grace_and_asks_for_another_start_itself(checkout: Checkout) -> None:
    """Ranks that leave with 0 in their grace would count as completed."""
    ranks = """
if starts: sys.exit(0)
if rank == 0: print("notice", slurm().notice(), flush=True)
until_asked()
if rank == 0: print("left", slurm().seconds_left(), heard, flush=True); print("refused", slurm().requeue(), flush=True)
"""
    job = checkout.submit(ranks, partition="low")
    checkout.cluster.until(lambda: "notice" in checkout.cluster.output(job), "the ranks are there", 60)
    everything = ["--nodes=2", "--exclusive", "--output=/dev/null"]
    other = checkout.cluster.submit("--wrap=true", options=everything)
    ended = checkout.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "1"), ended.output
    assert checkout.cluster.wait(other)["JobState"] == "COMPLETED"
    assert "notice Notice(seconds=20.0, source='GraceTime of partition low')" in ended.output
    left = re.search(r"left (\S+) \['SIGTERM'\]", ended.output)
    assert left
    assert 10 < float(left[1]) <= 20
    assert "refused None" in ended.output


def test_a_job_that_meets_its_time_limit_hears_of_it_and_goes_on_afterwards(checkout: Checkout) -> None:
    """USR1 without ``B:`` reaches every rank; ranks that did not save in time are started again all the same."""
    ranks = """
if starts: sys.exit(0)
if rank == 0: print("notice", slurm().notice(), flush=True)
until_asked(100)
print("heard", heard[0], flush=True)
if rank == 0: print("left", slurm().seconds_left(), flush=True)
heard.clear(); until_asked(100)
sys.exit(1)
"""
    job = checkout.submit(ranks, time="1", signal="USR1@30")
    ended = checkout.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "1"), ended.output
    assert ended.output.count("heard SIGUSR1") == 4
    assert "notice Notice(seconds=180.0, source='--signal in " in ended.output  # of the script: 30 is Slurm's secret
    left = re.search(r"left (\S+)", ended.output)
    assert left
    assert 0 < float(left[1]) <= 60
