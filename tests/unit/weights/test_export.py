"""Exports: a round trip preserves them; damaged and mismatched exports raise one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.atomic import sha256
from foveal.errors import ExportError, StorageUnreachableError
from foveal.weights.export import Card, load_weights_strict, read_card, read_export, read_head, write_export

CARD = Card(
    stage="pretrain",
    encoder={"name": "vit_tiny_patch16_224", "width": 32, "mlp_ratio": 4.0},
    mean=(0.25, 0.5, 1 / 3),
    std=(0.1, 0.2, 0.3),
    classes=("café", "犬"),
    resized_from=(16, 24),
    step=100,
    metrics={"loss": 0.5},
    science={"optim.betas": [0.9, 0.95], "clip": None},
    versions={"torch": "2"},
)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.weight": torch.randn(3, 4, generator=generator).t(),  # not contiguous
        "cls_token": torch.randn(1, 1, 4, generator=generator),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_export(tmp_path / "export", weights(), CARD)
    return tmp_path / "export"


def test_what_goes_in_comes_out(folder: Path) -> None:
    loaded, card = read_export(folder)
    assert loaded.keys() == weights().keys()
    assert all(loaded[name].equal(value) for name, value in weights().items())
    card_json = json.loads((folder / "card.json").read_text())
    assert card == read_card(folder)
    assert card.sha256 == sha256(folder / "model.safetensors")
    for name in (
        "stage",
        "encoder",
        "mean",
        "std",
        "classes",
        "resized_from",
        "step",
        "metrics",
        "science",
        "versions",
        "format",
    ):
        assert getattr(card, name) == getattr(CARD, name), name
    assert card_json["format"] == 1
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "card.json", "model.safetensors"]


def test_a_card_from_before_there_was_resizing(folder: Path) -> None:
    card_json = json.loads((folder / "card.json").read_text())
    del card_json["resized_from"]
    (folder / "card.json").write_text(json.dumps(card_json))
    assert read_card(folder).resized_from is None


HEAD = {"kind": "segmentation", "classes": 2}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_of_an_export_are_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_export(tmp_path / "export", weights(), replace(CARD, head=HEAD), {"classify.weight": torch.zeros(1)})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()}
    assert modes == dict.fromkeys(("README.md", "card.json", "head.safetensors", "model.safetensors"), 0o666 & ~umask)
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o777 & ~umask


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    """Fully or partly tied weights; the export loads strictly into the model that ties them."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    third.weight = first.weight
    second.bias = nn.Parameter(first.weight.detach()[1])  # a view
    tied = nn.Sequential(first, second, third)
    state = tied.state_dict()
    write_export(tmp_path / "export", state, CARD)
    loaded, _ = read_export(tmp_path / "export")
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(value) for name, value in state.items())
    load_weights_strict(tied, loaded, tmp_path / "export")
    with pytest.raises(ExportError, match=r"export lacks 2\.weight"):
        load_weights_strict(
            tied, {name: value for name, value in loaded.items() if name != "2.weight"}, tmp_path / "export"
        )


def test_a_head_lies_beside_the_encoder(tmp_path: Path) -> None:
    """The encoder is read as without a head; the head is read by its kind."""
    head, folder = {"classify.weight": torch.ones(2, 3)}, tmp_path / "export"
    write_export(folder, weights(), replace(CARD, head=HEAD), head)
    files = ["README.md", "card.json", "head.safetensors", "model.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == files
    assert read_export(folder)[0].keys() == weights().keys()
    loaded, card_json = read_head(folder, "segmentation")
    assert card_json == HEAD
    assert loaded["classify.weight"].equal(head["classify.weight"])
    with pytest.raises(ExportError, match="has a head for segmentation, and one for detection is wanted"):
        read_head(folder, "detection")
    save_file({"other": torch.ones(1)}, folder / "head.safetensors")
    with pytest.raises(ExportError, match=r"head\.safetensors is not the file that its card describes"):
        read_head(folder, "segmentation")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ExportError, match=r"is no whole export: head\.safetensors is missing"):
        read_head(folder, "segmentation")


def test_an_export_without_a_head_says_nothing_of_one(folder: Path) -> None:
    assert "head" not in json.loads((folder / "card.json").read_text())
    assert read_card(folder).head is None
    with pytest.raises(ExportError, match="has no head, and one for segmentation is wanted"):
        read_head(folder, "segmentation")


def test_an_export_that_is_made_again_replaces_the_old_one(folder: Path) -> None:
    write_export(folder, {"other": torch.ones(2)}, CARD)
    assert read_export(folder)[0].keys() == {"other"}
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_an_export_that_fails_leaves_the_old_one(folder: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_export(folder, {"a": torch.ones(4)}, replace(CARD, science={"clip": object()}))
    assert read_export(folder)[0].keys() == weights().keys()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def swap(folder: Path) -> None:
    save_file({"blocks.0.weight": torch.zeros(4, 3)}, folder / "model.safetensors")


def edit_card(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card_json = json.loads((folder / "card.json").read_text()) | changes
        card_json = {name: value for name, value in card_json.items() if value is not ...}
        (folder / "card.json").write_text(json.dumps(card_json))

    return change


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    edit_card(sha256=sha256(folder / "model.safetensors"))(folder)


def not_finite(folder: Path) -> None:
    write_export(folder, weights() | {name: value / 0 for name, value in list(weights().items())[:1]}, CARD)


HARM: list[tuple[Callable[[Path], Any], str]] = [
    (flip, r"model\.safetensors is not the file that its card describes \(sha256 differs\)"),
    (swap, r"model\.safetensors is not the file that its card describes \(sha256 differs\)"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no whole export: model.safetensors is missing"),
    (not_finite, r"values that are NaN or infinite; give the weights of a step before"),
    (no_safetensors, r"model\.safetensors cannot be read"),
    (lambda folder: (folder / "card.json").unlink(), "is no export: it has no card.json"),
    (lambda folder: (folder / "card.json").write_text("{"), r"card\.json cannot be read"),
    (lambda folder: (folder / "card.json").write_bytes(b"\xff"), r"card\.json cannot be read"),
    (lambda folder: (folder / "card.json").write_text("[]"), "has export format None; this foveal reads format 1"),
    (edit_card(format=2), "has export format 2; this foveal reads format 1"),
    (edit_card(format=None), "has export format None"),
    (edit_card(colour="red"), r"card\.json is not as foveal wrote it \(.*colour"),
    (edit_card(mean=...), r"card\.json is not as foveal wrote it \('mean'"),
    (edit_card(encoder=...), r"card\.json is not as foveal wrote it \(.*encoder"),
    (edit_card(std=0.5), r"card\.json is not as foveal wrote it"),
    (edit_card(mean=["a"]), r"card\.json is not as foveal wrote it \('mean\.0'"),
    (edit_card(mean=[float("inf")]), r"card\.json is not as foveal wrote it \('mean\.0'"),
    (edit_card(std=[0.0]), r"card\.json is not as foveal wrote it \('std\.0'"),
    (edit_card(classes={"a": 1}), r"card\.json is not as foveal wrote it \('classes'"),
    (edit_card(encoder=[]), r"card\.json is not as foveal wrote it \('encoder'"),
    (edit_card(sha256=None), r"card\.json is not as foveal wrote it \('sha256'"),
    (edit_card(resized_from="a"), r"card\.json is not as foveal wrote it \('resized_from"),
    (edit_card(head=5), r"card\.json is not as foveal wrote it \('head'"),
    (lambda folder: (folder / "card.json").write_text("[" * 100_000), r"card\.json cannot be read"),
    (lambda folder: (folder / "card.json").write_text('\ufeff{"format": 1}'), r"card\.json cannot be read"),
]


@pytest.mark.parametrize(("harm", "sentence"), HARM)
def test_what_is_not_whole_is_one_sentence(harm: Callable[[Path], None], sentence: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(ExportError, match=sentence) as caught:
        read_export(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere is no export"):
        read_card(tmp_path / "nowhere")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))


def fresh() -> dict[str, Tensor]:
    return {name: torch.full_like(value, 7) for name, value in model().state_dict().items()}


def test_a_folder_of_exports_says_which(folder: Path, tmp_path: Path) -> None:
    for name in ("small", "other"):
        shutil.copytree(folder, tmp_path / "several" / name)
    with pytest.raises(ExportError, match=r"it has no card.json; give one of the exports in it \(other, small\)"):
        read_card(tmp_path / "several")
    with pytest.raises(ExportError, match=r"it has no card.json; give the export folder of a finished run"):
        read_card(folder / "model.safetensors")


def test_weights_are_loaded_buffers_included() -> None:
    module = model()
    load_weights_strict(module, fresh(), Path("export"))
    assert all((value == 7).all() for value in module.state_dict().values())


def test_a_new_head_keeps_its_start_and_an_old_one_is_left_over() -> None:
    module, new_weights = model(), fresh()
    start = module.state_dict()["2.weight"].clone()
    new_weights["2.weight"] = torch.zeros(9, 9)  # a head of other classes
    new_weights["norm.weight"] = torch.zeros(3)
    load_weights_strict(module, new_weights, Path("export"), new_module_prefixes=["2."], unused_prefixes=["norm."])
    assert module.state_dict()["2.weight"].equal(start)
    assert module.state_dict()["0.weight"].eq(7).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"0.weight": None}, "export lacks 0.weight [3, 2]"),
        ({"more": torch.ones(1)}, "export has names that are not the model's: more [1]"),
        ({"0.weight": torch.ones(2, 3)}, "export has other shapes: 0.weight [2, 3] for [3, 2]"),
        (
            {f"x{n}": torch.ones(1) for n in range(7)},
            "not the model's: x0 [1], x1 [1], x2 [1], x3 [1], x4 [1] and 2 more",
        ),
        (
            {"more": torch.ones(1), "0.weight": torch.ones(2, 3)},
            "export has names that are not the model's: more [1]; has other shapes: 0.weight [2, 3] for [3, 2]",
        ),
        ({f"x{n}": torch.ones(1) for n in range(5)}, "not the model's: x0 [1], x1 [1], x2 [1], x3 [1], x4 [1]"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(change: dict[str, Tensor | None], sentence: str) -> None:
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    new_weights = {name: value for name, value in (fresh() | change).items() if value is not None}
    with pytest.raises(ExportError) as caught:
        load_weights_strict(module, new_weights, Path("export"), unused_prefixes=["2.unknown"])
    assert str(caught.value).endswith(sentence)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_what_never_answers_is_left_within_the_patience(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(StorageUnreachableError, match=rf"{name} cannot be read \(no answer within 0.2 s\)"):
        read_export(folder, 0.2)
