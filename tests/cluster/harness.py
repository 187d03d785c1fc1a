"""A real Slurm of two or three nodes on one machine, for the time of a test session.

    with Cluster(folder) as cluster:
        job = cluster.submit("slurm/pretrain_mae.sh", "CONFIG", options=["--nodes=2"], cwd=repository)
        assert cluster.wait(job)["JobState"] == "COMPLETED"

Every daemon runs in the foreground as a child of this process, and keeps all of its files in ``folder``. What a node is
depends on what this process may do (machines.py): where it may, a node can lose its power, its slurmd or its network.
No root is needed for nodes that are plain processes.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from machines import (
    ClusterError,
    Daemons,
    Kind,
    Machines,
    Process,
    best_kind,
    controller_address,
    kill,
    node_address,
    processes,
    succeeds,
    wait,
)
from ports import free_port
from slurm_files import Place, write_files

PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # jobs run this Python
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "mariadbd", "mariadb-install-db", "setpriv")
STILL_GOING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING"}
# UNIX sockets have 108 characters; the longest here is spool/NAME/NAME_JOB.4294967291
LONGEST_FOLDER = 50
OUTER_JOB = ("SLURM_", "SBATCH_", "SRUN_")  # the tests may themselves run in a job


def missing() -> list[str]:
    """The programs that are not installed; tests/cluster/install_slurm.sh installs them all."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


@dataclass(frozen=True, slots=True)
class Rank:
    """A process that srun started for a job: its rank, its node, and how often the job had been requeued then."""

    rank: int
    node: str
    pid: int
    restarts: int


class Cluster:
    """slurmctld, slurmdbd with MariaDB, munged and some slurmd under ``folder`` (short, empty; it is not removed).

    ``grace``: seconds that jobs of the partition "low" have to leave; ``more``: further lines of slurm.conf.
    Raises: ClusterError when a daemon does not answer in time, or a job does not end in time.
    """

    def __init__(
        self, folder: Path, *, nodes: int = 2, kind: Kind | None = None, grace: int = 20, more: str = ""
    ) -> None:
        assert len(str(folder)) <= LONGEST_FOLDER, f"{folder} is too long for UNIX sockets"
        self.folder = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(OUTER_JOB)},
            "PATH": PATH,
            "LC_ALL": "C",
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "MYSQL_UNIX_PORT": str(folder / "run/database.socket"),
        }
        self.kind = best_kind(self._environment) if kind is None else kind
        addresses = [node_address(self.kind, number) for number in range(1, nodes + 1)]
        names = [f"node{number}" for number in range(1, nodes + 1)] if self.named else addresses
        self.nodes = tuple(names)
        self._daemons = Daemons(folder / "log", self._environment)
        self.machines = Machines(folder, self.kind, self._daemons, dict(zip(names, addresses, strict=True)))
        self._configure(addresses, grace, more)

    @property
    def named(self) -> bool:
        """Whether a node has a host name of its own."""
        return self.kind is not Kind.PLAIN

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._daemons.running("slurmctld"):
            self.run("scancel", f"--user={_user()}", check=False)
            wait(lambda: not self.run("squeue", "--noheader", check=False).stdout, 15)
        for node in self.nodes:
            self._daemons.end(node, signal.SIGKILL if self.named else signal.SIGTERM)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged", "switch"):
            self._daemons.end(name)
        kill(self.folder, lambda _: True)  # what a plain node leaves: slurmstepd and tasks are not children of slurmd

    def run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would; with ``check``, a failure is a ClusterError with its output."""
        environment = {**self._environment, **(env or {})}
        words = [*self.machines.outside, *command]
        done = subprocess.run(
            words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, name: str, *command: str) -> None:
        """Start a server that the nodes reach at the controller's address; ``end(name)`` ends it, and so does the exit."""
        self._daemons.start(name, [*self.machines.outside, *command])

    def send(self, name: str, number: signal.Signals) -> None:
        """Signal a server and what it started."""
        self._daemons.send(name, number)

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        self._daemons.end(name, how)

    def submit(
        self, *command: str, options: Sequence[str] = (), cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """``sbatch OPTIONS SCRIPT ARGUMENTS``; the job's id."""
        return self.run("sbatch", "--parsable", *options, *command, cwd=cwd, env=env).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` knows: JobState, ExitCode, Reason, Restarts, NodeList, StdOut and more."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job).stdout))

    def until(self, holds: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Wait until something holds; a ClusterError that says what did not."""
        if not wait(holds, timeout):
            raise ClusterError(f"{what}: not after {timeout} s\n{self.run('squeue', '--long').stdout}")

    def wait(self, job: str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job is over, and tell what became of it."""
        self.until(lambda: self.job(job)["JobState"] not in STILL_GOING, f"job {job} is over", timeout)
        return self.job(job)

    def output(self, job: str) -> str:
        """What a job wrote so far."""
        file = Path(self.job(job).get("StdOut", ""))
        return file.read_text(errors="replace") if file.is_file() else ""

    def state(self, node: str) -> str:
        """A node's state as Slurm sees it, such as idle, mixed, down or idle*."""
        return self.run("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T").stdout.strip()

    def ranks(self, job: str) -> list[Rank]:
        """A job's ranks that are alive, on every node: after a cut there may be those of two attempts."""
        found = []
        for each in processes(self.folder):
            said = each.environment
            if said.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in said and "SLURM_PROCID" in said:
                restarts = int(said.get("SLURM_RESTART_COUNT", "0"))
                found.append(Rank(int(said["SLURM_PROCID"]), said.get("SLURMD_NODENAME", ""), each.pid, restarts))
        mine = {rank.pid for rank in found}
        return sorted((rank for rank in found if _parent(rank.pid) not in mine), key=lambda rank: rank.rank)

    def orphans(self) -> list[Process]:
        """Processes of jobs that Slurm does not run (any more), or of an earlier attempt of one that it does run."""
        lines = self.run("squeue", "--noheader", "--states=running,completing", "--format=%A").stdout.split()
        running = {job: self.job(job).get("Restarts", "0") for job in lines}

        def lost(each: Process) -> bool:
            said = each.environment
            return "SLURM_JOB_ID" in said and said.get("SLURM_RESTART_COUNT", "0") != running.get(said["SLURM_JOB_ID"])

        return [each for each in processes(self.folder) if lost(each)]

    def logs(self, lines: int = 40) -> dict[str, str]:
        """The end of every daemon's log."""
        files = sorted((self.folder / "log").glob("*"))
        return {file.name: "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) for file in files}

    def all_idle(self) -> None:
        """Wait until every node can be given a job."""
        idle = f"test $(sinfo --noheader --partition=main --Node --states=idle --format=%N | wc -l) = {len(self.nodes)}"
        self._until(self.nodes[0], "sh", "-c", idle)

    def _configure(self, addresses: Sequence[str], grace: int, more: str) -> None:
        host = socket.gethostname().split(".")[0]
        accounting, controller, *ports = (free_port() for _ in range(2 + len(self.nodes)))
        places = {
            node: Place(node, node if self.named else host, address, port)
            for node, address, port in zip(self.nodes, addresses, ports, strict=True)
        }
        control = Place(host, host, controller_address(self.kind), controller)
        write_files(self.folder, _user(), control, accounting, places, grace, more)

    def _start(self) -> None:
        self.machines.connect()
        self._start_munge()
        self._start_database()
        self.start("slurmdbd", "slurmdbd", "-D")
        self._until("slurmdbd", "sacctmgr", "--noheader", "list", "cluster")
        self.run("sacctmgr", "--immediate", "add", "cluster", "foveal")
        self.start("slurmctld", "slurmctld", "-D")
        self._until("slurmctld", "sh", "-c", "scontrol ping | grep -q UP")
        for node in self.nodes:
            self.machines.start(node)
        self.all_idle()

    def _start_munge(self) -> None:
        munge, run, log = self.folder / "munge", self.folder / "run", self.folder / "log"
        places = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--seed-file={munge}/seed"]
        own = [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log"]
        self.start("munged", "munged", "--foreground", *places, *own)
        self._until("munged", "munge", "--no-input", "--socket", f"{munge}/socket")

    def _start_database(self) -> None:
        """MariaDB without network and without passwords: only this user may enter the folder of its socket."""
        data = [f"--user={_user()}", f"--datadir={self.folder / 'database'}", "--innodb-log-file-size=16M"]
        data.append(f"--tmpdir={self.folder / 'run'}")  # a server that starts removes the temporary tables of others
        self.run("mariadb-install-db", "--no-defaults", *data, "--skip-test-db", timeout=300)
        place = [f"--socket={self.folder / 'run/database.socket'}", f"--pid-file={self.folder / 'run/mariadbd.pid'}"]
        small = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        alone = ["--skip-networking", "--skip-grant-tables"]
        self.start("mariadbd", "mariadbd", "--no-defaults", *data, *place, *small, *alone)
        self._until("mariadbd", "mariadb", "--no-defaults", "--execute=select 1")

    def _until(self, name: str, *command: str) -> None:
        """Wait until a daemon answers to a command."""

        def answered_or_ended() -> bool:
            return not self._daemons.running(name) or succeeds([*self.machines.outside, *command], self._environment)

        if not wait(answered_or_ended, 60) or not self._daemons.running(name):
            logs = "\n".join(f"--- {file}\n{text}" for file, text in self.logs().items())
            raise ClusterError(f"{name} does not answer to '{' '.join(command)}'\n{logs}")


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
