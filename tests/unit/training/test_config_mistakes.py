"""What is given as CONFIG and is none gets a sentence that says what to type."""

from pathlib import Path

import pytest

from foveal.errors import ConfigError
from foveal.strict_yaml import read_yaml
from foveal.training.cli import load_config
from foveal.training.config_files import SHIPPED_CONFIGS
from foveal.training.config_mistakes import list_matching_stages, locate_config, refuse_run_of_other_stage
from foveal.training.stage import STAGE_NAMES, import_stage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(config: str, stage: str = "pretrain") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(import_stage(stage).config_class, stage, config, ["run.dir=x"])
    return str(caught.value)


def make(*files: str) -> None:
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"\x00")


def test_a_name_gets_near_names_and_what_there_is() -> None:
    assert refusal("imagenete").startswith("pretrain has no config 'imagenete'. Did you mean 'imagenette'? There are ")
    assert "mae_vit_b16, mae_vit_b16_b5760, " in refusal("imagenete")
    assert refusal("configs/pretrain/imagenete.yaml") == (
        "configs/pretrain/imagenete.yaml: no such file. Did you mean 'imagenette'?"
    )
    make("mine.yaml")
    assert "Did you mean 'mine.yaml'?" in refusal("mine")


@pytest.mark.parametrize(
    ("files", "config", "sentence"),
    [
        (["e/card.json", "e/model.safetensors"], "e", "e holds weights: type foveal train distill CONFIG teacher=e"),
        (["e/card.json"], "e/card.json", "e holds weights: type "),
        (["e/model.safetensors"], "e/model.safetensors", "e/model.safetensors holds weights: type "),
        (["r/science.json", "r/config.yaml"], "r", "r is the directory of a run: to continue it, type foveal train distill r/config.yaml"),
        (["r/science.json", "r/config.yaml", "r/export/card.json"], "r", "; to start from its weights, foveal train distill CONFIG teacher=r/export"),
        (["s/manifest.json", "s/a-0.tar"], "s", "s is a folder of shards: type foveal train distill CONFIG data.path=s, "),
        (["s/manifest.json", "s/a-0.tar"], "s/a-0.tar", "s is a folder of shards: "),
        (["s/a-0.tar"], "s", "s holds tar shards without an index: type foveal data index s first"),
        (["c/a.yaml"], "c", "c is a folder: give one of its files, such as c/a.yaml"),
        (["i/cat/a.JPG"], "i", "i holds images: pack them by foveal data pack folder i --out data/i"),
        (["n/notes.txt"], "n", "n is a folder: give a YAML file, or one of cifar10_small, digits, "),
    ],
)  # fmt: skip
def test_a_folder_says_what_to_type(files: list[str], config: str, sentence: str) -> None:
    make(*files)
    assert sentence in refusal(config, "distill")


def test_the_stage_of_a_config_is_recognised() -> None:
    distill = SHIPPED_CONFIGS / "distill" / "digits.yaml"
    assert refusal("mae_vit_s16").startswith(
        "mae_vit_s16 is a config of distill, not of pretrain: type foveal train distill mae_vit_s16; pretrain has "
    )
    assert refusal(str(distill)).endswith(f"not of pretrain: type foveal train distill {distill}")  # by its folder
    mine = Path("mine.yaml")
    mine.write_text((SHIPPED_CONFIGS / "finetune" / "digits.yaml").read_text())  # by its settings
    assert (
        refusal("mine.yaml")
        == "mine.yaml is a config of finetune, not of pretrain: type foveal train finetune mine.yaml"
    )
    assert refusal("configs/pipelines/demo.yaml").startswith("configs/pipelines/demo.yaml: no such file")
    assert " is a pipeline of stages: type " in refusal(str(SHIPPED_CONFIGS / "pipelines" / "demo.yaml"))
    assert " --config_file " in refusal(str(SHIPPED_CONFIGS / "accelerate" / "cpu2.yaml"))


def test_a_mistake_in_a_config_of_the_stage_is_named_itself() -> None:
    Path("mine.yaml").write_text((SHIPPED_CONFIGS / "pretrain" / "digits.yaml").read_text() + "task: segmentation\n")
    assert refusal("mine.yaml").startswith("mine.yaml: task is not a setting")
    assert "File name too long" in refusal("x" * 300)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_every_shipped_config_is_of_its_stage(stage: str) -> None:
    for file in (SHIPPED_CONFIGS / stage).glob("*.yaml"):
        assert stage in list_matching_stages(read_yaml(file))
        assert locate_config(stage, file.stem).name == file.name


def test_a_run_of_another_stage_is_not_a_run_of_other_science() -> None:
    Path("config.yaml").write_text("epochs: 1\nmask_ratio: 0.5\n")
    science = ["mask_ratio", "epochs", "inherited.data"]
    pretrain, finetune = (import_stage(stage).config_class.model_construct() for stage in ("pretrain", "finetune"))
    refuse_run_of_other_stage(pretrain, Path(), science)
    with pytest.raises(ConfigError, match=r"is a run of pretrain.*: give this run another run.dir"):
        refuse_run_of_other_stage(finetune, Path(), science)
