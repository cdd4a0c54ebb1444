"""A real Slurm on this machine: a controller and nodes, each in a namespace with its own name and address.

Everything lives in one process-id namespace whose first process waits for its standard input to close: when the test
process ends, however it ends, the kernel ends every daemon and job with it.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NETWORK = "10.78.0"
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
NEW_NAMESPACES = [
    "unshare",
    "--keep-caps",
    "--net",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why Slurm cannot run here, in words; None when it can."""
    if os.getuid() != 0:
        return "Slurm's tests make namespaces with a network each, which needs root"
    missing = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if missing:
        return f"Slurm's tests need {', '.join(missing)} (make slurm-tools)"
    tried = subprocess.run(
        [*NEW_NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """`with Cluster(folder, nodes) as cluster`: partitions main (preempted with grace), strict (without) and high."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._folder, self._nodes = folder, nodes
        for name in ("state", "log", "devices"):
            (folder / name).mkdir(parents=True)
        self._write("slurm.conf", _slurm_conf(folder, nodes))
        self._write("gres.conf", f"Name=gpu File={folder}/devices/nvidia[0-3]\n")
        hosts = [f"{NETWORK}.{i} node{i}" for i in range(1, nodes + 1)]
        self._write("hosts", "\n".join(["127.0.0.1 localhost", f"{NETWORK}.254 controller", *hosts]) + "\n")
        for i in range(4):
            (folder / f"devices/nvidia{i}").symlink_to("/dev/null")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        folder.chmod(0o755)

    def __enter__(self) -> "Cluster":
        script = self._write(
            "controller.sh", CONTROLLER.format(folder=self._folder, network=NETWORK, controller=self._controller())
        )
        log = (self._folder / "log/controller.out").open("w")
        self._holder = subprocess.Popen(
            [*NEW_NAMESPACES, "bash", str(script)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment(),
        )  # fmt: skip
        try:
            self._inside = self._wait_for(lambda: _children(self._holder.pid), "the namespace")[0]
            self._wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")
            for i in range(1, self._nodes + 1):
                self.start_node(i)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(timeout=20)

    def start_node(self, number: int) -> None:
        script = self._write("node.sh", NODE.format(folder=self._folder, network=NETWORK))
        pid_file = self._folder / f"node{number}.pid"
        pid_file.unlink(missing_ok=True)
        self.run("bash", "-c", f"{' '.join(NEW_NAMESPACES)} bash {script} {number} >{self._folder}/log/node{number}.out 2>&1 "
                 f"</dev/null & echo $! >{pid_file}")  # fmt: skip
        launcher = pid_file.read_text().strip()
        find = f"cat /proc/{launcher}/task/{launcher}/children"
        child = self._wait_for(lambda: self.run("bash", "-c", find, check=False).split(), f"node{number}")[0]
        pid_file.write_text(child)
        self.run("ip", "link", "delete", f"to{number}", check=False)  # of a dead node, when it is still there
        mac = f"02:00:00:00:00:{number:02x}"  # the same after a restart: its neighbours remember it
        self.run("ip", "link", "add", f"to{number}", "master", "bridge", "type", "veth", "peer", "name", "eth0", "address", mac, "netns", child)  # fmt: skip
        self.run("ip", "link", "set", f"to{number}", "up")

    def kill_node(self, number: int) -> None:
        """A power failure: everything on the node is gone at once, and nobody tells Slurm."""
        self.run("kill", "-9", (self._folder / f"node{number}.pid").read_text().strip())

    def unplug_node(self, number: int) -> None:
        """Take a node's network away: all that runs there goes on, and hears nothing."""
        self.run("ip", "link", "set", f"to{number}", "down")

    def plug_node(self, number: int) -> None:
        """Give a node its network back."""
        self.run("ip", "link", "set", f"to{number}", "up")

    def kill_controller(self) -> None:
        """The controller's machine fails: what it had not saved is lost."""
        self.run("pkill", "-9", "-x", "slurmctld")

    def start_controller(self) -> None:
        self.run("bash", "-c", self._controller())
        self._wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False, timeout=5), "slurmctld")

    def _controller(self) -> str:
        return f"slurmctld -D </dev/null >>{self._folder}/log/slurmctld.out 2>&1 &"

    def on_node(self, number: int, *command: str) -> str:
        """A command on a node, as its administrator."""
        pid = (self._folder / f"node{number}.pid").read_text().strip()
        return self.run("nsenter", "--target", pid, "--mount", "--net", "--uts", "--pid", *command)

    def wait_idle(self) -> None:
        idle = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
        self._wait_for(lambda: len(self.run(*idle, check=False).split()) == self._nodes, f"{self._nodes} idle nodes")

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """A command on the login node; its output."""
        enter = ["nsenter", "--target", str(self._inside), "--mount", "--net", "--uts", "--pid"]
        try:
            done = subprocess.run(
                [*enter, f"--wd={Path.cwd()}", *command],
                capture_output=True,
                text=True,
                timeout=timeout,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired:
            if check:
                raise
            return ""
        if check and done.returncode:
            raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", *arguments)

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", "-o", job, check=False).split()
        return next((word.partition("=")[2] for word in shown if word.startswith(f"{name}=")), "")

    def wait_state(self, job: str, *wanted: str, timeout: float = 120) -> str:
        return self._wait_for(lambda: (state := self.state(job)) in wanted and state, f"job {job}: {wanted}", timeout)

    def _wait_for(self, ready: Callable, what: str, timeout: float = 20):  # type: ignore[no-untyped-def,type-arg]
        end = time.monotonic() + timeout
        while not (answer := ready()):
            if time.monotonic() > end or self._holder.poll() is not None:
                raise AssertionError(f"{what}: not within {timeout} s\n{self.logs()}")
            time.sleep(0.1)
        return answer

    def logs(self) -> str:
        """The last lines of every daemon, and of every job's console beside the logs."""
        texts = []
        for path in sorted(self._folder.glob("log/*")):
            texts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(texts)

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text)
        return path

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return {**kept, "SLURM_CONF": str(self._folder / "slurm.conf"), "PATH": PATH}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


CONTROLLER = """\
hostname controller
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip link add bridge type bridge; ip addr add {network}.254/24 dev bridge; ip link set bridge up
munged --force --key-file={folder}/munge.key --socket={folder}/munge.socket --pid-file={folder}/munged.pid \\
  --log-file={folder}/log/munged.log --seed-file={folder}/munge.seed
{controller}
cat
"""

NODE = """\
hostname node$1
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {network}.$1/24 dev eth0; ip link set eth0 up
exec slurmd -D -N node$1
"""


def _slurm_conf(folder: Path, nodes: int) -> str:
    addresses = "\n".join(f"NodeName=node{i} NodeAddr={NETWORK}.{i}" for i in range(1, nodes + 1))
    return f"""\
ClusterName=test
SlurmctldHost=controller({NETWORK}.254)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=16 RealMemory=8000 Gres=gpu:4
{addresses}
PartitionName=main Default=YES Nodes=node[1-{nodes}] PriorityTier=1 GraceTime=20
PartitionName=strict Nodes=node[1-{nodes}] PriorityTier=1
PartitionName=high Nodes=node[1-{nodes}] PriorityTier=10 PreemptMode=OFF
"""
