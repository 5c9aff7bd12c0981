"""A real SLURM of one node on this machine: its daemons are started here, as root, and stopped.

Nothing of the machine is used but Debian's programs and ``/etc/slurm``: the daemons keep their
state, logs, key and sockets in a folder of the test's own, and listen on ports that were free.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "setpriv")
# Debian's daemons are where a user's PATH may not lead.
PATH = f"{os.environ['PATH']}:/usr/sbin"
# The executor takes variables that name another folder (SLURM_CONF) from its jobs.
ETC = Path("/etc/slurm")
FILES = ("slurm.conf", "gres.conf")
OURS = "# Written by eoraflow's tests, which remove it.\n"

# Memory is watched, not fenced (fences need the machine's cgroups): a job that takes more than it
# asked for is killed within seconds. Cards are device files that every machine has.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:a100:4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
PartitionName=cpu Nodes={host} MaxTime=INFINITE State=UP
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill,UsePss
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=500
SlurmdParameters=config_overrides
ReturnToService=2
# As clusters may have it: jobs must ask for it.
JobRequeue=0
MinJobAge=3600
KillWait=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
"""
GRES = """\
Name=gpu Type=a100 File=/dev/null
Name=gpu Type=a100 File=/dev/zero
Name=gpu Type=a100 File=/dev/full
Name=gpu Type=a100 File=/dev/random
"""


def unavailable() -> str | None:
    """Why no SLURM can be started here, None if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons want root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed; `make test-slurm` installs them on Debian"
    for name in FILES:
        file = ETC / name
        if file.exists() and not file.read_text().startswith(OURS):
            return f"{file} exists: this machine belongs to a cluster"
    return None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def until(found: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """Wait until ``found`` gives something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.05)
    return value


def run(*command: str) -> str:
    """A command's output; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def records(text: str) -> list[dict[str, str]]:
    """SLURM's ``Key=value Key=value`` lines, a record a line."""
    lines = [re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|$)", line) for line in text.splitlines()]
    return [dict(line) for line in lines if line]


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; ``folder`` holds its state and logs."""

    folder: Path
    host: str

    def jobs(self, workdir: Path | None = None) -> list[dict[str, str]]:
        """What the controller knows of all jobs, or of those submitted from a folder."""
        found = records(run("scontrol", "--oneliner", "--details", "show", "job"))
        found = [job for job in found if "JobId" in job]
        return [job for job in found if workdir is None or job["WorkDir"] == str(workdir)]

    def completed(self) -> list[dict[str, str]]:
        """SLURM's record of jobs that ended, in that order."""
        file = self.folder / "completed"
        return records(file.read_text()) if file.exists() else []

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground: ours to stop, and it ends if the tests are killed."""
        program = shutil.which(command[0], path=PATH)
        bound = ("setpriv", "--pdeathsig", "TERM", program, *command[1:])
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            return subprocess.Popen(bound, stdout=log, stderr=log, start_new_session=True)

    def lose(self, job: dict[str, str]) -> None:
        """Lose sight of a job that lives on, as when its node's network fails, and queue it again.

        What watches the job on the node dies without a word, and the node is down for a moment.
        """
        for pid in run("pgrep", "-f", rf"^slurmstepd: \[{job['JobId']}\.").split():
            os.kill(int(pid), signal.SIGKILL)
        run("scontrol", "update", f"NodeName={self.host}", "State=DOWN", "Reason=lost")
        until(self.up, "the node's return")
        # Queued again it waits two minutes. It may not start in the second in which it was lost.
        run("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now+3")

    def up(self) -> bool:
        """Whether jobs can start."""
        # A node that is down by hand is up when it is told, or when it tells that it is well.
        resume = ["scontrol", "update", f"NodeName={self.host}", "State=RESUME"]
        subprocess.run(resume, capture_output=True)
        asked = ["sinfo", "--noheader", "--format=%T"]
        done = subprocess.run(asked, capture_output=True, text=True)
        return done.stdout.strip() in ("idle", "mixed", "allocated")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a daemon."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A SLURM of one node with four cards, up as long as the context is open."""
    made = Cluster(folder, socket.gethostname().split(".")[0])
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ETC.mkdir(exist_ok=True)
    texts = (CONF, GRES)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.delenv("SLURM_CONF", raising=False)
        for name, text in zip(FILES, texts, strict=True):
            filled = text.format(
                folder=folder, host=made.host, controller_port=free_port(), node_port=free_port()
            )
            (ETC / name).write_text(OURS + filled)
            stack.callback((ETC / name).unlink)
        munge = {
            "socket": "munge.socket",
            "key-file": key.name,
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = (f"--{option}={folder / file}" for option, file in munge.items())
        for daemon in (
            ("munged", "--foreground", "--force", *options),
            ("slurmctld", "-D", "-c"),
            ("slurmd", "-D", "-c"),
        ):
            stack.callback(stop, made.spawn(*daemon))
            if daemon[0] == "munged":
                until((folder / "munge.socket").exists, "munged")
        until(made.up, "a node that is up")
        stack.callback(
            lambda: [run("scancel", "--full", job["JobId"]) for job in made.jobs() if live(job)]
        )
        yield made


def live(job: dict[str, str]) -> bool:
    """Whether a job may still do something."""
    return job["JobState"] in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING")
