"""Small files, many at a time. The GIL is released while they are read."""

from typing_extensions import Buffer

from fastcas.store.types import Identity

IRREGULAR: int
CHANGED_BEFORE: int
CHANGED_WHILE: int

def read_files(
    dir_fd: int, names: list[bytes], sizes: list[int], identities: list[Identity | None], out: Buffer
) -> tuple[int, int, int]:
    """Read files of one folder whole, back to back.

    Args:
        dir_fd: The folder.
        names: Of the files in it, one component each; a link there is not followed.
        sizes: Bytes that each must have.
        identities: What each must be before and after it is read, None: only the size is known beforehand.
        out: Writable, at least the sum of the sizes.
    Returns:
        (how many were read, why the next one was not, the size that it has): (n, 0, ..) when all were. The reason is
        IRREGULAR, CHANGED_BEFORE, CHANGED_WHILE, or a positive errno.
    Raises:
        UsageError: The lists differ in length, a name has a NUL, or `out` is too small; nothing was read.
        MemoryError: No room for the list; nothing was read.
    Cost: five system calls per file, 48 B of memory.
    """
