"""A "host": a process tree with network, name, mounts and process ids of its own, on the machine's cores and disks.

What is private to it: its addresses, its host name, `/dev/shm`, `/etc/hosts`, the processes that it sees. Its first process
lives until the host is switched off; the kernel then ends all others and removes network and mounts with them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from nemo_dapo.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
FIRST_PROCESS = """
hostname {name}
mount --bind {names} /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
ip link set lo up
echo up
sleep infinity & wait  # bash reaps, while it waits, whatever loses its parent in here
"""


class Host:
    """`switch_on` and `switch_off` as often as you like. Made in the main thread: it ends with the thread that made it."""

    def __init__(self, name: str, names: Path) -> None:
        self.name = name
        self._script = f"set -e{FIRST_PROCESS.format(name=name, names=names)}"
        self.first = 0  # process id, as the machine counts
        self._namespace = ""  # of the processes

    def switch_on(self) -> None:
        """Raises RuntimeError with what the kernel refused."""
        parent = os.getpid()
        self._unshare = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", self._script],
            cwd=ROOT,
            env={**os.environ, "PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
        assert self._unshare.stdout
        said = self._unshare.stdout.readline()
        if said.strip() != "up":
            raise RuntimeError(f"{self.name} does not start: {said}{self._unshare.communicate()[0]}")
        self.first = int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text())
        self._namespace = os.readlink(f"/proc/{self.first}/ns/pid")

    def switch_off(self) -> None:
        """As by a power cut: every process at once."""
        if self.first:
            self._unshare.kill()  # its child, the first process, dies with it
            self._unshare.wait()
            while self.processes():
                time.sleep(0.01)
        self.first = 0

    def command(self, *command: str) -> list[str]:
        """What runs `command` on this host, in the folder of the checkout."""
        return ["nsenter", "--target", str(self.first), *NAMESPACES, "--wd", *command]

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Standard output of a short command; RuntimeError with everything it said where it fails."""
        done = subprocess.run(
            self.command(*command), env={**os.environ, "PATH": PATH, **(env or {})}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def link(self, state: str) -> None:
        """Plug the network cable in (`up`) or pull it (`down`)."""
        self.run("ip", "link", "set", "eth0", state)

    def signal(self, number: int) -> None:
        """To every process of the host, its first one and Slurm's included; SIGSTOP freezes the host."""
        for _ in range(2):  # what was started meanwhile
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)
        for pid in self.processes():  # what entered the host waits outside it, and has stopped with its child
            with contextlib.suppress(OSError):
                os.kill(_parent(pid), signal.SIGCONT)

    def processes(self) -> list[int]:
        """Everything alive on it, as the machine counts process ids; zombies are not."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._holds(pid)]

    def _holds(self, pid: int) -> bool:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            return os.readlink(f"/proc/{pid}/ns/pid") == self._namespace and "\nState:\tZ" not in status
        except OSError:  # ended while we looked
            return False


def _parent(pid: int) -> int:
    """Raises OSError where the process has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nPPid:")[2].split()[0])
