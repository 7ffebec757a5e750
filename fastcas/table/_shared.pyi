"""Ring, HaveLog, GivenBoard, Counters: small shared-memory structures between the processes of a node.

Layouts and protocols: csrc/table/{ring,havelog,given,counters}.h. Descriptors that are passed in are borrowed:
they are duplicated and may be closed after the call; the attributes `fd`, `memfd`, `eventfd` belong to the object
and are -1 once it is closed.

All methods raise UsageError on a closed object or a malformed argument, OverflowError where a number does not
fit its field; `attach` raises LocalProtocolError for what is not the structure, has another version or could
still shrink, and OSError for what is not a memfd. `manifest_hash` and `file_hash` are 32 bytes.
"""

from typing import ClassVar, TypeAlias, final

Bytes: TypeAlias = bytes | bytearray | memoryview

NAMES: tuple[str, ...]  # the counters of csrc/table/counters.h, in its order

@final
class Ring:
    """Messages in one direction: one producer, one consumer, each in any process.

    Neither side trusts the other: after the first inconsistency every call raises LocalProtocolError, and the
    owner makes a new ring.
    """

    @staticmethod
    def create(capacity: int = 1 << 20) -> Ring:
        """Make an empty ring of `capacity` bytes: a power of two, 4 KiB..1 GiB."""
    @staticmethod
    def attach(memfd: int, eventfd: int) -> Ring:
        """Open the ring that another process made."""
    @property
    def memfd(self) -> int:
        """Descriptor of the shared memory."""
    @property
    def eventfd(self) -> int:
        """Descriptor that is readable while messages may wait: give it to `loop.add_reader`, then `drain`."""
    @property
    def max_message(self) -> int:
        """Longest message in bytes: half the capacity."""
    def push(self, message: Bytes) -> bool:
        """Append a message and wake the consumer; False when there is no room for it at the moment.

        Raises:
            UsageError: Longer than max_message.
            LocalProtocolError: The consumer's cursor makes no sense.
        """
    def pop(self) -> bytes | None:
        """Return the next message, None when empty. Leaves the eventfd alone.

        Raises:
            LocalProtocolError: The producer's cursor or a length makes no sense.
        """
    def drain(self) -> list[bytes]:
        """Clear the eventfd and return all messages that wait; errors as `pop`.

        A producer that never stops cannot hold it: after one capacity of bytes it signals the eventfd itself
        and returns.
        """
    def close(self) -> None:
        """Unmap and close both descriptors. Idempotent."""

@final
class HaveLog:
    """Which chunks of one partial file are here, in the order in which they came; one writer."""

    @staticmethod
    def create(file_hash: Bytes, manifest_hash: Bytes, n_total: int) -> HaveLog:
        """Make an empty log, as its only writer.

        Args:
            n_total: Chunks of the manifest, data then parity, 1..2^24.
        """
    @staticmethod
    def attach(fd: int) -> HaveLog:
        """Open the log that another process writes, for reading."""
    @property
    def fd(self) -> int:
        """Descriptor of the shared memory."""
    @property
    def file_hash(self) -> bytes:
        """Whose chunks these are."""
    @property
    def manifest_hash(self) -> bytes:
        """The cutting that the numbers refer to."""
    @property
    def n_total(self) -> int:
        """Chunks of the manifest."""
    @property
    def generation(self) -> int:
        """Number of chunks in the log."""
    def append(self, i: int) -> None:
        """Chunk i is here; a chunk that is in the log already changes nothing.

        Raises:
            UsageError: i >= n_total, or opened for reading.
        """
    def since(self, g: int) -> list[int]:
        """Return the chunks that came after generation g; all of them if g is not a generation of this log."""
    def bitfield(self) -> bytes:
        """Return one bit per chunk: bit i = byte i // 8, mask 0x80 >> (i % 8). Cost: copying, plus new entries."""
    def close(self) -> None:
        """Unmap and close the descriptor. Idempotent."""

@final
class GivenBoard:
    """What a node's workers handed out through NEXT: per file one bit per chunk, claimed atomically.

    `n` is the number of chunks of the manifest, the same in every call for it, at most 2^24. When the board has no
    room for another file, it forgets all files before: a chunk may be given twice.
    """

    @staticmethod
    def create(slots: int = 256, bits_bytes: int = 4 << 20) -> GivenBoard:
        """Make an empty board for `slots` files (a power of two) at a time, `bits_bytes` * 8 chunks in all."""
    @staticmethod
    def attach(fd: int) -> GivenBoard:
        """Open the board that another process made."""
    @property
    def fd(self) -> int:
        """Descriptor of the shared memory."""
    def claim(self, manifest_hash: Bytes, n: int, i: int) -> bool:
        """Mark chunk i as given; True when nobody had before. False, too, when the file cannot fit."""
    def claim_from(self, manifest_hash: Bytes, n: int, start: int, pick: int) -> int | None:
        """Claim the (pick % m)-th of the m chunks in [start, n) that were never given, and return its number.

        Returns:
            None when none is left, or when the file cannot fit.
        Cost: n / 64 steps.
        """
    def clear(self, manifest_hash: Bytes, i: int) -> None:
        """Let chunk i be given again: it did not arrive."""
    def is_given(self, manifest_hash: Bytes, i: int) -> bool:
        """Return whether chunk i was given."""
    def close(self) -> None:
        """Unmap and close the descriptor. Idempotent."""

@final
class Bucket:
    """A token bucket shared by a node's workers: what they send together keeps to one rate. Any thread, any process."""

    @staticmethod
    def create(rate_Bps: int) -> Bucket:
        """Make a bucket of 1..2^40 bytes per second; 50 ms of it may be saved up."""
    @staticmethod
    def attach(fd: int) -> Bucket:
        """Open the bucket that another process made."""
    @property
    def fd(self) -> int:
        """Descriptor of the shared memory."""
    @property
    def rate_Bps(self) -> int:
        """Bytes per second."""
    @property
    def slice_bytes(self) -> int:
        """The most that one `take` takes: 20 ms of the rate, 1..64 KiB."""
    def take(self, n: int, now_ns: int) -> int:
        """Take n bytes, all or none.

        Args:
            now_ns: CLOCK_MONOTONIC.
        Returns:
            0, or in how many ns they are there if nobody else takes any.
        """
    def charge(self, n: int, now_ns: int) -> None:
        """Take n bytes that are sent in any case; later takings wait for it, at most a second."""
    def refund(self, n: int) -> None:
        """Give back n bytes that were taken and not sent."""
    def close(self) -> None:
        """Unmap and close the descriptor. Idempotent."""

@final
class Counters:
    """One slot of counters per process; each is written by its owner and read by anybody."""

    NAMES: ClassVar[tuple[str, ...]]

    @staticmethod
    def create(n_slots: int) -> Counters:
        """Make 1..4096 slots of zeros."""
    @staticmethod
    def attach(fd: int) -> Counters:
        """Open the counters that another process made."""
    @property
    def fd(self) -> int:
        """Descriptor of the shared memory."""
    @property
    def n_slots(self) -> int:
        """Number of slots."""
    def get(self, slot: int, name: str) -> int:
        """Return one counter (acquire)."""
    def add(self, slot: int, name: str, n: int = 1) -> None:
        """Add n, atomically."""
    def set(self, slot: int, name: str, value: int) -> None:
        """Set a gauge (release)."""
    def clear(self, slot: int) -> None:
        """Set all counters of a slot to zero, for a new owner."""
    def snapshot(self, slot: int) -> dict[str, int]:
        """Return all counters of a slot by name; each is right, together they are not one moment."""
    def close(self) -> None:
        """Unmap and close the descriptor. Idempotent."""

def sort_keys(keys: bytearray | memoryview) -> int:
    """Sort uint8[n * 32] in place by key, drop repeated keys, and return how many are left at the front.

    Cost: n log n comparisons without the GIL; about 0.35 s for 1 M keys.
    """
