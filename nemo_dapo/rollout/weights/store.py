"""The newest weights in the memory of one host: a private folder there, which outlives no run.

    weights.bin   the run of bytes            table.json   what it is made of; there only while the bytes are whole

The folder belongs to the process that starts the host's servers. A trainer's rank on the host, or the receiver in that
process, writes the bytes over those of the version before, whose pages are then there already; servers load them in place.
Whoever reads looks at the table before and after: a table that is still the same means that nothing was written meanwhile.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

from nemo_dapo.rollout.weights.plan import Place
from nemo_dapo.rollout.weights.table import Table, parse

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
SPACE_MARGIN = 1.05
PREFIX, LOCK, NONCE = "nemo_dapo_weights_", ".lock", ".nonce"
DATA, TABLE = "weights.bin", "table.json"


class WeightStore:
    """A folder (0700) in host memory, or on disk where that has no `needed` bytes free.

    It is locked for as long as this process lives: one that can be locked was left by a run that is dead, all of whose
    processes were killed at once, and is removed when the next store is made on the same host.
    """

    def __init__(self, needed: int, node: str) -> None:
        self.node = node
        needed = int(needed * SPACE_MARGIN)
        for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            remove_left_folders(place)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=roomy_folder(needed)))
        self.nonce = secrets.token_hex(16)
        self._lock = self._occupy()

    def _occupy(self) -> TextIO:
        (self.folder / NONCE).write_text(self.nonce)
        return lock(self.folder)

    def require_folder(self) -> None:
        """Make the folder again where somebody removed it, aloud."""
        if not self.folder.is_dir():
            log.warning("%s was removed and is made again: %s", self.folder, remedy(self.folder))
            self._lock.close()
            self.folder.mkdir(0o700)
            self._lock = self._occupy()

    def place(self, address: str = "") -> Place:
        """How ranks find the folder."""
        return place_of(self.folder, self.node, address)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def place_of(folder: Path, node: str, address: str = "") -> Place:
    """How ranks find a store's folder; `address` is that of the receiver that fills it for other hosts."""
    return Place(node, str(folder), (folder / NONCE).read_text(), address)


class WeightWriter:
    """Writes versions into a store's folder, from any process that sees it: `begin`, `room` for each piece, `commit`.

    The mapping is kept from one version to the next: a first touch of a page costs more than all that follow.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = -1
        self._map: mmap.mmap | None = None

    def begin(self) -> None:
        """From here on the folder holds no version, until `commit`."""
        (self.folder / TABLE).unlink(missing_ok=True)
        if not self._is_there():
            self.close()
            self._file = os.open(self.folder / DATA, os.O_RDWR | os.O_CREAT, 0o600)

    def room(self, offset: int, nbytes: int) -> memoryview:
        """The memory of `nbytes` from `offset` on; raises OSError where the host has none left."""
        end = offset + nbytes
        if self._map is None or len(self._map) < end:
            size = os.fstat(self._file).st_size
            if size < end:
                # Without the pages a write through the mapping would kill this process where memory is short.
                os.posix_fallocate(self._file, size, end - size)
            self._map = mmap.mmap(self._file, max(size, end))
        return memoryview(self._map)[offset:end]

    def commit(self, table: Table) -> None:
        """Raises RuntimeError, which says what to do, where somebody removed what was written."""
        if not self._is_there():
            raise RuntimeError(f"{self.folder} was removed while it was written to: {remedy(self.folder)}")
        temporary = self.folder / f"{TABLE}.tmp"
        temporary.write_text(table.render())
        os.replace(temporary, self.folder / TABLE)

    def _is_there(self) -> bool:
        """Whether the file that this writer has open is still the one in the folder."""
        try:
            return self._file >= 0 and os.path.samestat(os.fstat(self._file), os.stat(self.folder / DATA))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """What was written stays."""
        self._map = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_table(folder: Path, digest: str = "") -> Table:
    """The table of the version that a folder holds.

    Raises RuntimeError where it holds none, ValueError where it is not the one of `digest`.
    """
    try:
        return parse((folder / TABLE).read_text(), digest)
    except FileNotFoundError:
        raise RuntimeError(f"{folder / TABLE} is not there: {remedy(folder)}") from None


def read_announced(folder: Path, version: int, digest: str) -> Table:
    """As `read_table`; raises ValueError for a version that was not announced, too."""
    table = read_table(folder, digest)
    if table.version != version:
        raise ValueError(f"{folder} holds weights of version {table.version}, announced was {version}")
    return table


def require_there(table: Table, folder: Path) -> None:
    """Raise ValueError, which names the first such tensor, unless the bytes of `folder` reach to the end of each one."""
    try:
        size = (folder / DATA).stat().st_size
    except FileNotFoundError:
        raise RuntimeError(f"{folder / DATA} is not there: {remedy(folder)}") from None
    for entry in table.entries:
        if entry.offset + entry.nbytes > size:
            raise ValueError(f"parameter {entry.name} is cut off: {folder / DATA} ends at byte {size}")


def sees(folder: Path, nonce: str) -> bool:
    """Whether this process sees the very folder, not one of the same name on another host."""
    try:
        return secrets.compare_digest((folder / NONCE).read_text(), nonce)
    except OSError:
        return False


def remedy(folder: Path) -> str:
    """What to do where somebody removes what a run keeps in memory."""
    return (
        f"exclude {folder.parent}/{PREFIX}* from what cleans that folder (a cron job, systemd-tmpfiles, or "
        "RemoveIPC=yes in logind.conf, which empties /dev/shm when its user logs out)"
    )


def lock(folder: Path) -> TextIO:
    """The open file that holds the lock of `folder`."""
    held = (folder / LOCK).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


def remove_left_folders(place: Path) -> None:
    """Remove what dead runs of this user left under `place`: a folder whose lock is free has no owner any more."""
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                log.warning("removed %s, which a run that was killed had left in memory", folder)
        except OSError:  # locked by a run that lives, just being made, or just gone
            continue


def roomy_folder(needed: int) -> Path:
    """/dev/shm where it has `needed` bytes free, else, with a warning, the folder for temporary files."""
    fallback = Path(tempfile.gettempdir())
    if not SHARED_MEMORY.is_dir():
        log.warning("%s does not exist: weights go through %s, which is slower", SHARED_MEMORY, fallback)
        return fallback
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= needed:
        return SHARED_MEMORY
    log.warning(
        "%s has %.2f GB free and the weights need %.2f GB: they go through %s, which is slower (in Docker: --shm-size)",
        SHARED_MEMORY,
        free / 1e9,
        needed / 1e9,
        fallback,
    )
    return fallback
