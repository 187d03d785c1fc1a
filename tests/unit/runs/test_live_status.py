"""The status of a run at a time, of runs in every condition; it reads little and writes nothing."""

import math
import time
from pathlib import Path

import pytest
from run_directories import begin_attempt, end_attempt, leave_without_word, make_run, save_checkpoint, steps

from foveal.errors import CheckpointError
from foveal.runs.live_status import RunStatus, read_status
from foveal.runs.record import list_runs, read_run

OLD_RUNS = Path(__file__).parents[2] / "fixtures/v0_1_0"


def status_of(run: Path, now: float | None = None) -> RunStatus:
    return read_status(read_run(run), time.time() if now is None else now)


def test_a_run_under_way(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100)
    begin = time.time()
    lease = begin_attempt(run)
    other = make_run(tmp_path / "other", rows=steps(1, 40, begin=begin))
    (other / "metrics.jsonl").replace(run / "metrics.jsonl")
    status = status_of(run, begin + 45.0)
    assert (status.state, status.step, status.total_steps, status.fraction) == ("running", 40, 100, 0.4)
    assert (status.epoch, status.num_epochs) == (4, 10)
    assert status.seconds_left == pytest.approx(60 - 5, abs=0.01)
    assert (status.rows.images_per_second, status.rows.data_wait) == (140.0, 0.25)
    assert (status.num_attempts, status.num_ranks, status.is_stalled) == (1, 2, False)
    assert status_of(run, begin + 40 + 119).is_stalled is False
    assert status_of(run, begin + 40 + 121).is_stalled is True
    assert status_of(run, begin + 1000).seconds_left == 0.0
    lease.record_end_and_release("asked to leave: saved at step 40 of 100", 0, 40)
    status = status_of(run, begin + 1000)
    assert (status.state, status.seconds_left, status.is_stalled) == ("saved-and-left", None, False)
    assert status.reason == status.last_end == "asked to leave: saved at step 40 of 100"


def test_the_time_left_is_to_the_step_where_the_attempt_stops(tmp_path: Path) -> None:
    begin = time.time()
    run = make_run(tmp_path / "run", total_steps=100, stop_step=50)
    lease = begin_attempt(run)
    other = make_run(tmp_path / "other", rows=steps(1, 40, begin=begin + 1))
    (other / "metrics.jsonl").replace(run / "metrics.jsonl")
    assert status_of(run, begin + 41).seconds_left == pytest.approx(10.0, abs=0.01)
    lease.record_end_and_release("", 0)


def test_before_the_first_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("plan.json", "metrics.jsonl"):
        (run / name).unlink()
    lease = begin_attempt(run)
    status = status_of(run)
    assert (status.state, status.stage, status.step, status.total_steps, status.fraction) == (
        "running",
        "pretrain",
        0,
        None,
        None,
    )
    assert (status.rows.loss, status.seconds_left, status.best, status.checkpoint, status.newest_evaluation) == (
        None,
    ) * 5
    lease.record_end_and_release("", 0)


def test_evaluations_come_from_the_newest_checkpoint_and_the_rows_since(tmp_path: Path) -> None:
    evaluated = [{"step": 30, "val_loss": 0.5, "val_top1": 0.6, "time": 3.0}]
    run = make_run(tmp_path / "run", rows=[*steps(21, 30, begin=0.0), *evaluated])
    end_attempt(run)
    save_checkpoint(run, 20, scores={10: {"val_loss": 0.4, "val_top1": 0.7}, 20: {"val_loss": 0.6, "val_top1": 0.5}})
    status = status_of(run)
    assert status.newest_evaluation is not None
    assert status.best is not None
    assert (status.newest_evaluation.step, status.best.step, status.best.value) == (30, 10, 0.7)
    assert status.checkpoint is not None
    assert status.checkpoint.step == 20
    (status.checkpoint.path / "state.json").write_text("{")
    best = status_of(run).best
    assert best is not None
    assert best.step == 30


def test_a_void_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    end_attempt(run)
    save_checkpoint(run, 10, 1)
    save_checkpoint(run, 30, 1)
    begin_attempt(run, 10).record_end_and_release("", 1)
    checkpoint = status_of(run).checkpoint
    assert checkpoint is not None
    assert checkpoint.step == 10


def test_what_went_wrong_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[{"step": 1, "loss": math.nan, "time": 1.0}])
    end_attempt(run, "diverged, with https://u:" + "secret@host/x", 3)
    (run / "refused.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "rollbacks.jsonl").write_text('{"to": 0}\n')
    (run / "quarantine.jsonl").write_text('{"step": 1}\n' * 3)
    status = status_of(run)
    assert (status.num_refused_updates, status.num_rollbacks, status.num_quarantined) == (2, 1, 3)
    assert "secret" not in status.reason + status.last_end


def test_trials_are_counted_and_the_one_under_way_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stage="finetune", num_runs=4)
    lease = begin_attempt(run)
    for number in range(2):
        end_attempt(make_run(run / "trials" / f"done{number}", finished={"val_top1": 0.5, "step": 5}))
    inner = make_run(run / "trials" / "now", rows=steps(1, 10, begin=time.time()))
    inner_lease = begin_attempt(inner)
    nested = (status := status_of(run)).nested
    assert nested is not None
    assert (nested.noun, nested.num_finished, nested.total) == ("trial", 2, 4)
    assert [(each.name, each.step) for each in nested.current] == [("now", 10)]
    assert (status.fraction, status.seconds_left) == (0.5, pytest.approx(16.0, abs=1.0))
    inner_lease.record_end_and_release("", 0)
    lease.record_end_and_release("", 0)
    nested = status_of(run).nested
    assert nested is not None
    assert (nested.current, nested.seconds_left) == ((), None)


def test_the_duration_is_of_all_attempts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[{"step": 1, "loss": 1.0, "time": time.time() + 50.0}])
    leave_without_word(run, beat_age=3600.0)
    assert status_of(run, time.time() + 4000.0).duration_seconds == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize("run", list_runs(OLD_RUNS), ids=lambda run: run.name)
def test_runs_of_0_1(run: Path) -> None:
    status = status_of(run)
    assert status.stage == run.name.partition("_")[0]
    assert status.state == ("finished" if (run / "finished.json").exists() else "saved-and-left")
    assert status.step is not None


def test_another_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_a_look_reads_little_and_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    end_attempt(run)
    with (run / "metrics.jsonl").open("w") as stream:
        stream.writelines(f'{{"step": {step}, "loss": 0.5, "time": {step}.0}}\n' for step in range(200_000))

    def contents() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in [run, *run.rglob("*")]}

    before, num_bytes = contents(), int(Path("/proc/self/io").read_text().split()[1])
    assert status_of(run).step == 199_999
    assert (
        int(Path("/proc/self/io").read_text().split()[1]) - num_bytes
        < 1_100_000
        < (run / "metrics.jsonl").stat().st_size / 8
    )
    assert contents() == before


def test_files_may_vanish_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", rows=steps(1, 10, begin=0.0))
    leave_without_word(run)
    save_checkpoint(run, 10)
    record = read_run(run)

    def vanish(*_: object, **__: object) -> object:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", vanish)
        patch.setattr(Path, "read_bytes", vanish)
        patch.setattr(Path, "iterdir", vanish)
        status = read_status(record, time.time())
    assert (status.step, status.checkpoint) == (0, None)
