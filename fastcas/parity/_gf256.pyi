"""Products of matrices over GF(2^8) with rows of bytes. Every `kernel` argument names one of kernels(); None is
kernel_name()."""

from typing import TypeVar

from typing_extensions import Buffer

T = TypeVar("T", bound=Buffer)

def kernel_name() -> str:
    """Return the name of the kernel that this process uses by default.

    It is FASTCAS_GF256_KERNEL's where that was set when the module was imported, else the fastest that this CPU
    supports.
    """

def kernels() -> list[str]:
    """Return the kernels that were built and that this CPU supports, from the slowest to the fastest."""

def _mask_cpu(allowed: int) -> None:
    """Pretend, for tests, that the CPU has at most these FCAS_CPU_* bits; 2**32 - 1 restores the truth.

    Kernels in use and the process's default stay as they are.
    """

def self_test(kernel: str | None = None) -> None:
    """Check a kernel: all products, all tails, and known parity of every code with k + m < 16.

    Raises:
        SelfTestFailed: A byte is wrong; nothing this kernel computes can be trusted.
        KernelUnavailable: No such kernel here.
    Cost: 1 to 3 ms.
    """

def survivors(shards: list[Buffer | None]) -> tuple[int, ...]:
    """Return the slots that are not None, in ascending order.

    Raises:
        UsageError: One of them is no buffer, or is not as long as the first.
    Cost: about 20 ns a shard.
    """

class Plan:
    """A matrix bound to its tables and to a kernel. Immutable; any number of threads may apply it at once.

    Args:
        matrix: uint8[n_out, n_in], row-major.
        n_out: Rows, 1..255.
        n_in: Columns, 1..255.
        kernel: Kernel to demand.
    Raises:
        UsageError: The shape is out of range or is not the matrix's.
        KernelUnavailable: No such kernel here.
    Cost: about 40 bytes per coefficient.
    """

    def __init__(self, matrix: bytes, n_out: int, n_in: int, *, kernel: str | None = None) -> None: ...
    @property
    def kernel(self) -> str:
        """Name of the kernel in use."""

    def apply(self, inputs: list[Buffer], outputs: list[T | None]) -> list[T | bytes]:
        """Compute each output as the matrix's combination of the inputs, without the GIL.

        Args:
            inputs: n_in contiguous buffers of one length, which may be 0.
            outputs: n_out writable contiguous buffers of that length, overwritten; None makes a new `bytes`. They
                overlap neither each other nor an input.
        Returns:
            The outputs.
        Raises:
            UsageError: A count, a length, an overlap, or a buffer that is read-only; nothing was written.
        Cost: one pass over the inputs per 4 (AVX2) or 8 (GFNI) outputs, in blocks that stay in the cache.
        """
