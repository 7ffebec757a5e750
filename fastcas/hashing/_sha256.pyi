"""SHA-256 with readable and settable states. Every `kernel` argument names one of kernels(); None is kernel_name().

Buffers are any C-contiguous bytes-like objects. The GIL is released above 2 KiB. Objects are for one thread at a
time: a call while another thread is inside raises UsageError and changes nothing.
"""

from collections.abc import Iterable

from typing_extensions import Buffer

def kernel_name() -> str:
    """Return the name of the kernel that this process uses by default.

    It is FASTCAS_SHA256_KERNEL's where that was set when the module was imported, else the preferred one that this CPU
    supports.
    """

def kernels() -> list[str]:
    """Return the kernels that were built and that this CPU supports, the default last."""

def _mask_cpu(allowed: int) -> None:
    """Pretend, for tests, that the CPU has at most these FCAS_CPU_* bits; 2**32 - 1 restores the truth.

    Kernels in use and the process's default stay as they are.
    """

def _default_for(cpu: int) -> str:
    """Return, for tests, the default kernel of a CPU with just these FCAS_CPU_* bits."""

def self_test(kernel: str | None = None) -> None:
    """Check a kernel, each of its streams and lanes, against the digests of known messages.

    Raises:
        SelfTestFailed: A digest is wrong; nothing this kernel computes can be trusted.
        KernelUnavailable: No such kernel here.
    Cost: under 1 ms.
    """

def sha256(data: Buffer, *, kernel: str | None = None) -> bytes:
    """Return the SHA-256 of a buffer, 32 bytes."""

def digest_many(buffers: Iterable[Buffer], *, kernel: str | None = None) -> list[bytes]:
    """Return the SHA-256 of each buffer, in order.

    As many messages are hashed at a time as the kernel has lanes or streams; lengths may differ: the longest
    are taken up first.

    Raises:
        KernelUnavailable: No such kernel here.
        MemoryError: No room for the list; nothing was hashed.
    Cost: about 130 B per buffer, no copy of the data.
    """

def chunk_pass(data: Buffer, chain: bytes, *, kernel: str | None = None) -> tuple[bytes, bytes]:
    """Hash a chunk and carry the content's chaining value over it, in one pass.

    Args:
        data: The chunk; a multiple of 64 bytes, may be empty.
        chain: Chaining value of the content's SHA-256 before the chunk, 32 bytes (eight big-endian words).
    Returns:
        The chunk's SHA-256 and the chaining value after it, 32 bytes each.
    Raises:
        UsageError: A length is wrong; nothing was hashed.
    Cost: one pass over the data; the message schedule is computed once.
    """

def chunk_passes(data: Buffer, chunk_size: int, chain: bytes, *, kernel: str | None = None) -> tuple[bytes, bytes]:
    """Hash consecutive chunks of one size and carry the content's chaining value over them, in one pass.

    Args:
        data: The chunks back to back; a multiple of chunk_size, may be empty.
        chunk_size: Bytes per chunk, a multiple of 64 from 64 B to 16 MiB.
        chain: Chaining value of the content's SHA-256 before the first chunk, 32 bytes.
    Returns:
        (hashes, midstates), back to back: each chunk's SHA-256, and the chaining value after it.
    Raises:
        UsageError: A length is wrong; nothing was hashed.
        KernelUnavailable: No such kernel here.
    Cost: as so many chunk_pass(); eight chunks or more, of a multiple of 512 bytes, at 0.75 of it with shani_x10.
    """

class Sha256:
    """A message's SHA-256, from its start or from a midstate.

    Args:
        midstate: Chaining value to continue from, 32 bytes; None starts a message.
        length: Bytes that the midstate stands for, a multiple of 64.
        kernel: Kernel to demand.
    Raises:
        UsageError: midstate is not 32 bytes, or length is no multiple of 64, or is given without a midstate.
        KernelUnavailable: No such kernel here.
    """

    def __init__(self, midstate: bytes | None = None, length: int = 0, *, kernel: str | None = None) -> None: ...
    @property
    def length(self) -> int:
        """Bytes fed since the start of the message, those before the midstate included."""

    @property
    def kernel(self) -> str:
        """Name of the kernel in use."""

    def update(self, data: Buffer) -> Sha256:
        """Feed a buffer of any length and return self."""

    def digest(self) -> bytes:
        """Return the SHA-256 of what was fed so far; feeding may go on."""

    def midstate(self) -> bytes:
        """Return the chaining value, 32 bytes.

        Raises:
            UsageError: length is not a multiple of 64.
        """

    def copy(self) -> Sha256:
        """Return an independent twin in the same state."""

class ChunkHasher:
    """All hashes of a file in one pass: of each chunk, of the content, and the midstates between chunks.

    Args:
        chunk_size: Bytes per chunk, a multiple of 64 from 64 B to 16 MiB; the last chunk may be shorter.
        kernel: Kernel to demand.
    Raises:
        UsageError: chunk_size is out of range.
        KernelUnavailable: No such kernel here.
    """

    def __init__(self, chunk_size: int, *, kernel: str | None = None) -> None: ...
    @property
    def chunk_size(self) -> int:
        """Bytes per chunk."""

    @property
    def size(self) -> int:
        """Bytes fed so far."""

    @property
    def n_chunks(self) -> int:
        """Chunks begun so far, the last one full or not."""

    def update(self, data: Buffer) -> ChunkHasher:
        """Feed a buffer of any length and return self; cuts need not fall on chunk borders.

        Raises:
            UsageError: The file would have more than 200,000 chunks, or finish() was called; nothing was fed.
        Cost: one pass; 64 B per chunk, no copy of the data.
        """

    def finish(self) -> tuple[bytes, bytes, bytes, int]:
        """End the file; the object cannot be fed afterwards.

        Returns:
            (hashes, midstates, file_hash, size): chunk hashes back to back (32 * n bytes, none for an empty file);
            chaining values of the content after chunk 0..n-2 back to back (32 * max(n - 1, 0) bytes); SHA-256 of
            the content; bytes fed.
        Raises:
            UsageError: Already finished.
        """
