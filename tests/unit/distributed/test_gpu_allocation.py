"""GPUs and ranks: two ranks on one GPU are refused before they meet."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ports import free_port

from foveal.distributed import rendezvous
from foveal.distributed.gpu_allocation import read_gpu_uuid
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import RankConflictError


def test_two_ranks_on_one_gpu_are_a_sentence_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when every task sees one GPU, and the same one."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    run = RunIdentity({"launcher": "environment"}, 3)

    def join(rank: int) -> dist.Store | RankConflictError:
        launch_env = LaunchEnv(rank, 3, rank, "environment")
        try:
            return join_rendezvous(launch_env, run, 60.0, "GPU-a" if rank else "GPU-b")
        except RankConflictError as error:
            return error

    with ThreadPoolExecutor(3) as threads:
        errors = list(threads.map(join, range(3)))
    assert [type(error) for error in errors] == [RankConflictError] * 3
    sentence = (
        f"ranks 1-2 are on one GPU, GPU-a of {socket.gethostname()}: start as many tasks per node as GPUs, and let each "
        f"task see all GPUs of the node or one that no other task sees (CUDA_VISIBLE_DEVICES)"
    )
    assert {str(error) for error in errors} == {sentence}


@pytest.mark.parametrize("hosts", [["node1", "node2"], ["node1", "node1"]])
def test_gpus_are_told_apart_by_node_and_name(hosts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, host = dist.HashStore(), iter(hosts)
    monkeypatch.setattr(socket, "gethostname", lambda: next(host))
    rendezvous._claim_gpu(store, 0, "GPU-a")
    with pytest.raises(RankConflictError) if len(set(hosts)) == 1 else contextlib.nullcontext():
        rendezvous._claim_gpu(store, 1, "GPU-a")


@pytest.mark.parametrize(
    ("device", "environment", "uuid"),
    [
        ("cuda:1", {}, "a1b2"),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "2,3"}, "a1b2"),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "MIG-x,MIG-y"}, "MIG-y"),  # the properties may name the whole GPU
        ("cuda:1", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}, ""),
        ("cpu", {}, ""),
    ],
)
def test_the_name_of_a_gpu(
    device: str, environment: dict[str, str], uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a1b2"))
    assert read_gpu_uuid(torch.device(device)) == uuid


def test_a_gpu_without_a_name_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert read_gpu_uuid(torch.device("cuda", 0)) == ""
