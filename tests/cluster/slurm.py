"""slurmctld, slurmd and munged of Debian's packages on hosts of host.py; nothing of it outlives the `with` block.

The machine's own network, /etc and /run are not touched: the bridge between the hosts is the controller's, and each host
sees an /etc/hosts of its own.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from tests.cluster.host import NAMESPACES, PATH, ROOT, Host

NEEDED = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "ip": "iproute2"}
NETWORK = "10.77.0"  # the controller is .1, host N is .N + 10
CORES, GPUS = 8, 8  # that each host claims to have
START_SECONDS = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")


def why_not() -> str:
    """Why no cluster can be brought up here; "" where it can."""
    if missing := [package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None]:
        return f"needs a real Slurm: apt-get install {' '.join(dict.fromkeys(missing))}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if not Path("/sys/fs/cgroup").is_mount():
        return "needs /sys/fs/cgroup to be mounted: slurmd looks for it"
    bridge = "ip link add br0 type bridge && ip link add one type veth peer name two && mount -t tmpfs tmpfs /dev/shm"
    tried = subprocess.run(
        ["timeout", "30", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", bridge],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
    )
    return f"needs network and mount namespaces: {tried.stderr.strip() or 'refused'}" if tried.returncode else ""


class Job:
    """One that was submitted; Slurm is asked anew at each look."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number

    def __getitem__(self, field: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts, ExitCode, NodeList."""
        shown = self.cluster.slurm("scontrol", "show", "job", str(self.number), "--oneliner")
        found = re.search(rf"(?:^|\s){field}=(\S*)", shown)
        assert found, f"no {field} in: {shown}"
        return found.group(1)

    @property
    def state(self) -> str:
        return self["JobState"]

    @property
    def restarts(self) -> int:
        return int(self["Restarts"])

    @property
    def console(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @functools.cached_property
    def _output(self) -> Path:
        return Path(self["StdOut"])

    def wait(self, seconds: float, *states: str) -> str:
        """Its state, once that is one of `states`, by default any that it cannot leave; TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while (state := self.state) not in (states or ENDED):
            if time.monotonic() > deadline or state in ENDED:
                raise TimeoutError(f"job {self.number} is {state} after {seconds} s:\n{self.console[-6000:]}")
            time.sleep(0.3)
        return state


class Cluster:
    """`hosts` hosts named host1, host2, … and a controller."""

    def __init__(self, hosts: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cluster_"))
        names = self.folder / "hosts"
        self.controller = Host("controller", names)
        self.hosts = [Host(f"host{number}", names) for number in range(1, hosts + 1)]
        lines = [f"{self.address(host)} {host.name}" for host in (self.controller, *self.hosts)]
        names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._write_configuration()
            self._start_controller()
            for host in self.hosts:
                self.switch_on(host)
            self.wait_for_hosts(START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in (*self.hosts, self.controller):
            host.switch_off()
        for daemon in self._daemons:
            daemon.wait()
        shutil.rmtree(self.folder)

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def address(self, host: Host) -> str:
        return f"{NETWORK}.{1 if host is self.controller else self.hosts.index(host) + 11}"

    def switch_on(self, host: Host) -> None:
        """Start the host, connect it and have it join the cluster."""
        host.switch_on()
        port = f"to_{host.name}"
        bridge = ["nsenter", "--target", str(self.controller.first), "--net", "ip", "link"]
        for arguments in (
            ["add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.first)],
            ["set", port, "master", "bridge", "up"],
        ):
            subprocess.run([*bridge, *arguments], check=True, env={**os.environ, "PATH": PATH})
        host.run("ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        host.link("up")
        again = (
            ["-b"] if (self.folder / f"{host.name}_slurmd.log").exists() else []
        )  # it has booted, which Slurm is to see
        self._daemon(host, "slurmd", "-D", *again, "-f", str(self.folder / "slurm.conf"), "-N", host.name)

    def sbatch(self, *arguments: str, env: dict[str, str] | None = None) -> Job:
        """`sbatch ARGUMENTS` in the checkout's folder, as a user would type it."""
        return Job(self, int(self.slurm("sbatch", "--parsable", *arguments, env=env)))

    def slurm(self, *command: str, env: dict[str, str] | None = None) -> str:
        """What a Slurm command prints, run beside the controller."""
        return self.controller.run(*command, env={"SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})})

    def wait_for_hosts(self, seconds: float) -> None:
        """Until every host is idle or at work."""
        deadline = time.monotonic() + seconds
        states = ["sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%T"]
        while unready := set(self.slurm(*states).split()) - {"idle", "allocated", "mixed"}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"hosts are {unready}:\n{self.logs()}")
            time.sleep(0.2)

    def wait_until_down(self, host: Host, seconds: float) -> None:
        """Until Slurm has given a silent host up, which takes SlurmdTimeout."""
        deadline = time.monotonic() + seconds
        state = ["sinfo", "--noheader", "--nodes", host.name, "--partition", "low", "--format", "%T"]
        while not (said := self.slurm(*state)).startswith("down"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{host.name} is {said}:\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The last words of every daemon."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def left_on(self, host: Host) -> list[str]:
        """Command lines of what runs on a host beside its first process and Slurm's daemon."""
        return [line for line in map(command_line, host.processes()) if line and not line.startswith(OWN)]

    def _start_controller(self) -> None:
        self.controller.switch_on()
        for command in (
            "ip link add bridge type bridge",
            f"ip address add {NETWORK}.1/24 dev bridge",
            "ip link set bridge up",
        ):
            self.controller.run(*command.split())
        self._start_munge()
        self._daemon(self.controller, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))

    def _start_munge(self) -> None:
        """One serves all hosts: its socket is a file."""
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        places = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "munge.log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder / 'munge'}.{end.removeprefix('munge.')}" for option, end in places.items()]
        self._daemon(self.controller, "munged", "--foreground", "--force", *options)
        deadline = time.monotonic() + START_SECONDS
        while not (self.folder / "munge.socket").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"munged does not start:\n{self.logs()}")
            time.sleep(0.05)

    def _daemon(self, host: Host, *command: str) -> None:
        with (self.folder / f"{host.name}_{command[0]}.log").open("ab") as log:
            environment = {**os.environ, "PATH": PATH}
            self._daemons.append(
                subprocess.Popen(
                    host.command(*command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _write_configuration(self) -> None:
        nodes = [
            f"NodeName={host.name} NodeAddr={self.address(host)} CPUs={CORES} Gres=gpu:{GPUS} State=UNKNOWN"
            for host in self.hosts
        ]
        template = (ROOT / "tests" / "cluster" / "slurm.conf").read_text()
        filled = template.format(controller=f"{NETWORK}.1", folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(filled)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "state").mkdir()
        for host in self.hosts:
            (self.folder / host.name).mkdir()


OWN = ("bash -c set -e\nhostname", "sleep infinity", "slurmd -D", "nsenter ")


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:  # ended while we looked
        return ""
