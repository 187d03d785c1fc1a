"""Ranks that come together, and ranks that do not: threads of this process, each with a connection of its own."""

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

from foveal.distributed import rendezvous, tcp_store
from foveal.distributed.launcher import LaunchEnv, rendezvous_addresses
from foveal.distributed.rendezvous import format_ranks, join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import ServerProbe
from foveal.errors import AttemptSupersededError, FovealError, LaunchError, RankConflictError, TrainingHungError
from foveal.timeouts import call_with_timeout

_JOBS = itertools.count(77)
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0"}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody answers yet."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_SERVER_EXIT_SECONDS", 1.0)
    return f"127.0.0.1:{port}"


@pytest.fixture
def step(address, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A Slurm step on this node; the places where its ranks may meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    for name, value in (STEP | {"SLURM_JOB_ID": str(next(_JOBS))}).items():  # a store may outlive its test by a moment
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tcp_store, "_ANSWER_TIMEOUT_SECONDS", 2.0)
    there = rendezvous_addresses(LaunchEnv(0, 2, 0, "srun"))
    monkeypatch.setattr(
        tcp_store, "rendezvous_addresses", lambda _: there
    )  # ``join_rendezvous`` sets MASTER_PORT, of all threads at once
    yield there
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def by_hand(rank: int, size: int) -> LaunchEnv:
    return LaunchEnv(rank, size, rank, "environment")


def a_run(size: int, directory: str = "A", **settings: Any) -> RunIdentity:
    return RunIdentity({"launcher": "environment"}, size, "pretrain", directory, {"seed": 1} | settings)


def an_attempt(size: int, restart: int = 0, step: int = 0, **settings: Any) -> RunIdentity:
    return replace(a_run(size, **settings), launch={"job": "77", "step": str(step), "restart": str(restart)})


def come(rank: int, run: RunIdentity, seconds: float = 60.0, launcher: str = "environment") -> dist.Store | FovealError:
    """What a rank gets to know: the store, or why there is none."""
    try:
        return join_rendezvous(LaunchEnv(rank, run.world_size, rank, launcher), run, seconds)
    except FovealError as error:
        return error


def test_all_ranks_meet_in_one_store(address, pool) -> None:
    stores = list(pool.map(lambda rank: join_rendezvous(by_hand(rank, 3), a_run(3), 60.0), range(3)))
    stores[2].set("word", "said")
    assert [store.get("word") for store in stores] == [b"said"] * 3
    host, port = address.split(":")
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    listening = [words[1] for words in lines if words[3] == "0A"]
    assert f"0100007F:{int(port):04X}" in listening, f"on {host} alone: who is elsewhere has no business there"


# --- ranks of another run ---


@pytest.mark.parametrize(
    ("other", "unlike"),
    [
        (a_run(2, seed=2), "seed is 2 here and 1 there"),
        (a_run(2, "B"), "run.dir is B here and A there"),
        (replace(a_run(2), what="distill"), "the stage is distill here and pretrain there"),
        (a_run(3), "the number of ranks is 3 here and 2 there"),
        (an_attempt(2), "it was started as job 77, step 0, restart 0, the other as launcher environment"),
    ],
)
def test_a_rank_of_another_run_in_place_of_ones_own_ends_both(
    other: RunIdentity, unlike: str, address, pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    first, second = pool.map(come, (0, 1), (a_run(2), other))
    assert isinstance(first, RankConflictError) and isinstance(second, RankConflictError)
    assert f"rank 1 of {other}" in str(first)
    assert str(first).endswith(
        f"came to where this run meets, and 1 of 2 ranks came (rank 0 on {socket.gethostname()}), but not rank 1"
    )
    assert str(second).startswith(f"{address} is where the ranks of {a_run(2)} meet, and rank 1 is of {other}: ")
    assert unlike in str(second)
    assert {first.exit_code, second.exit_code} == {2}


def test_a_stranger_does_not_end_a_run_whose_ranks_come(address, pool) -> None:
    first = pool.submit(come, 0, a_run(3))
    stranger = come(2, a_run(3, "B"))
    late = list(pool.map(come, (1, 2), [a_run(3)] * 2))
    assert isinstance(stranger, RankConflictError)
    assert all(isinstance(each, dist.Store) for each in (first.result(), *late))


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
    """Whoever serves first goes on with its own ranks, in whatever order the six come; the others end."""
    runs = {name: a_run(3, name) for name in "AB"}
    order = [("A", 1), ("B", 2), ("B", 0), ("A", 2), ("B", 1), ("A", 0)]
    came = list(pool.map(lambda place: (*place, come(place[1], runs[place[0]], 30.0)), order))
    met = {name: [isinstance(each, dist.Store) for run, _, each in came if run == name] for name in runs}
    assert sorted(met.values()) == [[False] * 3, [True] * 3], came
    conflicts = [each for _, _, each in came if not isinstance(each, dist.Store)]
    assert all(isinstance(each, RankConflictError) for each in conflicts)


def test_a_second_rank_0_is_told_whose_address_it_is(address, pool) -> None:
    ranks = [pool.submit(come, rank, a_run(2)) for rank in (0, 1)]
    assert all(isinstance(each.result(), dist.Store) for each in ranks)
    other = come(0, a_run(2, "B"))
    assert isinstance(other, RankConflictError)
    assert str(other) == f"{address} is where the ranks of {a_run(2)} meet: set another MASTER_PORT for {a_run(2, 'B')}"


def test_one_rank_twice_is_a_sentence_for_everybody(address, pool) -> None:
    came = list(pool.map(come, (0, 1, 1), [a_run(3)] * 3))
    said = {str(each) for each in came}
    assert [type(each) for each in came] == [RankConflictError] * 3
    assert len(said) == 1
    assert said.pop().startswith("two processes came as rank 1 of 3, process ")


def test_a_late_rank_of_a_dead_attempt_harms_nobody(address, pool) -> None:
    first = pool.submit(come, 0, an_attempt(2, restart=1))
    late = come(1, an_attempt(2, restart=0))
    own = come(1, an_attempt(2, restart=1))
    assert isinstance(late, AttemptSupersededError)
    assert late.exit_code == 4
    assert isinstance(first.result(), dist.Store) and isinstance(own, dist.Store)


def test_what_a_run_says_another_does_not_read(address, pool) -> None:
    store, _ = pool.map(come, (0, 1), [a_run(2)] * 2)
    assert isinstance(store, dist.Store)
    other = tcp_store.connect_to_store(20.0, a_run(2, "B").store_key)
    other.set("word", "said")
    assert not store.check(["word"])
    assert not other.check(["here/0"])


# --- places ---


def test_two_steps_of_a_job_meet_apart(step, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ports are drawn by the step; where they are the same all the same, the second takes the next."""
    ranks = [pool.submit(come, rank, an_attempt(2, step=number), 30.0, "srun") for number in (0, 1) for rank in (0, 1)]
    assert all(isinstance(each.result(), dist.Store) for each in ranks), [each.result() for each in ranks]
    for name, value in {"MASTER_ADDR": "", "MASTER_PORT": "", "SLURM_STEP_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert set(rendezvous_addresses(LaunchEnv(0, 2, 0, "srun"))).isdisjoint(step)


@pytest.mark.parametrize("listens", ["silent", "talking"])
def test_a_port_that_another_program_has_is_passed_over(listens: str, step, pool) -> None:
    with contextlib.closing(socket.create_server(("", step[0][1]))) as other:
        if listens == "talking":
            threading.Thread(target=_greet, args=(other,), daemon=True).start()
        ranks = list(pool.map(come, (0, 1), [an_attempt(2)] * 2, [60.0] * 2, ["srun"] * 2))
    assert all(isinstance(each, dist.Store) for each in ranks), ranks
    assert int(os.environ["MASTER_PORT"]) == step[1][1]


def _greet(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            peer, _ = server.accept()
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            peer.close()


@pytest.mark.parametrize("left", ["an address", "no name"])
def test_an_address_that_a_shell_has_left_is_replaced(
    left: str, step, pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp_store, "rendezvous_addresses", lambda _: [("elsewhere", 29500), *step])
    real = {name: getattr(socket, name) for name in ("getaddrinfo", "create_connection")}

    def resolved(host: str, *rest: object, **how: object) -> object:
        if host != "elsewhere":
            return real["getaddrinfo"](host, *rest, **how)
        if left == "no name":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.9", 29500))]  # of documents: nobody's

    def reached(at: tuple[str, int], **how: object) -> object:
        if at[0] == "elsewhere":  # nobody is asked: as behind a firewall, nobody answers or refuses
            raise TimeoutError
        return real["create_connection"](at, **how)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "create_connection", reached)
    ranks = list(pool.map(come, (0, 1), [an_attempt(2)] * 2, [60.0] * 2, ["srun"] * 2))
    assert all(isinstance(each, dist.Store) for each in ranks), ranks
    assert (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) == step[0]
    assert (
        f"MASTER_ADDR=elsewhere is no address of {socket.gethostname()}, where rank 0 is; the ranks meet" in caplog.text
    )


def test_an_address_of_another_machine_is_a_sentence_where_no_launcher_knows_better(
    address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "203.0.113.9")
    said = come(0, a_run(2))
    assert isinstance(said, LaunchError)
    assert "MASTER_ADDR=203.0.113.9 is no address of " in str(said)


def test_a_start_without_a_free_port_is_worth_another(step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "_bind_listener", _in_use)
    said = come(0, an_attempt(2), launcher="srun")
    assert isinstance(said, TrainingHungError)
    assert "another program listens at localhost:" in str(said)


def _in_use(*_: object) -> None:
    raise OSError(98, "Address already in use")


def test_a_name_that_is_the_loopback_to_its_own_node_alone_is_served_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))])
    with contextlib.closing(tcp_store._open_listener("node1", 0)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - that is what is asked


# --- ranks that do not come ---


def test_who_does_not_come_is_named_on_every_rank(address, pool) -> None:
    errors = [str(each) for each in pool.map(come, (0, 2), [a_run(5)] * 2, [3.0] * 2)]
    sentence = (
        f"2 of 5 ranks came within 3 s (ranks 0, 2 on {socket.gethostname()}), but not ranks 1, 3-4: "
        f"see why they did not start there, and start again"
    )
    assert errors == [sentence] * 2


def test_rank_0_that_does_not_come_is_a_sentence(address) -> None:
    said = str(come(1, a_run(2), 0.2))
    assert said.startswith(f"rank 0 was not there within 0 s: {address} does not answer (")
    assert "Connection refused" in said


def test_another_program_at_the_port_is_a_sentence_for_everybody(address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "_ANSWER_TIMEOUT_SECONDS", 0.5)
    with contextlib.closing(socket.create_server(("127.0.0.1", int(address.partition(":")[2])))):
        first = str(come(0, a_run(2), 5.0))
        assert first.startswith(f"rank 0 cannot serve the ranks' store: another program listens at {address}")
        said = str(come(1, a_run(2), 0.5))
    assert said.startswith(f"rank 0 was not there within 0 s: {address} does not answer (no answer within ")


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", ""), ("MASTER_PORT", "http")])
def test_no_address_is_a_sentence(address, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "set them to the node of rank 0" in str(come(1, a_run(2), 1.0))


def test_under_torchrun_rank_0_is_a_guest_too(address, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(address.partition(":")[2])
    agent = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ranks = list(pool.map(come, (1, 0), [a_run(2)] * 2, [60.0] * 2, ["torchrun"] * 2))
    assert all(isinstance(each, dist.Store) for each in ranks), ranks
    assert agent.get(f"foveal/{a_run(2).store_key}/came") == b"2"


def test_a_lifeline_ends_with_its_server(address) -> None:
    server = socket.create_server(("127.0.0.1", int(address.partition(":")[2])))
    with contextlib.closing(ServerProbe(20.0)) as line:
        theirs, _ = server.accept()
        assert line.is_alive()
        theirs.close()
        server.close()
        while line.is_alive():  # as soon as the kernel has told
            pass


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 1, 2, 7, 8], "ranks 0-2, 5, 7-8")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert format_ranks(ranks) == words


def test_a_call_returns_raises_or_is_left_behind() -> None:
    assert call_with_timeout(20.0, lambda: 3) == 3
    assert call_with_timeout(20.0, lambda: None) is None
    with pytest.raises(KeyError, match="x"):
        call_with_timeout(20.0, lambda: {}["x"])
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(TimeoutError):
        call_with_timeout(0.1, silent.accept)
