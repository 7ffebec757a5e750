"""What describes a file: the manifest (canonical bytes, format below) and `FileMetadata` of the quick reference.

Goals: one byte string per cutting of one file, so that its SHA-256 names it; everything that is needed to check
chunks in any order against the content's own SHA-256. Non-goals: names, times, modes (they are not content).

Manifest, version 1. All numbers little-endian; there are no optional or variable parts but the three arrays, so
the bytes are canonical by construction.

    offset  size      field
    0       8         magic "FCASMAN1"
    8       1         algorithm of chunk and content hashes: 1 = SHA-256
    9       1         flags: 0 = chunks of one size, 1 = cut by content (see below; any other flag is an error)
    10      1         k: data chunks per stripe, 0 = no parity
    11      1         m: parity chunks per stripe, 0 = no parity
    12      4         chunk_size in bytes, a power of two, 16 KiB..16 MiB
    16      8         size of the file in bytes, <= 2^50
    24      4         n: number of data chunks = ceil(size / chunk_size), <= 200,000
    28      4         p: number of parity chunks = ceil(n / k) * m, 0 without parity
    32      32        file_hash: SHA-256 of the content
    64      32*n      chunk hashes, in order
    ..      32*(n-1)  midstates: chaining value of the content's SHA-256 after chunk 0..n-2 (none for n < 2), each
                      eight big-endian 32-bit words
    ..      32*p      parity chunk hashes: stripe by stripe, m each

Stripe s consists of data chunks s*k .. min((s+1)*k, n)-1. Its shards are as long as its longest data chunk; a
shorter last chunk is padded with zeros for the arithmetic, absent data chunks of the last stripe are zeros. So a
parity chunk's length is chunk_size, or the last chunk's length where that is the only one of its stripe.

A manifest of chunks that were cut by content (flags = 1; the rule stands in csrc/cdc/cdc.h) has explicit lengths. It
has no midstates, as cuts are no multiples of SHA-256's block, and no parity.

    offset  size      field
    0       8         magic "FCASMAN1"
    8       1         algorithm, 1
    9       1         flags, 1
    10      2         0 (no parity)
    12      4         chunk_size in bytes: the longest that a chunk may be, a power of two, 256 KiB..16 MiB. It is
                      four times the average of the cut rule and sixteen times the shortest
    16      8         size of the file in bytes, 1..2^50 (an empty file has a manifest of the first kind)
    24      4         n: number of chunks, 1..200,000
    28      4         0 (no parity)
    32      32        file_hash
    64      32*n      chunk hashes, in order
    ..      4*n       lengths in bytes, in order: all but the last chunk_size / 16..chunk_size, the last
                      1..chunk_size; their sum is size
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from fastcas.errors import ManifestCorrupt, UsageError
from fastcas.limits import (
    CDC_AVERAGE_AUTO,
    CDC_AVERAGE_MAX,
    CDC_AVERAGE_MIN,
    CHUNK_SIZE_AUTO,
    CHUNK_SIZE_MAX,
    CHUNK_SIZE_MIN,
    CHUNKS_AUTO_MAX,
    CHUNKS_MAX,
    FILE_SIZE_MAX,
    MANIFEST_SIZE_MAX,
    PARITY_M_MAX,
    PARITY_TOTAL_MAX,
    STRIPE_BYTES_MAX,
)

__all__ = [
    "CDC",
    "CHUNKINGS",
    "EMPTY_SHA256",
    "FIXED",
    "FileMetadata",
    "Manifest",
    "check_chunking",
    "check_parity",
    "choose_average",
    "choose_chunk_size",
]

MAGIC = b"FCASMAN1"
ALGORITHM_SHA256 = 1
FLAG_CDC = 1
FIXED, CDC = CHUNKINGS = ("fixed", "cdc")
LONGEST = 4  # of the cut rule, in averages
SHORTEST = 16  # the longest, in shortest
HEADER = struct.Struct("<8sBBBBIQII32s")
EMPTY_SHA256 = hashlib.sha256(b"").digest()
SHA256_IV = bytes.fromhex("6a09e667bb67ae853c6ef372a54ff53a510e527f9b05688c1f83d9ab5be0cd19")


def choose_chunk_size(size: int, wanted: int | None = None) -> int:
    """Return the chunk size for a file of `size` bytes: `wanted`, or the automatic one.

    Raises:
        UsageError: `wanted` is not a power of two in 16 KiB..16 MiB, or would need more than 200,000 chunks.
    """
    if wanted is None:
        chunk_size = CHUNK_SIZE_AUTO
        while size > chunk_size * CHUNKS_AUTO_MAX and chunk_size < CHUNK_SIZE_MAX:
            chunk_size *= 2
    else:
        chunk_size = wanted
        if not CHUNK_SIZE_MIN <= wanted <= CHUNK_SIZE_MAX or wanted & (wanted - 1):
            raise UsageError(f"chunk size: expected a power of two from 16 KiB to 16 MiB, got {wanted} B")
    if -(-size // chunk_size) > CHUNKS_MAX:
        raise UsageError(
            f"chunk size: {chunk_size} B would cut {size} B into {-(-size // chunk_size)} chunks, limit {CHUNKS_MAX}"
        )
    return chunk_size


def choose_average(size: int, wanted: int | None = None) -> int:
    """Return the average chunk of a file of `size` bytes that is cut by content: `wanted`, or the automatic one.

    Raises:
        UsageError: `wanted` is not a power of two in 64 KiB..4 MiB, or would make more than 200,000 chunks.
    """
    average = CDC_AVERAGE_AUTO if wanted is None else wanted
    if not CDC_AVERAGE_MIN <= average <= CDC_AVERAGE_MAX or average & (average - 1):
        raise UsageError(
            f"chunk size: expected a power of two from 64 KiB to 4 MiB as the average of chunks cut by content, "
            f"got {average} B"
        )
    while wanted is None and size > average * CHUNKS_AUTO_MAX and average < CDC_AVERAGE_MAX:
        average *= 2
    if size // average > CHUNKS_MAX:
        raise UsageError(f"chunk size: an average of {average} B would cut {size} B into more than {CHUNKS_MAX} chunks")
    return average


def check_chunking(chunking: str, parity: tuple[int, int] | None) -> None:
    """Check how a file is to be cut, before anything is read.

    Raises:
        UsageError: Neither "fixed" nor "cdc", or cut by content with parity.
    """
    if chunking not in CHUNKINGS:
        raise UsageError(f"chunking: expected one of {', '.join(CHUNKINGS)}, got {chunking!r}")
    if chunking == CDC and parity is not None:
        raise UsageError(
            "chunking cdc: chunks that are cut by content cannot have parity (stripes need chunks of one size); "
            "store with fixed chunks, or without parity; nothing was stored"
        )


def check_parity(size: int, chunk_size: int, k: int, m: int) -> None:
    """Check a parity shape for a file of `size` bytes, before anything is read or allocated.

    Raises:
        UsageError: k < 1, m < 1, m > 64, k + m > 255, a stripe over 1 GiB, or a manifest over 16 MiB.
    """
    if not (k >= 1 and 1 <= m <= PARITY_M_MAX and k + m <= PARITY_TOTAL_MAX):
        raise UsageError(
            f"parity: expected K+M with K >= 1, 1 <= M <= {PARITY_M_MAX}, K+M <= {PARITY_TOTAL_MAX}, got {k}+{m}"
        )
    try:
        _check_shape("parity", size, chunk_size, k, m)
    except ManifestCorrupt as exc:
        raise UsageError(f"{exc}; nothing of it was stored") from None


@dataclass(frozen=True)
class Manifest:
    """One cutting of one file. Immutable; the constructor checks every number against the others.

    Attributes:
        file_hash: SHA-256 of the content, 32 bytes.
        size: Bytes of content.
        chunk_size: Bytes per chunk, the last one may be shorter; cut by content: the longest that one may be.
        hashes: Chunk hashes back to back, 32 * n bytes.
        midstates: Chaining values after chunk 0..n-2 back to back, 32 * max(n - 1, 0) bytes.
        k, m: Stripe shape, both 0 without parity.
        parity_hashes: Parity chunk hashes back to back, 32 * p bytes.
        lengths: Cut by content: bytes of each chunk, n little-endian 32-bit numbers back to back; else empty.
    Raises:
        ManifestCorrupt: The numbers contradict each other or the limits.
    """

    file_hash: bytes
    size: int
    chunk_size: int
    hashes: bytes = field(repr=False)
    midstates: bytes = field(repr=False)
    k: int = 0
    m: int = 0
    parity_hashes: bytes = field(default=b"", repr=False)
    lengths: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        who = f"manifest of {self.file_hash[:4].hex()}"
        if self.lengths:
            n, p, n_mid = len(self.lengths) // 4, 0, 0
            _check_cdc_shape(who, self.size, self.chunk_size, n, self.k, self.m)
            _check_lengths(who, self.lengths, self.size, self.chunk_size)
        else:
            n, p = _check_shape(who, self.size, self.chunk_size, self.k, self.m)
            n_mid = max(n - 1, 0)
        for what, data, count in (
            ("file hash", self.file_hash, 1),
            ("chunk hashes", self.hashes, n),
            ("midstates", self.midstates, n_mid),
            ("parity hashes", self.parity_hashes, p),
        ):
            if len(data) != 32 * count:
                raise ManifestCorrupt(f"{who}: {what}: expected {32 * count} B, got {len(data)} B")
        if n == 0 and self.file_hash != EMPTY_SHA256:
            raise ManifestCorrupt(f"{who}: size 0 but not the hash of nothing")
        if n == 1 and self.hashes != self.file_hash:
            raise ManifestCorrupt(f"{who}: one chunk but its hash is not the file hash")

    @cached_property
    def n_chunks(self) -> int:
        """Number of data chunks."""
        return len(self.hashes) // 32

    @property
    def chunking(self) -> str:
        """How the file is cut: "fixed" or "cdc"."""
        return CDC if self.lengths else FIXED

    @property
    def is_cdc(self) -> bool:
        """Whether it is cut by content: there are no midstates, and the content is proven by its hash at the end."""
        return bool(self.lengths)

    @property
    def wanted_size(self) -> int:
        """What to ask for to cut like this: bytes per chunk, or of the average chunk."""
        return self.chunk_size // LONGEST if self.lengths else self.chunk_size

    @cached_property
    def _starts(self) -> array[int]:
        """Where each chunk of a file cut by content begins, and the file's end."""
        return array("Q", accumulate(_numbers(self.lengths), initial=0))

    def offset_of(self, index: int) -> int:
        """Return where data chunk `index` begins in the file, bytes; n_chunks: the end of fixed chunks or the file."""
        return self._starts[index] if self.lengths else index * self.chunk_size

    def chunk_at(self, offset: int) -> int:
        """Return the data chunk that holds the byte at `offset`, 0 <= offset < size."""
        return bisect_right(self._starts, offset) - 1 if self.lengths else offset // self.chunk_size

    @property
    def n_parity(self) -> int:
        """Number of parity chunks."""
        return len(self.parity_hashes) // 32

    @property
    def n_total(self) -> int:
        """Data and parity chunks: the bits of a bitfield."""
        return self.n_chunks + self.n_parity

    @property
    def n_stripes(self) -> int:
        """Number of stripes, 0 without parity."""
        return -(-self.n_chunks // self.k) if self.k else 0

    def hash_of(self, index: int) -> bytes:
        """Return the hash of chunk `index`: data chunks first, then parity chunks."""
        n = self.n_chunks
        if index < n:
            return self.hashes[32 * index : 32 * index + 32]
        return self.parity_hashes[32 * (index - n) : 32 * (index - n) + 32]

    def length_of(self, index: int) -> int:
        """Return the length in bytes of chunk `index`: data chunks first, then parity chunks."""
        n = self.n_chunks
        if self.lengths:
            return self._starts[index + 1] - self._starts[index]
        if index < n - 1:
            return self.chunk_size
        if index < n:
            return self.size - (n - 1) * self.chunk_size
        first = (index - n) // self.m * self.k
        return self.length_of(first)

    def chain_before(self, index: int) -> bytes:
        """Return the content's chaining value before data chunk `index`: SHA-256's IV for 0."""
        return SHA256_IV if index == 0 else self.midstates[32 * (index - 1) : 32 * index]

    def chain_after(self, index: int) -> bytes:
        """Return the chaining value after data chunk `index`; for the last one, padded, the file hash."""
        return self.file_hash if index == self.n_chunks - 1 else self.midstates[32 * index : 32 * index + 32]

    def stripe_of(self, index: int) -> int:
        """Return the stripe of chunk `index` (data or parity). Only for manifests with parity."""
        n = self.n_chunks
        return index // self.k if index < n else (index - n) // self.m

    def stripe(self, number: int) -> tuple[range, range]:
        """Return the chunk numbers of stripe `number`: (data, parity)."""
        n = self.n_chunks
        return (
            range(number * self.k, min((number + 1) * self.k, n)),
            range(n + number * self.m, n + (number + 1) * self.m),
        )

    @cached_property
    def data(self) -> bytes:
        """The canonical bytes."""
        header = HEADER.pack(
            MAGIC, ALGORITHM_SHA256, FLAG_CDC if self.lengths else 0, self.k, self.m, self.chunk_size, self.size,
            self.n_chunks, self.n_parity, self.file_hash,
        )  # fmt: skip
        return b"".join((header, self.hashes, self.midstates, self.parity_hashes, self.lengths))

    @cached_property
    def manifest_hash(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.data).digest()

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Manifest:
        """Parse canonical bytes. Every length is checked before anything is copied.

        Raises:
            ManifestCorrupt: Not a manifest, an unknown version, algorithm or flag, or contradicting numbers.
        """
        size_B = len(data)
        if not HEADER.size <= size_B <= MANIFEST_SIZE_MAX:
            raise ManifestCorrupt(f"manifest: expected {HEADER.size}..{MANIFEST_SIZE_MAX} B, got {size_B} B")
        magic, algorithm, flags, k, m, chunk_size, size, n, p, file_hash = HEADER.unpack_from(data)
        if magic[:7] != MAGIC[:7]:
            raise ManifestCorrupt("manifest: wrong magic")
        who = f"manifest of {file_hash[:4].hex()}"
        if magic != MAGIC:
            raise ManifestCorrupt(f"{who}: version {magic[7:8]!r} is unknown")
        if algorithm != ALGORITHM_SHA256 or flags & ~FLAG_CDC:
            raise ManifestCorrupt(f"{who}: algorithm {algorithm}, flags {flags}: unknown")
        view = memoryview(data)
        at = HEADER.size
        if flags & FLAG_CDC:
            _check_cdc_shape(who, size, chunk_size, n, k, m)
            if p:
                raise ManifestCorrupt(f"{who}: {p} parity chunks beside chunks cut by content")
            if size_B != at + 36 * n:
                raise ManifestCorrupt(f"{who}: expected {at + 36 * n} B, got {size_B} B")
            hashes = bytes(view[at : (at := at + 32 * n)])
            return cls(file_hash, size, chunk_size, hashes, b"", lengths=bytes(view[at:]))
        if (n, p) != _check_shape(who, size, chunk_size, k, m):
            raise ManifestCorrupt(f"{who}: {n} chunks and {p} parity chunks do not fit {size} B in {chunk_size} B each")
        n_mid = max(n - 1, 0)
        if size_B != HEADER.size + 32 * (n + n_mid + p):
            raise ManifestCorrupt(f"{who}: expected {HEADER.size + 32 * (n + n_mid + p)} B, got {size_B} B")
        hashes = bytes(view[at : (at := at + 32 * n)])
        midstates = bytes(view[at : (at := at + 32 * n_mid)])
        return cls(file_hash, size, chunk_size, hashes, midstates, k, m, bytes(view[at:]))


def _check_shape(who: str, size: int, chunk_size: int, k: int, m: int) -> tuple[int, int]:
    """Return (n, p) of a shape that is within the limits, else raise ManifestCorrupt."""
    if not CHUNK_SIZE_MIN <= chunk_size <= CHUNK_SIZE_MAX or chunk_size & (chunk_size - 1):
        raise ManifestCorrupt(f"{who}: chunk size {chunk_size} B is not a power of two from 16 KiB to 16 MiB")
    if not 0 <= size <= FILE_SIZE_MAX:
        raise ManifestCorrupt(f"{who}: size {size} B is over the limit {FILE_SIZE_MAX} B")
    n = -(-size // chunk_size)
    if n > CHUNKS_MAX:
        raise ManifestCorrupt(f"{who}: {n} chunks, limit {CHUNKS_MAX}")
    if (k == 0) != (m == 0) or k < 0 or not 0 <= m <= PARITY_M_MAX or k + m > PARITY_TOTAL_MAX:
        raise ManifestCorrupt(f"{who}: parity shape {k}+{m} is outside the limits")
    if (k + m) * chunk_size > STRIPE_BYTES_MAX:
        raise ManifestCorrupt(f"{who}: stripe of {k}+{m} chunks of {chunk_size} B is over {STRIPE_BYTES_MAX} B")
    p = -(-n // k) * m if k else 0
    if HEADER.size + 32 * (n + max(n - 1, 0) + p) > MANIFEST_SIZE_MAX:
        raise ManifestCorrupt(f"{who}: {n} chunks and {p} parity chunks need a manifest over {MANIFEST_SIZE_MAX} B")
    return n, p


def _check_cdc_shape(who: str, size: int, chunk_size: int, n: int, k: int, m: int) -> None:
    """Raise ManifestCorrupt unless n chunks cut by content with this longest one are within the limits."""
    longest = CDC_AVERAGE_MAX * LONGEST
    if not CDC_AVERAGE_MIN * LONGEST <= chunk_size <= longest or chunk_size & (chunk_size - 1):
        raise ManifestCorrupt(f"{who}: longest chunk {chunk_size} B is not a power of two from 256 KiB to 16 MiB")
    if not 1 <= size <= FILE_SIZE_MAX:
        raise ManifestCorrupt(f"{who}: size {size} B is not within 1..{FILE_SIZE_MAX} B, as chunks cut by content need")
    if not 1 <= n <= CHUNKS_MAX:
        raise ManifestCorrupt(f"{who}: {n} chunks, expected 1..{CHUNKS_MAX}")
    if k or m:
        raise ManifestCorrupt(f"{who}: parity {k}+{m} of chunks that are cut by content")


def _numbers(lengths: bytes) -> array[int]:
    numbers = array("I", lengths)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _check_lengths(who: str, lengths: bytes, size: int, chunk_size: int) -> None:
    """Raise ManifestCorrupt unless the lengths are the rule's and add up."""
    if len(lengths) % 4:
        raise ManifestCorrupt(f"{who}: lengths: expected a multiple of 4 B, got {len(lengths)} B")
    numbers = _numbers(lengths)
    if (
        max(numbers) > chunk_size
        or numbers[-1] == 0
        or (len(numbers) > 1 and min(numbers[:-1]) < chunk_size // SHORTEST)
    ):
        raise ManifestCorrupt(
            f"{who}: a chunk's length is not within {chunk_size // SHORTEST}..{chunk_size} B (the last one's, 1..)"
        )
    if sum(numbers) != size:
        raise ManifestCorrupt(f"{who}: the chunks have {sum(numbers)} B together, expected {size} B")


@dataclass
class FileMetadata:
    """What a publisher says about a file; hashes are 64-hex strings (quick reference).

    Attributes:
        file_hash: SHA-256 of the content.
        original_name: The name it was stored under; a hint for people.
        size: Bytes.
        data_chunks: Chunk hashes in order.
        parity_chunks: Parity chunk hashes, stripe by stripe.
    """

    file_hash: str
    original_name: str
    size: int
    data_chunks: list[str]
    parity_chunks: list[str] = field(default_factory=list)

    @classmethod
    def from_manifest(cls, manifest: Manifest, name: str) -> FileMetadata:
        """Return the metadata of a manifest's file under a name."""
        n = manifest.n_chunks
        return cls(
            manifest.file_hash.hex(),
            name,
            manifest.size,
            [manifest.hash_of(i).hex() for i in range(n)],
            [manifest.hash_of(n + i).hex() for i in range(manifest.n_parity)],
        )
