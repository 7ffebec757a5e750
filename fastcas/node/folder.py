"""The storage folder as seen from outside the store: its lock and the address of its control socket.

A unix socket's path is limited to 108 bytes, a folder's is not: the socket is named through `/proc/self/fd/N`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastcas.errors import NodeUnavailable, PermissionDenied
from fastcas.store import lock
from fastcas.store.paths import Folder, shown

__all__ = ["SOCKET_NAME", "lock_folder", "socket_address"]

SOCKET_NAME = "node.sock"


def lock_folder(root: Path) -> int:
    """Create the folder if need be, lock it, and return the descriptor that holds the lock.

    Raises:
        StoreLocked: Another node or command has it; at once.
        PermissionDenied, StoreNotFound: The folder cannot be made or opened.
    """
    folder = Folder(root, create=True)
    try:
        return lock.acquire(folder)
    finally:
        folder.close()


@contextlib.contextmanager
def socket_address(root: Path) -> Iterator[str]:
    """Yield a short path of the folder's control socket, valid inside the block.

    Raises:
        NodeUnavailable: There is no such folder, so no node either.
        PermissionDenied: The folder may not be entered.
    """
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NodeUnavailable(f"{shown(root)}: no such storage folder") from exc
    except PermissionError as exc:
        raise PermissionDenied(f"{shown(root)}: permission denied") from exc
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)
