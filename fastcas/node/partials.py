"""Stored files that lost chunks: what is left of them is served and announced like a part file.

Workers list only complete files by themselves. For one that is not, the agent keeps a have-log, which says in /swarm
what is here of it, data and parity; so several nodes that each lost other chunks are a whole source together.
"""

from __future__ import annotations

import logging
import os

from fastcas.errors import FastCASError
from fastcas.ids import short
from fastcas.metadata import Manifest
from fastcas.node.announcer import WHOLE, Announcement, Announcer
from fastcas.node.publisher import Publish, Publisher
from fastcas.node.store_thread import StoreThread
from fastcas.store import Store
from fastcas.table import HaveLog

__all__ = ["Partials"]

log = logging.getLogger(__name__)


class Partials:
    """Belongs to the loop's thread; `refresh` whenever chunks came or went."""

    def __init__(
        self, store: Store, thread: StoreThread, publisher: Publisher, publish: Publish, announcer: Announcer
    ) -> None:
        self._store, self._thread, self._publisher = store, thread, publisher
        self._publish, self._announcer = publish, announcer
        self._logs: dict[bytes, tuple[HaveLog, set[int]]] = {}

    async def refresh(self) -> None:
        """Look which files are incomplete, and say what is left of them. Cost: one lookup per chunk of those."""
        try:
            manifests = {m.manifest_hash: m for m in await self._thread.run(self._store.incomplete)}
        except FastCASError as error:
            log.warning("incomplete files are not offered error=%s", error)
            return
        for manifest_hash in self._logs.keys() - manifests.keys():
            self._end(manifest_hash)
        for manifest in manifests.values():
            self._say(manifest)

    def _say(self, manifest: Manifest) -> None:
        keys = (manifest.hash_of(i) for i in range(manifest.n_total))
        here = {i for i, key in enumerate(keys) if self._publisher.find_extent(key) is not None}
        known = self._logs.get(manifest.manifest_hash)
        if known is not None and known[1] <= here:
            for index in sorted(here - known[1]):
                known[0].append(index)
            known[1].update(here)
            return
        if known is not None:
            self._end(manifest.manifest_hash)  # a log only grows
        if not here:
            return
        have = HaveLog.create(manifest.file_hash, manifest.manifest_hash, manifest.n_total)
        for index in sorted(here):
            have.append(index)
        self._logs[manifest.manifest_hash] = have, here
        message = {"op": "have", "file_hash": manifest.file_hash, "manifest_hash": manifest.manifest_hash}
        self._publish("workers", _key(manifest.manifest_hash), message, [os.dup(have.fd)], None)
        share = max(1, min(WHOLE - 1, WHOLE * len(here) // manifest.n_total))
        self._announcer.announce([Announcement(manifest.file_hash, manifest.manifest_hash, "", manifest.size, share)])
        log.info("incomplete file is offered file=%s chunks=%d of=%d", short(manifest.file_hash), len(here),
                 manifest.n_total)  # fmt: skip

    def _end(self, manifest_hash: bytes) -> None:
        have, _ = self._logs.pop(manifest_hash)
        self._publish("workers", _key(manifest_hash), None, [], {"op": "have_end", "manifest_hash": manifest_hash})
        have.close()

    def republish(self) -> None:
        """Say everything again: a download of the same file has taken its own log away."""
        for manifest_hash, (have, _) in self._logs.items():
            message = {"op": "have", "file_hash": have.file_hash, "manifest_hash": manifest_hash}
            self._publish("workers", _key(manifest_hash), message, [os.dup(have.fd)], None)

    def close(self) -> None:
        """Unmap the logs; workers keep theirs. Idempotent."""
        for have, _ in self._logs.values():
            have.close()
        self._logs.clear()


def _key(manifest_hash: bytes) -> str:
    return "have:" + manifest_hash.hex()
