"""What the chunk table says about a blob."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BlobEntry"]


class BlobEntry(NamedTuple):
    """One live entry of the blob directory: where a blob is and what it was when it was registered.

    path is bytes as the file system has it. For an owned blob only device, inode and "not smaller than size" must
    still hold when it is opened, for a linked one size and mtime_ns too, for a growing one device and inode.
    """

    number: int
    path: bytes
    device: int
    inode: int
    size: int
    mtime_ns: int
    linked: bool
    growing: bool
