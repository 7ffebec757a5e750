"""Copies that share blocks: btrfs, xfs and others let two files have the same blocks until one is written to.

Never: moves a byte through this process, or says that it failed. Who calls copies what was not cloned, and checks the
copy by reading the copy.
"""

from __future__ import annotations

import fcntl
import os
import struct

__all__ = ["block_of", "clone_prefix"]

_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")


def block_of(fd: int) -> int:
    """Return the block size of a file's file system, to which what is cloned must be aligned."""
    return os.fstatvfs(fd).f_bsize


def clone_prefix(source: int, offset: int, length: int, target: int, target_offset: int) -> int:
    """Let a range of a file share the blocks of another's, as far as blocks reach.

    Args:
        source: Descriptor open for reading.
        offset: Where the range begins; else than at a block nothing is cloned.
        length: Its bytes.
        target: Descriptor open for writing, on the same file system.
        target_offset: Where the range goes; likewise.
    Returns:
        How many bytes from the start of the range are in the target now: all of them if the range ends with the
        source, else those in whole blocks; 0 where file system, kernel or alignment do not allow it.
    Cost: the source's unwritten pages are written first.
    """
    whole = length // block_of(target) * block_of(target)
    for n in (length, whole):
        if n == 0:
            break
        try:
            fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, offset, n, target_offset))
        except OSError:
            continue
        return n
    return 0
