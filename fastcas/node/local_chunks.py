"""Chunks of this machine for a download: looked up in the table, so that the store's thread is never waited for."""

from __future__ import annotations

import os
from collections import OrderedDict

from fastcas.node.publisher import Publisher, is_same_file

__all__ = ["TableChunks"]

OPEN_MAX = 32


class TableChunks:
    """`LocalChunks` over the agent's table. One per download; belongs to the loop's thread."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._open: OrderedDict[str, int] = OrderedDict()

    def open_extent(self, digest: bytes) -> tuple[int, int, int] | None:
        """Return (fd, offset, length) where a chunk should lie, or None.

        The fd stays ours, valid until the next call.
        """
        found = self._publisher.find_extent(digest)
        if found is None:
            return None
        path, device, inode, offset, length = found
        fd = self._open.pop(path, -1)
        if fd < 0:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                return None
        self._open[path] = fd
        if len(self._open) > OPEN_MAX:
            os.close(self._open.popitem(last=False)[1])
        return (fd, offset, length) if is_same_file(fd, device, inode) else None

    def close(self) -> None:
        """Close the descriptors."""
        while self._open:
            os.close(self._open.popitem()[1])
