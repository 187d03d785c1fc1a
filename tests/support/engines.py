"""A tiny model under every engine: what a rank of a pool runs, and the shapes (engine and ranks) it runs in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ranks import devices
from safetensors import safe_open
from torch import Tensor, nn

from foveal.checkpoint.chunk_index import load_chunks
from foveal.checkpoint.chunks import write_and_hash_chunks
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups

IMAGES, WIDTH, MICROS = 8, 7, 2
OPTIM = OptimConfig(lr_per_256=1e-2, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6, max_grad_norm=0.5)
# Under ZeRO 3 some parameters are sharded while they rest and some stay gathered, and a group has several flat partitions.
_STAGE_3 = {"stage3_param_persistence_threshold": 2 * WIDTH, "sub_group_size": 4 * WIDTH}


@dataclass(frozen=True)
class Shape:
    """An engine on so many ranks."""

    ranks: int
    kind: str
    zero: int = 1
    sharding: str = "ddp"
    precision: str = "fp32"
    reduce_dtype: str = "fp32"
    optim: str = "adamw"
    compile: bool | str = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> EngineConfig:
        more: dict[str, Any] = {"sharding": self.sharding, "reduce_dtype": self.reduce_dtype, "compile": self.compile}
        if self.zero == 3:
            zero = _STAGE_3 | self.deepspeed.get("zero_optimization", {})
            more["deepspeed"] = self.deepspeed | {"zero_optimization": zero}
        elif self.deepspeed:
            more["deepspeed"] = self.deepspeed
        return EngineConfig.model_validate({"kind": self.kind, "zero": self.zero, "precision": self.precision, **more})


def offloaded(ranks: int, zero: int) -> Shape:
    """DeepSpeed with weights and moments of the update in the host's memory."""
    settings = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    return Shape(ranks, "deepspeed", zero, deepspeed=settings)


class Block(nn.Module):
    """A residual layer of odd sizes, so that no partition ends where a tensor does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)
        self.narrow = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.narrow(torch.tanh(self.wide(self.norm(rows))))


class Tiny(nn.Module):
    """Everything that a checkpoint must hold: matrices, vectors, a token, what is frozen, what is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls_token = nn.Parameter(torch.randn(1, WIDTH))
        self.frozen = nn.Parameter(torch.randn(5, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("seen", torch.tensor([3, 4]))
        self.register_buffer("derived", torch.ones(WIDTH), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows * self.get_buffer("scale") + self.cls_token * self.get_buffer("derived") + self.frozen.mean(0)
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows).sum(-1)

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)


def depth(name: str) -> int:
    return {"cls_token": 0, "head": 3}.get(name.split(".", maxsplit=1)[0], 1 + int(name.startswith("blocks.1")))


def batch(step: int, rank: int, ranks: int, micro: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a micro of a step; together they are the same on any number of ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randn(IMAGES, WIDTH, generator=generator)
    size = IMAGES // MICROS // ranks
    part = slice(start := micro * ranks * size + rank * size, start + size)
    return rows[part], rows.pow(2).sum(1)[part]


@dataclass(frozen=True)
class Told:
    """What a step said: the loss over all ranks, and the engine's result, read from the device."""

    loss: float
    applied: bool
    grad_norm: float


class Trainer:
    """An engine in a shape, and its steps."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world, self.module = world, Tiny()
        optim = OPTIM.model_copy(update={"name": shape.optim})
        groups = parameter_groups(self.module, optim.model_copy(update={"layer_decay": 0.5}), depth, 3)
        cfg = shape.config
        at_once = IMAGES // MICROS // world.size
        self.engine: Engine = build_engine(
            self.module, groups, optim, cfg, world, microbatch_size=at_once, accumulation_steps=MICROS
        )

    def step(self, number: int, spoil: Callable[[int, Tensor], Tensor] = lambda _micro, rows: rows) -> Told:
        """One step; ``spoil`` changes the rows of a micro on this rank."""
        engine, world = self.engine, self.world
        engine.set_lr(1e-2 * (1 + math.cos(number / 10)))
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for micro in range(MICROS):
            rows, wanted = (part.to(world.device) for part in batch(number, world.rank, world.size, micro))
            with engine.microbatch(last=micro == MICROS - 1):
                loss = (engine.model(spoil(micro, rows)).float() - wanted).pow(2).mean()
                engine.backward(loss)
            total += loss.detach().double() / MICROS / world.size
        result = engine.step()
        return Told(world.all_reduce_sum(total).item(), bool(result.applied), float(result.grad_norm))

    def look(self, number: int) -> Tensor:
        """A forward without a backward, as of an evaluation: it leaves gathered what a backward would put away."""
        with self.engine.eval_mode():
            return self.engine.model(batch(number, self.world.rank, self.world.size, 0)[0].to(self.world.device))

    def steps(self, start: int, stop: int) -> list[float]:
        return [self.step(number).loss for number in range(start, stop)]

    def save(self, folder: Path) -> None:
        if self.world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        write_and_hash_chunks(folder, self.world.rank, self.engine.state_chunks())
        self.world.barrier()

    def load(self, folder: Path, updates: int) -> None:
        load_chunks(folder, self.engine.state_chunks())
        self.engine.on_state_loaded(updates)

    def groups(self) -> list[tuple[Any, ...]]:
        """What the optimizer's groups are set to."""
        names = ("name", "lr_scale", "weight_decay", "betas", "eps")
        engine: Any = self.engine
        return [tuple(group[name] for name in names) for group in engine._optimizer.param_groups]


_MOST = min(2, devices() or 2)  # ranks: a machine with one GPU has room for one
_RANKS = range(1, _MOST + 1)
SHAPES = {
    "plain": Shape(1, "plain"),
    **{f"zero {zero}, {ranks} ranks": Shape(ranks, "deepspeed", zero) for zero in range(4) for ranks in _RANKS},
    **{f"ddp, {ranks} ranks": Shape(ranks, "accelerate") for ranks in _RANKS},
    **{f"fsdp2, {ranks} ranks": Shape(ranks, "accelerate", sharding="fsdp2") for ranks in _RANKS},
    **{f"accelerated zero {zero}": Shape(_MOST, "accelerate", zero, "deepspeed") for zero in (0, 2, 3)},
}
OTHERS = {
    "plain bf16": Shape(1, "plain", precision="bf16"),
    "ddp bf16": Shape(_MOST, "accelerate", precision="bf16"),
    "fsdp2 bf16": Shape(_MOST, "accelerate", sharding="fsdp2", precision="bf16"),
    **{f"zero {zero} bf16": Shape(_MOST, "deepspeed", zero, precision="bf16") for zero in range(4)},
    "zero 2 dealt": Shape(_MOST, "deepspeed", 2, deepspeed={"zero_optimization": {"round_robin_gradients": True}}),
    **{f"zero {zero} offloaded": offloaded(_MOST, zero) for zero in (1, 2, 3)},
}


def gathered(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, each part whole: by "part name", without a word of the code that reads checkpoints."""
    runs: dict[str, dict[int, Tensor]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - it is no dict
                part, start, name = key.split(" ")
                runs.setdefault(f"{part} {name}", {})[int(start)] = handle.get_tensor(key)
    return {key: torch.cat([found[start] for start in sorted(found)]) for key, found in runs.items()}
