"""What the job scripts make of the end of their ranks, on a real Slurm; a few lines stand in for a stage."""

import re
import tempfile
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
class Checkouts:
    """Folders that sbatch can be called in, each with a stage that does what it is given, on nodes that nobody examines."""

    cluster: Cluster
    folder: Path

    def submit(self, ranks: str, env: Mapping[str, str] | None = None, environment: str = "", **options: str) -> str:
        """Submit a job whose ranks run these lines; ``environment``: what its slurm/environment.sh says besides ours."""
        here = Path(tempfile.mkdtemp(dir=self.folder))
        (here / "slurm").mkdir()
        for file in (ROOT / "slurm").glob("*.sh"):
            (here / "slurm" / file.name).write_text(file.read_text())
        with (here / "slurm/environment.sh").open("a") as ours:
            ours.write(environment)
        (here / "pretrain").mkdir()
        (here / "pretrain/__init__.py").touch()
        (here / "pretrain/run.py").write_text(STAND_IN + ranks)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in (RESOURCES | options).items()]
        env = {"FOVEAL_PREFLIGHT": "0", "FOVEAL_PAUSES": "0", **(env or {})}
        return self.cluster.submit("slurm/pretrain_mae.sh", options=given, cwd=here, env=env)

    def up(self, job: str, text: str = "start 0") -> None:
        self.cluster.until(lambda: text in self.cluster.output(job), f"job {job} says {text}", 90)

    def ended(self, job: str) -> Ended:
        return Ended(self.cluster.wait(job, timeout=240), self.cluster.output(job))


@pytest.fixture(scope="module")
def checkouts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkouts:
    return Checkouts(cluster, tmp_path_factory.mktemp("checkouts"))


LIMITED = """
if starts: sys.exit(0)
if rank == 0: print("notice", slurm().read_shutdown_notice(), flush=True)
until_asked(100)
print("heard", heard[0], flush=True)
if rank == 0: print("left", slurm().read_slurm_seconds_left(), flush=True)
heard.clear(); until_asked(100)
sys.exit(1)
"""
FAILING = """
def leave():
    until_asked()
    if rank == 0: print("asked", heard, slurm().requeue_slurm_job_if_due(got_warning_signal=False), flush=True)
if rank == 0 and starts: slurm()
if starts == 0:
    if rank == 2: os.kill(os.getpid(), 9)
    time.sleep(60)
elif starts == 1:
    if rank == 0: os.system("scancel --signal=TERM $SLURM_JOB_ID")
    leave()
else:
    if rank == 1: time.sleep(5); sys.exit(2)
    leave()
"""
SUSPECT = """
first, second = {nodes}
other = second if os.environ["SLURMD_NODENAME"] == first else first
if not starts: sys.stderr.write(f"foveal: suspect node {{other}}: it is slow\\n")
if starts < 2: sys.exit(5)
"""
MISSING = """
ranks=(sh -c '[ "$SLURMD_NODENAME" != {bad} ] || exec .venv/bin/python "$@"; exec python "$@"' sh)
"""


@pytest.fixture(scope="module", autouse=True)
def jobs(checkouts: Checkouts) -> dict[str, str]:
    """Jobs that run beside each other. Slurm sees to the end of a time limit, of a minute at least, only now and then."""
    nodes = checkouts.cluster.nodes
    return {
        "limited": checkouts.submit(LIMITED, nodes="1", time="1", signal="USR1@30"),
        "failing": checkouts.submit(FAILING),
        "suspect": checkouts.submit(SUSPECT.format(nodes=nodes), env={"FOVEAL_EXCLUDE_BAD_NODE": "1"}, nodes="1"),
        "missing": checkouts.submit("time.sleep(60)\n", environment=MISSING.format(bad=nodes[1])),
    }


def test_one_failed_start_after_another(checkouts: Checkouts, jobs: dict[str, str]) -> None:
    """A rank is killed: requeued. A user sends SIGTERM, for which Slurm has no reason: requeued. A rank makes a mistake,
    and srun sends the others the same SIGTERM: the job ends with the mistake's code, whatever the others believe.
    """
    job = jobs["failing"]
    waiting = {"dependency": f"afterany:{job}", "output": "/dev/null"}
    after = checkouts.cluster.submit("--wrap=true", options=[f"--{name}={value}" for name, value in waiting.items()])
    ended = checkouts.ended(job)
    assert (ended.facts["JobState"], ended.facts["ExitCode"], ended.facts["Restarts"]) == ("FAILED", "2:0", "2"), (
        ended.output
    )
    killed, left, *more, mistake = ended.ours
    assert re.fullmatch(r"foveal: exit code \d+, requeued; first to fail: \S+: task 2: Killed", killed)
    assert left.startswith("foveal: saved and left on SIGTERM")
    assert all(line == left for line in more)
    assert mistake.startswith("foveal: exit code 2, not requeued: another start would make the same mistake")
    assert ended.output.count("asked ['SIGTERM'] None") >= 1
    last = checkouts.cluster.wait(after, timeout=60)
    assert (last["JobState"], last["StartTime"] >= ended.facts["EndTime"]) == ("COMPLETED", True), "it waited"


def test_an_environment_that_is_missing_on_a_node_ends_the_job_with_its_name(
    checkouts: Checkouts, jobs: dict[str, str]
) -> None:
    bad, ended = checkouts.cluster.nodes[1], checkouts.ended(jobs["missing"])
    assert (ended.facts["JobState"], ended.facts["ExitCode"], ended.facts["Restarts"]) == ("FAILED", "127:0", "1"), (
        ended.output
    )
    first, last = ended.ours
    assert first.startswith(f"foveal: exit code 127, requeued; first to fail: {bad}: task")
    assert last.startswith(
        f"foveal: exit code 127, not requeued: 2 starts in a row failed before any attempt began, each first on {bad}: "
    )
    assert last.endswith("not found")


def test_a_suspect_is_excluded_on_request_as_long_as_others_are_left(
    checkouts: Checkouts, jobs: dict[str, str]
) -> None:
    """First the run names one itself, then srun's word is taken."""
    ended = checkouts.ended(jobs["suspect"])
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "2"), ended.output
    assert ended.nodes[0] == ended.nodes[1] == ended.nodes[2]
    (here,) = ended.nodes[0]
    assert {ended.facts["ExcNodeList"]} == set(checkouts.cluster.nodes) - {here}
    assert f"foveal: not excluded: {here}: 0 nodes would be left for 1" in ended.ours


def test_a_cancelled_job_is_not_requeued(checkouts: Checkouts) -> None:
    job = checkouts.submit("until_asked(); sys.exit(rank % 2)\n")
    checkouts.cluster.until(lambda: checkouts.cluster.output(job).count("start 0") == 4, "all ranks are there", 90)
    checkouts.cluster.run("scancel", job)
    ended = checkouts.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("CANCELLED", "0"), ended.output
    assert all("not requeued: the job was cancelled" in line for line in ended.ours)


def test_a_preempted_job_knows_its_grace_and_asks_for_another_start_itself(checkouts: Checkouts) -> None:
    """Ranks that leave with 0 in their grace would count as completed."""
    ranks = """
if starts: sys.exit(0)
if rank == 0: print("notice", slurm().read_shutdown_notice(), flush=True)
until_asked()
if rank == 0: print("left", slurm().read_slurm_seconds_left(), heard, flush=True)
if rank == 0: print("refused", slurm().requeue_slurm_job_if_due(got_warning_signal=False), flush=True)
"""
    job = checkouts.submit(ranks, partition="low", nodes="1", ntasks_per_node="1", cpus_per_task="5")
    checkouts.up(job, "notice")
    node = checkouts.cluster.job(job)["NodeList"]
    greedy = ["--cpus-per-task=5", f"--nodelist={node}", "--output=/dev/null"]
    other = checkouts.cluster.submit("--wrap=true", options=greedy)
    ended = checkouts.ended(job)
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "1"), ended.output
    assert checkouts.cluster.wait(other)["JobState"] == "COMPLETED"
    assert "notice ShutdownNotice(seconds=20.0, source='GraceTime of partition low')" in ended.output
    left = re.search(r"left (\S+) \['SIGTERM'\]", ended.output)
    assert left
    assert 10 < float(left[1]) <= 20
    assert "refused None" in ended.output
    assert "saved and left" not in ended.output, "it does not leave that to the job script"


def test_a_job_that_meets_its_time_limit_hears_of_it_and_goes_on_afterwards(
    checkouts: Checkouts, jobs: dict[str, str]
) -> None:
    """USR1 without ``B:`` reaches every rank; ranks that did not save in time are started again all the same."""
    ended = checkouts.ended(jobs["limited"])
    assert (ended.facts["JobState"], ended.facts["Restarts"]) == ("COMPLETED", "1"), ended.output
    assert ended.output.count("heard SIGUSR1") == 2
    assert (
        "notice ShutdownNotice(seconds=180.0, source='--signal in " in ended.output
    )  # of the script: 30 is Slurm's secret
    left = re.search(r"left (\S+)", ended.output)
    assert left
    assert 0 < float(left[1]) <= 60
