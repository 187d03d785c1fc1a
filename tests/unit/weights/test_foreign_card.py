"""Cards of foreign weights: heads that timm's model has or has not, and facts of config.json that shapes do not show."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.weights.foreign_card import check_square_window
from foveal.weights.pretrained import PretrainedSource, inspect_pretrained
from foveal.weights.teacher import build_unfrozen_teacher

VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
SIZES: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 32}
TINY = SIZES | {"intermediate_size": 768, "layer_norm_eps": 1e-6}


def inspect(folder: Path, name: str, **settings: Any) -> PretrainedSource:
    return inspect_pretrained(folder, name, DataConfig.from_dict({"path": "x", "image_size": 32} | settings, "here"))


def hugging_face(folder: Path, kind: str, config: str, **settings: Any) -> Any:
    """Write a randomly drawn model to a folder as transformers does."""
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**TINY | settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def logits(source: PretrainedSource, images: Tensor) -> Tensor:
    return build_unfrozen_teacher(source.load_weights(), source.card, None, source.path).eval()(images)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_classifier_on_the_mean_of_the_patches_has_its_norm_behind_it(tmp_path: Path) -> None:
    """As facebookresearch/mae fine-tunes: fc_norm in place of norm."""
    model = timm.create_model(VIT, img_size=32, num_classes=3, global_pool="avg").eval()
    nn.init.normal_(model.get_parameter("head.weight"))
    assert "fc_norm.weight" in model.state_dict()
    save_file(model.state_dict() | {"mask_token": torch.ones(1)}, tmp_path / "model.safetensors")
    source = inspect(tmp_path, VIT)
    assert (source.card.encoder["pooling"], source.card.encoder["classes"]) == ("avg", 3)
    torch.testing.assert_close(logits(source, images()), model(images()))


def test_deits_two_heads_are_averaged(tmp_path: Path) -> None:
    names = {number: f"kind {number}" for number in range(3)}
    model = hugging_face(tmp_path, "DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=3, id2label=names)
    source = inspect(tmp_path, DEIT)
    assert source.card.classes == ("kind 0", "kind 1", "kind 2")
    torch.testing.assert_close(logits(source, images()), model(images()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "name", "settings", "note"),
    [
        ("DeiTForImageClassification", "DeiTConfig", DEIT, {}, "it reads the class token alone, and timm averages"),
        (
            "Dinov2ForImageClassification",
            "Dinov2Config",
            "vit_small_patch14_dinov2",
            {"hidden_size": 384, "num_attention_heads": 6, "image_size": 28, "patch_size": 14},
            "it reads 768 features, not the 384 of a token",
        ),
    ],
)
def test_a_head_that_timms_model_has_not_is_left_out(
    kind: str, config: str, name: str, settings: dict[str, Any], note: str, tmp_path: Path
) -> None:
    hugging_face(tmp_path, kind, config, num_labels=3, **settings)
    source = inspect(tmp_path, name, image_size=settings.get("image_size", 32))
    assert source.card.encoder["classes"] == 0
    assert any(line.startswith(f"classifier left out: {note}") for line in source.notes)
    assert not any(key.startswith("head") for key in source.load_weights())


@pytest.mark.parametrize("name", [VIT, DEIT])
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"hidden_act": "quick_gelu"}, "has the activation quick_gelu (hidden_act in config.json), timm's "),
        ({"hidden_act": "gelu_pytorch_tanh"}, "has the activation gelu_pytorch_tanh"),
        ({"num_attention_heads": 6}, "has heads 6, timm's "),
        ({"layer_norm_eps": 1e-2}, "has norms that add 0.01 to the variance (layer_norm_eps in config.json), timm's "),
    ],
)
def test_what_shapes_do_not_show_is_compared(name: str, config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    kind = "DeiT" if name == DEIT else "ViT"
    hugging_face(tmp_path, f"{kind}Model", f"{kind}Config", **config)
    with pytest.raises(ExportError) as caught:
        inspect(tmp_path, name)
    assert sentence in str(caught.value)


def test_another_epsilon_is_said(tmp_path: Path) -> None:
    hugging_face(tmp_path, "ViTModel", "ViTConfig", layer_norm_eps=1e-12)
    assert "norms add timm's 1e-06 to the variance, config.json says 1e-12" in inspect(tmp_path, VIT).notes


def test_beits_biases_of_a_window_that_is_no_square_are_one_sentence(tmp_path: Path) -> None:
    """transformers exchanges rows and columns of such a table: the same weights are another model in timm."""
    weights = {"blocks.0.attn.relative_position_bias_table": torch.zeros(24, 2)}
    check_square_window(tmp_path, 32, weights)
    check_square_window(tmp_path, (32, 64), {})
    with pytest.raises(ExportError, match=r"has bias tables under Hugging Face's names for images of 32 x 64 pixels"):
        check_square_window(tmp_path, (32, 64), weights)


def test_heads_of_timms_model_args_are_compared(tmp_path: Path) -> None:
    save_file(timm.create_model(VIT, img_size=32, num_classes=0).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": VIT, "model_args": {"num_heads": 6}}))
    with pytest.raises(ExportError, match=f"has heads 6, timm's {VIT} has 3; they must be equal"):
        inspect(tmp_path, VIT)
