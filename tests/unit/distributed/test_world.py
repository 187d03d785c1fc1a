"""The process group and its collectives."""

import os
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveal.distributed import world
from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.world import (
    RankOutcome,
    World,
    describe_rank,
    init_world,
    select_device,
)
from foveal.errors import DataError, FileLimitError, FovealError, LaunchError, RankConflictError, TrainingHungError

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16"}


@pytest.fixture(autouse=True)
def no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the launcher's variables; all are restored after the test."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what init_world sets
        monkeypatch.delenv(name)


def test_a_world_of_size_1_cleans_up() -> None:
    with init_world(5.0) as world:
        assert (world.rank, world.size, world.local_rank, world.launcher) == (0, 1, 0, "none")
        assert torch.distributed.is_initialized()
        assert world.any_rank(True) and not world.any_rank(False)
        assert world.all_reduce_max((3, 0, 5)) == [3, 0, 5]
        assert world.broadcast_object("x") == "x"
        assert world.all_gather_objects(3) == [3]
        assert world.all_reduce_sum(torch.tensor([2.0])).item() == 2.0
        world.barrier()
        assert os.environ["WORLD_SIZE"] == "1"
    assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError, match="a mistake"), init_world(5.0):
        raise RuntimeError("a mistake")
    assert not torch.distributed.is_initialized()


def test_a_step_of_slurm_looks_like_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of libraries are set from Slurm's variables and from the rendezvous address."""
    recorded: dict[str, str] = {}

    def init_process_group(backend: str, **settings: object) -> None:
        recorded.update(os.environ)
        recorded["backend"] = backend

    def join_rendezvous(launch_env: LaunchEnv, run: object, seconds: float, gpu_uuid: str) -> None:
        recorded["joined"] = f"{launch_env.rank} of {launch_env.world_size}, {seconds:g} s{gpu_uuid}"
        os.environ |= {"MASTER_ADDR": "gpu4", "MASTER_PORT": "23456"}

    monkeypatch.setattr(world, "join_rendezvous", join_rendezvous)
    monkeypatch.setattr(world.HostCollectives, "connect", lambda *_: HostCollectives([]))
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (STEP | {"SLURM_JOB_NODELIST": "gpu[3-5]", "SLURM_STEP_NODELIST": "gpu[4-5]"}).items():
        monkeypatch.setenv(name, value)
    with init_world(5.0):
        pass
    assert recorded["joined"] == "3 of 4, 600 s", "the rendezvous has a timeout of its own"
    assert {name: recorded[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu4",
        "MASTER_PORT": "23456",
    }
    assert recorded["backend"] == "gloo"


NCCL_MISUSE = (
    "NCCL error in: /src/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 19000"
)
NCCL_NETWORK = (
    "Failed to initialize NCCL communicator: unhandled system error (run with NCCL_DEBUG=INFO for details) \n"
    "NCCL Last Error: Bootstrap : no socket interface found"
)


@pytest.fixture
def join_on_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Join as rank 1 of 2 on GPUs that are not there. ``failing`` raises ``error``; return what init_process_group got."""

    def join(failing: str = "", error: Exception | None = None) -> dict[str, Any]:
        connected: dict[str, Any] = {}

        def init_process_group(backend: str, **options: Any) -> None:
            connected.update(options, backend=backend)
            if failing == "init_process_group" and error:
                raise error

        def barrier() -> None:
            connected["barrier"] = True
            if failing == "barrier" and error:
                raise error

        monkeypatch.setattr(world, "join_rendezvous", lambda *_: None)
        monkeypatch.setattr(world, "read_launch_env", lambda: LaunchEnv(1, 2, 1, "environment"))
        monkeypatch.setattr(world, "select_device", lambda _: torch.device("cuda", 1))
        monkeypatch.setattr(world, "read_gpu_uuid", lambda _: "")
        monkeypatch.setattr(world.HostCollectives, "connect", lambda *_: HostCollectives([]))
        monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
        monkeypatch.setattr(torch.distributed, "barrier", barrier)
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        with init_world(5.0):
            return connected

    return join


def test_nccl_connects_and_runs_its_first_collective_at_the_start(join_on_gpus) -> None:
    connected = join_on_gpus()
    assert (connected["backend"], connected["device_id"]) == ("nccl", torch.device("cuda", 1))
    assert connected["barrier"], "connections that are made in the first collective fail as a launch, too"


@pytest.mark.parametrize("failing", ["init_process_group", "barrier"])
@pytest.mark.parametrize(
    ("text", "restarts", "kind", "sentence"),
    [
        (NCCL_MISUSE, 0, LaunchError, "NCCL refuses what rank 1 asks for: Duplicate GPU detected : rank 1 and rank 0"),
        (NCCL_MISUSE, 2, LaunchError, "NCCL refuses what rank 1 asks for: Duplicate GPU detected : rank 1 and rank 0"),
        (NCCL_NETWORK, 0, LaunchError, "rank 1 of 2 could not connect to the others over nccl (Bootstrap : no socket"),
        (
            NCCL_NETWORK,
            2,
            TrainingHungError,
            "rank 1 of 2 could not connect to the others over nccl (Bootstrap : no so",
        ),
        ("socket: Too many open files", 2, FileLimitError, "files that a process may open are in use: raise the hard"),
    ],
)
def test_nccl_that_does_not_start_is_an_error_of_the_launch(
    failing: str, text: str, restarts: int, kind: type[FovealError], sentence: str, join_on_gpus, monkeypatch
) -> None:
    """Not a lost peer, which is requeued: another start would do the same, unless one of this job has worked before."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    for error in (torch.distributed.DistBackendError(text), RuntimeError(text)):
        with pytest.raises(FovealError) as caught:
            join_on_gpus(failing, error)
        assert type(caught.value) is kind
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value.exit_code == (5 if kind is TrainingHungError else 2)


def test_every_rank_may_open_as_many_files_as_its_node_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with init_world(5.0):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise DataError("rank 1 has no data")


def outcome(outcome: RankOutcome[Any]) -> tuple[Any, float, tuple[bool, ...]]:
    try:
        found = outcome.result_or_raise()
    except DataError as error:
        found = str(error)
    return found, outcome.total, outcome.flags


def _collectives(world: World) -> dict[str, object]:
    values = torch.arange(3.0) * (world.rank + 1)
    return {
        "any": (world.any_rank(world.rank == 1), world.any_rank(False)),
        "max": world.all_reduce_max([world.rank, 7 - world.rank, 0]),
        "sum": world.all_reduce_sum(values).tolist(),
        "argument": values.tolist(),
        "broadcast": world.broadcast_object({"from": world.rank}),
        "gather": world.all_gather_objects(f"rank {world.rank}"),
        "run on all": outcome(
            world.run_all(lambda: world.rank, lambda rank: 0.5 + rank, lambda: (world.rank == 1, False))
        ),
        "fails on one": outcome(world.run_all(lambda: fail_on_rank_1(world), lambda _: 1.0, lambda: (True,))),
    }


def test_collectives_of_two_ranks(two_ranks) -> None:
    first, second = two_ranks.call(_collectives)
    assert first["any"] == second["any"] == (True, False)
    assert first["max"] == second["max"] == [1, 7, 0]
    assert first["sum"] == second["sum"] == [0.0, 3.0, 6.0]
    assert (first["argument"], second["argument"]) == ([0.0, 1.0, 2.0], [0.0, 2.0, 4.0]), "the argument is not changed"
    assert first["broadcast"] == second["broadcast"] == {"from": 0}
    assert first["run on all"] == (0, 2.0, (True, False)), "this rank's result, the sum, and any rank's flags"
    assert second["run on all"] == (1, 2.0, (True, False))
    assert first["fails on one"] == second["fails on one"] == ("rank 1 has no data", 1.0, (True,))
    assert first["gather"] == second["gather"] == ["rank 0", "rank 1"]


def test_the_rank_line_names_the_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    line = describe_rank(World(3, 4, 1, "srun", torch.device("cpu")))
    assert line.startswith("rank 3 of 4 on ")
    assert line.endswith("local rank 1, cpu, launcher srun, SLURM_JOB_ID=77, SLURM_RESTART_COUNT=2")


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 3, 0), (4, 3, 3), (4, 0, 0)])
def test_one_gpu_for_each_task_or_all_for_every_task(
    visible: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert select_device(LaunchEnv(local_rank, 8, local_rank, "srun")) == torch.device("cuda", index)


def test_more_tasks_than_gpus_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: this process sees 2; start as many tasks"):
        select_device(LaunchEnv(2, 4, 2, "srun"))


def _check_equal(world: World, facts: list[dict[str, object]]) -> str:
    try:
        world.check_equal_on_ranks(facts[world.rank])
    except RankConflictError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"seed": 1, "data": "abc"}, "equal"),
        ({"seed": 1, "data": "abd"}, "rank 1 is about another run than rank 0: data is abd there and abc here"),
        ({"seed": 1}, "rank 1 is about another run than rank 0: data is None there and abc here"),
    ],
)
def test_ranks_with_other_facts_raise(second: dict[str, object], sentence: str, two_ranks) -> None:
    """Settings may be equal and data not: a path may show other data on another node."""
    assert two_ranks.call(_check_equal, [{"data": "abc", "seed": 1}, second]) == [sentence] * 2


@pytest.mark.parametrize(("restarts", "kind"), [(None, LaunchError), ("0", LaunchError), ("2", TrainingHungError)])
def test_ranks_that_do_not_come_are_worth_another_start_only_in_a_job_that_was_started_before(
    restarts: str | None, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with pytest.raises(FovealError) as caught, world.hung_if_restarted():
        raise LaunchError("1 of 2 ranks came")
    assert (type(caught.value), str(caught.value)) == (kind, "1 of 2 ranks came")
