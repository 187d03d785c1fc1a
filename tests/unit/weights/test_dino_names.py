"""DINOv2's and DINOv3's weights under their own and Hugging Face's names: the features of Hugging Face's models.

Both sides compute in float64, except the rotary positions: their periods, base^(2i/d) there and its reciprocal here, are
fp32 and differ by one rounding. Features are of the order of 1.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.weights.export import check_and_select_weights
from foveal.weights.foreign import ForeignWeights, read_weights_as_timm
from foveal.weights.pretrained import inspect_pretrained
from foveal.weights.teacher import build_unfrozen_teacher
from foveal.weights.timm_names import UNUSED_PREFIXES, rename_to_timm

ROPE_TOLERANCE = 1e-6  # of fp32 periods
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "intermediate_size": 64,
    "num_register_tokens": 4,
}
TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
HERE = Path("weights.pth")
QKVB, PLAIN, GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"


def hugging_face(kind: str, **settings: Any) -> Any:
    """A tiny random model in evaluation mode, every weight far from its initial value."""
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES | settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def join_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the queries, keys and values of layers; keys without a bias have one of 1, which DINOv3's mask takes off."""
    joined = {
        name: value for name, value in weights.items() if not re.search(r"\.([qkv]_proj|query|key|value)\.", name)
    }
    for name, value in weights.items():
        match = re.fullmatch(r"(.+\.)(q_proj|query)\.(weight|bias)", name)
        if match is not None:
            parts = ("q_proj", "k_proj", "v_proj") if match[2] == "q_proj" else ("query", "key", "value")
            names = [f"{match[1]}{part}.{match[3]}" for part in parts]
            filled = [weights.get(part, torch.ones_like(value)) for part in names]
            joined[f"{match[1].rpartition('attention.')[0]}attn.qkv.{match[3]}"] = torch.cat(filled)
    return joined


def rename(weights: dict[str, Tensor], pairs: dict[str, str]) -> dict[str, Tensor]:
    """Apply all replacements to all names."""
    renamed = {}
    for name, value in weights.items():
        for old, new in pairs.items():
            name = re.sub(old, new, name)  # noqa: PLW2901
        renamed[name] = value
    return renamed


def dinov3s_own(model: nn.Module) -> dict[str, Tensor]:
    """The weights of Hugging Face's DINOv3 under the names of DINOv3's code, with all that its files hold besides."""
    pairs = {
        r"^embeddings\.register_tokens$": "storage_tokens",
        r"^embeddings\.(cls|mask)_token$": r"\1_token",
        r"^embeddings\.patch_embeddings\.": "patch_embed.proj.",
        r"^(model\.)?layer\.": "blocks.",
        r"attention\.o_proj": "attn.proj",
        r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    }
    is_gated = any("gate_proj" in name for name in model.state_dict())
    pairs |= (
        {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if is_gated else {"up_proj": "fc1", "down_proj": "fc2"}
    )
    weights = rename(join_qkv(weights_of(model)), pairs)
    mask = torch.cat([torch.ones(16), torch.zeros(16), torch.ones(16)])
    masks = {f"{name}_mask": mask for name in weights if name.endswith("qkv.bias")}
    weights["mask_token"] = weights["mask_token"].flatten(0, 1)
    return weights | masks | {"rope_embed.periods": torch.ones(2), "local_cls_norm.weight": torch.ones(16)}


def dinov2s_own(model: nn.Module) -> dict[str, Tensor]:
    """The weights of Hugging Face's DINOv2 with registers under the names of DINOv2's code."""
    pairs = {
        r"^embeddings\.register_tokens$": "register_tokens",
        r"^embeddings\.(cls|mask)_token$": r"\1_token",
        r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"^(encoder\.layer|layers|layer)\.": "blocks.",
        r"attention\.(output\.dense|o_proj)": "attn.proj",
        r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
        r"^layernorm\.": "norm.",
    }
    return rename(join_qkv(weights_of(model)), pairs)


def features_of(foreign: ForeignWeights, ours: Any, images: Tensor) -> Tensor:
    used = {name: value for name, value in foreign.tensors.items() if not name.startswith(UNUSED_PREFIXES)}
    ours.load_state_dict(used)
    return ours.double().eval().forward_features(images)


def pixels(height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("names", ["of the file", "of the module", "behind a prefix", "of DINOv3's code"])
@pytest.mark.parametrize(("name", "settings"), [(QKVB, {}), (GATED, {"use_gated_mlp": True, "hidden_act": "silu"})])
def test_dinov3s_features_are_hugging_faces(name: str, settings: dict[str, Any], names: str, tmp_path: Path) -> None:
    theirs, file = hugging_face("DINOv3ViT", **settings), tmp_path / "model.safetensors"
    if names == "of the file":
        theirs.save_pretrained(tmp_path)
    elif names == "of DINOv3's code":
        file = tmp_path / "dinov3.pth"
        torch.save(dinov3s_own(theirs), file)
    else:
        prefix = "backbone." if names == "behind a prefix" else ""
        save_file({prefix + key: value for key, value in weights_of(theirs).items()}, file)
    ours: Any = timm.create_model(name, **TIMM)
    foreign = read_weights_as_timm(file, ours.state_dict())
    assert foreign.is_hugging_face == (names != "of DINOv3's code")
    # Not square, so that rows and columns cannot be exchanged.
    ours.set_input_size(img_size=(16, 24))
    images = pixels(16, 24)
    expected = theirs.double()(images).last_hidden_state
    actual = features_of(foreign, ours, images)
    torch.testing.assert_close(actual, expected, rtol=ROPE_TOLERANCE, atol=ROPE_TOLERANCE)


def test_biases_of_0_fit_a_model_without_them() -> None:
    """DINOv3's published biases of attention are 0; timm has models with and without."""
    theirs = hugging_face("DINOv3ViT")
    own = timm.create_model(PLAIN, **TIMM)
    weights = weights_of(theirs)
    for name, value in weights.items():
        if re.search(r"[qv]_proj\.bias", name):
            value.zero_()
    renamed = rename_to_timm(weights, HERE, own.state_dict())
    assert renamed.tensors.keys() - {"mask_token"} == own.state_dict().keys()
    learned = rename_to_timm(weights_of(theirs), HERE, own.state_dict()).tensors
    with pytest.raises(
        ExportError, match=r"weights\.pth has names that are not the model's: blocks\.0\.attn\.[qv]_bias \[16\]"
    ):
        check_and_select_weights(own, learned, HERE, unused_prefixes=UNUSED_PREFIXES)
    with_keys = weights | {"model.layer.0.attention.k_proj.bias": torch.ones(16)}
    names = timm.create_model(QKVB, **TIMM).state_dict()
    assert "blocks.0.attn.k_bias" in rename_to_timm(with_keys, HERE, names).tensors


def test_dinov3s_that_are_no_vision_transformer_as_timms_are_one_sentence() -> None:
    weights, names = weights_of(hugging_face("DINOv3ViT")), timm.create_model(QKVB, **TIMM).state_dict()
    with pytest.raises(ExportError, match=r"nor translated \(model\.layer\.0\.adapter\.weight \[1\]\); translated are"):
        rename_to_timm(weights | {"model.layer.0.adapter.weight": torch.ones(1)}, HERE, names)
    with pytest.raises(ExportError, match=r"has 2 of the 3 parts of blocks\.1\.attn\.qkv\.weight"):
        rename_to_timm({k: v for k, v in weights.items() if "layer.1.attention.k_proj" not in k}, HERE, names)


def test_dinov2s_own_checkpoint_has_hugging_faces_features(tmp_path: Path) -> None:
    """A teacher of DINOv2's training: registers, layer scale, positions of the class token, and a head beside it."""
    theirs = hugging_face("Dinov2WithRegisters", layer_norm_eps=1e-6)
    teacher = {f"backbone.{name}": value for name, value in dinov2s_own(theirs).items()}
    torch.save({"teacher": teacher | {"dino_head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "teacher_checkpoint.pth")
    ours: Any = timm.create_model("vit_small_patch14_reg4_dinov2", **TIMM)
    foreign = read_weights_as_timm(tmp_path / "teacher_checkpoint.pth", ours.state_dict())
    assert foreign.notes == (
        "weights are those under teacher of the file",
        "names under backbone. are the encoder's",
        "1 other weights left out (dino_head.mlp.0.weight)",
    )
    images = pixels()
    expected = theirs.double()(images).last_hidden_state
    torch.testing.assert_close(features_of(foreign, ours, images), expected, rtol=1e-6, atol=1e-6)


def test_a_dinov3_of_hugging_face_is_a_teacher(tmp_path: Path) -> None:
    """With its config.json, at another image size than it states."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    theirs = hugging_face("DINOv3ViT", **sizes, patch_size=16, image_size=224)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    data = DataConfig.from_dict({"path": "x", "image_size": [32, 48]}, "here")
    source = inspect_pretrained(tmp_path, "vit_tiny_patch16_dinov3_qkvb", data)
    model: Any = build_unfrozen_teacher(source.load_weights(), source.card, data.image_size, source.path).eval()
    images = pixels(32, 48).float()
    # fp32 on both sides, through 12 blocks.
    torch.testing.assert_close(model.forward_features(images), theirs(images).last_hidden_state, rtol=1e-4, atol=1e-4)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 100.0', '"rope_theta": 10000.0'))
    with pytest.raises(
        ExportError, match=r"has rotary positions of base 10000 \(rope_theta in config.json\), timm's vit"
    ):
        inspect_pretrained(tmp_path, "vit_tiny_patch16_dinov3_qkvb", data)


def test_a_head_beside_dinov3_is_read() -> None:
    weights, names = weights_of(hugging_face("DINOv3ViT")), timm.create_model(QKVB, **TIMM).state_dict()
    theirs = {f"backbone.{name}": value for name, value in weights.items()} | {"classifier.weight": torch.ones(2, 16)}
    assert rename_to_timm(theirs, HERE, names).tensors.keys() == names.keys() | {"mask_token", "classifier.weight"}
