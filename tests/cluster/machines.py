"""Nodes that can be switched off, unplugged and started again: namespaces of this machine, or plain processes.

Where it is allowed, a node is a UTS, mount, PID and network namespace: it has a host name, a process table and an address
of its own, and a cable to a bridge that itself lives in a namespace, so that nothing of it is seen outside and nothing
is left of it when the test process dies. Its file system is the machine's: like a cluster's storage network, it stays
reachable when the cable is cut. Without network namespaces a node shares the machine's addresses and cannot be cut;
without any, it is a plain process, is named by its loopback address, and needs no root.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_NETWORK = "10.0.0"
# PID 1 of a node reaps what its jobs leave behind; when it is killed, everything on the node dies, as by a power cut.
_NODE = """
hostname "$1"; mount --bind "$2" /etc/hosts
if [ -n "$3" ]; then
    for _ in $(seq 100); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.1; done
    ip link set lo up; ip address add "$3/24" dev eth0; ip link set eth0 up
fi
slurmd -D -N "$1" & sleep infinity & wait
"""
_SWITCH = f"""
ip link set lo up; ip link add switch type bridge; ip address add {_NETWORK}.1/24 dev switch; ip link set switch up
echo up; exec sleep infinity
"""


class Kind(Enum):
    """How much of a machine a node is."""

    PLAIN = 0
    NAMED = 1  # its own host name and processes
    WIRED = 2  # and its own network


class ClusterError(Exception):
    """The cluster, or a job on it, did not do in time what was asked of it."""


def best_kind(environment: Mapping[str, str]) -> Kind:
    """The most that this process may do here."""

    def works(*command: str) -> bool:
        return shutil.which(command[0], path=environment["PATH"]) is not None and succeeds(command, environment)

    if not works(*_NAMESPACES, "true"):
        return Kind.PLAIN
    bridge = "ip link add switch type bridge && ip link add here type veth peer name there"
    return Kind.WIRED if works("unshare", "--net", "sh", "-c", bridge) else Kind.NAMED


def controller_address(kind: Kind) -> str:
    return f"{_NETWORK}.1" if kind is Kind.WIRED else "127.0.0.1"


def node_address(kind: Kind, number: int) -> str:
    return f"{_NETWORK if kind is Kind.WIRED else '127.0.0'}.{10 + number}"


class Daemons:
    """Children of this process, by name. They die with it, and the terminal's Ctrl-C does not reach them."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._environment = environment
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start one, and return its process id; what it writes goes to log/NAME.out."""
        with (self._log / f"{name}.out").open("ab") as out:
            self._children[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        return self._children[name].pid

    def running(self, name: str) -> bool:
        return name in self._children and self._children[name].poll() is None

    def send(self, name: str, number: signal.Signals) -> None:
        """Signal one and the processes that it started."""
        if self.running(name):
            os.killpg(self._children[name].pid, number)

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Signal one and wait for it; a child that is not waited for keeps its pid, so that no stranger is hit."""
        if not self.running(name):
            return
        child = self._children[name]
        child.send_signal(how)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the cluster: its pid on this machine and its environment; slurmd and slurmstepd show none of it."""

    pid: int
    name: str
    command: str
    environment: Mapping[str, str]
    logs: tuple[str, ...]  # names of the cluster's log files that it holds open


def processes(folder: Path) -> list[Process]:
    """All processes of the cluster under ``folder`` but zombies.

    They are known by its configuration in their environment or its logs in their hands, never by their name.
    """
    found = (_process(entry, folder) for entry in Path("/proc").glob("[0-9]*") if int(entry.name) != os.getpid())
    return [each for each in found if each is not None]


def _process(entry: Path, folder: Path) -> Process | None:
    try:
        words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        environment = dict(word.split("=", 1) for word in words if "=" in word)
        ours = environment.get("SLURM_CONF") == str(folder / "etc/slurm.conf")
        logs = tuple(_logs_of(entry, folder))
        if not ours and not logs:
            return None
        before, _, after = (entry / "stat").read_text().rpartition(")")
        if after.split()[0] in "ZX":
            return None
        command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return None  # it ended meanwhile, or is another user's
    return Process(int(entry.name), before.partition("(")[2], command, environment if ours else {}, logs)


def _logs_of(entry: Path, folder: Path) -> Iterator[str]:
    for file in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            path = file.readlink()
            if path.parent == folder / "log":
                yield path.name


def kill(folder: Path, which: Callable[[Process], bool]) -> int:
    """SIGKILL to those processes of the cluster; how many were hit.

    The handle is opened before the look, so that the process that was looked at is the one that is ended.
    """
    hit = 0
    for pid in [each.pid for each in processes(folder) if which(each)]:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                again = _process(Path("/proc") / str(pid), folder)
                if again is not None and which(again):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    hit += 1
            finally:
                os.close(handle)
    return hit


class Machines:
    """The nodes of the cluster under ``folder``, and what connects them. ``addresses``: by node."""

    def __init__(self, folder: Path, kind: Kind, daemons: Daemons, addresses: Mapping[str, str]) -> None:
        self.kind = kind
        self._folder = folder
        self._daemons = daemons
        self._addresses = addresses
        self._pids: dict[str, int] = {}
        self.outside: tuple[str, ...] = ()  # how a command is run where the controller is

    def connect(self) -> None:
        """Make the switch."""
        if self.kind is not Kind.WIRED:
            return
        pid = self._daemons.start("switch", ["unshare", "--net", "sh", "-c", _SWITCH])
        said = self._folder / "log/switch.out"
        if not wait(lambda: said.read_text().strip().endswith("up"), 20):
            raise ClusterError(f"the switch does not come up\n{said.read_text()}")
        self.outside = ("nsenter", f"--net=/proc/{pid}/ns/net")

    def start(self, node: str) -> None:
        """Switch a node on, or start the slurmd that was killed on it."""
        if self._daemons.running(node):
            if self.kind is not Kind.PLAIN and not self._slurmd(node):
                self._daemons.start(f"{node}-slurmd", [*self.inside(node), "slurmd", "-D", "-N", node])
            return
        if self.kind is Kind.PLAIN:
            self._daemons.start(node, ["slurmd", "-D", "-N", node])
            return
        wired = self.kind is Kind.WIRED
        address = self._addresses[node] if wired else ""
        shell = ["bash", "-c", _NODE, "node", node, str(self._folder / "etc/hosts"), address]
        self._pids[node] = self._daemons.start(node, [*_NAMESPACES, *(["--net"] if wired else []), *shell])
        if wired:
            self._plug(node)

    def inside(self, node: str) -> list[str]:
        """How a command is run on a node."""
        if self.kind is Kind.PLAIN:
            return []
        first = (Path("/proc") / f"{self._pids[node]}/task/{self._pids[node]}/children").read_text().split()[0]
        return ["nsenter", f"--target={first}", "--uts", "--mount", "--pid", "--net"]

    def crash(self, node: str) -> None:
        """Cut a node's power: everything on it dies at once, and nothing is heard of it, not even closed connections."""
        if self.kind is Kind.WIRED:
            self.cut(node)
        if self.kind is Kind.PLAIN:
            kill(self._folder, lambda each: f"slurmd.{node}.log" in each.logs)  # nobody may report the deaths
            kill(self._folder, lambda each: each.environment.get("SLURMD_NODENAME") == node)
        self._daemons.end(node, signal.SIGKILL)
        self._daemons.end(f"{node}-slurmd", signal.SIGKILL)
        if not wait(lambda: not self.on(node), 10):
            raise ClusterError(f"{node} was switched off, and still has processes: {self.on(node)}")
        if self.kind is Kind.WIRED:
            # The kernel may have been faster: the cable goes with the namespace that it leads to.
            cable = [*self.outside, "ip", "link", "delete", f"to-{node}"]
            subprocess.run(cable, check=False, stderr=subprocess.DEVNULL)

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's daemon only: its jobs go on."""
        if not kill(self._folder, lambda each: self._is_slurmd(each, node)):
            raise ClusterError(f"no slurmd runs on {node}")

    def cut(self, node: str) -> None:
        """Unplug a node's network; its processes and its disks stay."""
        self._cable(node, "down")

    def heal(self, node: str) -> None:
        self._cable(node, "up")

    def on(self, node: str) -> list[Process]:
        """The processes on a node: its slurmd, its slurmstepd and those of jobs."""

        def there(each: Process) -> bool:
            return f"slurmd.{node}.log" in each.logs or each.environment.get("SLURMD_NODENAME") == node

        return [each for each in processes(self._folder) if there(each)]

    def _slurmd(self, node: str) -> list[Process]:
        return [each for each in processes(self._folder) if self._is_slurmd(each, node)]

    def _is_slurmd(self, each: Process, node: str) -> bool:
        return f"slurmd.{node}.log" in each.logs and each.name == "slurmd"

    def _plug(self, node: str) -> None:
        pid = self._pids[node]
        ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{pid}/ns/net")
        if not wait(lambda: theirs.readlink() != ours.readlink(), 20):
            raise ClusterError(f"{node} has no network of its own")
        add = ["ip", "link", "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        subprocess.run([*self.outside, *add], check=True)
        subprocess.run([*self.outside, "ip", "link", "set", f"to-{node}", "master", "switch", "up"], check=True)

    def _cable(self, node: str, state: str) -> None:
        if self.kind is not Kind.WIRED:
            raise ClusterError(f"nodes share this machine's network (no network namespaces here): {node} cannot be cut")
        subprocess.run([*self.outside, "ip", "link", "set", f"to-{node}", state], check=True)


def succeeds(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    none = subprocess.DEVNULL
    done = subprocess.run(command, env=dict(environment), stdin=none, stdout=none, stderr=none, timeout=60, check=False)
    return done.returncode == 0


def wait(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether something holds within so many seconds. To ask Slurm costs the time of the ranks: less often later on."""
    began = time.monotonic()
    while not holds():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(min(0.5, 0.1 + waited / 50))
    return True
