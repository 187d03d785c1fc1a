"""Engine settings that the engine would refuse or ignore are refused before a run begins."""

from typing import Any

import pytest
import torch

from foveal.distributed.world import World
from foveal.engines.accelerate import _create_accelerator
from foveal.engines.build import check_engine_config
from foveal.engines.config import EngineConfig
from foveal.engines.deepspeed import build_deepspeed_config
from foveal.errors import ConfigError, LaunchError
from foveal.optim.config import OptimConfig


def check(ranks: int = 2, **settings: Any) -> None:
    check_engine_config(EngineConfig(**settings), OptimConfig(), ranks, microbatch_size=1, accumulation_steps=1)


def test_an_engine_takes_the_optimizers_that_it_can() -> None:
    def take(optimizer: str, **settings: Any) -> None:
        check_engine_config(
            EngineConfig(**settings),
            OptimConfig.model_validate({"name": optimizer}),
            2,
            microbatch_size=1,
            accumulation_steps=1,
        )

    for optimizer, sharding in (("sgd", "ddp or fsdp2"), ("lars", "ddp"), ("muon", "ddp")):
        sentence = (
            rf"optim\.name={optimizer} does not run on DeepSpeed, .* use engine\.kind=plain .*sharding={sharding}$"
        )
        for settings in ({}, {"kind": "accelerate", "sharding": "deepspeed"}):
            with pytest.raises(ConfigError, match=sentence):
                take(optimizer, **settings)
        take(optimizer, kind="accelerate")
    take("sgd", kind="accelerate", sharding="fsdp2")
    with pytest.raises(ConfigError, match=r"optim\.name=lars needs the norms of whole weights"):
        take("lars", kind="accelerate", sharding="fsdp2")
    with pytest.raises(ConfigError, match=r"optim\.name=muon needs whole matrices, .*; use engine\.sharding=ddp, or"):
        take("muon", kind="accelerate", sharding="fsdp2")


def zero(**keys: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": keys}}


REFUSED = {
    "plain on many": ({"kind": "plain"}, r"engine\.kind=plain runs in one process, this run has 2"),
    "offload to a drive": (zero(offload_optimizer={"device": "nvme"}), r"offload_optimizer\.device=nvme: .* use cpu"),
    "weights on a drive": (zero(offload_param={"device": "nvme"}), r"offload_param\.device=nvme: .* use cpu"),
    "a second optimizer": (zero(zenflow={"topk_ratio": 0.1}), r"zenflow keeps states .* remove it"),
    "another second": (zero(offload_optimizer={"device": "cpu", "super_offload": True}), r"super_offload keeps states"),
    "no norm": (zero(compute_grad_norm=False), r"compute_grad_norm is derived by foveal, which needs a norm"),
    "a stage": (zero(stage=2), r"zero_optimization\.stage is engine\.zero; set that"),
    "no section": ({"deepspeed": {"zero_optimization": 5}}, r"zero_optimization: a mapping .* \(given: 5\)"),
    "nothing": ({"deepspeed": {"zero_optimization": None}}, r"zero_optimization: a mapping .* \(given: None\)"),
    "another optimizer": ({"deepspeed": {"zero_force_ds_cpu_optimizer": True}}, r"is derived by foveal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(case: str) -> None:
    settings, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence):
        check(**settings)
    if "deepspeed" in settings:
        with pytest.raises(ConfigError, match=sentence):
            check(kind="accelerate", sharding="deepspeed", **settings)


def test_what_can_be_is_let_through() -> None:
    check(1, kind="plain")
    for sharding in ("ddp", "fsdp2", "deepspeed"):
        check(kind="accelerate", sharding=sharding)
    check(**zero(offload_optimizer={"device": "cpu"}, reduce_bucket_size=1000))
    check(deepspeed={"compile": {"deepcompile": True}})  # without effect, and a run may have it


def test_further_keys_reach_deepspeed() -> None:
    cfg = EngineConfig(zero=3, **zero(sub_group_size=10))
    assert build_deepspeed_config(OptimConfig(max_grad_norm=0.5), cfg, 2, 4, 3) | {"zero_optimization": {}} == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {},
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    assert build_deepspeed_config(OptimConfig(), cfg, 2, 4, 3, [6_000_000])["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 6_000_000,
        "overlap_comm": True,
        "sub_group_size": 10,
    }


@pytest.mark.parametrize(("variable", "sharding"), [("DEEPSPEED", "deepspeed"), ("FSDP", "fsdp2")])
def test_a_launcher_that_says_otherwise_is_refused(
    variable: str, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    world = World(0, 1, 0, "torchrun", torch.device("cpu"))
    with pytest.raises(LaunchError, match=rf"engine\.sharding is ddp; set engine\.sharding={sharding}, or launch"):
        _create_accelerator(EngineConfig(kind="accelerate"), world, 1)


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {}}, r"engine\.deepspeed\.zero_optimisation is not a setting .* mean 'zero_optimization'\?"),
    ({"zero_optimization": {"reduce_bucket_siz": 5}}, r"\.reduce_bucket_siz is not .* mean 'reduce_bucket_size'\?"),
    ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, r"offload_optimizer\.devic is not .* 'device'\?"),
    (
        {"zero_optimization": {"reduce_bucket_size": "large"}},
        r"reduce_bucket_size: input should be .* \(given: 'large'\)",
    ),
    (
        {"zero_optimization": {"reduce_bucket_size": -1}},
        r"reduce_bucket_size: input should be greater .* \(given: -1\)",
    ),
    ({"prescale_gradients": None}, r"engine\.deepspeed\.prescale_gradients: true or false is expected \(given: None\)"),
    ({"gradient_predivide_factor": "two"}, r"gradient_predivide_factor: a number is expected \(given: 'two'\)"),
    ({"comms_logger": 3}, r"engine\.deepspeed\.comms_logger=3 is refused by DeepSpeed \("),
    ({"flops_profiler": {"enabled": "maybe"}}, r"flops_profiler=.* is refused by DeepSpeed"),
]


@pytest.mark.parametrize(("keys", "sentence"), UNKNOWN)
def test_what_deepspeed_does_not_know_or_take(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        check(deepspeed=keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"zero_optimization": {"reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}}},
        {"prescale_gradients": True, "gradient_predivide_factor": 2, "communication_data_type": "fp32"},
        {"comms_logger": {"enabled": True}, "activation_checkpointing": {}, "zero_allow_untested_optimizer": True},
    ],
)
def test_what_deepspeed_takes(keys: dict[str, Any]) -> None:
    check(deepspeed=keys)
