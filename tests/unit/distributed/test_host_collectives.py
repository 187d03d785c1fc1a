"""Collectives between processors: ranks as threads of this process, in trees of every depth."""

import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from foveal.distributed import host_collectives as module
from foveal.distributed.host_collectives import GROUP_SIZE, HostCollectives
from foveal.distributed.peer_failure import describe_peer_failure
from foveal.errors import LaunchError

TIMEOUT = 20.0  # seconds for a collective: more than any of these tests takes


@pytest.fixture(autouse=True)
def store_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def run_ranks(
    size: int, group_size: int, function: Callable[[HostCollectives, int], Any], timeout: float = TIMEOUT
) -> list[Any]:
    """Return what the function returned on each rank; an exception is raised here."""
    store, results = dist.HashStore(), [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(HostCollectives.connect(store, rank, size, timeout, group_size), rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), "a rank waits for ever"
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize(
    ("size", "group_size"),
    [
        pytest.param(2, GROUP_SIZE, id="two ranks"),
        pytest.param(3, 3, id="one full group"),
        pytest.param(7, 3, id="two levels, a group of one"),
        pytest.param(10, 3, id="three levels"),
    ],
)
def test_every_rank_gets_the_same_answer(size: int, group_size: int) -> None:
    def collectives(host: HostCollectives, rank: int) -> Any:
        return (
            host.all_reduce([rank, -rank, 0], max),
            host.all_reduce([rank, 1, 0.1], sum),
            host.all_gather({"rank": rank, "bytes": b"x" * 100 * rank}),
            host.broadcast(f"from {rank}"),
            host.broadcast("long " * 1000 + str(rank)),
        )

    results = run_ranks(size, group_size, collectives)
    maxima, sums, gathered, short, long = results[0]
    assert all(result == results[0] for result in results), "bit for bit, sums of fractions too"
    assert maxima == [size - 1, 0, 0]
    assert sums == [size * (size - 1) / 2, size, pytest.approx(0.1 * size)]
    assert gathered == [{"rank": rank, "bytes": b"x" * 100 * rank} for rank in range(size)]
    assert (short, long) == ("from 0", "long " * 1000 + "0")


def test_connections_and_messages_of_a_large_world() -> None:
    """1,024 ranks form two levels; a rank has at most 62 connections, and every rank but rank 0 sends up once."""
    groups = {rank: module._groups_of_rank(rank, 1024, GROUP_SIZE) for rank in range(1024)}
    assert max(sum(size - 1 for _, _, size in of_rank) for of_rank in groups.values()) == 62
    assert max(len(of_rank) for of_rank in groups.values()) == 2
    for world_size in (1, 2, 32, 33, 500, 1025):
        members: dict[str, dict[int, int]] = {}
        for rank in range(world_size):
            for name, position, size in module._groups_of_rank(rank, world_size, GROUP_SIZE):
                members.setdefault(name, {})[position] = size
        senders = sum(position > 0 for positions in members.values() for position in positions)
        assert senders == world_size - 1, "a tree"
        assert all(
            set(positions) == set(range(size)) for positions in members.values() for size in set(positions.values())
        )


def test_all_ranks_learn_at_once_that_one_is_gone() -> None:
    """An error closes the connections although its traceback is alive, so that it reaches the other groups."""
    all_others_failed = threading.Barrier(9)

    def lose_rank_7(host: HostCollectives, rank: int) -> str | None:
        host.all_reduce([rank], max)
        if rank == 7:
            host.close()
            return "closed"
        try:
            host.all_reduce([rank], max)
        except RuntimeError as error:
            all_others_failed.wait(TIMEOUT / 2)  # here a rank asks the store who is behind
            with pytest.raises(dist.DistNetworkError, match="this rank's connections are closed"):
                host.broadcast("")
            return describe_peer_failure(error)
        return "no error"

    results = run_ranks(10, 3, lose_rank_7)
    assert results.pop(7) == "closed"
    # Closed, unless data was on its way: then reset, or a broken pipe for the next write.
    lost = re.compile(r"lost a peer in a collective: .*(Connection (closed|reset) by peer|Broken pipe)")
    assert all(result and lost.search(result) for result in results)


@pytest.mark.thorough
def test_a_rank_that_does_not_come_is_an_error_after_the_timeout() -> None:
    is_over = threading.Event()

    def wait_for_rank_1(host: HostCollectives, rank: int) -> str | None:
        if rank == 1:
            return str(is_over.wait(TIMEOUT))
        try:
            host.all_reduce([rank], max)
        except RuntimeError as error:
            return describe_peer_failure(error)
        finally:
            is_over.set()
        return "no error"

    first, second = run_ranks(2, GROUP_SIZE, wait_for_rank_1, timeout=6.0)
    assert "lost a peer in a collective: Timed out waiting 6000ms" in str(first)
    assert second == "True"


def test_ranks_that_cannot_reach_each_other_are_a_launch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        _Options = dist.ProcessGroupGloo._Options  # pyright: ignore[reportAttributeAccessIssue]
        create_device = staticmethod(dist.ProcessGroupGloo.create_device)

        def __init__(self, *_: object) -> None:
            raise RuntimeError("Gloo connectFullMesh failed with timed out\nframes")

    monkeypatch.setattr(module.dist, "ProcessGroupGloo", Unreachable)
    with pytest.raises(
        LaunchError, match=r"rank 1 of 2 could not connect .*connectFullMesh failed with timed out\); .*"
    ):
        HostCollectives.connect(dist.HashStore(), 1, 2, TIMEOUT)


@pytest.mark.parametrize(
    ("master", "resolved", "interface", "device"),
    [
        ("localhost", "127.0.0.1", None, "address 127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", None, "address 127.0.0.1"),
        ("node1", "127.0.1.1", None, "default"),  # a host's name in its own /etc/hosts: others cannot reach it
        ("localhost", "127.0.0.1", "ib0", "default"),  # gloo reads the variable
    ],
)
def test_connections_use_the_interface_that_faces_the_store(
    master: str, resolved: str, interface: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    if interface is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    address = (socket.AF_INET, socket.SOCK_DGRAM, 0, "", (resolved, 29500))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [address])
    gloo = module.dist.ProcessGroupGloo
    monkeypatch.setattr(gloo, "create_device", lambda hostname: f"address {hostname}")
    monkeypatch.setattr(gloo, "create_default_device", lambda: "default")
    assert module._open_gloo_device() == device
