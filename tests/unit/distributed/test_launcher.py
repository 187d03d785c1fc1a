"""Rank, world size and rendezvous addresses from the variables of every launcher."""

import os

import pytest

from foveal.distributed import launcher
from foveal.distributed.launcher import (
    LaunchEnv,
    candidate_store_addresses,
    read_launch_env,
    read_launch_id,
)
from foveal.errors import LaunchError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of every launcher."""
    launchers = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI", "CROSS_RANK")
    for name in [name for name in os.environ if name.startswith(launchers)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, LaunchEnv(0, 1, 0, "none")),
        (TORCHRUN, LaunchEnv(5, 8, 1, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, LaunchEnv(0, 1, 0, "environment")),
        (STEP, LaunchEnv(3, 4, 1, "srun")),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_NUM_TASKS"}, LaunchEnv(3, 16, 1, "srun")),
        (BATCH, LaunchEnv(0, 1, 0, "none")),
        (STEP | TORCHRUN, LaunchEnv(5, 8, 1, "torchrun")),  # torchrun inside a step numbers the ranks
        (BATCH | TORCHRUN, LaunchEnv(5, 8, 1, "torchrun")),
        ({"RANK": "3"}, LaunchEnv(0, 1, 0, "none")),
        (TORCHRUN | {"CROSS_RANK": "0", "TORCHELASTIC_RUN_ID": ""}, LaunchEnv(5, 8, 1, "torchrun")),
        (BY_HAND, LaunchEnv(3, 4, 1, "environment")),
        (STEP | BY_HAND, LaunchEnv(3, 4, 1, "srun")),  # both state the same
        (BY_HAND | {"CROSS_RANK": "0"}, LaunchEnv(3, 4, 1, "deepspeed")),
        (MPI, LaunchEnv(3, 4, 1, "mpirun")),
        (STEP | MPI, LaunchEnv(3, 4, 1, "srun")),  # srun --mpi
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, LaunchEnv(1, 2, 1, "mpirun")),
    ],
)
def test_launch_env(variables: dict[str, str], expected: LaunchEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_launch_env() == expected


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "srun says rank 3 of 4, and the environment RANK=0 and WORLD_SIZE=1"),
        (STEP | BY_HAND | {"WORLD_SIZE": "8"}, "srun says rank 3 of 4, and the environment RANK=3 and WORLD_SIZE=8"),
        (
            MPI | {"RANK": "0", "WORLD_SIZE": "1"},
            "mpirun says rank 3 of 4, and the environment RANK=0 and WORLD_SIZE=1",
        ),
        (
            STEP | MPI | {"OMPI_COMM_WORLD_RANK": "0"},
            "srun says rank 3 of 4, and the environment OMPI_COMM_WORLD_RANK=0",
        ),
        (TORCHRUN | {"WORLD_SIZE": "4"}, r"torchrun says rank 5 \(local rank 1\) of 4, which cannot be"),
        (TORCHRUN | {"RANK": "-1"}, "torchrun says rank -1"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "of 0, which cannot be"),
        (TORCHRUN | {"LOCAL_RANK": "6"}, r"rank 5 \(local rank 6\)"),
        (TORCHRUN | {"RANK": "five"}, "the launcher's RANK is 'five', which is not a number"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "the launcher's WORLD_SIZE is '', which is not a number"),
        (STEP | {"SLURM_PROCID": "4"}, "srun says rank 4"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2(x3)"}, r"SLURM_STEP_NUM_TASKS is '2\(x3\)', which is not a number"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_one_sentence(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=sentence):
        read_launch_env()


def test_torchrun_variables_are_ignored_in_a_child_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was submitted by a process of torchrun inherits all variables of torchrun."""
    for name, value in (STEP | TORCHRUN).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "is_child_of_srun", lambda: True)
    with pytest.raises(LaunchError, match="srun says rank 3 of 4, and the environment RANK=5 and WORLD_SIZE=8: unset"):
        read_launch_env()


@pytest.mark.parametrize(
    ("variables", "first", "count"),
    [
        (STEP | {"SLURM_STEP_NODELIST": "gpu[4-5]"}, "gpu4", 16),
        (STEP | {"SLURM_STEP_NODELIST": "gpu4", "MASTER_PORT": "29500"}, ("gpu4", 29500), 17),
        (STEP | {"SLURM_STEP_NODELIST": "gpu4", "MASTER_ADDR": "old", "MASTER_PORT": "1"}, ("old", 1), 17),
        (STEP | {"SLURM_STEP_NODELIST": "gpu4", "MASTER_ADDR": "gpu4-ib"}, "gpu4-ib", 32),
        (BY_HAND | {"MASTER_ADDR": "old", "MASTER_PORT": "29500"}, ("old", 29500), 1),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "127.0.0.1", 16),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "gpu4"}, "gpu4", 16),
    ],
)
def test_rendezvous_addresses(
    variables: dict[str, str], first: str | tuple[str, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    addresses = candidate_store_addresses(read_launch_env())
    assert addresses[0] == first or addresses[0][0] == first
    assert len(addresses) == len(set(addresses)) == count
    assert all(port in (1, 29500) or 20000 <= port < 32000 for _, port in addresses), "below the kernel's own ports"


def test_mpirun_on_several_nodes_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="set them to the node of rank 0"):
        candidate_store_addresses(read_launch_env())


def test_ports_are_drawn_by_job_step_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports of the job id's last digits would be equal for all steps of a job and for every 20,000th job."""
    first_addresses = []
    for job, step, restart in (("77", "0", "0"), ("77", "1", "0"), ("77", "0", "1"), ("20077", "0", "0")):
        for name, value in (STEP | {"SLURM_STEP_NODELIST": "gpu4"}).items():
            monkeypatch.setenv(name, value)
        for name, value in {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart}.items():
            monkeypatch.setenv(name, value)
        assert read_launch_id(read_launch_env()) == {"job": job, "step": step, "restart": restart}
        first_addresses.append(candidate_store_addresses(read_launch_env())[0])
    assert len(set(first_addresses)) == 4
