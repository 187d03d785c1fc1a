"""Encoders: construction, initialisation, refusals, and rebuilding from a card."""

import json
import math
from typing import Any

import pytest
import timm
import torch
from encoders import KINDS, encoder_of

from foveal.errors import ConfigError, ExportError
from foveal.models.config import Positions, ResolvedVitConfig, VitConfig
from foveal.models.sincos import sincos_positions
from foveal.models.timm_vit import build_meta_encoder
from foveal.models.vit import (
    EncoderCard,
    build_encoder,
    encoder_card,
    encoder_from_card,
    resolve_sizes,
)

TINY = VitConfig(patch=4, width=32, depth=2, heads=2)


def build_tiny(cfg: VitConfig = TINY, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"image_size": 16, "channels": 3} | kwargs
    return build_encoder(cfg, **settings)


def equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == name_2 and torch.equal(tensor, tensor_2) for (name, tensor), (name_2, tensor_2) in pairs)


def test_sizes_are_the_names_where_nothing_is_told() -> None:
    resolved = resolve_sizes(VitConfig(name="vit_small_patch16_224", depth=3))
    assert resolved == ResolvedVitConfig(
        name="vit_small_patch16_224", patch=16, width=384, depth=3, heads=6, mlp_ratio=4.0, positions="sincos"
    )
    assert resolve_sizes(resolved) == resolved


@pytest.mark.parametrize(
    "name",
    ["vit_large_patch16_224", "vit_giant_patch14_224", "vit_small_patch14_dinov2", "eva02_base_patch16_clip_224"],
)
def test_resolved_sizes_build_what_the_name_builds(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(resolve_sizes(VitConfig(name=name)), image_size=224, channels=3)
        timm_model = timm.create_model(name, img_size=224, num_classes=0)
    timm_shapes = {key: weight.shape for key, weight in timm_model.state_dict().items()}
    assert {key: weight.shape for key, weight in encoder.state_dict().items()} == timm_shapes


def test_the_seed_decides_and_timm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_tiny(num_classes=3)
    assert equal_weights(first, build_tiny(num_classes=3))
    assert not equal_weights(first, build_tiny(num_classes=3, seed=1))

    create = timm.create_model

    def create_after_drawing(*args: Any, **kwargs: Any) -> torch.nn.Module:
        torch.rand(7)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_after_drawing)
    assert equal_weights(first, build_tiny(num_classes=3))


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_the_first_encoder_of_a_process_is_drawn_like_the_second(name: str, positions: Positions | None) -> None:
    build_meta_encoder.cache_clear()
    first, second = encoder_of(name, positions), encoder_of(name, positions)
    assert equal_weights(first, second)


def test_it_starts_as_in_the_paper() -> None:
    encoder = build_tiny(VitConfig(patch=4, width=64, depth=2, heads=2), num_classes=5)
    for name, layer in encoder.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "head":
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
    bound = math.sqrt(6 / (3 * 4 * 4 + 64))
    assert 0.95 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound
    assert not encoder.patch_embed.proj.bias.any()
    assert 0.01 < encoder.cls_token.std() < 0.03
    assert 0 < encoder.head.weight.abs().max() < 2e-4


def test_fixed_positions_are_not_learned_and_learned_ones_are() -> None:
    fixed, learned = build_tiny(), build_tiny(TINY.model_copy(update={"positions": "learned"}))
    assert not fixed.pos_embed.requires_grad
    assert not fixed.pos_embed[0, 0].any()
    assert learned.pos_embed.requires_grad
    assert 0.01 < learned.pos_embed.std() < 0.03


def test_rotary_frequencies_are_drawn_from_the_seed_and_learned() -> None:
    cfg = VitConfig(name="vit_base_patch16_rope_mixed_224", patch=4, width=48, depth=3, heads=3, positions=None)
    first, second = build_tiny(cfg), build_tiny(cfg, seed=1)
    assert first.rope.freqs.shape == (2, 3, 3, 8)
    assert first.rope.freqs.requires_grad
    assert not first.rope.freqs.equal(second.rope.freqs)
    lengths = first.rope.freqs.square().sum(dim=0)  # every pair is a rotated frequency
    torch.testing.assert_close(lengths, lengths[:1, :1].expand_as(lengths))


def test_nothing_in_an_encoder_draws() -> None:
    for name, positions in KINDS:
        encoder = encoder_of(name, positions)
        assert not [layer for layer in encoder.modules() if isinstance(layer, torch.nn.Dropout) and layer.p]


def test_a_table_without_a_row_for_the_class_token() -> None:
    cfg = VitConfig(name="deit3_small_patch16_224", patch=4, width=32, depth=1, heads=2)
    assert build_tiny(cfg).pos_embed.shape == (1, 16, 32)
    torch.testing.assert_close(build_tiny(cfg).pos_embed[0], sincos_positions(4, 4, 32))


def test_mean_pooling_ignores_the_class_token_after_the_blocks() -> None:
    encoder = build_tiny(pooling="avg", num_classes=4).eval()
    assert isinstance(encoder.norm, torch.nn.Identity)
    images = torch.rand(2, 3, 16, 16)
    patches = encoder.forward_features(images)[:, 1:]
    torch.testing.assert_close(encoder(images), encoder.head(encoder.fc_norm(patches.mean(1))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "vit_bse_patch16_224"}, "not a model of timm .* Did you mean 'vit_base_patch16_224'"),
        ({"name": "hf-hub:timm/vit_base_patch16_224"}, "not a model of timm"),
        ({"name": "resnet50"}, "not a plain vision transformer .*ResNet"),
        (
            {"name": "vit_base_patch16_rope_224"},
            "'vit_base_patch16_rope_224' adds no positions .*rotary.* positions=null",
        ),
        ({"name": "vit_relpos_base_patch16_cls_224", "positions": "learned"}, "a relative bias.* positions=null"),
        (
            {"name": "eva02_tiny_patch14_224", "positions": None},
            "adds positions to its patches: positions must be sincos or",
        ),
        (
            {"name": "vit_base_patch16_224", "positions": None},
            "adds positions to its patches: positions must be sincos or",
        ),
        ({"name": "vit_relpos_base_patch16_224"}, "vit_relpos_base_patch16_224' is not a plain .*no class token"),
        ({"name": "vit_relpos_small_patch16_rpn_224"}, "no class token"),
        ({"name": "vit_base_patch16_rope_reg1_gap_256"}, "no class token"),
        ({"name": "vit_small_patch16_dinov3"}, "rotary positions are of another kind"),
        ({"name": "eva02_enormous_patch14_clip_224"}, "blocks are of another kind"),
        ({"name": "beit_base_patch16_224"}, "timm builds it as Beit"),
        ({"name": "eva02_tiny_patch14_223"}, "Did you mean 'eva02_tiny_patch14_224'"),
        (
            {"name": "vit_base_patch16_rope_224", "positions": None, "width": 36, "heads": 6},
            "width=36 over heads=6 gives 6 values per head, .* need a multiple of 4",
        ),
        ({"name": "deit_base_distilled_patch16_224"}, "VisionTransformerDistilled"),
        ({"name": "vit_base_patch16_gap_224"}, "no class token"),
        ({"name": "vit_relpos_base_patch16_cls_224", "positions": None, "registers": 2}, "registers=0"),
        ({"name": "vit_base_r50_s16_224"}, "not embedded by one linear map"),
        ({"name": "vit_giant_patch14_dinov2"}, "blocks are of another kind"),
        ({"heads": 5}, "width=32 cannot be divided among heads=5; heads=4"),
        ({"patch": 5}, "image_size=16 is not a whole number of patches of 5 pixels; .*: 15"),
        ({"patch": 32}, "image_size=16 .* 32"),
        ({"patch": 5, "image_size": (16, 21)}, r"image_size=\[16, 21\] is not a whole .*: \[15, 20\]"),
        ({"width": 30, "heads": 3}, "width=30: .* the nearest is 32"),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides: dict[str, Any], message: str) -> None:
    image_size = overrides.pop("image_size", 16)
    with pytest.raises(ConfigError, match=message):
        build_tiny(TINY.model_copy(update=overrides), image_size=image_size)


def test_a_card_brings_the_encoder_back() -> None:
    first = build_tiny(
        VitConfig(patch=8, depth=2, width=32, heads=4, positions="learned"), pooling="avg", num_classes=3
    )
    card = encoder_card(
        VitConfig(patch=8, depth=2, width=32, heads=4, positions="learned"), 16, 3, pooling="avg", num_classes=3
    )
    assert None not in card.values()
    torch.manual_seed(0)
    assert equal_weights(first, encoder_from_card(card, "card.json"))
    assert encoder_from_card(card, "card.json", num_classes=0, pooling="token").num_classes == 0


def test_a_card_holds_a_size_that_is_not_square() -> None:
    first, card = build_tiny(image_size=(8, 16)), json.loads(json.dumps(encoder_card(TINY, (8, 16), 3)))
    assert card["image_size"] == [8, 16]
    torch.manual_seed(0)
    encoder = encoder_from_card(card, "card.json")
    assert equal_weights(first, encoder)
    assert encoder.patch_embed.grid_size == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "wide"}, "export/card.json: width"),
        ({"colour": 1}, "export/card.json: colour is not a setting"),
        ({"image_size": 17}, "export/card.json: image_size=17"),
        ({"name": "vit_of_tomorrow"}, "export/card.json: 'vit_of_tomorrow' is not a model of timm"),
    ],
)
def test_a_card_that_does_not_fit_is_one_sentence(change: dict[str, Any], message: str) -> None:
    card = encoder_card(TINY, 16, 3) | change
    with pytest.raises(ExportError, match=message):
        encoder_from_card(card, "export/card.json")


def test_a_card_says_everything_the_config_says() -> None:
    assert set(encoder_card(TINY, 16, 1)) == set(EncoderCard.model_fields) >= set(VitConfig.model_fields)
