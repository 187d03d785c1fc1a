"""Files of foreign weights: one, or parts with an index; of several precisions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.atomic import sha256
from foveal.errors import ExportError
from foveal.weights.foreign import find_weights_file, read_weights_as_timm
from foveal.weights.foreign_card import read_foreign_model

INDEX = "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tiny() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=8, depth=2, num_heads=2).state_dict()


def write_parts(folder: Path, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write a model in two parts with an index, as Hugging Face's libraries do."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype) for name, value in tiny().items()}
    files = {prefix + name: PARTS[number % 2] for number, name in enumerate(weights)}
    for part in PARTS:
        save_file({name: weights[name.removeprefix(prefix)] for name in files if files[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return weights


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("of_the_index", [False, True])
def test_parts_are_read_through_their_index(prefix: str, of_the_index: bool, tmp_path: Path) -> None:
    weights = write_parts(tmp_path, prefix)
    file = find_weights_file(tmp_path / INDEX if of_the_index else tmp_path)
    found = read_weights_as_timm(file, weights)
    assert found.tensors.keys() == weights.keys()
    assert all(found.tensors[name].equal(value) for name, value in weights.items())
    second = load_file(tmp_path / PARTS[1])
    save_file({name: value + 1 for name, value in second.items()}, tmp_path / PARTS[1])
    assert read_weights_as_timm(file, weights).sha256 != found.sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_half_precision_are_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = write_parts(tmp_path, "module.", dtype)
    found = read_weights_as_timm(find_weights_file(tmp_path), weights)
    assert found.tensors.keys() == weights.keys()
    assert all(found.tensors[name].equal(value.float()) for name, value in weights.items())


def test_parts_of_torch_save_are_read_through_their_index(tmp_path: Path) -> None:
    """As transformers wrote large models before safetensors: pytorch_model-00001-of-00002.bin."""
    weights = {name: value.half() for name, value in tiny().items()}
    parts = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    files = {name: parts[number % 2] for number, name in enumerate(weights)}
    for part in parts:
        torch.save({name: weights[name] for name in files if files[name] == part}, tmp_path / part)
    with pytest.raises(
        ExportError, match=r"its parts are read through pytorch_model\.bin\.index\.json, which is missing"
    ):
        find_weights_file(tmp_path)
    with pytest.raises(ExportError, match=r"give its folder, where pytorch_model\.bin\.index\.json names all parts"):
        find_weights_file(tmp_path / parts[0])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    found = read_weights_as_timm(find_weights_file(tmp_path), weights)
    assert found.tensors.keys() == weights.keys()
    assert all(found.tensors[name].equal(value.float()) for name, value in weights.items())
    torch.save([1], tmp_path / parts[0])
    with pytest.raises(ExportError, match="is no part of weights: it is a list"):
        read_weights_as_timm(find_weights_file(tmp_path), weights)


def test_one_file_is_read_before_parts_and_keeps_its_digest(tmp_path: Path) -> None:
    weights = write_parts(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    file = find_weights_file(tmp_path)
    assert file.name == "model.safetensors"
    assert read_weights_as_timm(file, weights).sha256 == sha256(file)


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        (
            {"a": "model-00003-of-00003.safetensors"},
            "names model-00003-of-00003.safetensors, which is not in the folder",
        ),
        ({"a": "../model.safetensors"}, "a part is a file in the same folder"),
        ({"a": 3}, "a part is a file in the same folder"),
        ({"a": "flax_model.msgpack"}, "which is neither safetensors nor a file of torch.save"),
        ({"a": PARTS[0]}, f"says that {PARTS[0]} holds a, which it does not"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_parts_is_one_sentence(weight_map: Any, sentence: str, tmp_path: Path) -> None:
    write_parts(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ExportError) as caught:
        read_weights_as_timm(find_weights_file(tmp_path), ())
    assert str(caught.value).startswith(f"{tmp_path / INDEX} ")
    assert sentence in str(caught.value)


def test_files_that_are_not_the_weights_are_one_sentence(tmp_path: Path) -> None:
    write_parts(tmp_path)
    with pytest.raises(ExportError, match=r"is one part of several; give its folder"):
        find_weights_file(tmp_path / PARTS[0])
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ExportError, match=rf"{INDEX} cannot be read"):
        read_weights_as_timm(find_weights_file(tmp_path), ())
    (tmp_path / INDEX).unlink()
    with pytest.raises(ExportError, match=rf"its parts are read through {INDEX}, which is missing"):
        find_weights_file(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    save_file(tiny(), other / "open_clip_model.safetensors")
    with pytest.raises(ExportError, match=r"give the file that is meant, such as .+open_clip_model\.safetensors"):
        find_weights_file(other)
    torch.save(tiny(), tmp_path / "mae.pth")
    (tmp_path / "readme.md").touch()
    for part in PARTS:
        (tmp_path / part).unlink()
    with pytest.raises(ExportError, match=r"give the file that is meant, such as .+mae\.pth"):
        find_weights_file(tmp_path)
    with pytest.raises(
        ExportError, match=r"readme\.md is no file of weights: foveal reads safetensors and files of torch"
    ):
        find_weights_file(tmp_path / "readme.md")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda value: torch.full_like(value, torch.nan),
            "has norm.weight with 8 of 8 values that are NaN or infinite",
        ),
        (lambda value: value.index_fill(0, torch.tensor([1]), torch.inf), "has norm.weight with 1 of 8 values"),
        (lambda value: value.double() * 1e300, "has norm.weight with 8 of 8 values"),
        (lambda value: value.to(torch.int8), "has norm.weight of type int8, which is no floating-point number"),
        (lambda value: value.to(torch.int32), "has norm.weight of type int32"),
        (lambda value: value.to(torch.complex64), "has norm.weight of type complex64"),
    ],
)
def test_weights_that_are_no_finite_real_numbers_are_refused(
    change: Callable[[Tensor], Tensor], sentence: str, tmp_path: Path
) -> None:
    weights = tiny()
    save_file(weights | {"norm.weight": change(weights["norm.weight"])}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=sentence):
        read_foreign_model(tmp_path / "model.safetensors", "vit_tiny_patch16_224", 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precision_and_counters_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: value.to(dtype) for name, value in tiny().items()}
    weights |= {
        "bn.num_batches_tracked": torch.tensor(3),
        "position_ids": torch.arange(4),
        "decoder.x": torch.tensor(torch.nan),
    }
    save_file(weights, tmp_path / "model.safetensors")
    found = read_foreign_model(tmp_path / "model.safetensors", "vit_tiny_patch16_224", 60).tensors
    assert found["norm.weight"].equal(weights["norm.weight"].float())
