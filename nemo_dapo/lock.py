"""One run at a time in a folder: a second one would cut the first one's record and remove its half-written checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

NAME = ".lock"
# Of file systems that do not lock between hosts (Lustre without `-o flock`, some FUSE mounts).
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class RunLock:
    """Holds `folder` from entry to exit. The kernel releases it with the process, however that ends; NFS locks as well.

    Raises ValueError that names the host, process and Slurm job which holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> RunLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / NAME).open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            held_by = describe(self.file.read())
            self.file.close()
            raise ValueError(
                f"output_dir={self.folder} is in use by {held_by}; end that run first, or choose another folder by name=… "
                "or output_dir=…"
            ) from None
        except OSError as problem:
            if problem.errno not in UNSUPPORTED:
                raise
            log.warning("%s cannot be locked (%s): start no second run in it", self.folder, problem.strerror)
        self.file.truncate(0)
        self.file.write(json.dumps(holder()))
        self.file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()  # the file stays: removing it would let two runs lock two files of one name


def holder() -> dict[str, str | int]:
    """What a second run should know of this one."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%F %T %z"),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }


def describe(text: str) -> str:
    """The holder in words; the file is empty for the instant in which the holder writes it."""
    if not text:
        return "a run that has just started"
    found = json.loads(text)
    job = f", Slurm job {found['slurm_job']}" if found["slurm_job"] else ""
    return f"process {found['pid']} on {found['host']} since {found['since']}{job}"
