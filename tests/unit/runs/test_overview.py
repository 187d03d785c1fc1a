"""The runs of a folder: in order, with stages that have not begun, and whether anything may still change."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from run_directories import begin_attempt, end_attempt, leave_without_word, make_run

from foveal.errors import CheckpointError
from foveal.runs.job_lookup import JobLookup
from foveal.runs.overview import Overview, read_overview
from foveal.runs.pipeline import PlannedStage, read_pipeline_stages, write_pipeline
from foveal.slurm import SlurmJobStatus, SlurmUnavailableError
from foveal.training.lease_holder import LeaseHolder

JOB = SlurmJobStatus("7", "PENDING", "Dependency", "main", "", False, None, None, None)


def look(folder: Path, jobs: JobLookup | None = None) -> Overview:
    return read_overview(folder, time.time(), jobs)


def is_live(folder: Path, jobs: JobLookup | None = None) -> bool:
    return look(folder, jobs).is_live(time.time())


def test_runs_stand_in_the_order_of_their_starts(tmp_path: Path) -> None:
    for name in ("z", "a", "m"):
        end_attempt(make_run(tmp_path / name))
    assert [run.name for run in look(tmp_path).runs] == ["z", "a", "m"]
    overview = look(tmp_path / "a")
    assert (overview.is_run, [run.name for run in overview.runs]) == (True, ["a"])


def test_a_folder_without_runs_is_a_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no"):
            look(folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("plan.json", "{", "plan.json is damaged"),
        ("plan.json", '{"stage": 3}', "plan.json is not as foveal wrote it"),
        ("config.yaml", ": : {", "not valid YAML"),
        ("config.yaml", "- 1", "config.yaml is damaged"),
        ("finished.json", '{"summary": [1]}', "finished.json is not as foveal wrote it"),
        ("tags.json", "\0", "tags.json is damaged"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_shown(
    tmp_path: Path, file: str, content: str, sentence: str
) -> None:
    end_attempt(make_run(tmp_path / "good"))
    end_attempt(make_run(tmp_path / "bad"))
    (tmp_path / "bad" / file).write_text(content)
    overview = look(tmp_path)
    assert [run.name for run in overview.runs] == ["good"]
    assert [(run.path.name, sentence in run.reason) for run in overview.unreadable] == [("bad", True)]
    assert str(tmp_path / "bad") in overview.unreadable[0].reason
    with pytest.raises(CheckpointError, match=sentence.replace(".", r"\.")):
        look(tmp_path / "bad")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("attempts/0001.json", '{"time": "noon", "host": 3, "pid": "x", "born": null, "ranks": 1}'),
        ("attempts/0001.end.json", '{"why": 3, "code": "x", "seconds": "long"}'),
        ("attempts/0001.start.json", "[]"),
        ("inputs.json", "{}"),
    ],
)
def test_damaged_details_cost_only_themselves(tmp_path: Path, file: str, content: str) -> None:
    end_attempt(make_run(tmp_path / "run"))
    (tmp_path / "run" / file).write_text(content)
    assert [run.name for run in look(tmp_path).runs] == ["run"]


def test_a_pipeline_shows_what_has_not_begun_and_is_live_until_a_stage_fails(tmp_path: Path) -> None:
    folder = tmp_path / "runs/demo"
    stages = [
        PlannedStage("one", "pretrain", folder / "one"),
        PlannedStage("two", "distill", tmp_path / "elsewhere/two"),
    ]
    write_pipeline(folder, stages)
    assert [(stage.name, stage.run_dir.resolve()) for stage in read_pipeline_stages(folder)] == [
        (stage.name, stage.run_dir) for stage in stages
    ]
    assert [stage.planned.name for stage in look(tmp_path / "runs").not_begun] == [
        "one",
        "two",
    ]  # from the folder above
    assert is_live(folder)
    end_attempt(make_run(folder / "one", finished={"loss": 1.0}))
    assert [stage.planned.name for stage in look(folder).not_begun] == ["two"]
    assert is_live(folder)  # the next stage imports torch
    later = time.time() + 3700.0
    assert not read_overview(folder, later).is_live(later)  # the chain has ended
    (folder / "one" / "finished.json").unlink()
    assert not is_live(folder)
    end_attempt(make_run(tmp_path / "elsewhere/two"))
    assert [run.name for run in look(folder).runs] == ["one", "two"]  # also a run that lies elsewhere
    (folder / "pipeline.json").write_text('{"stages": [1]}')
    assert [run.name for run in look(folder).runs] == ["one"]


def test_stages_on_slurm_live_as_long_as_their_jobs(tmp_path: Path) -> None:
    write_pipeline(tmp_path, [PlannedStage("one", "pretrain", tmp_path / "one", "7")])
    overview = look(tmp_path, JobLookup(lambda _, __: JOB))
    assert overview.not_begun[0].job == JOB
    assert overview.is_live(time.time())
    assert not is_live(tmp_path, JobLookup(lambda _, __: replace(JOB, state="CANCELLED")))
    assert not is_live(tmp_path, JobLookup(lambda _, __: None))


def test_a_preemption_is_live_until_its_job_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease = begin_attempt(run, job="7")
    lease.record_end_and_release("preempted", 0)
    for state, live in (("RUNNING", True), ("COMPLETING", True), ("PENDING", True), ("CANCELLED", False)):
        job = replace(JOB, state=state)
        assert is_live(tmp_path, JobLookup(lambda _, __, job=job: job)) == live
    assert not is_live(tmp_path)


def test_what_is_live(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease = begin_attempt(run)
    assert is_live(tmp_path)
    lease.record_end_and_release("why", 1)
    assert not is_live(tmp_path)
    leave_without_word(run, beat_age=100.0)  # it may live: its host may be slow
    assert is_live(tmp_path)
    leave_without_word(run, beat_age=4000.0)
    assert look(tmp_path).runs[0].state == "unknown"
    assert not is_live(tmp_path)


def test_slurm_is_asked_for_each_job_once_and_not_after_silence() -> None:
    asked: list[str] = []

    def show(job: str, _: float) -> SlurmJobStatus | None:
        asked.append(job)
        if job == "9":
            raise SlurmUnavailableError
        return JOB

    jobs = JobLookup(show)
    holder = LeaseHolder("host", 1, "", 1, job="7")
    assert (jobs.find(holder), jobs.find(holder), jobs.find(None), jobs.find(replace(holder, job=None))) == (
        JOB,
        JOB,
        None,
        None,
    )
    assert (jobs.find_by_id("9"), jobs.find_by_id("10"), jobs.find_by_id("7")) == (None, None, JOB)
    assert asked == ["7", "9"]
    assert jobs.find(replace(holder, cluster="another")) is None
