"""Anonymous shared memory: memfds that nobody can resize, and that only their writer can write.

Sealing makes a mapping safe to read: a file that cannot shrink cannot kill its readers with SIGBUS, and one
sealed against future writing is changed by nobody but the process that mapped it before. There is no name to
unlink, squat or open (architecture §3).
"""

from __future__ import annotations

import fcntl
import os

from fastcas.errors import LocalProtocolError

__all__ = ["create", "is_sealed", "seal"]

# Kernel interface (linux/fcntl.h); Python 3.11's fcntl lacks FUTURE_WRITE.
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x1
F_SEAL_SHRINK = 0x2
F_SEAL_GROW = 0x4
F_SEAL_FUTURE_WRITE = 0x10


def create(name: str, size: int = 0) -> int:
    """Return the descriptor of a new memfd of `size` zero bytes, close-on-exec and open for seals.

    Args:
        name: Shown in /proc/PID/maps; need not be unique.
        size: Bytes; memory is used only for what is written.
    Raises:
        OSError: No memory, no descriptor.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if size:
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
    return fd


def seal(fd: int, *, writable_by_others: bool) -> None:
    """Fix the size of a memfd for good, and let nobody add or remove seals after this.

    Args:
        fd: A memfd made by `create`.
        writable_by_others: False: write() and new writable mappings are refused from now on, to ourselves too;
            only writable mappings that exist go on working.
    Raises:
        OSError: Not a memfd, or sealed already (EPERM).
    """
    seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
    if not writable_by_others:
        seals |= F_SEAL_FUTURE_WRITE
    fcntl.fcntl(fd, F_ADD_SEALS, seals)


def is_sealed(fd: int) -> bool:
    """Return whether `fd` is a memfd that cannot shrink, so that a mapping of it is safe to read.

    Raises:
        LocalProtocolError: `fd` is not a memfd at all.
    """
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as exc:
        raise LocalProtocolError(f"descriptor {fd}: expected a memfd ({exc.strerror})") from exc
    return bool(seals & F_SEAL_SHRINK)
