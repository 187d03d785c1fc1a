"""Ranks that come together, and ranks that do not: threads of this process, each with a connection of its own."""

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from foveal.distributed import rendezvous
from foveal.distributed.rendezvous import Lifeline, meet, ranks_in_words, within
from foveal.errors import LaunchError


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody answers yet."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_LINGERS", 1.0)
    return f"127.0.0.1:{port}"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as found:
        yield found


def test_all_ranks_meet_in_one_store(address, pool) -> None:
    stores = list(pool.map(lambda rank: meet(rank, 3, 60.0), range(3)))
    stores[2].set("word", "said")
    assert [store.get("word") for store in stores] == [b"said"] * 3


def test_another_attempt_meets_nobody_of_this_one(address, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = pool.map(lambda rank: meet(rank, 2, 60.0), range(2))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    other = rendezvous.connect(20.0)
    other.set("word", "said")
    assert not store.check(["word"])
    assert not other.check(["here/0"])


def test_who_does_not_come_is_named_on_every_rank(address, pool) -> None:
    errors = list(pool.map(lambda rank: _refused(rank, 5, 3.0), (0, 2)))
    sentence = (
        f"2 of 5 ranks came within 3 s (ranks 0, 2 on {socket.gethostname()}), but not ranks 1, 3-4: "
        f"see why they did not start there, and start again"
    )
    assert errors == [sentence] * 2


def test_rank_0_that_does_not_come_is_a_sentence(address) -> None:
    said = _refused(1, 2, 0.2)
    assert said.startswith(f"rank 0 was not there within 0 s: {address} does not answer (")
    assert "Connection refused" in said


def test_another_program_at_the_port_is_a_sentence_for_everybody(address) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", int(address.partition(":")[2])))):
        assert _refused(0, 2, 5.0).startswith(f"rank 0 cannot serve on {address} (")
        said = _refused(1, 2, 0.5)
    assert said.startswith(f"rank 1 found {address}, but the ranks did not meet there (no answer within 0.5 s)")


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", ""), ("MASTER_PORT", "http")])
def test_no_address_is_a_sentence(address, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "set them to the node of rank 0" in _refused(1, 2, 1.0)


def test_under_torchrun_rank_0_is_a_guest_too(address, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(address.partition(":")[2])
    agent = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    list(pool.map(lambda rank: meet(rank, 2, 60.0), range(2)))
    assert agent.get("foveal/0/0/came") == b"2"


def test_a_lifeline_ends_with_its_server(address) -> None:
    server = socket.create_server(("127.0.0.1", int(address.partition(":")[2])))
    with contextlib.closing(Lifeline(20.0)) as line:
        theirs, _ = server.accept()
        assert line.holds()
        theirs.close()
        server.close()
        while line.holds():  # as soon as the kernel has told
            pass


def _refused(rank: int, size: int, seconds: float) -> str:
    with pytest.raises(LaunchError) as caught:
        meet(rank, size, seconds)
    return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 1, 2, 7, 8], "ranks 0-2, 5, 7-8")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


def test_a_call_returns_raises_or_is_left_behind() -> None:
    assert within(20.0, lambda: 3) == 3
    assert within(20.0, lambda: None) is None
    with pytest.raises(KeyError, match="x"):
        within(20.0, lambda: {}["x"])
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(TimeoutError):
        within(0.1, silent.accept)
