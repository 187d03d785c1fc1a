"""One GPU: its memory, copies, and waits; and what is said where it is too small, shared, or looked at."""

import gc
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from plans import forecast
from processes import PYTHON, ROOT, ended, rows_of
from ranks import Ranks, stage_named
from runs_on_gpus import require_libraries, start_ranks

from foveal.checkpoint.chunks import TensorChunk
from foveal.checkpoint.host_copy import copy_to_host
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.data.loader import train_batches
from foveal.distributed.world import World
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.loop import build_stage_engine

pytestmark = pytest.mark.gpu
NOWHERE = ("run.dir=none", "tracking.uri=null")
TENSORS = ("images", "labels", "ids", "sample_keys", "valid")
_MEMORY = 0.1  # benchmarks/results/memory-gpu.md: nine cases on an H200 were off by 9 % at most


def train_and_measure(world: World, config: str, overrides: Sequence[str]) -> int:
    """The most bytes that a run has on its GPU at once."""
    stage = stage_named("pretrain")
    square = torch.zeros(1024, 1024, device=world.device)
    torch.mm(square, square)  # cuBLAS's own memory, which no forecast has
    del square
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_stage(stage, load_config(stage.config_class, "pretrain", config, overrides), world)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_memory_is_what_plan_foresees(
    engine: str, cuda: torch.device, one_gpu: Ranks, config: Path, tmp_path: Path
) -> None:
    """ViT-B/16 with MAE's decoder, 64 images of 224 pixels in bf16: 5 to 9 GB."""
    settings = [f"engine.kind={engine}", "engine.precision=bf16", "data.image_size=224", "epochs=1"]
    settings += ["model={name: vit_base_patch16_224}", "decoder={width: 512, depth: 8, heads: 16}"]
    settings += ["batch={global_size: 64, max_micro_size: 64}"]
    require_libraries(settings)
    foreseen = forecast("pretrain", config, *settings).memory_estimate.peak
    run = [f"run.dir={tmp_path / 'run'}", "tracking.uri=null", "run.stop_at_step=3"]
    measured = one_gpu.call(train_and_measure, str(config), [*settings, *run])[0]
    assert measured == pytest.approx(foreseen, rel=_MEMORY)


def losses_without_waiting(world: World, config: str, overrides: Sequence[str]) -> list[float]:
    """The losses of ten steps, which may not read the device, nor copy to it and wait: torch raises where they do."""
    stage = stage_named("pretrain")
    cfg = load_config(stage.config_class, "pretrain", config, overrides)
    plan = stage.functions.build_plan(cfg, 1)
    setup = stage.functions.build(plan, world.device)
    engine = build_stage_engine(setup, plan, world)
    losses = []
    for batch in batches(config, overrides, 11):
        if losses:  # the first step makes constants on the device, and chooses kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            with engine.microbatch(last=True):
                total, _ = setup.objective(engine.model, batch.to(world.device, non_blocking=True))
                engine.backward(total / setup.objective.batch_weight(batch))
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(total.detach())
    return [value.item() for value in losses[1:]]


def batches(config: str, overrides: Sequence[str], steps: int) -> list[Batch]:
    """The loader's batches of the first steps."""
    stage = stage_named("pretrain")
    plan = stage.functions.build_plan(load_config(stage.config_class, "pretrain", config, overrides), 1)
    size = plan.microbatch_size
    loader = train_batches(
        plan.training_set, plan.cfg.data, rank=0, world_size=1, microbatch_size=size, start_step=0, stop_step=steps
    )
    with loader as found:
        return list(islice(found, steps))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait(precision: str, cuda: torch.device, one_gpu: Ranks, config: Path) -> None:
    losses = one_gpu.call(losses_without_waiting, str(config), [f"engine.precision={precision}", *NOWHERE])[0]
    assert len(set(losses)) == 10, "ten steps"


def test_batches_come_pinned_and_normalise_on_the_device(cuda: torch.device, config: Path) -> None:
    (batch,) = batches(str(config), NOWHERE, 1)
    assert all(getattr(batch, name).is_pinned() for name in TENSORS)
    moved = batch.to(cuda, non_blocking=True)
    back = moved.to("cpu")
    assert all(torch.equal(getattr(back, name), getattr(batch, name)) for name in TENSORS)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    on_device = normalise(moved.images, mean, std).cpu()
    torch.testing.assert_close(on_device, normalise(batch.images, mean, std), rtol=0, atol=1e-6)


def test_a_gpu_is_copied_to_pinned_memory_in_order(cuda: torch.device) -> None:
    """The snapshot contains the operations queued before it, and none queued after it."""
    values = torch.zeros(1 << 22, device=cuda)
    chunks = [TensorChunk("a", (len(values),), 0, {"weight": values}, (0, len(values)))]
    buffer: torch.Tensor | None = None
    for number in range(1, 4):
        for _ in range(100):
            values += 0.01
        (copy,), buffer = copy_to_host(chunks, buffer)
        values += 7
        values -= 7
        assert copy.flat_views_by_part["weight"].is_pinned()
        torch.testing.assert_close(
            copy.flat_views_by_part["weight"], torch.full((len(values),), float(number)), rtol=1e-4, atol=0
        )


_IN_LITTLE_MEMORY = """\
import sys, torch
torch.cuda.set_per_process_memory_fraction(0.004)
from foveal.training.cli import main
from pretrain.run import STAGE
main(STAGE, sys.argv[1:])
"""


def test_too_little_memory_is_one_sentence(cuda: torch.device, config: Path, tmp_path: Path) -> None:
    """A few thousandths of the GPU: the model fits, 256 images of 128 pixels do not."""
    settings = ["data.image_size=128", "batch={global_size: 256, max_micro_size: 256}", f"run.dir={tmp_path / 'run'}"]
    command = [PYTHON, "-c", _IN_LITTLE_MEMORY, config, *settings, "tracking.uri=null"]
    done = ended(command, tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 2, done.err
    (said,) = [line for line in done.err.splitlines() if line.startswith("foveal: ")]
    assert said.startswith(
        "foveal: pretrain ran out of memory on rank 0, with 256 images per forward (CUDA out of memory"
    )
    assert "lower batch.max_micro_size (256)" in said
    assert "Traceback" not in done.err


def test_two_ranks_on_one_gpu_are_refused(cuda: torch.device, config: Path, tmp_path: Path) -> None:
    """As under a launcher that shows every rank the same GPU."""
    settings = [config, f"run.dir={tmp_path / 'run'}", "tracking.uri=null", "engine.kind=accelerate"]
    require_libraries(settings[-1:])
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ranks = start_ranks(2, ["-m", "pretrain.run", *settings], tmp_path, CUDA_VISIBLE_DEVICES=first)
    said = [rank.ended() for rank in ranks]
    assert [each.code for each in said] == [2, 2], said
    assert any(re.search(r"ranks 0 and 1 are on one GPU, \S+ of \S+: start as many tasks", each.err) for each in said)
    assert not any("Traceback" in each.err for each in said)
    assert not (tmp_path / "run").exists()


def test_the_doctor_looks_at_the_gpu(one_gpu: Ranks, config: Path, tmp_path: Path) -> None:
    """Name and rates of products; the GPU that this machine is used for is fit."""
    run = [f"run.dir={tmp_path / 'run'}", "--stage", "pretrain"]
    done = ended([PYTHON, "-m", "foveal.cli", "doctor", config, *run], tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.out + done.err
    head, line = done.out.splitlines()[:2]
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    assert line[head.index("device") :].startswith(name)
    bf16, fp32 = (float(line[head.index(f"{dtype} TFLOP/s") :].split()[0]) for dtype in ("bf16", "fp32"))
    assert min(bf16, fp32) > 0
    if torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 0):
        assert bf16 > 2 * fp32, "tensor cores multiply bf16, and fp32 is not rounded to TF32"
    assert line.endswith("fine")


def test_the_throughput_is_said(one_gpu: Ranks, config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As a user starts a run: in its rows, and in its last lines."""
    run = tmp_path / "run"
    command = [PYTHON, "-m", "pretrain.run", config, f"run.dir={run}", "tracking.uri=null", "epochs=1"]
    done = ended(command, tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err
    assert re.search(r" at [\d,]+ images/s", done.out + done.err), done
    last = rows_of(run)[-1]
    assert last["step"] == 8
    assert last["images_per_second"] > 0
    assert 0 <= last["data_wait"] <= 1
    assert ("peak_memory_gib" in last) is not request.config.getoption("--on-cpus")
