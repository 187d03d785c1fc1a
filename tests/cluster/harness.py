"""A real Slurm of two nodes on one machine, for the time of a test session.

    with Cluster(folder) as cluster:
        job = cluster.submit("slurm/pretrain_mae.sh", "CONFIG", options=["--nodes=2"], cwd=repository)
        assert cluster.wait(job)["JobState"] == "COMPLETED"

Every daemon runs in the foreground as a child of this process, is addressed on loopback, and keeps all of its files in
``folder``. A node is a UTS, mount and PID namespace with its own host name (node1, node2) where ``unshare`` is allowed;
elsewhere it is a plain process, and is named by its loopback address, which needs no entry in /etc/hosts. No root is
needed for that.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # jobs run this Python
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "mariadbd", "mariadb-install-db", "setpriv")
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
CPUS = 8
STILL_GOING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING"}
# UNIX sockets have 108 characters; the longest here is spool/NAME/NAME_JOB.4294967291
LONGEST_FOLDER = 50
OUTER_JOB = ("SLURM_", "SBATCH_", "SRUN_")  # the tests may themselves run in a job

# PID 1 of a node reaps what its jobs leave behind; when it is killed, everything on the node dies, as by a power cut.
NODE = 'hostname "$1"; mount --bind "$2" /etc/hosts; slurmd -D -N "$1" & wait "$!"'

SLURM_CONF = """\
ClusterName=foveal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for the credential of its first attempt to expire: 120 s if not told otherwise
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# slurmd and srun stay on every address (NoInAddrAny breaks srun inside a job): only munge's key guards them
CommunicationParameters=NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# more CPUs than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
TCPTimeout=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue
JobRequeue=1
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge/socket
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser={user}
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
DebugLevel=info
StorageType=accounting_storage/mysql
# "localhost" means the socket that MYSQL_UNIX_PORT names
StorageHost=localhost
StorageUser={user}
StorageLoc=accounting
"""


class ClusterError(Exception):
    """The cluster, or a job on it, did not do in time what was asked of it."""


def missing() -> list[str]:
    """The programs that are not installed; tests/cluster/install_slurm.sh installs them all."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def namespaces_work() -> bool:
    """Whether this process may give a node its own host name and process table."""
    return shutil.which(NAMESPACES[0]) is not None and _succeeds([*NAMESPACES, "true"], dict(os.environ))


class Cluster:
    """slurmctld, slurmdbd with MariaDB, munged and two slurmd under ``folder`` (short, empty; it is not removed).

    Errors: ClusterError when a daemon does not answer in time, or a job does not end in time.
    """

    def __init__(self, folder: Path, *, namespaces: bool | None = None) -> None:
        assert len(str(folder)) <= LONGEST_FOLDER, f"{folder} is too long for UNIX sockets"
        self.folder = folder
        self.namespaces = namespaces_work() if namespaces is None else namespaces
        self.nodes = ("node1", "node2") if self.namespaces else ("127.0.0.11", "127.0.0.12")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(OUTER_JOB)},
            "PATH": PATH,
            "LC_ALL": "C",
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "MYSQL_UNIX_PORT": str(folder / "run/database.socket"),
        }

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
        if self._running("slurmctld"):
            self.run("scancel", f"--user={_user()}", check=False)
            _wait(lambda: not self.run("squeue", "--noheader", check=False).stdout, 15)
        for name in (*self.nodes, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name, signal.SIGKILL if name in self.nodes and self.namespaces else signal.SIGTERM)
        self._end_strays()

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
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

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
        if not _wait(holds, timeout):
            raise ClusterError(f"{what}: not after {timeout} s\n{self.run('squeue', '--long').stdout}")

    def wait(self, job: str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job is over, and tell what became of it."""
        self.until(lambda: self.job(job)["JobState"] not in STILL_GOING, f"job {job} is over", timeout)
        return self.job(job)

    def output(self, job: str) -> str:
        """What a job wrote so far."""
        file = Path(self.job(job).get("StdOut", ""))
        return file.read_text(errors="replace") if file.is_file() else ""

    def logs(self, lines: int = 40) -> dict[str, str]:
        """The end of every daemon's log."""
        files = sorted((self.folder / "log").glob("*"))
        return {file.name: "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) for file in files}

    def _start(self) -> None:
        for name in ("etc", "log", "state", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        for name in ("run", "database"):
            (self.folder / name).mkdir(mode=0o700)  # the database asks nobody for a password
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        self._configure()
        self._start_munge()
        self._start_database()
        self._daemon("slurmdbd", ["slurmdbd", "-D"])
        self._until("slurmdbd", "sacctmgr", "--noheader", "list", "cluster")
        self.run("sacctmgr", "--immediate", "add", "cluster", "foveal")
        self._daemon("slurmctld", ["slurmctld", "-D"])
        self._until("slurmctld", "sh", "-c", "scontrol ping | grep -q UP")
        for node in self.nodes:
            plain = ["slurmd", "-D", "-N", node]
            inside = [*NAMESPACES, "bash", "-c", NODE, "node", node, str(self.folder / "etc/hosts")]
            self._daemon(node, inside if self.namespaces else plain)
        idle = "test $(sinfo --noheader --Node --states=idle --format=%N | wc -l) = 2"
        self._until(self.nodes[0], "sh", "-c", idle)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        accounting, controller, *ports = _free_ports(2 + len(self.nodes))
        addresses = ("127.0.0.11", "127.0.0.12")
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node if self.namespaces else host} NodeAddr={address} Port={port} CPUs={CPUS}"
            for node, address, port in zip(self.nodes, addresses, ports, strict=True)
        )
        values = {
            "folder": self.folder, "host": host, "user": _user(), "nodes": nodes,
            "controller_port": controller, "accounting_port": accounting,
        }  # fmt: skip
        names = [("127.0.0.1", "localhost"), ("127.0.0.1", host), *zip(addresses, self.nodes, strict=True)]
        etc = self.folder / "etc"
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names))
        (etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (etc / "slurmdbd.conf").touch(mode=0o600)  # slurmdbd refuses one that others can read
        (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (self.folder / "munge/key").touch(mode=0o600)
        (self.folder / "munge/key").write_bytes(os.urandom(1024))

    def _start_munge(self) -> None:
        munge, run, log = self.folder / "munge", self.folder / "run", self.folder / "log"
        places = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--seed-file={munge}/seed"]
        own = [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log"]
        self._daemon("munged", ["munged", "--foreground", *places, *own])
        self._until("munged", "munge", "--no-input", "--socket", f"{munge}/socket")

    def _start_database(self) -> None:
        """MariaDB without network and without passwords: only this user may enter the folder of its socket."""
        data = [f"--user={_user()}", f"--datadir={self.folder / 'database'}", "--innodb-log-file-size=16M"]
        self.run("mariadb-install-db", "--no-defaults", *data, "--skip-test-db", timeout=300)
        place = [f"--socket={self.folder / 'run/database.socket'}", f"--pid-file={self.folder / 'run/mariadbd.pid'}"]
        small = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        alone = ["--skip-networking", "--skip-grant-tables"]
        self._daemon("mariadbd", ["mariadbd", "--no-defaults", *data, *place, *small, *alone])
        self._until("mariadbd", "mariadb", "--no-defaults", "--execute=select 1")

    def _daemon(self, name: str, command: list[str]) -> None:
        """Start a child that dies with this process, and that the terminal's Ctrl-C does not reach."""
        with (self.folder / "log" / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _running(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def _until(self, name: str, *command: str) -> None:
        def answered_or_ended() -> bool:
            return not self._running(name) or _succeeds(command, self._environment)

        if not _wait(answered_or_ended, 60) or not self._running(name):
            logs = "\n".join(f"--- {file}\n{text}" for file, text in self.logs().items())
            raise ClusterError(f"{name} does not answer to '{' '.join(command)}'\n{logs}")

    def _end(self, name: str, how: signal.Signals) -> None:
        if not self._running(name):
            return
        self._daemons[name].send_signal(how)  # a child that is not waited for keeps its pid: no stranger is hit
        try:
            self._daemons[name].wait(20)
        except subprocess.TimeoutExpired:
            self._daemons[name].kill()
            self._daemons[name].wait()

    def _end_strays(self) -> None:
        """Kill what a plain node leaves: slurmstepd and the tasks of jobs are not children of slurmd.

        They are known by our configuration in their environment or our files in their hands, never by their name; the
        handle is opened before the look, so that the process that was looked at is the one that is ended.
        """
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                handle = os.pidfd_open(int(entry.name))
            except OSError:
                continue
            try:
                if int(entry.name) != os.getpid() and self._is_ours(entry):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            except OSError:
                continue  # it ended by itself
            finally:
                os.close(handle)

    def _is_ours(self, process: Path) -> bool:
        if f"SLURM_CONF={self._environment['SLURM_CONF']}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        return any(str(file.readlink()).startswith(f"{self.folder}/log/") for file in (process / "fd").iterdir())


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _succeeds(command: Sequence[str], environment: dict[str, str]) -> bool:
    none = subprocess.DEVNULL
    done = subprocess.run(command, env=environment, stdin=none, stdout=none, stderr=none, timeout=60, check=False)
    return done.returncode == 0


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
