"""Fake ranks for scale.py: rank 0 serves the ranks' real store in a process, the others are threads that use it."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from foveal.distributed.heartbeat import Heartbeat, HeartbeatExchange
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preflight import PreflightGroup, PreflightTimeouts
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.world import World

GPUS_PER_NODE = 8
POLL, COMPARING = 1.0, 64  # seconds between heartbeats; ranks that compare them
TIMEOUT = 300.0  # seconds for a phase
CPU = torch.device("cpu")
LOCATION = "step, deepspeed.py:171"
FACTS = {f"version of library{number}": "1.2.3+cu130" for number in range(12)} | {"node": "node0017", "clock": 1.98e9}


class FakeRank:
    """A rank as far as the store knows it."""

    def __init__(self, rank: int, size: int) -> None:
        self.env = LaunchEnv(rank, size, rank % GPUS_PER_NODE, "environment")
        self.identity = RunIdentity.from_launch_env(self.env, "pretrain")
        self._poll_count = 0

    def join(self) -> None:
        self.store = join_rendezvous(self.env, self.identity, TIMEOUT)

    def beat(self) -> None:
        world = World(self.env.rank, self.env.world_size, self.env.local_rank, "none", CPU, self.identity.store_key)
        self.exchange = HeartbeatExchange(world, POLL, self._heartbeat)

    def report(self) -> None:
        """What the doctor's ranks tell each other, without what they look at."""
        group = PreflightGroup(
            self.env,
            CPU,
            "node0017",
            PreflightTimeouts.for_world_size(self.env.world_size),
            self.store,
            time.monotonic(),
        )
        group.post_report("alone", {"facts": FACTS, "faults": []})
        if self.env.rank == 0:
            assert len(group.gather_reports_until("alone", TIMEOUT)) == self.env.world_size
            group.announce("go", {"all": True})
        assert group.wait_for_announcement("go", TIMEOUT)

    def _heartbeat(self) -> Heartbeat:
        self._poll_count += 1
        return Heartbeat(1000, "training", 0.0, self._poll_count, "node0017", LOCATION, is_waiting=True)


def traffic() -> dict[str, float]:
    """This process's open files, and the bytes that its connections have sent and received."""
    descriptors, sent, received = [int(path.name) for path in Path("/proc/self/fd").iterdir()], 0, 0
    for descriptor in descriptors:
        if not Path(f"/proc/self/fd/{descriptor}").is_socket():
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            # struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received
            acked, got = struct.unpack_from("QQ", copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120)
            sent, received = sent + acked, received + got
    return {"descriptors": len(descriptors), "sent": sent, "received": received}


def serve(size: int) -> None:
    """Be rank 0: call what each line of stdin names, and answer with its seconds and the traffic so far."""
    rank = FakeRank(0, size)
    calls: dict[str, Callable[[], object]] = {
        "join": rank.join,
        "beat": rank.beat,
        "compare": lambda: rank.exchange.diagnose(),  # noqa: PLW0108 - there is none before "beat"
        "report": rank.report,
        "measure": lambda: None,
    }
    for line in sys.stdin:
        began = time.monotonic()
        said = calls[line.strip()]()
        sys.stdout.write(json.dumps({"seconds": time.monotonic() - began, "said": said, **traffic()}) + "\n")
        sys.stdout.flush()
    os._exit(0)


class Server:
    """Rank 0's process."""

    def __init__(self, size: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("scale.py")), "--serve", str(size)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, call: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def in_threads(calls: list[Callable[[], object]]) -> float:
    """Call all at once; the seconds until the last one returned."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result(TIMEOUT)
    return time.monotonic() - began


def rehearse_store(size: int) -> dict[str, dict[str, float]]:
    """Joining, heartbeats, their comparison and a preflight's exchange: seconds, and what passed through rank 0."""
    server, found = Server(size), {}
    ranks = [FakeRank(rank, size) for rank in range(1, size)]
    server.send("measure")
    before = server.answer()  # its imports are over

    def rehearse(name: str, call: str, calls: list[Callable[[], object]], pause: float = 0.0) -> None:
        nonlocal before
        server.send(call)
        seconds = in_threads(calls)
        answer = server.answer()
        time.sleep(pause)
        server.send("measure")
        now = server.answer()
        found[name] = {
            "seconds": max(seconds, answer["seconds"]),
            "descriptors": now["descriptors"],
            **{key: now[key] - before[key] for key in ("sent", "received")},
        }
        before = now

    try:
        rehearse("join", "join", [rank.join for rank in ranks])
        rehearse("exchange the reports of a preflight", "report", [rank.report for rank in ranks])
        rehearse("10 s of heartbeats", "beat", [rank.beat for rank in ranks], pause=10.0)
        rehearse("compare heartbeats", "compare", [rank.exchange.diagnose for rank in ranks[: COMPARING - 1]])
    finally:
        server.close()
    return found
