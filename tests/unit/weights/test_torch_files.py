"""Files of torch.save: every format, checkpoints of training scripts, and files that would run code, which never runs."""

import argparse
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from foveal.errors import ExportError
from foveal.weights.foreign import find_weights_file, read_weights_as_timm


def tiny() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=8, depth=2, num_heads=2).state_dict()


def read(file: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return read_weights_as_timm(find_weights_file(file), weights).tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["mae.pth", "a.pt", "pytorch_model.bin", "last.ckpt", "checkpoint.pth.tar"])
def test_every_format_and_precision_is_read(name: str, is_zip: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {key: value.to(dtype) for key, value in tiny().items()}
    torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    found = read(tmp_path / name, weights)
    assert found.keys() == weights.keys()
    assert all(found[key].equal(value.float()) for key, value in weights.items())


def test_weights_are_copies_of_the_file(tmp_path: Path) -> None:
    """A mapped file that is written again while a run uses its weights would change them."""
    weights, file = tiny(), tmp_path / "mae.pth"
    torch.save(weights, file)
    found = read(file, weights)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(found[key].equal(value) for key, value in weights.items())


def test_a_checkpoint_with_its_options_and_optimizer_is_read(tmp_path: Path) -> None:
    """As MAE's, DINO's and DeiT's scripts save it: the options are an argparse.Namespace."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    weights = tiny()
    options = argparse.Namespace(lr=1e-3, output_dir="out", betas=(0.9, 0.95), nested=argparse.Namespace(a=[1]))
    rest = {"optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {"scale": 2.0}, "args": options}
    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"model": weights} | rest, tmp_path / "checkpoint-399.pth")
    source = read_weights_as_timm(tmp_path / "checkpoint-399.pth", weights)
    assert source.tensors.keys() == weights.keys()
    assert source.notes == (
        "weights are those under model of the file",
        "not read from the file: optimizer, epoch, scaler, args",
    )
    assert set(torch.serialization.get_safe_globals()) == allowed


class Trap:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


TRAPS: dict[str, Callable[[str], Trap]] = {
    "open": lambda path: Trap(open, path, "w"),
    "os.mkdir": lambda path: Trap(os.mkdir, path),
    "eval": lambda path: Trap(eval, f"open({path!r}, 'w')"),
    "getattr": lambda path: Trap(getattr, Trap(os.path.join, path), "x"),
}


@pytest.mark.parametrize("kind", [*TRAPS, "a Namespace with a trap"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_no_code_of_a_file_is_run(form: str, kind: str, tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "model.pth"
    trap: Any = TRAPS.get(kind, TRAPS["open"])(str(victim))
    if kind not in TRAPS:
        trap = argparse.Namespace(lr=trap)
    tree = {"model": tiny(), "args": trap}
    if form.startswith("pickle"):
        file.write_bytes(pickle.dumps({"args": trap}, protocol=int(form[-1])))
        if kind == "open":
            pickle.loads(file.read_bytes())["args"].close()  # noqa: S301 - the trap works
        assert victim.exists() == (kind == "open")
        victim.unlink(missing_ok=True)
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ExportError) as caught:
        read(file, tiny())
    assert not victim.exists()
    assert str(caught.value).startswith(f"{file} ")
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value)
    if form != "pickle 5":  # torch reads protocols up to 3
        assert "holds more than weights: it asks for " in str(caught.value)


class Recipe:
    """A class of a training script."""


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_a_file_asks_for_is_named(is_zip: bool, tmp_path: Path) -> None:
    tree = {"model": tiny(), "recipe": Recipe(), "best": np.float64(0.5)}
    torch.save(tree, tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ExportError) as caught:
        read(tmp_path / "model.pth", tiny())
    assert f"{__name__}.Recipe" in str(caught.value)
    assert ("numpy" in str(caught.value)) == is_zip  # of older files torch names the first alone
    assert str(caught.value).endswith("save its state dict alone, for example as safetensors")


def write_tar(file: Path) -> None:
    """Write the members of torch's oldest format."""
    with tarfile.open(file, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def write_script(file: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_tar, "has the tar format of torch's first releases, which cannot be read as weights alone"),
        (write_script, "is a TorchScript archive, which holds code beside weights; give its state dict"),
        (lambda file: file.write_bytes(b""), "cannot be read as a file of torch.save ("),
        (lambda file: file.write_bytes(b"version https://git-lfs"), "cannot be read as a file of torch.save ("),
        (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(50)), "cannot be read as a file of torch.save ("),
        (lambda file: torch.save([1, 2], file), "holds no weights: it is a list, and a dict of tensors by name is exp"),
        (lambda file: torch.save({"epoch": 3}, file), "holds no weights: it has epoch, and a dict of tensors by name"),
        (
            lambda file: torch.save({"cls_token": torch.ones(2).to_sparse()}, file),
            "has cls_token as a Tensor of layout",
        ),
    ],
)
def test_files_without_weights_are_one_sentence(write: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    write(file)
    with pytest.raises(ExportError) as caught:
        read(file, tiny())
    assert str(caught.value).startswith(f"{file} {sentence}")
    assert "\n" not in str(caught.value)


def test_a_torn_file_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    for is_zip in (True, False):
        torch.save(tiny(), file, _use_new_zipfile_serialization=is_zip)
        content = file.read_bytes()
        for length in (100, len(content) // 2, len(content) - 10):
            file.write_bytes(content[:length])
            with pytest.raises(ExportError, match=r"model\.pth cannot be read"):
                read(file, tiny())
