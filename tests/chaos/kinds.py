"""The kinds of faults by the names that a command line gives. Taking a line out keeps a kind from being drawn."""

import signal
from collections.abc import Callable

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
from scene import Scene
from surroundings import DiskFull, Poisoned, Resized, ShardDamaged, Unserved

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
    "torn": lambda scene: Damaged(scene, torn, "newest checkpoint truncated"),
    "flipped": lambda scene: Damaged(scene, flipped, "bit flipped in newest checkpoint"),
    "deleted": lambda scene: Damaged(scene, half_deleted, "newest checkpoint half deleted"),
    "full": DiskFull,
    "nan": Poisoned,
    "shard": ShardDamaged,
    "resized": Resized,
    "server-killed": lambda scene: Unserved(scene, "killed"),
    "server-hangs": lambda scene: Unserved(scene, "hangs"),
    "server-fails": lambda scene: Unserved(scene, "fails"),
}
