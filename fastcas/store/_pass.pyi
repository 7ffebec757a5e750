"""One pass over whole files. The GIL is released from the first read to the last hash."""

from typing_extensions import Buffer

CHANGED_WHILE: int
STOPPED: int

class Tally:
    """What the threads of one job share: bytes done, and whether they shall stop. Starts with 0 and no."""

    @property
    def n_bytes(self) -> int:
        """Bytes that were read and hashed."""

    def add(self, n_bytes: int) -> None:
        """Count bytes that were hashed in another way."""

    def stop(self) -> None:
        """Let every pass end before its next read."""

def pass_files(
    fds: list[int], sizes: list[int], chunk_size: int, buffer: Buffer, tally: Tally, *, kernel: str | None = None
) -> tuple[list[tuple[bytes, bytes, bytes]], int, int, int]:
    """Read one or two files whole, by position, and hash them; two go through the kernel side by side.

    Args:
        fds: Open for reading.
        sizes: Bytes that each must have, > 0; at most 200,000 chunks.
        chunk_size: A multiple of 64 up to 16 MiB, in bytes.
        buffer: Writable, at least one chunk per file; what fits a core's own cache is fastest.
        tally: Counts, and says when to stop.
        kernel: Of SHA-256; None: this process's.
    Returns:
        (files, why, failed, got). Of each file the hashes of its chunks, 32 bytes each; the content's chaining values
        after every whole chunk, 32 bytes each; and the content's hash. Or no files, and why number `failed` was read
        only to its byte `got`: CHANGED_WHILE (it ends there), STOPPED, or a positive errno.
    Raises:
        UsageError: An argument; nothing was read.
    Cost: 64 B of memory per chunk, one system call per buffer.
    """
