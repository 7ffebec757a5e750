"""Content-defined cuts. The rule stands in csrc/cdc/cdc.h. The GIL is released while bytes are looked at."""

from typing_extensions import Buffer

class Cutter:
    """Cuts one content into chunks whose ends depend on the bytes before them alone (FastCDC).

    Args:
        average: Bytes, a power of two from 256 B to 4 MiB; chunks have a quarter of it to four times it.
    Raises:
        UsageError: `average` is out of range.
    """

    def __init__(self, average: int) -> None: ...
    @property
    def shortest(self) -> int:
        """Bytes that every chunk but the content's last has at least."""

    @property
    def longest(self) -> int:
        """Bytes that no chunk exceeds."""

    @property
    def pending(self) -> int:
        """Bytes fed since the last cut: what would be the last chunk if the content ended here."""

    def feed(self, data: Buffer) -> list[int]:
        """Feed a buffer of any length; returns the places in it after which a chunk ends, ascending.

        The same content has the same cuts however it is split between calls.
        Cost: one pass, a quarter of it skipped; no copy of the data.
        """
