"""Ranks that join a rendezvous, and ranks that do not: threads of this process, each with its own connection."""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ports import free_port

from foveal.distributed import rendezvous, tcp_store
from foveal.distributed.launcher import LaunchEnv, candidate_store_addresses
from foveal.distributed.rendezvous import format_ranks, join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import StoreServerProbe
from foveal.errors import AttemptSupersededError, FovealError, LaunchError, RankConflictError, TrainingHungError
from foveal.timeouts import call_with_timeout

_JOBS = itertools.count(77)
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0"}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which no server listens yet."""
    port = free_port()
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_SERVER_EXIT_SECONDS", 1.0)
    return f"127.0.0.1:{port}"


@pytest.fixture
def step(address, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A Slurm step on this node. Return the candidate addresses of its rendezvous."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    for name, value in (STEP | {"SLURM_JOB_ID": str(next(_JOBS))}).items():  # a store may outlive its test briefly
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tcp_store, "_ANSWER_TIMEOUT_SECONDS", 2.0)
    addresses = candidate_store_addresses(LaunchEnv(0, 2, 0, "srun"))
    # ``join_rendezvous`` sets MASTER_PORT for all threads of this process.
    monkeypatch.setattr(tcp_store, "candidate_store_addresses", lambda _: addresses)
    yield addresses
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def manual_launch(rank: int, size: int) -> LaunchEnv:
    return LaunchEnv(rank, size, rank, "environment")


def a_run(size: int, directory: str = "A", **settings: Any) -> RunIdentity:
    return RunIdentity({"launcher": "environment"}, size, "pretrain", directory, {"seed": 1} | settings)


def an_attempt(size: int, restart: int = 0, step: int = 0, **settings: Any) -> RunIdentity:
    launch_id = {"job": "77", "step": str(step), "restart": str(restart)}
    return replace(a_run(size, **settings), launch_id=launch_id)


def come(rank: int, run: RunIdentity, seconds: float = 60.0, launcher: str = "environment") -> dist.Store | FovealError:
    """Join as a rank. Return the store, or the error."""
    try:
        return join_rendezvous(LaunchEnv(rank, run.world_size, rank, launcher), run, seconds)
    except FovealError as error:
        return error


def test_all_ranks_meet_in_one_store(address, pool) -> None:
    stores = list(pool.map(lambda rank: join_rendezvous(manual_launch(rank, 3), a_run(3), 60.0), range(3)))
    stores[2].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
    host, port = address.split(":")
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A"]
    assert f"0100007F:{int(port):04X}" in listening, f"listens on {host} only, not on all addresses"


# --- ranks of another run ---


@pytest.mark.parametrize(
    ("stranger", "difference"),
    [
        (a_run(2, seed=2), "seed is 2 here and 1 there"),
        (a_run(2, "B"), "run.dir is B here and A there"),
        (replace(a_run(2), command="distill"), "the stage is distill here and pretrain there"),
        (a_run(3), "the number of ranks is 3 here and 2 there"),
        (an_attempt(2), "it was started as job 77, step 0, restart 0, the other as launcher environment"),
    ],
)
def test_a_rank_of_another_run_in_place_of_an_own_rank_ends_both(
    stranger: RunIdentity, difference: str, address, pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    first, second = pool.map(come, (0, 1), (a_run(2), stranger))
    assert isinstance(first, RankConflictError) and isinstance(second, RankConflictError)
    assert f"rank 1 of {stranger}" in str(first)
    assert str(first).endswith(
        f"came to where this run meets, and 1 of 2 ranks came (rank 0 on {socket.gethostname()}), but not rank 1"
    )
    assert str(second).startswith(f"{address} is where the ranks of {a_run(2)} meet, and rank 1 is of {stranger}: ")
    assert difference in str(second)
    assert {first.exit_code, second.exit_code} == {2}


def test_a_stranger_does_not_end_a_run_whose_ranks_come(address, pool) -> None:
    first = pool.submit(come, 0, a_run(3))
    stranger = come(2, a_run(3, "B"))
    late = list(pool.map(come, (1, 2), [a_run(3)] * 2))
    assert isinstance(stranger, RankConflictError)
    assert all(isinstance(store, dist.Store) for store in (first.result(), *late))


def test_a_stranger_takes_no_time_from_ranks_that_a_launcher_has_started(
    address, pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.1)
    first = pool.submit(come, 0, an_attempt(2))
    assert isinstance(come(1, a_run(2)), RankConflictError)
    time.sleep(1)
    assert isinstance(come(1, an_attempt(2)), dist.Store)
    assert isinstance(first.result(), dist.Store)


def test_two_runs_at_one_address_never_mix(address, pool) -> None:
    """The run whose rank 0 serves first joins all its ranks, in any order of the six; the other run ends."""
    runs = {name: a_run(3, name) for name in "AB"}
    order = [("A", 1), ("B", 2), ("B", 0), ("A", 2), ("B", 1), ("A", 0)]
    results = list(pool.map(lambda entry: (*entry, come(entry[1], runs[entry[0]], 30.0)), order))
    joined = {name: [isinstance(result, dist.Store) for run, _, result in results if run == name] for name in runs}
    assert sorted(joined.values()) == [[False] * 3, [True] * 3], results
    conflicts = [result for _, _, result in results if not isinstance(result, dist.Store)]
    assert all(isinstance(conflict, RankConflictError) for conflict in conflicts)


def test_a_second_rank_0_is_told_whose_address_it_is(address, pool) -> None:
    ranks = [pool.submit(come, rank, a_run(2)) for rank in (0, 1)]
    assert all(isinstance(rank.result(), dist.Store) for rank in ranks)
    conflict = come(0, a_run(2, "B"))
    assert isinstance(conflict, RankConflictError)
    assert (
        str(conflict) == f"{address} is where the ranks of {a_run(2)} meet: set another MASTER_PORT for {a_run(2, 'B')}"
    )


def test_one_rank_twice_is_a_sentence_on_every_rank(address, pool) -> None:
    errors = list(pool.map(come, (0, 1, 1), [a_run(3)] * 3))
    sentences = {str(error) for error in errors}
    assert [type(error) for error in errors] == [RankConflictError] * 3
    assert len(sentences) == 1
    assert sentences.pop().startswith("two processes came as rank 1 of 3, process ")


def test_a_late_rank_of_a_dead_attempt_ends_alone(address, pool) -> None:
    first = pool.submit(come, 0, an_attempt(2, restart=1))
    late = come(1, an_attempt(2, restart=0))
    own = come(1, an_attempt(2, restart=1))
    assert isinstance(late, AttemptSupersededError)
    assert late.exit_code == 4
    assert isinstance(first.result(), dist.Store) and isinstance(own, dist.Store)


def test_a_run_does_not_read_the_keys_of_another(address, pool) -> None:
    store, _ = pool.map(come, (0, 1), [a_run(2)] * 2)
    assert isinstance(store, dist.Store)
    other_store = tcp_store.open_extra_store_connection(20.0, a_run(2, "B").store_key)
    other_store.set("key", "value")
    assert not store.check(["key"])
    assert not other_store.check(["here/0"])


# --- addresses ---


def test_two_steps_of_a_job_meet_apart(step, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ports are derived from the step. If both have the same candidates, the second step takes the next port."""
    ranks = [pool.submit(come, rank, an_attempt(2, step=number), 30.0, "srun") for number in (0, 1) for rank in (0, 1)]
    assert all(isinstance(rank.result(), dist.Store) for rank in ranks), [rank.result() for rank in ranks]
    for name, value in {"MASTER_ADDR": "", "MASTER_PORT": "", "SLURM_STEP_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert set(candidate_store_addresses(LaunchEnv(0, 2, 0, "srun"))).isdisjoint(step)


@pytest.mark.parametrize("listens", ["silent", "talking"])
def test_a_port_that_another_program_has_is_passed_over(listens: str, step, pool) -> None:
    with contextlib.closing(socket.create_server(("", step[0][1]))) as server:
        if listens == "talking":
            threading.Thread(target=_greet, args=(server,), daemon=True).start()
        ranks = list(pool.map(come, (0, 1), [an_attempt(2)] * 2, [60.0] * 2, ["srun"] * 2))
    assert all(isinstance(rank, dist.Store) for rank in ranks), ranks
    assert int(os.environ["MASTER_PORT"]) == step[1][1]


def _greet(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            peer, _ = server.accept()
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            peer.close()


@pytest.mark.parametrize("resolves", [True, False])
def test_a_stale_address_of_a_shell_is_replaced(
    resolves: bool, step, pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp_store, "candidate_store_addresses", lambda _: [("elsewhere", 29500), *step])
    real = {name: getattr(socket, name) for name in ("getaddrinfo", "create_connection")}

    def getaddrinfo(host: str, *arguments: object, **options: object) -> object:
        if host != "elsewhere":
            return real["getaddrinfo"](host, *arguments, **options)
        if not resolves:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.9", 29500))]  # reserved for documentation

    def create_connection(address: tuple[str, int], **options: object) -> object:
        if address[0] == "elsewhere":  # as behind a firewall: neither an answer nor a refusal
            raise TimeoutError
        return real["create_connection"](address, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    ranks = list(pool.map(come, (0, 1), [an_attempt(2)] * 2, [60.0] * 2, ["srun"] * 2))
    assert all(isinstance(rank, dist.Store) for rank in ranks), ranks
    assert (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) == step[0]
    assert (
        f"MASTER_ADDR=elsewhere is no address of {socket.gethostname()}, where rank 0 is; the ranks meet" in caplog.text
    )


def test_an_address_of_another_machine_is_a_sentence_without_a_launcher(
    address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "203.0.113.9")
    error = come(0, a_run(2))
    assert isinstance(error, LaunchError)
    assert "MASTER_ADDR=203.0.113.9 is no address of " in str(error)


def test_a_start_without_a_free_port_is_worth_another(step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "_bind_listener", _in_use)
    error = come(0, an_attempt(2), launcher="srun")
    assert isinstance(error, TrainingHungError)
    assert "another program listens at localhost:" in str(error)


def _in_use(*_: object) -> None:
    raise OSError(98, "Address already in use")


def test_a_node_name_that_resolves_to_the_loopback_is_served_on_all_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))])
    with contextlib.closing(tcp_store._open_listener("node1", 0)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - the expected value


# --- missing ranks ---


def test_missing_ranks_are_named_on_every_rank(address, pool) -> None:
    errors = list(pool.map(come, (0, 2), [a_run(5)] * 2, [3.0] * 2))  # rank 0's keeps its store alive
    sentence = (
        f"2 of 5 ranks came within 3 s (ranks 0, 2 on {socket.gethostname()}), but not ranks 1, 3-4: "
        f"see why they did not start there, and start again"
    )
    assert [str(error) for error in errors] == [sentence] * 2


def test_rank_0_that_does_not_come_is_a_sentence(address) -> None:
    sentence = str(come(1, a_run(2), 0.2))
    assert sentence.startswith(f"rank 0 was not there within 0 s: {address} does not answer (")
    assert "Connection refused" in sentence


def test_another_program_at_the_port_is_a_sentence_on_every_rank(address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "_ANSWER_TIMEOUT_SECONDS", 0.5)
    with contextlib.closing(socket.create_server(("127.0.0.1", int(address.partition(":")[2])))):
        first = str(come(0, a_run(2), 5.0))
        assert first.startswith(f"rank 0 cannot serve the ranks' store: another program listens at {address}")
        second = str(come(1, a_run(2), 0.5))
    assert second.startswith(f"rank 0 was not there within 0 s: {address} does not answer (no answer within ")


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", ""), ("MASTER_PORT", "http")])
def test_no_address_is_a_sentence(address, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "set them to the node of rank 0" in str(come(1, a_run(2), 1.0))


def test_under_torchrun_rank_0_is_a_client(address, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(address.partition(":")[2])
    agent = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    checked: list[int] = []
    monkeypatch.setattr(tcp_store, "check_agent_connections", checked.append)
    ranks = list(pool.map(come, (1, 0), [a_run(2)] * 2, [60.0] * 2, ["torchrun"] * 2))
    assert all(isinstance(rank, dist.Store) for rank in ranks), ranks
    assert agent.get(f"foveal/{a_run(2).store_key}/came") == b"2"
    assert checked == [2], "by rank 0, which is on the agent's node"


def test_a_server_probe_ends_with_its_server(address) -> None:
    server = socket.create_server(("127.0.0.1", int(address.partition(":")[2])))
    with contextlib.closing(StoreServerProbe(20.0)) as probe:
        peer, _ = server.accept()
        assert probe.is_alive()
        peer.close()
        server.close()
        while probe.is_alive():  # until the kernel has closed the connection
            pass


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 1, 2, 7, 8], "ranks 0-2, 5, 7-8")]
)
def test_format_ranks(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


def test_a_call_returns_raises_or_is_left_behind() -> None:
    assert call_with_timeout(20.0, lambda: 3) == 3
    assert call_with_timeout(20.0, lambda: None) is None
    with pytest.raises(KeyError, match="x"):
        call_with_timeout(20.0, lambda: {}["x"])
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(TimeoutError):
        call_with_timeout(0.1, silent.accept)
