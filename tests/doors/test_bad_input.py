"""A mistake is one sentence on stderr that begins with `foveal: `, exit code 2, and nothing written."""

import gzip
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from processes import PYTHON, ended
from ranks import Ranks, stage_named

from foveal.data.tools.cli import app as data_commands
from foveal.errors import DataError
from foveal.training.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(own_environment, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Start a stage in an empty folder, to check and to run (``ways``); the sentence, which is the same for both."""
    monkeypatch.chdir(tmp_path)

    def start(stage: str, *words: str | Path, ways: Sequence[str] = ("--check", "--run")) -> str:
        sentences = set()
        for way in ways:
            argv = [str(word) for word in words] + ["--check"] * (way == "--check")
            with pytest.raises(SystemExit) as done:
                main(stage_named(stage), argv)
            said = capsys.readouterr()
            assert done.value.code == 2
            assert said.err.startswith("foveal: ")
            assert said.err.count("\n") == 1, said.err
            assert not said.out
            sentences.add(said.err.strip())
        assert not (tmp_path / "runs").exists()
        assert len(sentences) == 1, f"--check and a start do not say the same: {sentences}"
        return sentences.pop()

    return start


# --- settings ---


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lr=1", "optim.lr is not a setting. Did you mean 'optim.lr_per_256'?"),
        ("optim.weight_deca=1", "optim.weight_deca is not a setting. Did you mean 'optim.weight_decay'?"),
        ("decodr.width=64", "decodr is not a setting. Did you mean 'decoder'?"),
        ("epochs=many", "epochs: "),
        ("epochs=1.5", "epochs: "),
        ("epochs=0", "epochs: "),
        ("mask_ratio=1.5", "mask_ratio: "),
        ("mask_ratio=0.99", "mask ratio 0.99 leaves none of 16 patches visible"),
        ("mask_strategy=blocks", "mask_strategy: "),
        ("init=nowhere", "nowhere is not there: give an export, or a file or folder"),
        ("mask_block_size=1", "mask_block_size: "),
        ("norm_pix=3", "norm_pix: "),
        ("optim.betas=[0.9]", "optim.betas"),
        ("engine.kind=accelrate", "engine.kind: "),
        ("seed=-1", "seed: "),
        ("epochs", "'epochs' is not an override; write dotted.key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("data.mean=[0.5]", "data.mean requires data.std (given: data.std=null): "),
        ("decoder.width=18", "width=18 is not a multiple of 4"),
        ("model.name=vit_base_patch16_223", "'vit_base_patch16_223' is not a model of timm"),
        ("model.name=resnet18", "is not a plain vision transformer"),
        ("model.patch=5", "image_size=16 is not a whole number of patches of 5 pixels"),
        ("model.heads=3", "width=32 cannot be divided among heads=3"),
        ("model={name: vit_tiny_patch16_224, patch: 4, width: 6, depth: 1, heads: 2}", "multiple of 4"),
    ],
)
def test_a_setting_that_cannot_be(override: str, sentence: str, configs, refused: Refused) -> None:
    assert sentence in refused("pretrain", configs["pretrain"], override)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["engine.deepspeed={train_batch_size: 3}"], "engine.deepspeed.train_batch_size is derived by foveal"),
        (["engine.deepspeed={optimizer: {type: Adam}}"], "engine.deepspeed.optimizer is derived by foveal"),
        (
            ["engine.deepspeed={zero_optimization: {stage: 2}}"],
            "engine.deepspeed.zero_optimization.stage is engine.zero",
        ),
        (["engine.deepspeed={bf16: {enabled: true}}"], "engine.deepspeed.bf16 is derived by foveal"),
        (["engine.kind=plain", "--ranks=2"], "engine.kind=plain runs in one process"),
        (["--ranks=0"], "--ranks"),
        (["--ranks=-2"], "--ranks"),
    ],
)
def test_an_engine_that_cannot_be(overrides: list[str], sentence: str, configs, refused: Refused) -> None:
    ranks = any(word.startswith("--ranks") for word in overrides)  # only a launcher starts so many
    ways = ("--check",) if ranks else ("--check", "--run")
    assert sentence in refused("pretrain", configs["pretrain"], *overrides, ways=ways)


def test_a_yaml_that_is_none(configs, refused: Refused, tmp_path) -> None:
    for text, sentence in (
        ("a: [1", "not valid YAML"),
        ("- 1", "a mapping of settings is expected"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("", "a mapping of settings is expected"),
        ("epochs: 1\n", "data.path is missing and has no default"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        said = refused("pretrain", "mine.yaml")
        assert "mine.yaml" in said and sentence in said


def test_a_config_that_is_not_there(refused: Refused, tmp_path) -> None:
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    (tmp_path / "configs" / "pretrain" / "digits.yaml").touch()
    assert "configs/pretrain/digit.yaml: no such file. Did you mean 'configs/pretrain/digits.yaml'?" in refused(
        "pretrain", "configs/pretrain/digit.yaml"
    )
    assert "pretrain has no config 'digit'. Did you mean 'digits'" in refused("pretrain", "digit")
    assert "elsewhere/mine.yaml: no such file" in refused("pretrain", "elsewhere/mine.yaml")


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
@pytest.mark.parametrize("overrides", [(), ("epochs=1",)])
def test_no_config(stage: str, overrides: tuple[str, ...], refused: Refused) -> None:
    said = refused(stage, *overrides)
    assert "CONFIG is missing: give a YAML file, or one of " in said
    assert "digits" in said


# --- batches ---


def test_a_batch_that_the_ranks_do_not_divide(configs, refused: Refused) -> None:
    said = refused("pretrain", configs["pretrain"], "--ranks=3", ways=["--check"])
    assert "a batch of 64 images cannot be dealt to 3 ranks equally: the nearest batch that fits is 72" in said
    assert "the nearest number of ranks is 2 or 4" in said


def test_lanes_that_do_not_divide_the_batch(configs, refused: Refused) -> None:
    assert "the nearest that fits is data.lanes=8" in refused("pretrain", configs["pretrain"], "data.lanes=7")


def test_a_set_smaller_than_a_batch(configs, refused: Refused) -> None:
    said = refused("pretrain", configs["pretrain"], "batch.global_size=2048")
    assert "a batch of 2048 images cannot be filled from 1437 samples" in said


# --- shards ---


@pytest.fixture
def shards(digits: Path, tmp_path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "shards"))


def test_a_folder_that_is_not_there(configs, refused: Refused) -> None:
    assert f"data.path: no such folder: nowhere (in {Path.cwd()})" in refused(
        "pretrain", configs["pretrain"], "data.path=nowhere"
    )


def test_a_folder_without_shards(configs, refused: Refused, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no shards (*.tar) here" in refused("pretrain", configs["pretrain"], "data.path=empty")


def test_a_variable_that_is_not_set(configs, refused: Refused) -> None:
    said = refused("pretrain", configs["pretrain"], "data.path=${FOVEAL_NO_SUCH}/digits")
    assert "needs the environment variable FOVEAL_NO_SUCH, which is not set" in said


def test_a_missing_shard(shards: Path, configs, refused: Refused) -> None:
    (shards / "train-000002.tar").unlink()
    assert "train-000002.tar is missing" in refused("pretrain", configs["pretrain"], "data.path=shards")


def test_an_empty_shard(shards: Path, configs, refused: Refused) -> None:
    (shards / "train-000002.tar").write_bytes(b"")
    assert "train-000002.tar has 0 bytes" in refused("pretrain", configs["pretrain"], "data.path=shards")


def test_foreign_shards_without_an_index(shards: Path, configs, refused: Refused) -> None:
    for file in (shards / "manifest.json", *shards.glob("*.index")):
        file.unlink()
    said = refused("pretrain", configs["pretrain"], "data.path=shards")
    assert "these shards have no index; run `foveal data index shards`" in said


def test_gzipped_shards(shards: Path, configs, refused: Refused) -> None:
    """Training says that they are compressed, and so does indexing, which names the file to unpack to."""
    for file in shards.iterdir():
        if file.suffix == ".tar":
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
        file.unlink()
    assert "compressed" in refused("pretrain", configs["pretrain"], "data.path=shards")
    with pytest.raises(DataError, match=r"train-000000\.tar\.gz is compressed.*unpack it to train-000000\.tar"):
        data_commands(["index", "shards"], standalone_mode=False)


def test_a_split_that_is_not_there(configs, refused: Refused) -> None:
    assert "split 'trian' does not exist" in refused("pretrain", configs["pretrain"], "data.train=trian")
    assert "split 'test' does not exist" in refused("finetune", configs["finetune"], "data.val=test")


# --- runs and exports ---


def test_a_checkpoint_from_other_science(configs, refused: Refused, one_rank: Ranks, tmp_path_factory) -> None:
    run = tmp_path_factory.mktemp("other") / "run"
    one_rank.train(stage_named("pretrain"), configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=2")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    said = refused(
        "pretrain", configs["pretrain"], "engine.kind=plain", f"run.dir={run}", "seed=4", "epochs=2", ways=["--run"]
    )
    assert "was made with other science: epochs (was 1, is 2), seed (was 3, is 4)" in said
    assert "/config.yaml has the run's own settings" in said
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.image_size=18", "image_size=18 is not a whole number of patches of 4 pixels; the nearest that is: 16"),
        ("data.channels=3", "has channels 1, the student's data.channels is 3"),
        ("model.patch=2", "has patch 4, the student's model.patch is 2"),
        ("teacher=nowhere", "nowhere is no export: it has no card.json"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher(override: str, sentence: str, configs, refused: Refused) -> None:
    assert sentence in refused("distill", configs["distill"], override)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.image_size=[16, 18]", "image_size=[16, 18] is not a whole number of patches of 4 pixels"),
        (
            "model={name: vit_tiny_patch16_224, patch: 2, width: 32, depth: 2, heads: 2}",
            "has patch 4, the config says 2",
        ),
        ("data.channels=3", "has channels 1, the config says 3"),
        (
            "model={name: vit_tiny_patch16_224, patch: 4, width: 64, depth: 2, heads: 2}",
            "has width 32, the config says 64",
        ),
        ("init=nowhere", "nowhere is no export: it has no card.json"),
        ("init=null", "model is missing: without init"),
        ("engine.kind=deepspeed", "engine.kind: "),
        (
            "trials={arms: {a: null}, lr_per_256: [0.1]}",
            "exclude each other: trials.arms says what each arm starts from",
        ),
    ],
)
def test_a_config_that_contradicts_the_export(override: str, sentence: str, configs, refused: Refused) -> None:
    assert sentence in refused("finetune", configs["finetune"], override)


def test_statistics_that_are_not_the_exports(configs, refused: Refused) -> None:
    for stage in ("distill", "finetune"):
        said = refused(stage, configs[stage], "data.mean=[0.5]", "data.std=[0.5]")
        assert "data.mean is [0.5], the weights were trained with" in said and "leave data.mean out" in said


# --- the same, of real processes ---


@pytest.mark.slow
def test_a_real_process(configs, tmp_path) -> None:
    done = ended([PYTHON, "-m", "pretrain.run", configs["pretrain"], "optim.lr=1"], tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("foveal: ") and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.thorough
@pytest.mark.slow
def test_two_ranks_say_it_once(configs, tmp_path) -> None:
    settings = [configs["pretrain"], "batch.global_size=63", "data.lanes=7"]
    done = ended(["torchrun", "--standalone", "--nproc-per-node=2", "-m", "pretrain.run", *settings], tmp_path)
    assert done.code != 0
    sentence = "foveal: a batch of 63 images cannot be dealt to 2 ranks equally"
    assert [line.startswith(sentence) for line in done.err.splitlines() if line.startswith("foveal: ")] == [True]
    assert sentence in done.err.splitlines()[-2]  # the root cause in torchrun's report
    assert not (tmp_path / "runs").exists()
