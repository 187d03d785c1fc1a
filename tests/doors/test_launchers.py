"""Every launcher's line starts the ranks it says, and the ranks make one curve."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import PYTHON, ROOT, Ended, column, ended, rows_of
from ranks import Ranks, stage_named

from foveal.quantities import format_count

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # of real processes, each several seconds

_REL = 1e-5
_STEPS = 20


def same_curve(rows: list[dict[str, float]], reference: list[dict[str, float]]) -> None:
    assert column(rows, "step") == list(range(1, _STEPS + 1)) == column(reference, "step")
    for name in ("loss", "grad_norm", "lr"):
        assert column(rows, name) == pytest.approx(column(reference, name), rel=_REL), name


def is_world_of(size: int, run: Path) -> None:
    """Each rank's log says so, and so does the plan."""
    logs = sorted((run / "logs").iterdir())
    assert [log.name for log in logs] == [f"rank-{rank:03d}.log" for rank in range(size)]
    for rank, log in enumerate(logs):
        text = log.read_text()
        assert f"rank {rank} of {size} on " in text
        assert f"batch     64 images = {format_count(size, 'rank')} x " in text


# --- pretraining ---


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """One process, by the path of its Python, with nothing on PATH: neither ninja, nor c++, nor git."""
    folder = tmp_path_factory.mktemp("alone")
    settings = [configs["pretrain"], "epochs=4", f"run.stop_at_step={_STEPS}", "tracking.uri=null", "run.dir=run"]
    return ended([PYTHON, "-m", "pretrain.run", *settings], folder, PATH=""), folder / "run"


def test_one_process_needs_nothing_on_path(alone) -> None:
    done, run = alone
    assert done.code == 0, done.err
    is_world_of(1, run)
    assert "deepspeed ZeRO 1" in done.err
    assert "Traceback" not in done.err


@pytest.mark.thorough
def test_foveal_train_under_torchrun_makes_the_curve_of_one_process(configs, alone, tmp_path) -> None:
    settings = [configs["pretrain"], "epochs=4", f"run.stop_at_step={_STEPS}", "tracking.uri=null", "run.dir=run"]
    launcher = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "foveal.cli", "train", "pretrain"]
    done = ended([*launcher, *settings, "engine.kind=accelerate"], tmp_path)
    assert done.code == 0, done.err
    is_world_of(2, tmp_path / "run")
    same_curve(rows_of(tmp_path / "run"), rows_of(alone[1]))


def test_torchrun_makes_the_curve_of_one_process(long_run, alone) -> None:
    is_world_of(2, long_run.path)
    same_curve(rows_of(long_run.path)[:_STEPS], rows_of(alone[1]))


# --- fine-tuning ---


@pytest.fixture(scope="module")
def reference(one_rank: Ranks, configs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The curve of fine-tuning in one process that no launcher started."""
    run = tmp_path_factory.mktemp("finetune") / "run"
    return one_rank.train(
        stage_named("finetune"), configs["finetune"], run, "engine.kind=plain", f"run.stop_at_step={_STEPS}"
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--config_file", "configs/accelerate/cpu2.yaml"), id="config file"),
        pytest.param(("--multi_gpu", "--num_processes", "2"), id="multi_gpu", marks=pytest.mark.thorough),
    ],
)
def test_accelerate_starts_two_ranks_that_talk(options: Sequence[str], reference, configs, tmp_path) -> None:
    settings = [configs["finetune"], f"run.stop_at_step={_STEPS}", f"run.dir={tmp_path / 'run'}", "tracking.uri=null"]
    done = ended(["accelerate", "launch", *options, "finetune/run.py", *settings], ROOT, HF_HOME=str(tmp_path / "hf"))
    assert done.code == 0, done.err
    is_world_of(2, tmp_path / "run")
    same_curve(rows_of(tmp_path / "run"), reference)


# --- a bare start of fine-tuning ---


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A folder in which nothing of foveal was, and the demo's fine-tuning in it: two epochs without CONFIG."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return folder, ended(["accelerate", "launch", ROOT / "finetune" / "run.py", "epochs=2"], folder)


def run_of(folder: Path) -> Path:
    """The one finished run, whatever the demo's config calls it."""
    (file,) = (folder / "runs").glob("*/finished.json")
    return file.parent


@pytest.mark.thorough
def test_a_bare_launch_packs_the_digits_and_trains_from_scratch(elsewhere) -> None:
    folder, done = elsewhere
    assert done.code == 0, done.err
    assert (folder / "data" / "digits" / "manifest.json").exists()
    assert "no CONFIG: fine-tuning the digits from scratch (runs/demo/pretrain/export is not there)" in done.err
    run = run_of(folder)
    assert "rank 0 of 1 on " in (run / "logs" / "rank-000.log").read_text()
    assert column(rows_of(run), "step") == [1, 2]
    assert (folder / "runs" / "mlflow.db").exists()
