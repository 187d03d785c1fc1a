"""Parameters, FLOPs and bytes of a microbatch, against values by hand and against real tensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import forecast
from torch import nn

from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.forecast.trace import (
    _fake_batch,
    _MemoryTracer,
    count_parameters,
    count_sample_flops,
    trace_microbatch_memory,
)
from foveal.optim.config import OptimConfig
from foveal.training.loop import TrainingSetup

VIT_B = ("model={name: vit_base_patch16_224}", "decoder={width: 512, depth: 8, heads: 16}")
FULL_SIZE = ("data.image_size=224", "data.channels=3")


@pytest.fixture(scope="module")
def vit_b(configs: dict[str, Path]) -> Forecast:
    """The MAE paper's model; the data does not matter for these numbers."""
    return forecast(
        "pretrain", configs["pretrain"], *VIT_B, *FULL_SIZE, "engine.precision=bf16", "batch.max_micro_size=64"
    )


def block(width: int) -> int:
    """Parameters of a transformer block: qkv, projection, an MLP of four times the width, two norms."""
    return 12 * width**2 + 13 * width


def test_parameters_of_the_papers_model(vit_b: Forecast) -> None:
    encoder = 768 + (16 * 16 * 3 * 768 + 768) + 12 * block(768) + 2 * 768  # class token, patches, blocks, last norm
    decoder = (768 * 512 + 512) + 512 + 8 * block(512) + 2 * 512 + (512 * 768 + 768)
    assert vit_b.parameter_counts.trainable == encoder + decoder == 111_655_680
    positions = 197 * 768 * 4  # in the encoder's state; the decoder's are not
    assert vit_b.checkpoint_bytes == 12 * (encoder + decoder) + positions


def test_work_is_the_closed_formula(vit_b: Forecast) -> None:
    """2 FLOPs per weight and token, and 2 products of tokens by tokens; a quarter of 196 patches is visible."""

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width)

    forward = 2 * 49 * 768 * 768 + blocks(50, 768, 12)
    forward += 2 * 50 * 768 * 512 + blocks(197, 512, 8) + 2 * 147 * 512 * 768
    assert vit_b.flops_per_sample.forward == pytest.approx(forward, rel=0.02)
    # The backward has two products for each of the forward.
    assert vit_b.flops_per_sample.forward_backward == pytest.approx(3 * forward, rel=0.02)


def test_recomputation_and_bf16_save_what_they_should(vit_b: Forecast) -> None:
    """ViT-B at 64 images: by hand, a block saves 17 fp32 tensors of its tokens' size, recomputation one."""
    row = vit_b.memory_by_sharding["ZeRO 0"]
    saved = 4 * 64 * (12 * 50 * 768 + 8 * 197 * 512)  # one fp32 tensor per block
    assert row["fp32"].micro == pytest.approx(17 * saved, rel=0.15)
    assert row["fp32, recompute"].micro < row["fp32"].micro / 4
    assert row["bf16"].micro < 0.7 * row["fp32"].micro


def test_looking_ahead_draws_nothing(vit_b: Forecast) -> None:
    state = torch.random.get_rng_state()
    vit_b.estimate_memory_with(vit_b.plan.cfg.engine, 32)
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("name", ["pretrain", "distill", "finetune"])
def test_fake_tensors_take_what_real_ones_take(name: str, configs: dict[str, Path]) -> None:
    """The same microbatch, traced on real tensors."""
    plan = forecast(name, configs[name], "engine.kind=plain")
    trace = trace_microbatch_memory(plan._build, 16, 1, (16, 16), precision="fp32", recompute=False)
    setup = plan.stage.functions.build(plan.plan, torch.device("cpu"))
    modules = (setup.model, *setup.frozen_modules)
    tracer = _MemoryTracer([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])
    for parameter in setup.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(tracer.on_gradient_ready)
    with tracer:
        total, _ = setup.objective(setup.model.train(), _fake_batch(16, 1, (16, 16)))
        total.backward()
    fake, real = trace.peak_by_gradient_bytes, tracer.peak_by_gradient_bytes
    assert max(fake.values()) == pytest.approx(max(real.values()), rel=0.01)
    assert max(fake) == max(real) == 4 * plan.parameter_counts.trainable


class Squares:
    """An objective of a plain linear model."""

    def batch_weight(self, batch: Any) -> float:
        return float(len(batch.ids))

    def __call__(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return model(batch.images.flatten(1).float()).square().sum(), {}


def linear(device: torch.device) -> TrainingSetup[Squares]:
    model = nn.Sequential(nn.Linear(12, 100, device=device), nn.Linear(100, 50, bias=False, device=device))
    return TrainingSetup(model, [{"params": list(model.parameters())}], Squares())


def test_a_model_that_can_be_counted_by_hand() -> None:
    weights = count_parameters(linear, OptimConfig(lr_per_256=1e-3))
    assert (weights.trainable, weights.linear_trainable, weights.trainable_tensor_numels) == (
        6300,
        6300,
        (1200, 100, 5000),
    )
    flops = count_sample_flops(linear, 3, (2, 2))
    assert flops.forward == 2 * (12 * 100 + 100 * 50)
    assert flops.forward_backward == 3 * flops.forward - 2 * 12 * 100  # the images need no gradient
    trace = trace_microbatch_memory(linear, 1000, 3, (2, 2), precision="fp32", recompute=False)
    alive = 1000 * (12 + 4 * 12 + 4 * 100 + 4 * 50)  # images, the same as floats, both outputs
    assert max(trace.peak_by_gradient_bytes) == 4 * 6300
    # At the last layer's backward: gradients of its output and input, beside the saved tensors.
    assert alive < max(trace.peak_by_gradient_bytes.values()) < alive + 4 * 1000 * (50 + 50 + 100) + 4 * 5000 + 100_000


def test_a_forecast_says_what_a_plan_says(vit_b: Forecast) -> None:
    assert json.dumps(dataclasses.asdict(vit_b.parameter_counts))
    assert vit_b.step_seconds is None
    timed = dataclasses.replace(vit_b, cluster=ClusterSpec(2, 4, 0.5, 1e9, gpu_flops_per_second=1e12))
    assert timed.step_seconds == pytest.approx(
        vit_b.flops_per_sample.forward_backward * vit_b.plan.cfg.batch.global_size / (8 * 0.5e12)
    )
