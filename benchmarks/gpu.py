"""The paper's models on real photographs and one GPU: how fast, in how much memory, and whether an interruption shows.

    python benchmarks/gpu.py --data $FOVEAL_TEST_DATA/imagenette224 --out benchmarks/results/gpu.md

Every run is started as a user starts it. The interrupted ones are killed after a checkpoint, asked to leave later, and
go on under another ZeRO stage.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import described
from safetensors.torch import load_file

from foveal.data.loader import train_batches
from foveal.data.workers import WorkerPool
from foveal.doctor.node_checks import measure_matmul_rates
from foveal.doctor.report import RankReport
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.training.cli import load_config
from pretrain.run import STAGE

EVERY = 20  # steps between checkpoints
_PATIENCE = 300  # seconds for one start
_WARM = 30  # steps that no rate counts: the compiler, the first data
SETTINGS = (
    "batch.global_size=256", "epochs=40", "optim.warmup_epochs=4", "data.lanes=16", "data.workers=12", "log.every=10",
    "log.images_every=0", f"checkpoint.every={EVERY}", "checkpoint.keep=1", "tracking.uri=null",
)  # fmt: skip


WAYS = {
    "ViT-B/16": ("mae_vit_b16", ()),
    "ViT-B/16, compiled": ("mae_vit_b16", ("engine.compile=true",)),
    "ViT-B/16, 2 workers": ("mae_vit_b16", ("data.workers=2",)),
    "ViT-L/16": ("mae_vit_l16", ("batch.max_micro_size=256",)),
}


@dataclass(frozen=True)
class Trained:
    """A run that was started in some way, and its rows."""

    folder: Path
    rows: list[dict[str, float]]

    def median(self, name: str) -> tuple[float, float, float]:
        """Median, lowest and highest of what was reported after the first steps."""
        found = [row[name] for row in self.rows if name in row and row["step"] > _WARM]
        return statistics.median(found), min(found), max(found)

    @property
    def pieces(self) -> dict[str, torch.Tensor]:
        """What its newest checkpoint holds."""
        newest = max((self.folder / "checkpoints").glob("step-*"))
        return {key: value for file in newest.glob("*.safetensors") for key, value in load_file(file).items()}


class Bench:
    """Runs in one folder, on one set of photographs."""

    def __init__(self, folder: Path, data: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        index = folder / "index"
        subprocess.run([sys.executable, "-m", "foveal.cli", "data", "index", data, "--index", index], check=True)
        self._settings = (*SETTINGS, f"data.path={data}", f"data.index={index}", f"run.stop_at_step={steps}")

    def plan(self, config: str, overrides: Sequence[str]) -> Forecast:
        """What foveal plan foresees of a run on this GPU."""
        cfg = load_config(STAGE.config_class, STAGE.name, config, [*self._settings, *overrides])
        return Forecast(STAGE, STAGE.functions.build_plan(cfg, 1), ClusterSpec(1, 1, 1.0, 1e9))

    def loader(self, workers: int, batches: int = 12) -> str:
        """Images that the loader makes in a second when nobody trains."""
        plan = self.plan("mae_vit_b16", ()).plan
        place = {
            "rank": 0,
            "world_size": 1,
            "microbatch_size": plan.microbatch_size,
            "start_step": 0,
            "stop_step": batches,
            "mean": plan.mean,
        }
        with (
            closing(WorkerPool(workers, _PATIENCE)) as pool,
            train_batches(plan.training_set, plan.cfg.data, **place, workers=pool) as made,
        ):
            next(made)
            began, images = time.perf_counter(), sum(len(batch.ids) for batch in made)
        return f"{workers}: {images / (time.perf_counter() - began):,.0f} images/s"

    def train(self, name: str, config: str, overrides: Sequence[str], stops: Sequence[tuple[int, int]] = ()) -> Trained:
        """Start a run; at each of ``stops``, a step and a signal, it is hit and started again, under ZeRO 2 instead of 1."""
        folder = self.folder / name
        command = [sys.executable, "-m", "pretrain.run", config, *self._settings, *overrides, f"run.dir={folder}"]
        for number, (step, what) in enumerate([*stops, (0, 0)]):
            zero = [f"engine.zero={1 + number % 2}"] if stops else []
            with (self.folder / f"{name}.out").open("a") as out:
                started = subprocess.Popen([*command, *zero], stdout=out, stderr=out)
                if what:
                    _reaches(folder, step, started)
                    started.send_signal(what)
                code = started.wait(_PATIENCE)
            expected = -what if what == signal.SIGKILL else 0
            assert code == expected, f"{name}: {code}\n{(self.folder / f'{name}.out').read_text()[-3000:]}"
        return Trained(folder, _rows(folder))


def _rows(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def _reaches(folder: Path, step: int, started: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while not any(row["step"] >= step for row in _rows(folder)):
        assert started.poll() is None and time.monotonic() < until, f"{folder} has not reached step {step}"
        time.sleep(0.1)


def apart(one: Trained, other: Trained) -> str:
    """How far two runs are from each other, in words."""
    assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
    loss = max(abs(mine["loss"] / theirs["loss"] - 1) for mine, theirs in zip(one.rows, other.rows, strict=True))
    ours, theirs = one.pieces, other.pieces
    assert ours.keys() == theirs.keys()
    same = all(ours[key].equal(theirs[key]) for key in ours)
    return f"largest difference of a loss {loss:.1e}; weights and moments at the end {'equal bit for bit' if same else 'differ'}"


def report(bench: Bench) -> Iterator[str]:
    """All runs, and what they show, line by line: a lease that ends leaves what was measured until then."""
    peak = RankReport("here", 0)
    measure_matmul_rates(peak, torch.device("cuda", 0))
    gemm = peak.facts["bf16_rate"]
    yield f"Products of 8192 x 8192 matrices in bf16 run at {gemm / 1e12:.0f} TFLOP/s here (`foveal doctor`)."
    yield f"The loader alone, with so many workers: {'; '.join(bench.loader(number) for number in (1, 2, 4, 8, 12, 16))}."
    names = "| run | images/s, median (lowest-highest) | MFU of the measured rate | waits for data | peak memory, GiB | foreseen | "
    yield f"\n{names}a save stops training, ms | a checkpoint, GB |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    runs = {}
    for name, (config, overrides) in WAYS.items():
        run = runs[name] = bench.train(name.replace("/", "").replace(", ", "-"), config, overrides)
        plan = bench.plan(config, overrides)
        pace, slowest, fastest = run.median("images_per_second")
        stalls, sizes, waits = (run.median(name)[0] for name in ("save_stall_ms", "save_gigabytes", "data_wait"))
        memory = max(row.get("peak_memory_gib", 0.0) for row in run.rows)
        yield (
            f"| {name} | {pace:,.0f} ({slowest:,.0f}-{fastest:,.0f}) | {pace * plan.flops_per_sample.forward_backward / gemm:.1%} | {waits:.0%} | "
            f"{memory:.2f} | {plan.memory_estimate.peak / 2**30:.2f} | {stalls:.0f} | {sizes:.2f} |"
        )
    third = bench.steps // 3 // EVERY * EVERY
    stops = [(third + EVERY // 2, signal.SIGKILL), (2 * third + EVERY // 2, signal.SIGTERM)]
    alone, cut = runs["ViT-B/16"], bench.train("interrupted", "mae_vit_b16", (), stops)
    yield (
        f"\nThe loss of ViT-B/16 falls from {alone.rows[0]['loss']:.4f} to {alone.rows[-1]['loss']:.4f} in {bench.steps} steps. "
        f"Killed at step {stops[0][0]}, asked to leave at step {stops[1][0]}, and gone on with under ZeRO 2 and then under ZeRO "
        f"1 again, against the run that was left alone: {apart(cut, alone)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="shards of photographs")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options.data, options.steps)
        about = (
            f"`python benchmarks/gpu.py --data FOLDER --steps {options.steps}`: masked-autoencoder pretraining in bf16 under DeepSpeed's ZeRO 1, 256 "
            f"photographs of 224 px a step, decoded from JPEG on the way; {described(['torch', 'deepspeed', 'timm'])}."
        )
        text = f"# On a GPU\n\n{about}\n"
        for line in report(bench):
            print(line, flush=True)
            text += f"\n{line}" if line.startswith("|") else f"\n{line}\n"
            if options.out:
                options.out.write_text(f"{text.rstrip()}\n")


if __name__ == "__main__":
    main()
