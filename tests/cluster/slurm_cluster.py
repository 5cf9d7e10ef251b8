"""A Slurm cluster on one machine, as the user who asks for it: munge, a controller and two node daemons.

Everything (configuration, keys, state, logs) lies in one folder. By hand, until Ctrl-C:

    python tests/cluster/slurm_cluster.py "$(mktemp -d)"     # prints the `export` lines that make it your cluster
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES = ("node1", "node2")
_START_SECONDS = 60.0

# No accounting, as on many small clusters; no cgroups, so that no privilege is needed. A requeued job waits until its
# old credential has expired, 120 seconds by default.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1_port} CPUs={cpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2_port} CPUs={cpus}
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


class SlurmCluster:
    """The cluster as a context; inside it `environment` makes Slurm's commands talk to it.

    Args:
        folder: for all its files; made if it is not there. Its path must be short (a socket lies in it).
        cpus: of each node. Nodes share the machine, so this is what may be asked for, not what there is.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._write_files()
        try:
            # --force: a folder under /tmp is writable by others, which munge takes for unsafe.
            munge = ["--foreground", "--force", f"--socket={self.folder}/munge.socket"]
            munge += [
                f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "seed-file")
            ]
            self._start("munged", *munge, f"--log-file={self.folder}/munge.log")
            self._wait("the socket of munge", (self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._wait("idle nodes", lambda: self.command("sinfo", "-h", "-o", "%T %D") == "idle 2")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self.command("squeue", "-h", "-o", "%A").split():
            self.command("scancel", job)
        self._wait("the end of all jobs", lambda: not self.command("squeue", "-h"))
        self._stop()

    def command(self, *command: str) -> str:
        """What one of Slurm's commands prints, stripped; empty if it fails."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(exist_ok=True)
        ports = dict(zip(("controller_port", "node1_port", "node2_port"), _free_ports(3), strict=True))
        text = _CONFIG.format(
            host=socket.gethostname(), user=getpass.getuser(), folder=self.folder, cpus=self.cpus, **ports
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "plugstack.conf").write_text("")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    def _start(self, name: str, *arguments: str) -> None:
        program = _which(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self._daemons.append(
                subprocess.Popen([program, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True)
            )

    def _wait(self, what: str, ready: object) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():  # type: ignore[operator]
            dead = [d.args for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.[ol][uo][tg]")))
                raise RuntimeError(f"no {what} after {_START_SECONDS:.0f} s; daemons that ended: {dead}\n{logs}")
            time.sleep(0.2)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def main() -> None:
    """Run a cluster until Ctrl-C or a polite kill."""
    with SlurmCluster(Path(sys.argv[1]).absolute()) as cluster:
        for name, value in cluster.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping", flush=True)


if __name__ == "__main__":
    main()
