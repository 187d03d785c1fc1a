"""Pretraining that goes on with the decoder of others: the predictions of Hugging Face's ViTMAE, and refusals."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mae_checkpoints import hugging_face_mae, name_as_reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.errors import ConfigError, ExportError
from foveal.models.config import VitConfig
from foveal.models.patches import patchify
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export
from pretrain.config import PretrainConfig
from pretrain.plan import PretrainPlan, plan_pretraining
from pretrain.train import build

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2}


def settings(digits: Path, init: Path, **further: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "epochs": 1,
        "init": str(init),
        "init_decoder": True,
        "data": {"path": str(digits), "image_size": 16, "channels": 3, "lanes": 8} | further.pop("data", {}),
        "model": MODEL,
        "decoder": {"width": 16, "depth": 2, "heads": 2} | further.pop("decoder", {}),
        "batch": {"global_size": 64},
        "optim": {"warmup_epochs": 1},
        "run": {"dir": "runs/x"},
    }
    return PretrainConfig.from_dict(tree | further, "here")


def autoencoder(plan: PretrainPlan) -> Any:
    return build(plan, CPU).model.eval()


def write(kind: str, folder: Path, model: Any) -> Path:
    """Write a checkpoint as Hugging Face's library does, under the names of several versions, or MAE's reference code."""
    if kind == "reference":
        return write_reference(folder, model)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if kind == "Hugging Face, published":  # as the files of 2022, which transformers 5 reads and no longer writes
        weights = load_file(file)
        save_file({name.replace("decoder_encoder.layer", "decoder_layers"): weights[name] for name in weights}, file)
    elif kind == "Hugging Face, of the module":
        save_file(model.state_dict(), file)
    return folder


def write_reference(folder: Path, model: Any) -> Path:
    """Write a checkpoint of MAE's reference code, with optimizer and options."""
    options = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True)
    file = folder / "checkpoint-799.pth"
    torch.save({"model": name_as_reference(model), "optimizer": {"state": {}}, "epoch": 799, "args": options}, file)
    return file


def their_predictions(model: Any, images: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
    """Return Hugging Face's predictions at ``indices`` [B, M], in foveal's order of a patch's pixels."""
    logits = model(pixel_values=images, noise=noise).logits
    reordered = patchify(model.unpatchify(logits), 4)
    return reordered.gather(1, indices[:, :, None].expand(-1, -1, reordered.shape[2]))


@pytest.mark.parametrize(
    "kind", ["Hugging Face", "Hugging Face, published", "Hugging Face, of the module", "reference"]
)
def test_predictions_are_hugging_faces(kind: str, digits: Path, tmp_path: Path) -> None:
    theirs = hugging_face_mae()
    plan = plan_pretraining(settings(digits, write(kind, tmp_path, theirs)), 1)
    ours = autoencoder(plan)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    output = ours(images, noise, 0.75)
    expected = their_predictions(theirs, images, noise, output.masked_indices)
    # fp32 on both sides; predictions are of the order of 1.
    torch.testing.assert_close(output.masked_patch_pred, expected, rtol=1e-4, atol=1e-4)
    assert plan.init_source is not None
    lines = plan.init_source.summary_lines()
    assert any("decoder: 31 weights used" in line for line in lines), lines
    assert plan.init_source.unexpected_keys == ()


def test_without_the_setting_the_decoder_is_drawn(digits: Path, tmp_path: Path) -> None:
    path = write("Hugging Face", tmp_path, hugging_face_mae())
    states = [
        autoencoder(plan_pretraining(settings(digits, path, init_decoder=choice), 1)).state_dict()
        for choice in (True, False)
    ]
    same = {name for name, value in states[0].items() if states[1][name].equal(value)}
    assert same == {name for name in states[0] if name.startswith("encoder.")}
    without = settings(digits, path, init_decoder=False)
    assert "init_decoder" not in without.without_neutral(without.science_settings()), "runs in flight continue"


def test_another_image_size_has_its_own_positions(digits: Path, tmp_path: Path) -> None:
    path = write("reference", tmp_path, hugging_face_mae())
    cfg = settings(digits, path, data={"image_size": [24, 16]})
    ours = autoencoder(plan_pretraining(cfg, 1))
    drawn = autoencoder(plan_pretraining(settings(digits, path, init_decoder=False, data={"image_size": [24, 16]}), 1))
    assert ours.decoder.positions.equal(drawn.decoder.positions)
    assert not ours.decoder.mask_token.equal(drawn.decoder.mask_token)


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        ({"decoder": {"width": 32}}, "has other shapes: decoder.mask_token [1, 1, 16] for [1, 1, 32], "),
        ({"decoder": {"depth": 3}}, "lacks decoder.blocks.2.norm1.weight [16], "),
        ({"decoder": {"depth": 1}}, "has names that are not the model's: decoder.blocks.1."),
        ({"decoder": {"heads": 4}}, "has decoder_num_attention_heads 2, decoder.heads is 4; they must be equal"),
    ],
)
def test_a_decoder_that_does_not_fit_is_one_sentence(
    further: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    path = write("Hugging Face", tmp_path, hugging_face_mae())
    with pytest.raises(ExportError) as caught:
        plan_pretraining(settings(digits, path, **further), 1)
    assert str(caught.value).startswith(f"{path} {sentence}")


def test_sources_without_a_decoder_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    model = VitConfig(**MODEL)
    encoder = build_encoder(model, image_size=16, channels=3)
    card = Card("pretrain", encoder_card(model, 16, 3), (0.3,) * 3, (0.4,) * 3)
    write_export(tmp_path / "export", encoder.state_dict(), card)
    with pytest.raises(
        ExportError, match="is an export, which holds no decoder: leave init_decoder out, or go on with"
    ):
        plan_pretraining(settings(digits, tmp_path / "export"), 1)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ExportError, match=r"encoder\.pth holds no decoder under the names of MAE's code"):
        plan_pretraining(settings(digits, tmp_path / "encoder.pth"), 1)
    with pytest.raises(ConfigError, match="init_decoder=true requires init"):
        PretrainConfig.from_dict(settings(digits, tmp_path).to_dict() | {"init": None}, "here")


def test_the_plan_says_on_which_pixels_the_decoder_was_trained(digits: Path, tmp_path: Path) -> None:
    path = write("Hugging Face", tmp_path, hugging_face_mae(norm_pix_loss=True))
    plan = plan_pretraining(settings(digits, path), 1)
    assert any("trained on normalised pixels (config.json)" in line for line in plan.summary_lines())
    config = json.loads((path / "config.json").read_text())
    assert config["norm_pix_loss"] is True
