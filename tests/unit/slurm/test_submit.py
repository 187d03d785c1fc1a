"""Pipelines: what is refused, what becomes of the rest, and the lines that are run here or handed to sbatch."""

import os
import signal
from pathlib import Path

import pytest

from foveal.errors import ConfigError, LaunchError
from foveal.runs.pipeline import read_pipeline_stages
from slurm import submit
from slurm.submit import StageJob, build_jobs_and_options, read_sbatch_options, run_jobs_locally

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "configs/pretrain/digits.yaml"
TWO = f"""\
- {{name: one, stage: pretrain, config: {DIGITS}, set: {{optim.lr_per_256: 1e-3, data.path: "a: b"}}}}
- {{name: two, stage: distill, config: {ROOT}/configs/distill/digits.yaml, from: {{teacher: one}}}}
"""
# A stage that writes down how it was started, and then does as it is told.
STAGE = """\
import os, pathlib, signal, sys
with open("started", "a") as file:
    file.write(" ".join([os.environ.get("RANK", "-"), *sys.argv[1:]]) + "\\n")
folder = next(word for word in sys.argv if word.startswith("run.dir=")).removeprefix("run.dir=")
what = pathlib.Path(sys.argv[1]).name
if what == "finish" and "--check" not in sys.argv:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    pathlib.Path(folder, "finished.json").touch()
if what == "interrupt":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.kill(os.getppid(), signal.SIGINT)
    signal.sigwait({signal.SIGINT})
    open("heard", "w").close()
sys.exit(int(what) if what.isdigit() else 0)
"""


def pipeline(folder: Path, text: str) -> Path:
    file = folder / "pair.yaml"
    file.write_text(text)
    return file


def job(what: str, *, processes: int = 1) -> StageJob:
    return StageJob(f"to-{what}", "pretrain", Path(what), (f"run.dir=runs/{what}",), (), Path("runs", what), processes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which ``python -m pretrain.run`` is the stage above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/__init__.py").touch()
    (tmp_path / "pretrain/run.py").write_text(STAGE)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("name: one", [], "a list of stages is expected"),
        ("[]", [], "a list of stages is expected"),
        ("- one", [], "element 1: a mapping"),
        ("- {name: a, stage: pretrain, config: x, form: {}}", [], "element 1: 'form' is not a key"),
        ("- {name: a, name: b}", [], "'name' is given twice"),
        ("- {name: a, stage: pretrain}", [], "element 1: config is missing"),
        ("- {name: a.b, stage: pretrain, config: x}", [], "'a.b' cannot be a stage's name"),
        ("- {name: slurm, stage: pretrain, config: x}", [], "'slurm' cannot be a stage's name"),
        ("- {name: a, stage: pretain, config: x}", [], "no stage 'pretain'. Did you mean 'pretrain'?"),
        (
            "- {name: a, stage: distill, config: x, from: {teacher: a}}",
            [],
            "from.teacher wants 'a', but it comes later",
        ),
        ("- {name: a, stage: distill, config: x, from: {teacher: b}}", [], "wants 'b', but there is no such stage"),
        ("- {name: a, stage: distill, config: x, from: [b]}", [], "set and from are mappings"),
        (f"{TWO}- {{name: one, stage: pretrain, config: x}}", [], "'one' names two stages"),
        ("- {name: a, stage: pretrain, config: nowhere.yaml}", [], "stage 'a': nowhere.yaml: no such file"),
        (TWO, ["one.optim.lr=1"], "stage 'one': .*optim.lr is not a setting"),
        (TWO, ["two.run.dir=runs/pair/one"], "'one' and 'two' have the same run.dir"),
        (TWO, ["one.run.fresh=true"], "stage 'one': run.fresh=true"),
        (TWO, ["tow.epochs=1"], "no stage 'tow'. Did you mean 'two'?"),
        (TWO, ["epochs=1"], "'epochs=1' is not an override of a pipeline"),
        (TWO, ["slurm.nodes"], "'slurm.nodes' is not an override of a pipeline"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        build_jobs_and_options(pipeline(tmp_path, text), overrides)
    assert "\n" not in str(error.value)


def test_a_missing_pipeline_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        build_jobs_and_options(tmp_path / "nowhere.yaml", [])


def test_settings_reach_the_stage_as_they_were_meant(tmp_path: Path) -> None:
    jobs, options = build_jobs_and_options(
        pipeline(tmp_path, TWO), ["two.run.dir=elsewhere", "two.epochs=3", "slurm.mem=1=2"]
    )
    one, two = jobs
    assert (one.run_dir, one.depends_on, two.run_dir, two.depends_on) == (
        Path("runs/pair/one"),
        (),
        Path("elsewhere"),
        ("one",),
    )
    assert "teacher=runs/pair/one/export" in two.overrides
    assert "run.pipeline=runs/pair" in two.overrides
    assert two.overrides[-2:] == ("run.dir=elsewhere", "epochs=3")
    loaded = submit.PretrainConfig.load(one.config_path, one.overrides)
    assert (loaded.optim.lr_per_256, loaded.data.path) == (1e-3, "a: b")
    assert options == {"mem": "1=2"}


def test_names_of_0_1_in_a_pipeline_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = TWO.replace("optim.lr_per_256: 1e-3", "batch.images: 64, optim.clip: 0.5")
    jobs, _ = build_jobs_and_options(pipeline(tmp_path, text), ["two.batch.at_once=4"])
    assert "batch.images=64" in jobs[0].overrides
    for renamed in ("batch.images is now batch.global_size", "batch.at_once is now batch.max_micro_size"):
        assert renamed in caplog.text
    with pytest.raises(ConfigError, match=r"batch\.images and batch\.global_size are one setting"):
        build_jobs_and_options(pipeline(tmp_path, text), ["one.batch.global_size=32"])


def test_a_moved_run_is_found_by_the_next_stage(tmp_path: Path) -> None:
    _, two = build_jobs_and_options(pipeline(tmp_path, TWO), ["one.run.dir=elsewhere"])[0]
    assert "teacher=elsewhere/export" in two.overrides


def test_one_of_several_students_is_taken(tmp_path: Path) -> None:
    tuned = f"- {{{{name: three, stage: finetune, config: {ROOT}/configs/finetune/digits.yaml, from: {{{{init: {{}}}}}}}}}}\n"
    students = "[{name: small, model: {}}, {name: other, backbone: resnet18}]"
    several = TWO.replace("from: {teacher: one}", f"from: {{teacher: one}}, set: {{students: {students}, model: null}}")
    *_, last = build_jobs_and_options(pipeline(tmp_path, several + tuned.format("two/small")), ())[0]
    assert "init=runs/pair/two/export/small" in last.overrides
    assert last.depends_on == ("two",)
    for text in (several + tuned.format("two"), several + tuned.format("two/smal")):
        with pytest.raises(ConfigError, match="the exports of 'two' are named two/small, two/other"):
            build_jobs_and_options(pipeline(tmp_path, text), ())
    with pytest.raises(ConfigError, match="the exports of 'one' are named one"):
        build_jobs_and_options(pipeline(tmp_path, TWO.replace("teacher: one", "teacher: one/small")), ())


def test_stages_run_here_one_after_another(here: Path) -> None:
    assert (
        run_jobs_locally([job("finish"), job("0")]) == LaunchError.exit_code
    )  # the second leaves without having finished
    assert (here / "started").read_text() == "- finish run.dir=runs/finish\n- 0 run.dir=runs/0\n"


def test_the_first_failure_stops_the_chain_with_its_code(here: Path) -> None:
    assert run_jobs_locally([job("7"), job("finish")]) == 7
    assert (here / "started").read_text() == "- 7 run.dir=runs/7\n"


def test_several_processes_are_ranks_and_the_first_failure_is_the_chains(here: Path, caplog) -> None:
    assert run_jobs_locally([job("finish", processes=2), job("7", processes=2), job("finish")]) == 7
    started = (here / "started").read_text().splitlines()
    assert sorted(started) == [f"{rank} {what} run.dir=runs/{what}" for rank in (0, 1) for what in ("7", "finish")]
    assert caplog.messages[-1] == "foveal: stage 'to-7' ended with exit code 7; nothing after it was started"


def test_ctrl_c_reaches_the_stage_and_ends_the_chain(here: Path, caplog) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run_jobs_locally([job("interrupt"), job("finish")]) == 130
    assert caplog.messages[-1] == "foveal: stopped in stage 'to-interrupt': start again to continue"
    assert (here / "heard").exists()
    assert len((here / "started").read_text().splitlines()) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps what it is given as 1.sh, 2.sh, ..., and refuses a third job; the folder of those files."""
    programs = {
        "srun": "exit 1",
        "sbatch": f'cd {tmp_path}; n=$(($(ls | grep -c "^[0-9].sh") + 1)); [ $n = 3 ] && {{ echo "no more" >&2; exit 1; }}\n'
        'cp "$1" $n.sh; echo "Submitted batch job $n"',
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return tmp_path


def test_a_job_is_the_script_with_its_own_resources(sbatch: Path) -> None:
    jobs, _ = build_jobs_and_options(pipeline(sbatch, TWO), [])
    options = {"nodes": "1", "gpus-per-node": "0", "dependency": "afterok:99", "requeue": "true"}
    assert submit.submit_jobs(jobs, sbatch / "submitted", options) == {"one": "1", "two": "2"}
    first, second = ((sbatch / f"{n}.sh").read_text().splitlines() for n in (1, 2))
    directives = {line.removeprefix("#SBATCH --") for line in first if line.startswith("#SBATCH")}
    ours = {
        f"{name.replace('_', '-')}={value}"
        for name, value in read_sbatch_options(ROOT / "slurm/pretrain_mae.sh").items()
    }
    changed = {"nodes=4", "gpus-per-node=8", "requeue=true"}
    assert changed < ours
    added = {"nodes=1", "gpus-per-node=0", "requeue", "dependency=afterok:99", "kill-on-invalid-dep=yes"}
    assert directives == (ours - changed) | added
    assert "signal=USR1@180" in directives
    assert "#SBATCH --dependency=afterok:1,afterok:99" in second
    commands = [line for line in first if line and not line.startswith("#")]
    assert commands[-1].startswith(f"exec bash slurm/pretrain_mae.sh {DIGITS} run.dir=runs/pair/one")
    assert commands[:-1] == ["export SUBMITIT_EXECUTOR=slurm"]


def test_an_array_is_for_the_stages_that_have_folds(sbatch: Path) -> None:
    folds = (
        f"- {{name: three, stage: finetune, config: {ROOT}/configs/finetune/digits_folds.yaml, from: {{init: one}}}}\n"
    )
    one, three = TWO.splitlines(keepends=True)[0], folds.replace("from:", "set: {model: null}, from:")
    jobs, options = build_jobs_and_options(pipeline(sbatch, one + three), ["slurm.array=0-4"])
    submit.submit_jobs(jobs, sbatch / "submitted", options)
    assert [("#SBATCH --array=0-4" in (sbatch / f"{n}.sh").read_text()) for n in (1, 2)] == [False, True]
    assert "#SBATCH --dependency=afterok:1" in (sbatch / "2.sh").read_text()
    with pytest.raises(
        ConfigError, match=r"slurm\.array is for the stages that have folds, and none has; leave it out"
    ):
        build_jobs_and_options(pipeline(sbatch, TWO), ["slurm.array=0-4"])


def test_a_refused_job_cancels_those_before_it(sbatch: Path) -> None:
    jobs, _ = build_jobs_and_options(pipeline(sbatch, f"{TWO}- {{name: three, stage: pretrain, config: {DIGITS}}}"), [])
    with pytest.raises(LaunchError, match="three: sbatch refused the job: no more; the jobs before it are cancelled"):
        submit.submit_jobs(jobs, sbatch / "submitted", {})
    assert (sbatch / "cancelled").read_text() == "1 2\n"


def test_without_slurm_submitting_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch and srun here"):
        submit.submit_jobs([job("finish")], tmp_path, {})


def test_the_stages_are_recorded_before_they_run(here: Path) -> None:
    with pytest.raises(SystemExit) as end:
        submit.main([str(pipeline(here, TWO)), "--cluster", "local"])
    assert end.value.code  # the stand-in leaves before its end
    stages = read_pipeline_stages(Path("runs/pair"))
    assert [(stage.name, stage.stage, stage.run_dir, stage.job) for stage in stages] == [
        ("one", "pretrain", Path("runs/pair/one"), None),
        ("two", "distill", Path("runs/pair/two"), None),
    ]


def test_a_list_of_stages_that_cannot_be_written_stops_nothing(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("runs").write_text("a file where a folder is to be")
    with pytest.raises(SystemExit):
        submit.main([str(pipeline(here, TWO)), "--cluster", "local"])
    assert "the list of stages is not written" in caplog.text
    assert Path("started").exists()
