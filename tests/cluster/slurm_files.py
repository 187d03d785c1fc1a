"""What a cluster's daemons read: slurm.conf, slurmdbd.conf, munge's key and the nodes' /etc/hosts."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPUS = 8
# Devices that every machine has stand in for GPUs that torch does not see; a node may not have the same one twice.
GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")

SLURM_CONF = """\
ClusterName=foveal
SlurmctldHost={host}({controller_address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for the credential of its first attempt to expire: 120 s if not told otherwise; but so must every
# step be launched within that time, also on a busy machine
AuthInfo=socket={folder}/munge/socket,cred_expire=10
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
GresTypes=gpu
{addresses}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# more CPUs than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
# a step whose node was cut off may outlive its kill for a while; Slurm would drain the node after a minute of it
UnkillableStepTimeout=3600
MinJobAge=3600
TCPTimeout=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge/socket
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE State=UP
# jobs here make way for those of the others, {grace} s after they are told
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime={grace} MaxTime=INFINITE State=UP
{more}
"""

# where all nodes share the machine's addresses, slurmd and srun stay on every one of them (NoInAddrAny breaks srun
# inside a job): only munge's key guards them
_SHARED_ADDRESSES = "CommunicationParameters=NoCtldInAddrAny"

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


@dataclass(frozen=True, slots=True)
class Place:
    """A node as Slurm knows it."""

    name: str
    host: str
    address: str
    port: int

    @property
    def line(self) -> str:
        return f"NodeName={self.name} NodeHostname={self.host} NodeAddr={self.address} Port={self.port} CPUs={CPUS} Gres=gpu:{len(GPUS)}"


def write_files(
    folder: Path, user: str, controller: Place, accounting_port: int, nodes: Mapping[str, Place], grace: int, more: str
) -> None:
    """Write all of it under ``folder``; ``more`` are further lines of slurm.conf, ``grace`` is in seconds."""
    for name in ("etc", "log", "state", "munge", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    for name in ("run", "database"):
        (folder / name).mkdir(mode=0o700)  # the database asks nobody for a password
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    values = {
        "folder": folder, "user": user, "host": controller.host, "controller_address": controller.address,
        "controller_port": controller.port, "accounting_port": accounting_port, "grace": grace, "more": more,
        "nodes": "\n".join(node.line for node in nodes.values()),
        "addresses": _SHARED_ADDRESSES if controller.address.startswith("127.") else "",
    }  # fmt: skip
    names = [("127.0.0.1", "localhost"), (controller.address, controller.host)]
    names += [(node.address, node.name) for node in nodes.values()]
    etc = folder / "etc"
    (etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names))
    (etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
    (etc / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"Name=gpu File={device}\n" for device in GPUS))
    (etc / "slurmdbd.conf").touch(mode=0o600)  # slurmdbd refuses one that others can read
    (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
    (folder / "munge/key").touch(mode=0o600)
    (folder / "munge/key").write_bytes(os.urandom(1024))
