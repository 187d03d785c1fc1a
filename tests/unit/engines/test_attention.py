"""Explicit attention: which runs have it, in which blocks, and that it is the fused kernel's mathematics."""

import pytest
import torch
from loop_steps import ALONE
from timm.models.vision_transformer import VisionTransformer

from foveal.engines import attention
from foveal.engines.attention import apply_attention, choose_max_explicit_tokens, has_explicit_attention
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.models.attention import SelfAttention
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups

SIZES = VitConfig(name="vit_tiny_patch16_224", patch=4, width=24, depth=2, heads=3)
CASES = {
    "bf16 on a CPU with AMX": ({"precision": "bf16"}, "cpu", True, 512),
    "medium products on a CPU with AMX": ({"float32_matmul_precision": "medium"}, "cpu", True, 512),
    "fp32 on a CPU with AMX": ({}, "cpu", True, 0),
    "bf16 on another CPU": ({"precision": "bf16"}, "cpu", False, 0),
    "bf16 on a GPU": ({"precision": "bf16"}, "cuda", True, 0),
    "stated": ({"max_explicit_attention_tokens": 64}, "cuda", False, 64),
    "stated as never": ({"max_explicit_attention_tokens": 0, "precision": "bf16"}, "cpu", True, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_hardware_decides(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, device, amx, expected = CASES[case]
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    assert choose_max_explicit_tokens(EngineConfig.model_validate(settings), device) == expected


def encoder_with(tokens: int | str) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_encoder(SIZES, image_size=16, channels=3).eval()
    apply_attention(model, EngineConfig.model_validate({"max_explicit_attention_tokens": tokens}))
    return model  # type: ignore[return-value]


def count_fused_calls(model: VisionTransformer, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []
    with monkeypatch.context() as patch:
        patch.setattr(
            "foveal.models.attention.F.scaled_dot_product_attention",
            lambda *values: calls.append(values) or fused(*values),
        )
        model(images)
    return len(calls)


@pytest.mark.parametrize(("tokens", "fused_calls"), [("auto", 2), (0, 2), (16, 2), (17, 0)])
def test_sequences_up_to_the_limit_are_explicit(
    tokens: int | str, fused_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 3, 16, 16)  # 16 patches and the class token
    assert count_fused_calls(encoder_with(tokens), images, monkeypatch) == fused_calls


def test_both_are_the_same_mathematics() -> None:
    images = torch.randn(2, 3, 16, 16)
    outputs = [encoder_with(tokens)(images) for tokens in (0, 512)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)  # fp32, rounded in another order
    blocks = [module for module in encoder_with(512).modules() if isinstance(module, SelfAttention)]
    assert {block.max_explicit_tokens for block in blocks} == {512}


def test_an_engine_sets_it() -> None:
    model, optim = build_encoder(SIZES, image_size=16, channels=3), OptimConfig()
    cfg = EngineConfig.model_validate({"kind": "plain", "max_explicit_attention_tokens": 16})
    assert not has_explicit_attention(model)
    build_engine(model, parameter_groups(model, optim), optim, cfg, ALONE, microbatch_size=2, accumulation_steps=1)
    assert has_explicit_attention(model)
