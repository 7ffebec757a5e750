"""Space for what a download adds to the storage folder, kept free under the quota while it runs.

A file that is fetched lies where the user wants it and costs the store its manifest; a collection also costs its packs
and its description.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastcas.metadata import Manifest
from fastcas.store import Store
from fastcas.store.adopt import tree_bound
from fastcas.store.collection import Collection
from fastcas.store.quota import manifest_bound

__all__ = ["Reservation"]


class Reservation:
    """The `reserve` of one download; `release` when it ended.

    Args:
        store: Whose quota counts.
        run: Runs a function of the store in its thread.
    """

    def __init__(self, store: Store, run: Callable[..., Awaitable[Any]]) -> None:
        self._store = store
        self._run = run
        self._held = 0

    async def __call__(self, manifest: Manifest, collection: Collection | None) -> None:
        """Reserve for a file, or for a collection's files. Raises StoreFull."""
        bound = manifest_bound(len(manifest.data)) if collection is None else tree_bound(collection)
        if self._store.quota.limit is None:
            return
        await self._run(self._store.quota.reserve, bound)
        self._held += bound

    async def release(self) -> None:
        """Give it back. Idempotent."""
        held, self._held = self._held, 0
        if held:
            await self._run(self._store.quota.release, held)
