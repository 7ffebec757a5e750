"""One process family per storage folder: an flock on LOCK, whose text is the holder's process id.

The lock belongs to the open file description, so a child that inherits the descriptor holds it with its parent,
and it is gone with the last of them however they die. LOCK is never unlinked: an unlinked lock file would let two
holders each lock their own.
"""

from __future__ import annotations

import fcntl
import os

from fastcas.errors import LocalProtocolError, StoreLocked
from fastcas.store.paths import Folder, os_errors, shown

__all__ = ["LOCK_NAME", "acquire", "adopt"]

LOCK_NAME = "LOCK"


def acquire(folder: Folder) -> int:
    """Lock the folder at once or fail; returns the descriptor that holds the lock.

    Raises:
        StoreLocked: Another process holds it; the message has its process id.
    """
    fd = folder.open(LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            holder = f"process {text}" if text.isdecimal() else "another process"
            raise StoreLocked(f"{shown(folder.root)}: storage folder in use by {holder}") from exc
        with os_errors(folder.path(LOCK_NAME), "writing the process id"):
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def adopt(folder: Folder, fd: int) -> int:
    """Check that an inherited descriptor is this folder's LOCK and holds it; returns a duplicate to own.

    Raises:
        LocalProtocolError: It is another file.
        StoreLocked: It does not hold the lock and somebody else does.
    """
    with os_errors(folder.path(LOCK_NAME), "checking the inherited lock"):
        own = os.fstat(fd)
        there = os.stat(LOCK_NAME, dir_fd=folder.fd, follow_symlinks=False)
    if (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino):
        raise LocalProtocolError(f"{shown(folder.root)}: the inherited descriptor is not this folder's LOCK")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise StoreLocked(f"{shown(folder.root)}: storage folder in use by another process") from exc
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
