"""The quota: how much disk the folder's owned blobs, manifests and quarantine may take, and who has to go for it.

Space is reserved before an ingest or download begins, for the most that it can come to; where there is not enough,
files are evicted, the longest unused first, until there is. Pinned files, what collections that stay need, and
downloads in progress are never evicted, nor are files that take no owned space; if that leaves too little, nothing is
evicted and the call fails. What an ingest writes is held to its reservation, too, so that the quota holds even where
an estimate is wrong. The catalog (110 B per chunk, some 310 B with its log) and the 1 MiB reserve come on
top: removing things needs them, and what `rebuild` replaced does not count either.
Counted are blocks on disk, as `du` does. The limit is remembered in the catalog.
Never: evicts in the middle of an ingest, whose chunks could be among those that go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from fastcas.errors import StoreFull
from fastcas.limits import CHUNK_SIZE_AUTO, CHUNK_SIZE_MIN
from fastcas.metadata import CDC, FIXED
from fastcas.store.catalog import BATCH
from fastcas.store.core import Core
from fastcas.store.maintain import gc, remove
from fastcas.store.paths import BLOB_DIR, MANIFEST_DIR, OLD_CATALOG, QUARANTINE_DIR, shown

__all__ = ["QUOTA_FACT", "Quota", "ingest_bound", "manifest_bound"]

log = logging.getLogger(__name__)

QUOTA_FACT = "quota"
BLOCK_B = 4096
ROUNDS = 4  # of eviction: what gc frees can be a little less than what was counted on
_PER_CHUNK_B = 48 + 64 + 32  # entry in the blob's index; hash and midstate, or parity hash, in the manifest


def manifest_bound(length: int) -> int:
    """Return what a manifest of `length` bytes takes on disk at most."""
    return -(-length // BLOCK_B) * BLOCK_B + BLOCK_B


def ingest_bound(
    size: int, chunk_size: int | None, parity: tuple[int, int] | None, *, chunking: str = FIXED, in_place: bool = False
) -> int:
    """Return what storing `size` bytes takes on disk at most, blob and manifest."""
    unit = max(chunk_size or CHUNK_SIZE_AUTO, CHUNK_SIZE_MIN)
    if chunking == CDC and chunk_size:
        unit = max(chunk_size // 4, CHUNK_SIZE_MIN)  # the average was named; the shortest is a quarter of it
    n = -(-size // unit)
    total = 0 if in_place else size
    if parity is not None and n:
        k, m = parity
        n_parity = -(-n // max(k, 1)) * m
        total += n_parity * min(unit, size)
        n += n_parity
    return total + n * _PER_CHUNK_B + 4 * BLOCK_B


class Quota:
    """The limit of one open store."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._held = 0
        self._used: int | None = None
        self.barrier: Callable[[], None] = lambda: None
        self.on_evicted: Callable[[list[bytes]], None] = lambda file_hashes: None
        fact = core.catalog.fact(QUOTA_FACT)
        self.limit: int | None = int.from_bytes(fact, "little") if fact else None
        core.room = self.room
        core.took = self._took

    def set_limit(self, limit: int | None) -> None:
        """Set the limit in bytes, or None for none, and make what is here fit.

        Raises:
            StoreFull: What cannot be evicted takes more; nothing was changed.
        """
        before, self.limit = self.limit, limit
        try:
            if limit is not None:
                self.forget()
                self._make_room(0)
        except BaseException:
            self.limit = before
            raise
        if limit != before:
            self._core.catalog.remember(QUOTA_FACT, None if limit is None else limit.to_bytes(8, "little"))

    def forget(self) -> None:
        """What is on disk changed: it is measured anew when it is asked for."""
        self._used = None

    def used(self) -> int:
        """Return the bytes on disk that count."""
        if self._used is None:
            folder, total = self._core.folder, 0
            for tree in (BLOB_DIR, MANIFEST_DIR, QUARANTINE_DIR):
                top = folder.names(tree)
                paths = [f"{tree}/{name}" for name in top]
                for name in top:
                    if len(name) == 2:
                        paths += [f"{tree}/{name}/{leaf}" for leaf in folder.names(f"{tree}/{name}")]
                for path in paths:
                    if path.startswith(OLD_CATALOG):  # a catalog does not count, wherever it is
                        continue
                    with contextlib.suppress(OSError):
                        info = os.stat(path, dir_fd=folder.fd, follow_symlinks=False)
                        total += info.st_blocks * 512 if stat.S_ISREG(info.st_mode) else 0
            self._used = total
        return self._used

    def room(self) -> int | None:
        """Return how many bytes are left, None for any number. Nothing is evicted for those who ask here."""
        return None if self.limit is None else max(0, self.limit - self.used() - self._held)

    def _took(self, n: int) -> None:
        """Count bytes that somebody wrote who asked for `room`."""
        if self._used is not None:
            self._used += manifest_bound(n)

    def reserve(self, n: int) -> None:
        """Keep `n` bytes free until `release`, evicting what is in the way.

        Raises:
            StoreFull: There cannot be so much; nothing was evicted.
        """
        if self.limit is not None:
            self._make_room(n)
        self._held += n

    def release(self, n: int) -> None:
        """Give a reservation back."""
        self._held = max(0, self._held - n)
        self.forget()

    @contextlib.contextmanager
    def admit(self, bound: int, name: str | None = None, *, held: bool = False) -> Iterator[int | None]:
        """Yield how many bytes an ingest may write, None for any number.

        Args:
            bound: The most that it can come to.
            name: It is going to be called; a file of that name may be here already, and then takes next to nothing:
                that is tried before anything is evicted.
            held: The space was reserved before, by the caller.
        Raises:
            StoreFull: There is not enough; nothing was evicted.
        """
        if self.limit is None:
            yield None
            return
        self.forget()
        free = self.limit - self.used() - (0 if held else self._held)
        if bound > free:
            if not held and not (name is not None and free > 0 and self._is_known(name, bound)):
                self._make_room(bound)
                free = self.limit - self.used() - self._held
            if bound > free:  # the manifests come on top of what is measured while it is written
                bound = max(0, free - bound // 64 - 4 * BLOCK_B)
        self._held += 0 if held else bound
        try:
            yield bound
        finally:
            self._held -= 0 if held else bound
            self.forget()

    def _is_known(self, name: str, bound: int) -> bool:
        """Whether a file of that name and about that size is here whole."""
        return bool(
            self._core.catalog.query(
                "SELECT 1 FROM names n JOIN files f ON f.hash=n.file JOIN manifests m ON m.hash=f.manifest"
                " WHERE n.name=? AND m.complete AND f.size <= ?",
                (name, bound),
            )
        )

    # --- eviction ---

    def _make_room(self, wanted: int) -> None:
        assert self.limit is not None
        evicted: list[bytes] = []
        short = 0
        is_swept = False
        self.forget()
        try:
            for _ in range(ROUNDS):
                missing = self.used() + self._held + wanted - self.limit
                if missing <= 0:
                    return
                short += missing if evicted else 0
                doomed = self._doomed(wanted + short)
                if doomed is None and is_swept:
                    break
                is_swept = True  # by the gc below, of what a kill or a removal left
                doomed = doomed or []
                for file_hash in doomed:
                    remove(self._core, file_hash)
                evicted += doomed
                gc(self._core, self.barrier)
                self.forget()
            if self.used() + self._held + wanted <= self.limit:
                return
        finally:
            if evicted:
                log.info("evicted files=%d", len(evicted))
                self.on_evicted(evicted)
        reserved = f", {self._held} B reserved" if self._held else ""
        raise StoreFull(
            f"{shown(self._core.folder.root)}: quota of {self.limit} B: {wanted} B more do not fit beside "
            f"{self.used()} B in use{reserved} (pinned files are not evicted); nothing of it was stored"
        )

    def _doomed(self, wanted: int) -> list[bytes] | None:
        """Return the files to evict so that `wanted` bytes are free, the longest unused first; None: impossible."""
        assert self.limit is not None
        catalog = self._core.catalog
        chunk_bytes = catalog.value(
            "SELECT sum(length) FROM extents WHERE blob IN (SELECT number FROM blobs WHERE kind=0)"
        ) + catalog.value("SELECT sum(length) FROM garbage")
        manifest_bytes = catalog.value("SELECT sum((length + 4095) / 4096 * 4096) FROM manifests")
        overhead = max(0, self.used() - chunk_bytes - manifest_bytes)
        room = self.limit - self._held - wanted - overhead
        kept: set[bytes] = set()
        roots = catalog.query(
            "WITH pinned(hash) AS (SELECT file FROM pins) "
            "SELECT hash FROM manifests WHERE file IN (SELECT hash FROM pinned)"
            " UNION SELECT manifest FROM members WHERE collection IN (SELECT hash FROM pinned)"
            " UNION SELECT manifest FROM blobs WHERE kind=2 AND manifest IS NOT NULL"
        )
        room -= self._cost(roots, kept, set())
        if room < 0:
            return None
        doomed: list[bytes] = []
        for (file_hash,) in catalog.query(
            "SELECT f.hash FROM files f LEFT JOIN used u ON u.file=f.hash"
            " WHERE EXISTS(SELECT 1 FROM names WHERE file=f.hash) AND NOT EXISTS(SELECT 1 FROM pins WHERE file=f.hash)"
            " ORDER BY max(f.stored_at, ifnull(u.at, 0)) DESC, f.hash"
        ):
            manifests = catalog.query(
                "SELECT hash FROM manifests WHERE file=?1 UNION SELECT manifest FROM members WHERE collection=?1",
                (file_hash,),
            )
            own: set[bytes] = set()
            cost = self._cost(manifests, own, kept)
            if cost and (doomed or cost > room):
                doomed.append(file_hash)
            else:
                room -= cost
                kept |= own
        doomed.reverse()
        return doomed

    def _cost(self, manifests: Iterable[tuple[bytes]], own: set[bytes], kept: set[bytes]) -> int:
        """Return what manifests take in owned blobs beside the chunks of `kept`, and put theirs into `own`."""
        total = 0
        for (manifest_hash,) in manifests:
            row = self._core.catalog.manifest(manifest_hash)
            if row is None:
                continue
            manifest = self._core.load_manifest(row)
            keys = {manifest.hash_of(i) for i in range(manifest.n_total)}
            fresh = list(keys - kept - own)
            own.update(fresh)
            for at in range(0, len(fresh), BATCH):
                part = fresh[at : at + BATCH]
                total += self._core.catalog.value(
                    "SELECT sum(e.length) FROM extents e JOIN blobs b ON b.number=e.blob"
                    f" WHERE b.kind=0 AND e.hash IN ({','.join('?' * len(part))})",
                    part,
                )
        return total
