"""Which manifest is believed how far, and which chunks of it are proven (architecture §5.2). Pure.

A manifest lists, beside the chunk hashes, the chaining value of the content's SHA-256 at each chunk boundary. Chunk i
is *consistent* if compressing it from the value before it gives the value after it; the last one must give the file's
hash. It is *proven* once every link from it to the end has been checked: a false one would need a second preimage.
A manifest of chunks that were cut by content has no links: it is proven by the hash of the whole content, at the end,
so nothing is gained by fetching the end first.

Owns: the state of the links, the window of chunks that may be fetched, the blame for what does not fit.
Never: hashes anything itself (csrc/receiver does), talks to anybody.
"""

from __future__ import annotations

from enum import Enum

from fastcas.errors import ManifestCorrupt
from fastcas.fetch.receiver import HAS_LINK, HASH_OK, LINK_ALONE, LINK_OK
from fastcas.ids import short
from fastcas.limits import UNVERIFIED_WINDOW_BYTES, UNVERIFIED_WINDOW_CHUNKS
from fastcas.metadata import Manifest

__all__ = ["Chain", "ManifestConvictedError", "Verdict", "check_manifest", "convicted", "judge"]


class ManifestConvictedError(ManifestCorrupt):
    """Between the modules of a download only: try another manifest."""


class Verdict(Enum):
    """Whom the check of a chunk's bytes convicts."""

    RIGHT = "right"
    PEER = "peer"
    MANIFEST = "manifest"


def judge(flags: int, *, is_data: bool) -> Verdict:
    """Return the verdict on a chunk's bytes.

    Args:
        flags: Bits of the check: own hash right, link right, link checked, link right and own hash not looked at.
        is_data: Parity chunks have no link.
    """
    if flags & LINK_ALONE:
        return Verdict.RIGHT
    if not is_data or not flags & HAS_LINK:
        return Verdict.RIGHT if flags & HASH_OK else Verdict.PEER
    match bool(flags & HASH_OK), bool(flags & LINK_OK):
        case True, True:
            return Verdict.RIGHT
        case False, False:
            return Verdict.PEER
        case _:
            # Bytes that satisfy one of the two and not the other show that the manifest contradicts itself.
            return Verdict.MANIFEST


def convicted(manifest: Manifest, index: int, where: str) -> ManifestConvictedError:
    """Return the error of a manifest that a chunk's bytes have shown to contradict itself."""
    return ManifestConvictedError(
        f"manifest {short(manifest.manifest_hash)}: chunk #{index} from {where} satisfies its hash or its link but not "
        f"both, so the manifest contradicts itself; it is not used"
    )


def check_manifest(data: bytes, manifest_hash: bytes, file_hash: bytes) -> Manifest:
    """Decode a manifest whose bytes are known to hash to `manifest_hash`, for one file.

    Raises:
        ManifestCorrupt: Malformed, or it describes another file.
    """
    manifest = Manifest.decode(data)
    if manifest.file_hash != file_hash:
        raise ManifestCorrupt(
            f"manifest {short(manifest_hash)}: expected file {short(file_hash)}, got {short(manifest.file_hash)}; "
            f"it is not used"
        )
    return manifest


class Chain:
    """The links of one file: which were checked, and what may be fetched because of that."""

    def __init__(
        self, manifest: Manifest, *, trusted: bool, is_checked: bool = True, wanted: int | None = None
    ) -> None:
        """Start with no link checked.

        Args:
            trusted: The manifest was named by a link or came from a peer that the user named: every chunk may be
                fetched at once. Otherwise only a window at the end, which doubles as the proven suffix grows.
            is_checked: Links are checked at all; if not, chunks count by their own hashes, and the content is never
                proven to be the file's. Only for a manifest that a link names.
            wanted: Chunk set, data chunks only, where no more of the file is to be fetched. Likewise.
        """
        self.is_checked = is_checked
        n = manifest.n_chunks
        self.wanted = (1 << n) - 1 if wanted is None else wanted
        self.takes_any = wanted is None  # a peer may choose which chunk it gives
        self._n = n
        self._has_links = not manifest.is_cdc or n == 1
        self._trusted = trusted or not self._has_links
        self._checked = bytearray(n)
        self._n_checked = 0
        self._suffix = n
        self._floor = max(1, min(UNVERIFIED_WINDOW_CHUNKS, UNVERIFIED_WINDOW_BYTES // manifest.chunk_size))
        self._total = manifest.n_total

    def link_holds(self, index: int) -> bool:
        """Note that the link of data chunk `index` holds; returns whether the proven suffix grew."""
        if self._checked[index]:
            return False
        self._checked[index] = 1
        self._n_checked += 1
        before = self._suffix
        while self._suffix and self._checked[self._suffix - 1]:
            self._suffix -= 1
        return self._suffix != before

    @property
    def proven_from(self) -> int:
        """First chunk of the proven suffix: it and all after it are proven."""
        return self._suffix

    @property
    def content_proven(self) -> bool:
        """Whether every link holds: the content's hash has been computed. Never of more chunks cut by content."""
        return self._has_links and self._n_checked == self._n

    def unchecked(self) -> list[int]:
        """Return the data chunks whose link was not checked."""
        return [i for i in range(self._n) if not self._checked[i]]

    @property
    def first_allowed(self) -> int:
        """First data chunk that may be fetched from peers."""
        if self._trusted:
            return 0
        return max(0, self._suffix - max(self._floor, self._n - self._suffix))

    def allowed(self) -> int:
        """Return the chunk set that may be fetched from peers (parity only when everything may)."""
        first = self.first_allowed
        return (1 << (self._total if first == 0 else self._n)) - (1 << first)
