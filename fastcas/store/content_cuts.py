"""A file's chunks where its content says so, fed buffer by buffer: cuts, chunk hashes, content hash."""

from __future__ import annotations

import sys
from array import array

from fastcas.errors import UsageError
from fastcas.hashing import Cutter, Sha256, digest_many
from fastcas.limits import CHUNKS_MAX
from fastcas.metadata import Manifest

__all__ = ["ContentCuts"]


class ContentCuts:
    """The chunks of one file that is not empty, fed in order."""

    def __init__(self, size: int, average: int) -> None:
        """Begin a file of `size` bytes.

        Raises:
            UsageError: `average` is no power of two from 256 B to 4 MiB.
        """
        self._cutter = Cutter(average)
        self._content = Sha256()
        self._size = size
        self._hashes = bytearray()
        self._lengths = array("I")
        self._carry = memoryview(b"")
        self.done = 0

    @property
    def longest(self) -> int:
        """Bytes that no chunk exceeds: so much is carried from one buffer to the next at most."""
        return self._cutter.longest

    def hash_content(self, data: memoryview) -> None:
        """Feed the content's hash; in order, each buffer once, in any thread."""
        self._content.update(data)

    def cut(self, room: memoryview, begin: int) -> tuple[list[bytes], list[memoryview]]:  # hot
        """Take the next bytes of the file, which lie in `room` from `begin` on; what was carried is put before them.

        The buffer must stay as it is until the next call has returned, and as long as the chunks are used.

        Args:
            room: A buffer with at least `longest` bytes before `begin`.
        Returns:
            (hash, bytes) of the chunks that end here, as two lists; the file's last ends with it.
        Raises:
            UsageError: More than 200,000 chunks.
        """
        ends = [begin + end for end in self._cutter.feed(room[begin:])]
        self.done += len(room) - begin
        if self.done == self._size and ends[-1:] != [len(room)]:
            ends.append(len(room))
        at = begin - len(self._carry)
        room[at:begin] = self._carry
        chunks = []
        for end in ends:
            chunks.append(room[at:end])
            at = end
        self._carry = room[at:]
        keys = digest_many(chunks)
        self._hashes += b"".join(keys)
        self._lengths.extend(len(chunk) for chunk in chunks)
        if len(self._lengths) > CHUNKS_MAX:
            raise UsageError(
                f"chunk size: the content has more than {CHUNKS_MAX} chunks, ask for a larger one; nothing was stored"
            )
        return keys, chunks

    def manifest(self) -> Manifest:
        """Return the manifest, once everything was fed."""
        if sys.byteorder == "big":
            self._lengths.byteswap()
        return Manifest(
            self._content.digest(), self._size, self._cutter.longest, bytes(self._hashes), b"",
            lengths=self._lengths.tobytes(),
        )  # fmt: skip
