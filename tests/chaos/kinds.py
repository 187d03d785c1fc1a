"""The kinds of faults by the names that a command line gives. Taking a line out keeps a kind from being drawn."""

import signal
from collections.abc import Callable

from daemons import ControllerKilled, ShellKilled, SrunKilled, Suspended
from faults import (
    Crashed,
    Cut,
    DaemonKilled,
    Damaged,
    Fault,
    Preempted,
    Requeued,
    Signalled,
    Stopped,
    Warned,
    flipped,
    half_deleted,
    torn,
)
from launches import EnvironmentGone, OutOfMemory, StaleAddress, StaleVariables, SubmittedTwice
from scene import Scene
from strangers import Foreign, ForeignFirst, PortTaken, SecondStep, Straggler
from surroundings import DiskFull, Poisoned, QuotaUsedUp, Resized, ShardDamaged
from tracked import Copied, MadeAtOnce, Unserved

KINDS: dict[str, Callable[[Scene], Fault]] = {
    "kill": lambda scene: Signalled(scene, signal.SIGKILL),
    "term": lambda scene: Signalled(scene, signal.SIGTERM),
    "usr1": lambda scene: Signalled(scene, signal.SIGUSR1),
    "usr2": lambda scene: Signalled(scene, signal.SIGUSR2),
    "stop": Stopped,
    "warned": Warned,
    "requeue": Requeued,
    "preempt": Preempted,
    "crash": Crashed,
    "slurmd": DaemonKilled,
    "cut": Cut,
    "srun": SrunKilled,
    "shell": ShellKilled,
    "slurmctld": ControllerKilled,
    "suspend": Suspended,
    "torn": lambda scene: Damaged(scene, torn, "newest checkpoint truncated"),
    "flipped": lambda scene: Damaged(scene, flipped, "bit flipped in newest checkpoint"),
    "deleted": lambda scene: Damaged(scene, half_deleted, "newest checkpoint half deleted"),
    "full": DiskFull,
    "nan": Poisoned,
    "shard": ShardDamaged,
    "resized": Resized,
    "quota": QuotaUsedUp,
    "memory": OutOfMemory,
    "twice": SubmittedTwice,
    "stale": StaleVariables,
    "stale-address": StaleAddress,
    "environment": EnvironmentGone,
    "foreign": Foreign,
    "foreign-first": ForeignFirst,
    "straggler": Straggler,
    "second-step": SecondStep,
    "port": PortTaken,
    "store": MadeAtOnce,
    "copy": Copied,
    "server-killed": lambda scene: Unserved(scene, "killed"),
    "server-hangs": lambda scene: Unserved(scene, "hangs"),
    "server-fails": lambda scene: Unserved(scene, "fails"),
}
