"""What being seen costs a training: steps per second without anything, with what a run records for people who look at
it (use of nodes, pictures and a report at its end), with MLflow that answers, and with one that hangs.

    python benchmarks/tracking.py --out benchmarks/results/tracking.md

Each run is a process of its own: MAE pretraining on scikit-learn's digits with the plain engine, one thread. The kinds
take turns. Speed is taken from the times in metrics.jsonl, from the first report to the last, so that everything that a
report costs is in it.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from machine import described

from foveal.data.pack import pack_digits

EVERY = 5  # steps in a report
NOTHING = "nobody"
CONFIG = {
    "seed": 0,
    "data": {"image_size": 16, "channels": 1, "lanes": 8},
    "batch": {"global_size": 64, "max_micro_size": 64},
    "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 96, "depth": 6, "heads": 3},
    "decoder": {"width": 64, "depth": 2, "heads": 2},
    "optim": {"lr_per_256": 4.0e-3, "warmup_epochs": 1},
    "engine": {"kind": "plain"},
    "checkpoint": {"every": 0},
    "log": {"every": EVERY},
}


@contextmanager
def healthy(folder: Path) -> Iterator[str]:
    """The URI of an MLflow server on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | own, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def hanging() -> Iterator[str]:
    """The URI of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for each in held:
            each.close()


def train(config: Path, run: Path, uri: str | None, *more: str) -> tuple[float, float, float]:
    """Steps per second, seconds from the command to the first report, and seconds from the last row to the exit."""
    given = "null" if uri is None else uri
    command = [sys.executable, "-m", "pretrain.run", str(config), f"run.dir={run}", f"tracking.uri={given}", *more]
    began = time.time()
    done = subprocess.run(
        [*command, "tracking.flush_timeout_seconds=1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    ended = time.time()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    first, last = rows[EVERY - 1], rows[-1]
    pace = (last["step"] - first["step"]) / (last["time"] - first["time"])
    return pace, first["time"] - began, ended - last["time"]


def measured(rounds: int, epochs: int) -> Iterator[str]:
    """The lines of the table."""
    paces: dict[str, list[float]] = {}
    starts: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        pack_digits(folder / "digits")
        config = folder / "digits.yaml"
        tree = CONFIG | {"epochs": epochs, "data": {**CONFIG["data"], "path": str(folder / "digits")}}
        config.write_text(yaml.safe_dump(tree))
        kinds: dict[str, tuple[str | None, ...]] = {
            NOTHING: (None, "log.final_pictures=false", "log.report=false", "log.node_metrics=false"),
            "use of nodes, final pictures, report": (None,),
            "and a server that answers": (stack.enter_context(healthy(folder)),),
            "and a server that hangs": (stack.enter_context(hanging()),),
        }
        train(config, folder / "warm", None)
        for number in range(rounds):
            turn = number % len(kinds)
            for kind in [*list(kinds)[turn:], *list(kinds)[:turn]]:
                uri, *more = kinds[kind]
                pace, start, end = train(config, folder / f"{kind} {number}", uri, *map(str, more))
                paces.setdefault(kind, []).append(pace)
                starts.setdefault(kind, []).append(start)
                ends.setdefault(kind, []).append(end)
    bare = paces[NOTHING]
    yield f"| seen by | steps per second, median | lowest to highest | ratio to {NOTHING}, median of the rounds | lowest to highest | seconds to the first report, median | seconds from the last row to the exit, median |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for kind, found in ((kind, paces[kind]) for kind in kinds):
        ratios = [pace / other for pace, other in zip(found, bare, strict=True)]
        yield (
            f"| {kind} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} | "
            f"{statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
            f"{statistics.median(starts[kind]):.1f} | {statistics.median(ends[kind]):.1f} |"
        )


def report(rounds: int, epochs: int) -> Iterator[str]:
    """The lines of the results file."""
    yield "# What being seen costs a training"
    yield ""
    yield "`python benchmarks/tracking.py --out benchmarks/results/tracking.md`"
    yield ""
    yield described(["mlflow", "torch"])
    yield ""
    yield (
        f"MAE pretraining on digits, plain engine, one thread, {epochs} epochs of 22 steps, a report every {EVERY} steps; "
        f"{rounds} rounds in which the kinds take turns. Pictures and report are made after the last step. The server that answers runs on the same cores, with its SQLite "
        f"store, and the uploader is a thread of the training: what both take is in the numbers."
    )
    yield ""
    yield from measured(rounds, epochs)


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the table is written to as well")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server has a session of its own, and would stay
    lines = []
    for line in report(options.rounds, options.epochs):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
