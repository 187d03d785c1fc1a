"""Ranks of different runs never train together, whoever starts them; a launcher's stale words are one sentence."""

import json
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from forked import Forked
from ports import free_port
from processes import PYTHON, ROOT, ended, rows_of

from foveal.training.cli import main
from pretrain.run import STAGE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # of real processes, each several seconds

SHORT = ("tracking.uri=null", "engine.kind=plain")


@pytest.fixture
def port() -> str:
    return str(free_port())


def test_ranks_of_two_runs_at_one_address_both_end(configs: dict[str, Path], port: str, tmp_path: Path) -> None:
    """Rank 0 of one run and rank 1 of another, as two shells start them that share MASTER_ADDR and MASTER_PORT."""
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        Forked(
            "pretrain.run",
            [configs["pretrain"], *SHORT, f"seed={rank}", f"run.dir={tmp_path / name}"],
            tmp_path,
            {"foveal.distributed.rendezvous._GRACE": 2.0},  # seconds that rank 0 waits for its own rank 1
            **address,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank, name in enumerate("AB")
    ]
    first, second = (each.ended() for each in started)
    assert (first.code, second.code) == (2, 2), first.err + second.err
    assert f"foveal: rank 1 of the run {tmp_path / 'B'} (launcher environment), on " in first.err
    assert "but not rank 1" in first.err
    assert (
        f"foveal: 127.0.0.1:{port} is where the ranks of the run {tmp_path / 'A'} (launcher environment) meet"
        in second.err
    )
    assert "seed is 1 here and 0 there" in second.err
    assert "Traceback" not in first.err + second.err
    assert not (tmp_path / "A").exists() and not (tmp_path / "B").exists()


def test_stale_variables_under_srun_are_one_sentence(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}
    for name, value in (step | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ending:
        main(STAGE, [str(configs["pretrain"]), f"run.dir={tmp_path / 'run'}", *SHORT])
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith(
        "foveal: srun says rank 1 of 2, and the environment RANK=0 and WORLD_SIZE=1: unset what a shell or an earlier"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_deepspeeds_own_launcher_starts_ranks(configs: dict[str, Path], port: str, tmp_path: Path) -> None:
    """It gives every rank its number twice: in the environment, and as an argument."""
    world = urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = [PYTHON, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={port}"]
    script = [ROOT / "pretrain/run.py", configs["pretrain"], "tracking.uri=null", "run.dir=run", "run.stop_at_step=2"]
    done = ended([*launcher, *script], tmp_path, DS_ACCELERATOR="cpu")
    assert done.code == 0, done.err
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert "rank 1 of 2 on" in (tmp_path / "run/logs/rank-001.log").read_text()
