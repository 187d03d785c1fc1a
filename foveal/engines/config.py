"""Settings of the engine."""

from typing import Annotated, Any, Literal

from pydantic import Field

from foveal.config import Config, machine, science

Precision = Literal["fp32", "bf16"]


class EngineConfig(Config):
    """Settings of the engine; except ``deepspeed`` and ``reduce_dtype`` they change the update by rounding at most."""

    kind: Literal["deepspeed", "accelerate", "plain"] = machine(
        "deepspeed", "The library that computes the update; plain: torch alone, one process."
    )
    sharding: Literal["ddp", "fsdp2", "deepspeed"] = machine(
        "ddp",
        "For engine.kind=accelerate: replicated weights (ddp), FSDP2 shards, or DeepSpeed at the stage engine.zero.",
    )
    zero: Literal[0, 1, 2, 3] = machine(
        1, "DeepSpeed's ZeRO stage: over ranks, 1 partitions optimizer states, 2 also gradients, 3 also weights."
    )
    precision: Precision = machine("fp32", "Precision of products: fp32, or bf16 by autocast, with fp32 weights.")
    reduce_dtype: Literal["fp32", "autocast"] = science(
        "fp32",
        "Type in which gradients are summed over ranks. autocast: that of runs before 0.2, where ZeRO 1 to 3 under "
        "precision=bf16 sum gradients of linear and convolution layers in bf16: half the traffic, and a curve that "
        "depends on the number of ranks. Other engines sum in fp32.",
        since="0.2",
        neutral="autocast",
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = machine(
        "highest",
        "torch's float32 matmul precision. 'medium' computes products in bf16 on some processors: an error of 2e-3 of a "
        "product, in place of 4e-7.",
    )
    max_explicit_attention_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = machine(
        "auto",
        "Self-attention of plain blocks over at most so many tokens computes products and softmax one by one, in place of "
        "torch's fused kernel. auto: 512 under bf16 products on a CPU with AMX, where that takes a third of the time, "
        "else 0.",
    )
    compile: bool | Literal["blocks", "auto"] = machine(
        "auto",
        "torch.compile of the training forward and backward: of each transformer block, of the whole model (true), or of "
        "nothing. auto: a run goes on as its newest checkpoint was trained; a new one compiles blocks on a GPU, except "
        "under ZeRO 3, FSDP2 or offloading.",
    )
    activation_checkpointing: bool = machine(
        False, "Recompute each block's activations in the backward pass: less memory, same result."
    )
    timeout_minutes: float = machine(30.0, "Time limit of a collective, in minutes.", gt=0)
    deepspeed: dict[str, Any] = science({}, "Further DeepSpeed settings; keys that foveal derives are refused.")

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed computes the update, by itself or as Accelerate's plugin."""
        return "deepspeed" in (self.kind, self.sharding)

    @property
    def is_compiled(self) -> bool:
        """Whether anything is compiled; an ``auto`` that nobody has decided compiles nothing."""
        return self.compile in (True, "blocks")
