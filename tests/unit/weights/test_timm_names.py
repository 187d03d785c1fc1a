"""Weights under other libraries' names: the features of the library that wrote them, and sentences for unknown names."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.errors import ExportError
from foveal.weights.foreign import read_weights_as_timm
from foveal.weights.timm_names import UNUSED_PREFIXES, rename_to_timm

HERE = Path("weights.safetensors")
HF: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
MLP = {"intermediate_size": 64}


def shaken(module: nn.Module) -> Any:
    """Return the module in evaluation mode in float64, with every weight far from its initial value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval().double()


def timm_weights(name: str = "vit_tiny_patch16_224", **sizes: Any) -> dict[str, Tensor]:
    return timm.create_model(name, **TIMM | sizes).state_dict()


@pytest.mark.parametrize("names", ["of the file", "of the module"])
@pytest.mark.parametrize(
    ("kind", "settings", "name", "sizes"),
    [
        ("ViT", MLP, "vit_tiny_patch16_224", {}),
        ("ViTMSN", MLP, "vit_tiny_patch16_224", {}),
        ("DeiT", MLP, "deit_tiny_distilled_patch16_224", {}),
        ("IJepa", MLP, "vit_huge_patch14_gap_224", {"mlp_ratio": 4}),
        ("Dinov2", {}, "vit_small_patch14_dinov2", {}),
        ("Dinov2", {"use_swiglu_ffn": True}, "vit_giant_patch14_dinov2", {"mlp_ratio": 6}),
        ("Dinov2WithRegisters", {}, "vit_small_patch14_reg4_dinov2", {}),
        ("Beit", MLP | {"use_relative_position_bias": True}, "beit_base_patch16_224", {}),
    ],
)
def test_hugging_faces_features_are_timms(
    kind: str, settings: dict[str, Any], name: str, sizes: dict[str, Any], names: str, tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    config = getattr(transformers, f"{kind}Config")(**HF | settings)
    theirs = shaken(getattr(transformers, f"{kind}Model")(config))
    file = tmp_path / "model.safetensors"
    theirs.float()
    if names == "of the file":
        theirs.save_pretrained(tmp_path)
    else:  # transformers 5 names modules differently in files
        save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    theirs.double()
    ours: Any = timm.create_model(name, **TIMM | sizes).eval()
    foreign = read_weights_as_timm(file, ours.state_dict())
    assert foreign.is_hugging_face
    ours.load_state_dict({k: v for k, v in foreign.tensors.items() if not k.startswith(UNUSED_PREFIXES)})
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = theirs(images).last_hidden_state
    torch.testing.assert_close(ours.double().forward_features(images), expected, rtol=1e-6, atol=1e-6)


def test_dinov2s_own_names_are_timms() -> None:
    """DINOv2's code chunks its blocks, packs the SwiGLU and adds positions before the registers."""
    sizes: dict[str, Any] = TIMM | {"mlp_ratio": 6}
    model = shaken(timm.create_model("vit_giant_patch14_reg4_dinov2", **sizes))
    weights = model.state_dict()
    pos_embed = torch.randn(1, 17, 16, dtype=torch.float64)
    theirs = {
        key.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for key, value in weights.items()
        if key not in {"reg_token", "pos_embed", "cls_token"}
    }
    theirs |= {"register_tokens": weights["reg_token"], "pos_embed": pos_embed, "mask_token": torch.ones(1, 16)}
    theirs |= {"cls_token": weights["cls_token"] - pos_embed[:, :1]}
    renamed = rename_to_timm(theirs, HERE, weights).tensors
    expected = weights | {"pos_embed": pos_embed[:, 1:], "mask_token": torch.ones(1, 16)}
    assert renamed.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(renamed[key], value)


@pytest.mark.parametrize(
    ("prefix", "notes"),
    [
        ("", ()),
        ("module.", ("prefix module. taken off",)),
        ("_orig_mod.", ("_orig_mod taken off names",)),
        ("module._orig_mod.", ("_orig_mod taken off names", "prefix module. taken off")),
        ("net.backbone.vit.", ("prefix net.backbone.vit. taken off",)),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet", "densenet121"])
def test_a_prefix_that_all_names_share_is_taken_off(prefix: str, notes: tuple[str, ...], name: str) -> None:
    """All names of a headless DenseNet begin with "features." in timm too."""
    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=0).state_dict()
    renamed = rename_to_timm({prefix + key: value for key, value in weights.items()}, HERE, weights)
    assert renamed.tensors.keys() == weights.keys()
    assert renamed.notes == notes


@pytest.mark.parametrize(
    ("pattern", "replacement", "notes"),
    [
        (r"^(blocks\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", 1),
        (r"^(blocks\.\d+)", r"_orig_mod.\1._orig_mod", 1),
        (r"^", "encoder._fsdp_wrapped_module._fpw_module.", 2),
        (r"(attn|mlp)\.", r"\1._checkpoint_wrapped_module.", 1),
    ],
)
def test_torchs_wrappers_are_taken_off_wherever_they_stand(pattern: str, replacement: str, notes: int) -> None:
    with torch.device("meta"):
        weights = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    renamed = rename_to_timm({re.sub(pattern, replacement, key): v for key, v in weights.items()}, HERE, weights)
    assert renamed.tensors.keys() == weights.keys()
    assert len(renamed.notes) == notes
    assert renamed.notes[0].endswith(" taken off names")


def test_a_name_with_and_without_a_wrapper_is_one_sentence() -> None:
    twice = {"norm._orig_mod.weight": torch.ones(1), "norm.weight": torch.zeros(1)}
    with pytest.raises(ExportError, match=r"has norm\.weight twice, also as norm\.weight"):
        rename_to_timm(twice, HERE, timm_weights())


@pytest.mark.parametrize("adapter", ["blocks.0.attn.qkv.lora_A.default.weight", "blocks.0.attn.qkv.base_layer.weight"])
def test_adapters_that_are_not_merged_are_one_sentence(adapter: str) -> None:
    theirs = {f"base_model.model.{key}": value for key, value in (timm_weights() | {adapter: torch.ones(1)}).items()}
    with pytest.raises(ExportError, match=r"has low-rank adapters that are not merged into the weights \(base_model"):
        rename_to_timm(theirs, HERE, timm_weights())
    with torch.device("meta"):
        dla = timm.create_model("dla34", num_classes=0).state_dict()
    assert rename_to_timm(dla, HERE, dla).tensors.keys() == dla.keys()


@pytest.mark.parametrize(
    ("beside", "kept", "note"),
    [
        ({"head.weight", "head.bias"}, {"head.weight", "head.bias"}, None),
        ({"decoder_pred.weight", "mask_token"}, {"decoder_pred.weight", "mask_token"}, None),
        ({"head.mlp.0.weight"}, set(), "1 other weights left out (head.mlp.0.weight)"),
        ({"neck.weight", "head.weight"}, set(), "2 other weights left out (neck.weight, head.weight)"),
        ({"n_averaged"}, set(), None),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
def test_the_encoders_own_prefix_is_taken_off(beside: set[str], kept: set[str], note: str | None, name: str) -> None:
    """A head stays if nothing stands between it and the encoder: with a neck left out it would read other features."""
    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=0).state_dict()
    theirs = {f"encoder.{key}": value for key, value in weights.items()}
    theirs |= dict.fromkeys(sorted(beside, reverse=True), torch.ones(1))
    renamed = rename_to_timm(theirs, HERE, weights)
    assert renamed.tensors.keys() == weights.keys() | kept
    assert renamed.notes[1:] == ((note,) if note else ())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.parametrize("prefixes", [("student.backbone.", "teacher.backbone."), ("", "target_encoder.")])
def test_two_encoders_in_a_file_are_one_sentence(prefixes: tuple[str, str], name: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=0).state_dict()
    both = {prefix + key: value for prefix in prefixes for key, value in weights.items()}
    with pytest.raises(ExportError) as caught:
        rename_to_timm(both, HERE, weights)
    assert f"holds 2 encoders ({prefixes[0] or 'names without a prefix'}, {prefixes[1]})" in str(caught.value)


@pytest.mark.parametrize("kind", ["SiglipVision", "CLIPVision", "Swin", "ConvNext", "ResNet"])
def test_names_that_are_not_translated_are_one_sentence(kind: str) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    config_class, model_class = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    sizes = MLP | HF if "Vi" in kind else {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        weights = model_class(config_class(**sizes)).state_dict()
    with pytest.raises(ExportError, match=r"names that are neither timm's of this model nor translated \(.+\); transl"):
        rename_to_timm(weights, HERE, timm_weights())


@pytest.mark.parametrize(
    "renames",
    [
        {"cls_token": "class_token", "patch_embed.proj": "conv_proj", "blocks.": "encoder.layers.encoder_layer_"},
        {"patch_embed.proj": "patch_embed.projection", "blocks.": "layers.", "norm1": "ln1"},
        {".": "/"},
    ],
)
def test_names_of_other_libraries_are_one_sentence(renames: dict[str, str]) -> None:
    """Torchvision's, mmpretrain's and JAX's."""
    theirs = {}
    for key, value in timm_weights().items():
        for name, new_name in renames.items():
            key = key.replace(name, new_name)  # noqa: PLW2901
        theirs[key] = value
    with pytest.raises(ExportError, match=r"names that are neither timm's of this model nor translated \(.+\); transl"):
        rename_to_timm(theirs, HERE, timm_weights())


def test_incomplete_attention_is_one_sentence(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    model = transformers.ViTModel(transformers.ViTConfig(**HF | MLP))
    weights = {key: value for key, value in model.state_dict().items() if "layers.1.attention.k_proj" not in key}
    with pytest.raises(ExportError, match=r"has 2 of the 3 parts of blocks\.1\.attn\.qkv\.weight"):
        rename_to_timm(weights, tmp_path, timm_weights())


def test_stages_of_a_model_of_timm_are_no_chunks() -> None:
    weights = timm.create_model("test_efficientnet").state_dict()
    assert rename_to_timm(weights, HERE, weights).tensors.keys() == weights.keys()
