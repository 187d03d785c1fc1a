"""The three job scripts and submit.py on a real two-node Slurm, one or two ranks a node, under gloo."""

import json
import re
import sys
from pathlib import Path

import pytest
from harness import Cluster
from ranks import Ranks, stage_named

from foveal.data.pack import pack_digits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "1", "gpus-per-node": "0"}
FOUR_RANKS = TWO_RANKS | {"ntasks-per-node": "2"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "FOVEAL_PREFLIGHT": "0"}
# Four ranks on the cores of a small machine do not multiply at like speeds.
EXAMINED = ONE_THREAD | {"FOVEAL_PREFLIGHT": "1", "FOVEAL_SLOWEST": "0.05"}
SHORT = ("epochs=4", "batch.global_size=128", "batch.max_micro_size=16", "tracking.uri=null", "checkpoint.every=0")
LABELLED = ("epochs=8", "batch.global_size=20", "tracking.uri=null")


def as_yaml(settings: tuple[str, ...]) -> str:
    return ", ".join(each.replace("=", ": ") for each in settings)


PIPELINE = f"""\
- name: first
  stage: pretrain
  config: digits
  set: {{{as_yaml(SHORT)}}}
- name: second
  stage: distill
  config: configs/distill/digits.yaml
  set: {{{as_yaml(SHORT)}}}
  from: {{teacher: first}}
- name: third
  stage: finetune
  config: digits
  set: {{{as_yaml(LABELLED)}}}
  from: {{init: first}}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a user could call sbatch in: the repository's scripts and configs, packed digits, no runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("slurm", "configs"):
        (folder / name).symlink_to(ROOT / name)
    pack_digits(folder / "data/digits")
    return folder


def in_one_process(one_rank: Ranks, checkout: Path, name: str, stage: str, *settings: str) -> Path:
    """A stage of the pipeline in one process on this machine; its run directory."""
    run = checkout / "runs/alone" / name
    config = ROOT / "configs" / stage / "digits.yaml"
    one_rank.train(stage_named(stage), config, run, f"data.path={checkout / 'data/digits'}", *settings)
    return run


@pytest.fixture(scope="module")
def first_alone(one_rank: Ranks, checkout: Path) -> Path:
    """The pipeline's first stage."""
    return in_one_process(one_rank, checkout, "first", "pretrain", *SHORT)


@pytest.fixture(scope="module")
def alone(one_rank: Ranks, checkout: Path, first_alone: Path) -> dict[str, Path]:
    """The stages of the whole pipeline."""
    encoder = first_alone / "export"
    return {
        "first": first_alone,
        "second": in_one_process(one_rank, checkout, "second", "distill", *SHORT, f"teacher={encoder}"),
        "third": in_one_process(one_rank, checkout, "third", "finetune", *LABELLED, f"init={encoder}"),
    }


def curve(run: Path) -> list[list[float]]:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    return [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in rows if "loss" in row]


def assert_same_curve(run: Path, reference: Path) -> None:
    assert len(curve(run)) == len(curve(reference)) > 3
    for ours, theirs in zip(curve(run), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def assert_ranks_on_two_nodes(run: Path, cluster: Cluster, ranks_per_node: int) -> None:
    """Each rank's log begins by naming its rank, host and Slurm's number of the task."""
    heads = [file.read_text().splitlines()[0] for file in sorted((run / "logs").glob("rank-*.log"))]
    head_of_rank = rf"rank (\d) of {2 * ranks_per_node} on (\S+), .*launcher srun.*SLURM_PROCID=(\d)"
    found = [re.search(head_of_rank, head) for head in heads]
    seats = [match.groups() if match else head for match, head in zip(found, heads, strict=True)]
    hosts = [node if cluster.named else seats[0][1] for node in cluster.nodes for _ in range(ranks_per_node)]
    assert seats == [(str(rank), host, str(rank)) for rank, host in enumerate(hosts)]


def jobs_of(said: str) -> dict[str, str]:
    """Ids by name, from what submit.py prints."""
    return {name: job for job, name in re.findall(r"^(\d+) (\w+)", said, re.MULTILINE)}


def test_an_interrupted_sbatch_goes_on_and_ends_like_one_process(
    cluster: Cluster, checkout: Path, first_alone: Path
) -> None:
    """USR1 is what Slurm sends before the time limit: every rank saves, and the job requeues itself and resumes."""
    options = [f"--{name}={value}" for name, value in FOUR_RANKS.items()]
    line = ("slurm/pretrain_mae.sh", "digits", *SHORT, "log.every=1")
    job = cluster.submit(*line, options=options, cwd=checkout, env=ONE_THREAD)
    run = checkout / "runs/digits"
    cluster.until(lambda: len(curve(run)) > 3, f"job {job} reports steps", timeout=240)
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, timeout=600)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert re.search(r"resumed from \S+step-\d+", cluster.output(job))
    assert_ranks_on_two_nodes(run, cluster, 2)
    assert_same_curve(run, first_alone)


@pytest.mark.thorough
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, checkout: Path) -> None:
    """The nodes are examined, then trained on. scancel sends the SIGTERM that preemption sends too; Slurm would requeue a
    cancelled job that asks for it.
    """
    resources = [f"--{name}={value}" for name, value in FOUR_RANKS.items()]
    line = ("slurm/pretrain_mae.sh", "digits", "tracking.uri=null", "log.every=1", "run.dir=runs/cancelled")
    job = cluster.submit(*line, options=resources, cwd=checkout, env=EXAMINED)
    cluster.until(lambda: len(curve(checkout / "runs/cancelled")) > 3, f"job {job} reports steps", timeout=240)
    assert "all-reduce among 4 ranks: correct" in cluster.output(job)
    cluster.run("scancel", job)
    ended = cluster.wait(job, timeout=120)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)


@pytest.mark.thorough
def test_submit_chains_three_jobs_like_one_process(cluster: Cluster, checkout: Path, alone: dict[str, Path]) -> None:
    (checkout / "chain.yaml").write_text(PIPELINE)
    resources = [f"slurm.{name}={value}" for name, value in TWO_RANKS.items()]
    submit = (sys.executable, "slurm/submit.py", "chain.yaml", *resources)
    jobs = jobs_of(cluster.run(*submit, cwd=checkout, env=ONE_THREAD).stdout)
    assert list(jobs) == ["first", "second", "third"]
    for name, job in jobs.items():
        ended = cluster.wait(job, timeout=600)
        assert ended["JobState"] == "COMPLETED", cluster.output(job)
        assert (ended["Requeue"], ended["NumNodes"]) == ("1", "2")
        assert_ranks_on_two_nodes(checkout / "runs/chain" / name, cluster, 1)
        assert_same_curve(checkout / "runs/chain" / name, alone[name])
    started = {name: cluster.job(job)["StartTime"] for name, job in jobs.items()}
    assert min(started["second"], started["third"]) >= cluster.job(jobs["first"])["EndTime"]


@pytest.mark.thorough
def test_missing_shards_are_one_sentence_and_cancel_what_waits(cluster: Cluster, checkout: Path) -> None:
    (checkout / "missing.yaml").write_text(PIPELINE)
    resources = [f"slurm.{name}={value}" for name, value in FOUR_RANKS.items()]
    submit = (sys.executable, "slurm/submit.py", "missing.yaml", "first.data.path=nowhere", *resources)
    jobs = jobs_of(cluster.run(*submit, cwd=checkout, env=ONE_THREAD).stdout)
    ended = {name: cluster.wait(job, timeout=120) for name, job in jobs.items()}
    assert [job["JobState"] for job in ended.values()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert ended["first"]["ExitCode"] == "2:0"
    lines = cluster.output(jobs["first"]).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("foveal: ")
    assert "nowhere" in lines[0]
    assert not (checkout / "runs/missing/first").exists()


def test_a_wrong_folder_is_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    script = str(ROOT / "slurm/pretrain_mae.sh")
    job = cluster.submit(script, options=[f"--{name}={value}" for name, value in FOUR_RANKS.items()], cwd=tmp_path)
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert cluster.output(job) == f"{tmp_path} is not the root of the repository: call sbatch there\n"
