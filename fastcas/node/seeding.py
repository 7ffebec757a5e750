"""A download that is served while it runs: its verified chunks in the table, its have log with the workers.

The hooks of `fastcas.fetch.download`, called in the loop's thread. Parity chunks lie nowhere in the part file, so
they are not offered. When the download ends the entries go, unless the finished file has taken their places.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcas.errors import FastCASError
from fastcas.ids import short
from fastcas.metadata import Manifest
from fastcas.node.publisher import Publish, Publisher
from fastcas.node.store_thread import StoreThread
from fastcas.store import Store
from fastcas.table import HaveLog

if TYPE_CHECKING:
    from fastcas.fetch import FetchedTree

__all__ = ["Seeding"]

log = logging.getLogger(__name__)


class _PartFile:
    """One part file: offered from when the store has given it a number, until `close`."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        self.manifest = manifest
        self.path = path
        self.number: int | None = None
        self.have: HaveLog | None = None
        self.waiting: list[int] = []
        self.keys: list[bytes] = []

    @property
    def message_key(self) -> str:
        return "have:" + self.manifest.manifest_hash.hex()


class Seeding:
    """The `DownloadHooks` of one download: one part file at a time, and one for each file of a collection.

    Attributes:
        finished: [(path, manifest, content_proven)] of the files that are complete.
        trees: The collections that are.
    """

    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        publisher: Publisher,
        publish: Publish,
        on_offered: Callable[[Manifest], None],
    ) -> None:
        self._store = store
        self._thread = thread
        self._publisher = publisher
        self._publish = publish
        self._on_offered = on_offered
        self._part: _PartFile | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._members: list[Seeding] = []
        self.finished: list[tuple[Path, Manifest, bool]] = []
        self.trees: list[FetchedTree] = []

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """Begin to offer a part file; what was offered before goes."""
        self._end_part()
        self._part = part = _PartFile(manifest, part_path)
        self._run(self._begin(part))

    def on_chunk(self, index: int) -> None:
        """Offer one verified chunk."""
        part = self._part
        if part is None or index >= part.manifest.n_chunks:
            return
        if part.number is None:
            part.waiting.append(index)
        else:
            self._offer(part, index)

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        """Remember a finished file; whoever runs the download registers it."""
        self.finished.append((path, manifest, content_proven))

    def on_tree(self, tree: FetchedTree) -> None:
        """Remember a collection whose folder is whole; likewise."""
        self.trees.append(tree)

    def member(self) -> Seeding:
        """Return the hooks of one file of a collection."""
        self._members = [member for member in self._members if member._part is not None or member._tasks]
        member = Seeding(self._store, self._thread, self._publisher, self._publish, self._on_offered)
        self._members.append(member)
        return member

    def end(self) -> None:
        """Offer nothing more of it."""
        self._end_part()

    async def close(self) -> None:
        """Offer nothing more. Idempotent."""
        self._end_part()
        for member in self._members:
            await member.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, part: _PartFile) -> None:
        try:
            number = await self._thread.run(self._store.begin_linked, part.path, part.manifest)
        except FastCASError as error:
            log.warning("part file is not seeded file=%s error=%s", short(part.manifest.file_hash), error)
            return
        if self._part is not part:
            await self._thread.run(self._store.abandon_linked, number)
            return
        try:
            self._publisher.begin_partial(number, part.path)
        except OSError:
            return  # it was finished and renamed meanwhile
        manifest = part.manifest
        part.number = number
        part.have = HaveLog.create(manifest.file_hash, manifest.manifest_hash, manifest.n_total)
        for index in part.waiting:
            self._offer(part, index)
        part.waiting.clear()
        message = {"op": "have", "file_hash": manifest.file_hash, "manifest_hash": manifest.manifest_hash}
        self._publish("workers", part.message_key, message, [os.dup(part.have.fd)], None)
        self._on_offered(manifest)

    def _offer(self, part: _PartFile, index: int) -> None:
        manifest = part.manifest
        assert part.number is not None and part.have is not None
        key = manifest.hash_of(index)
        if self._publisher.put_partial(part.number, key, manifest.offset_of(index), manifest.length_of(index)):
            part.keys.append(key)
        part.have.append(index)

    def _end_part(self) -> None:
        part, self._part = self._part, None
        if part is None or part.number is None or part.have is None:
            return
        self._publisher.end_partial(part.number, part.keys)
        forward = {"op": "have_end", "manifest_hash": part.manifest.manifest_hash}
        self._publish("workers", part.message_key, None, [], forward)
        part.have.close()
        self._run(self._forget(part.number))

    async def _forget(self, number: int) -> None:
        try:
            await self._thread.run(self._store.abandon_linked, number)
        except FastCASError as error:
            log.warning("part file's number is kept blob=%d error=%s", number, error)
