"""Compiled blocks train as eager ones do, share their code, and nothing is compiled after the first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import OTHERS, SHAPES, Shape, Trainer, offloaded
from ranks import Ranks, stage_named
from torch import Tensor, nn
from torch._dynamo.utils import counters

from foveal.distributed.preemption import LeaveRequest
from foveal.distributed.world import World
from foveal.engines import compiling
from foveal.engines.compiling import choose_compiled_parts, compile_model, explain_no_compiler
from foveal.engines.config import EngineConfig
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.loop import RankFlags
from foveal.training.run import Run


@contextmanager
def counted(backend: str) -> Iterator[list[int]]:
    """Compile with a backend that generates no kernels; ``append`` the number of graphs with ``count_graphs``."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend=backend):
        yield []


def count_graphs() -> int:
    """How many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]


def steps_compiled_and_eager(world: World, shape: Shape) -> tuple[list[float], list[float], list[int]]:
    """Return the losses of the same steps, and the graphs after each, with an evaluation between steps."""
    with counted("aot_eager") as graphs:
        trainer, compiled = Trainer(world, replace(shape, compile="blocks")), []
        for number in range(3):
            compiled.append(trainer.step(number).loss)
            trainer.look(number)
            graphs.append(count_graphs())
    names = trainer.module.state_dict()
    assert not [name for name in names if "_orig_mod" in name]
    return compiled, Trainer(world, shape).steps(0, 3), graphs


_QUICK = ("plain", "zero 1, 2 ranks", "ddp, 2 ranks")
_ALL = SHAPES | OTHERS
_CASES = [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.thorough)
    for name in _ALL
    if name == "plain" or ("1 ranks" not in name and name != "zero 3 offloaded")  # not known to work
]


@pytest.mark.parametrize("name", _CASES)
def test_an_engine_trains_compiled_blocks_as_eager_ones(name: str, one_rank: Ranks, two_ranks: Ranks) -> None:
    shape = _ALL[name]
    for compiled, eager, graphs in {1: one_rank, 2: two_ranks}[shape.ranks].call(steps_compiled_and_eager, shape):
        assert compiled == pytest.approx(eager, rel=2e-2 if shape.precision == "bf16" else 1e-5)
        assert graphs[0] > 0
        assert graphs == graphs[:1] * 3


def graphs_of_a_run(world: World, name: str, config: str, overrides: list[str]) -> list[int]:
    """Return the number of compiled graphs after each step and each evaluation of a run."""
    stage = stage_named(name)
    check, record = Run.check_preemption, Run.record_evaluation
    with counted("eager") as graphs, pytest.MonkeyPatch.context() as patch:

        def check_preemption(run: Run, flags: RankFlags) -> LeaveRequest | None:
            graphs.append(count_graphs())
            return check(run, flags)

        def record_evaluation(run: Run, step: int, metrics: dict[str, float]) -> None:
            graphs.append(count_graphs())
            record(run, step, metrics)

        patch.setattr(Run, "check_preemption", check_preemption)
        patch.setattr(Run, "record_evaluation", record_evaluation)
        run_stage(stage, load_config(stage.config_class, name, config, overrides), world)
    return graphs


DEEP = "model={name: vit_tiny_patch16_224, patch: 4, width: 32, depth: 4, heads: 2}"
RUNS = {
    # Two blocks of the encoder, and of the decoder the first, the last, and two between them.
    "pretrain": (["decoder={width: 16, depth: 4, heads: 2}", "log.images_every=2"], 4),
    "finetune": (["init=null", DEEP], 2),  # the first block never drops a branch; three others do, at three rates
    "distill": (["method=features"], 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_compiles_each_kind_of_block_once(
    name: str, configs: dict[str, Path], tmp_path: Path, one_rank: Ranks
) -> None:
    """With a smaller last batch in evaluations, k-NN and pictures, which change nothing."""
    settings, kinds = RUNS[name]
    words = [f"run.dir={tmp_path}", "tracking.uri=null", "engine.kind=plain", "engine.compile=blocks"]
    words += ["evaluate_every=2", "run.stop_at_step=4", *settings]
    (graphs,) = one_rank.call(graphs_of_a_run, name, str(configs[name]), words)
    assert graphs == [kinds] * 6, "four steps and two evaluations"


class Hooked(nn.Module):
    """Two blocks of one type, one with a hook inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        self.outputs: list[Tensor] = []
        self.blocks[1].get_submodule("0").register_forward_hook(lambda *call: self.outputs.append(call[2]))

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, rows: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](rows))


def test_a_hook_inside_a_block_is_called() -> None:
    """Of an encoder that learns a teacher's relations; dynamo gives its block the code of one without a hook."""
    model = Hooked()
    with counted("eager"):
        compile_model(model, EngineConfig(compile="blocks"))
        model(torch.ones(1, 2))
        assert count_graphs() == 1
    assert len(model.outputs) == 1


ZERO_OFFLOADED = offloaded(2, 1).config.deepspeed
AUTO: list[tuple[dict[str, Any], str, bool | str]] = [
    ({"kind": "plain"}, "cpu", False),
    ({"kind": "plain"}, "cuda", "blocks"),
    ({"kind": "plain", "zero": 3}, "cuda", "blocks"),
    ({"kind": "accelerate"}, "cuda", "blocks"),
    ({"kind": "accelerate", "sharding": "fsdp2"}, "cuda", False),
    ({"kind": "accelerate", "sharding": "deepspeed", "zero": 3}, "cuda", False),
    *(({"zero": zero}, "cuda", False if zero == 3 else "blocks") for zero in range(4)),
    ({"zero": 1, "deepspeed": ZERO_OFFLOADED}, "cuda", False),
    ({"compile": True}, "cpu", True),
    ({"zero": 3, "compile": "blocks"}, "cpu", "blocks"),
    ({"compile": False}, "cuda", False),
]


@pytest.mark.parametrize(("settings", "device", "expected"), AUTO)
def test_auto_compiles_blocks_on_a_gpu_whose_engine_moves_no_tensors(
    settings: dict[str, Any], device: str, expected: bool | str
) -> None:
    assert choose_compiled_parts(EngineConfig.model_validate(settings), device) == expected


def test_a_machine_that_cannot_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_values: Tensor) -> Tensor:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(compiling, "_probe", fail)
    with counted("eager"):
        assert explain_no_compiler(torch.device("cpu")) == "RuntimeError: no C++ compiler"
