"""Segmentation on any machine, stopped and continued, and rebuilt from what it left."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks, stage_named
from safetensors.torch import load_file
from scenes import scene_tree, write_scenes

from finetune.tasks.segment import segmenter_from_export
from foveal.distributed.world import World
from foveal.errors import DataError, ExportError
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.run import Run
from foveal.weights.export import read_card, read_head

STAGE = stage_named("finetune")
# That the parts of a batch add up: test_splits.py.
FSDP2 = ("engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segment")
    tree = scene_tree(
        write_scenes(folder / "scenes"),
        segment={"head": "pyramid", "width": 16},
        evaluate_every=2,
        class_weights=[0.5, 2, 1],
    )
    (folder / "segment.yaml").write_text(yaml.safe_dump(tree))
    return folder / "segment.yaml"


@pytest.fixture(scope="module")
def alone(
    config: Path, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """The run of one rank that holds its whole batch at once, and its rows."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, one_rank.train(STAGE, config, run, "batch.max_micro_size=8")


def test_one_curve_and_one_measure(config: Path, alone: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Five images are evaluated: two ranks fill up, and count none of it."""
    rows = two_ranks.train(STAGE, config, tmp_path / "run", *FSDP2)
    assert [set(row) - {"time"} >= {"val_miou"} for row in rows] == [set(row) >= {"val_miou"} for row in alone[1]]
    for mine, theirs in zip(rows, alone[1], strict=True):
        names = [
            each for each in theirs if each in ("loss", "grad_norm", "train_pixel_accuracy") or each.startswith("val_")
        ]
        assert names
        assert [mine[each] for each in names] == pytest.approx([theirs[each] for each in names], rel=1e-4), names


def test_stopping_changes_nothing(config: Path, alone: Any, one_rank: Ranks, tmp_path: Path) -> None:
    """Bit for bit: rows, evaluations, and both files of the export."""
    one_rank.train(STAGE, config, tmp_path / "run", "batch.max_micro_size=8", "run.stop_at_step=3")
    rows = one_rank.train(STAGE, config, tmp_path / "run", "batch.max_micro_size=8")
    for key in ("step", "loss", "grad_norm", "val_miou", "val_loss"):
        assert [row[key] for row in rows if key in row] == [row[key] for row in alone[1] if key in row], key
    for name in ("model", "head"):
        ours, theirs = (load_file(run / "export" / f"{name}.safetensors") for run in (tmp_path / "run", alone[0]))
        assert ours.keys() == theirs.keys()
        assert all(ours[each].equal(theirs[each]) for each in ours)


@pytest.mark.thorough
def test_what_cannot_be_measured_was_learned_and_is_left(alone: Any, one_rank: Ranks, tmp_path: Path) -> None:
    """A mask of val with an unknown id is met after the last step, when the training is paid for."""
    tree = scene_tree(write_scenes(tmp_path / "scenes", stray=7), segment={"head": "pyramid", "width": 16})
    tree["class_weights"] = [0.5, 2, 1]
    (tmp_path / "segment.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(DataError, match="7"):
        one_rank.train(STAGE, tmp_path / "segment.yaml", tmp_path / "run", "batch.max_micro_size=8")
    for name in ("model", "head"):
        ours, theirs = (load_file(run / "export" / f"{name}.safetensors") for run in (tmp_path / "run", alone[0]))
        assert all(ours[each].equal(theirs[each]) for each in theirs)
    assert not (tmp_path / "run" / "finished.json").exists()


def _logits(world: World, config: str, overrides: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What the trained model says of images, at its export."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        leave = Run.export_weights

        def export(run: Run, engine: Any, *told: Any, **more: Any) -> None:
            with engine.eval_mode():
                found.append(engine.model(images))
            leave(run, engine, *told, **more)

        patch.setattr(Run, "export_weights", export)
        stage = stage_named("finetune")
        run_stage(stage, load_config(stage.config_class, "finetune", config, overrides), world)
    return found


def _loaded(_world: World, export: str, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [segmenter_from_export(Path(export))(images)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["segment.head=linear"], marks=pytest.mark.thorough),
        ["segment.head=pyramid"],
        pytest.param(["segment.head=pyramid", "model=null", "backbone=test_resnet"], marks=pytest.mark.thorough),
    ],
)
def test_what_it_left_says_the_same_bit_for_bit(
    words: list[str], config: Path, one_rank: Ranks, tmp_path: Path
) -> None:
    images = torch.randn(2, 3, 16, 16)
    words = [f"run.dir={tmp_path}/run", "tracking.uri=null", "evaluate_every=0", "epochs=1", *words]
    ((logits,),) = one_rank.call(_logits, str(config), words, images)
    ((again,),) = one_rank.call(_loaded, str(tmp_path / "run" / "export"), images)  # with as many threads
    assert again.equal(logits)
    assert list((tmp_path / "run" / "pictures").glob("segmentation-*.png"))


@pytest.mark.thorough
def test_the_next_stage_takes_the_encoder(config: Path, alone: Any, one_rank: Ranks, tmp_path: Path) -> None:
    """Another segmentation, at other sides, with another head; its own head is a fresh one."""
    export = alone[0] / "export"
    card = read_card(export)
    assert card.encoder["classes"] == 0
    assert read_head(export, "segmentation")[1] == card.head
    rows = one_rank.train(
        STAGE,
        config,
        tmp_path / "run",
        f"init={export}",
        "model=null",
        "segment.head=linear",
        "data.image_size=[24, 16]",
    )
    assert rows[-1]["val_miou"] > 0
    assert read_card(tmp_path / "run" / "export").resized_from == 16
    with pytest.raises(ExportError, match="has a head for segmentation, and one for detection is wanted"):
        read_head(export, "detection")
