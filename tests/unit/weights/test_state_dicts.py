"""The state dict that is meant among the objects of a checkpoint."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from foveal.errors import ExportError
from foveal.weights.foreign import read_weights_as_timm
from foveal.weights.state_dicts import select_state_dict

HERE = Path("checkpoint.pth")


def tiny(name: str = "vit_tiny_patch16_224") -> dict[str, Tensor]:
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2} if "vit" in name else {}
    return timm.create_model(name, **sizes).state_dict()


@pytest.mark.parametrize(
    "keys", [("model",), ("state_dict",), ("teacher",), ("model_ema",), ("ema", "module"), ("net",)]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
def test_a_nested_state_dict_is_read(name: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    weights = tiny(name)
    tree: Any = {f"module.{key}": value for key, value in weights.items()}
    for key in reversed(keys):
        tree = {key: tree, "epoch": 3}
    torch.save(tree, tmp_path / "checkpoint.pth")
    source = read_weights_as_timm(tmp_path / "checkpoint.pth", weights)
    assert source.tensors.keys() == weights.keys()
    assert source.notes == (
        f"weights are those under {'.'.join(keys)} of the file",
        "not read from the file: epoch",
        "prefix module. taken off",
    )


def test_an_encoder_is_read_beside_what_is_none() -> None:
    """I-JEPA's predictor, DINO's loss, and an optimizer that names its moments by weight."""
    weights = tiny()
    moments = {name: {"exp_avg": value} for name, value in weights.items()}
    others = {"predictor": {"blocks.0.norm1.weight": torch.ones(99999)}, "dino_loss": {"center": torch.ones(1)}}
    tree = others | {"optimizer": {"state": moments}, "teacher": {f"backbone.{k}": v for k, v in weights.items()}}
    found, notes = select_state_dict(tree, HERE, weights)
    assert found.keys() == tree["teacher"].keys()
    assert notes == [
        "weights are those under teacher of the file",
        "not read from the file: predictor, dino_loss, optimizer",
    ]


def test_tensors_beside_other_values_are_a_state_dict() -> None:
    weights = tiny()
    found, notes = select_state_dict(weights | {"epoch": 3, "note": "x"}, HERE, weights)
    assert found.keys() == weights.keys()
    assert notes == ["not read from the file: epoch, note"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.parametrize(
    "keys", [("student", "teacher"), ("state_dict", "state_dict_ema"), ("encoder", "target_encoder")]
)
def test_several_encoders_are_refused_with_the_command_that_keeps_one(
    keys: tuple[str, str], name: str, tmp_path: Path
) -> None:
    weights, file = tiny(name), tmp_path / "check'point $HOME.pth"
    other = {key: value + 1 for key, value in weights.items()}
    torch.save({keys[0]: weights, keys[1]: other, "epoch": 3}, file)
    with pytest.raises(ExportError) as caught:
        read_weights_as_timm(file, weights)
    assert str(caught.value).startswith(f"{file} holds 2 encoders ({keys[0]}, {keys[1]}); ")
    allowed = torch.serialization.get_safe_globals()
    python, option, program = shlex.split(str(caught.value).partition("for example by ")[2])
    assert (python, option) == ("python", "-c")
    exec(program, {})  # noqa: S102 - what a user would run
    torch.serialization.clear_safe_globals()  # a user's command is a process of its own
    torch.serialization.add_safe_globals(allowed)
    kept = read_weights_as_timm(tmp_path / f"check'point $HOME.{keys[1]}.pth", weights).tensors
    assert all(kept[key].equal(value) for key, value in other.items())


def test_equal_encoders_are_one() -> None:
    weights = tiny()
    tree = {"model": weights, "module": {name: value.clone() for name, value in weights.items()}, "epoch": 1}
    found, notes = select_state_dict(tree, HERE, weights)
    assert found.keys() == weights.keys()
    assert notes == [
        "weights are those under model and module of the file, which are equal",
        "not read from the file: epoch",
    ]


def test_without_an_encoder_the_largest_state_dict_is_named() -> None:
    """The refusal that follows lists its names."""
    tree = {"loss": {"center": torch.ones(2)}, "model": {"conv_proj.weight": torch.ones(9)}}
    assert select_state_dict(tree, HERE, tiny())[0].keys() == {"conv_proj.weight"}


def test_a_dict_that_holds_itself_ends() -> None:
    tree: dict[str, Any] = {"epoch": 1}
    tree["model"] = tree
    with pytest.raises(ExportError, match="holds no weights: it has epoch, model"):
        select_state_dict(tree, HERE, tiny())
