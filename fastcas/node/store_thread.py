"""The one thread that owns the store: SQLite, blobs and fsync block, the event loop must not.

Jobs run one at a time, in the order in which they were given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["StoreThread"]

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """A single worker thread with an awaitable `run`."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the thread and return its result.

        A cancelled caller does not stop a job that has begun: it ends by itself, its result is dropped.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Refuse new jobs, drop the waiting ones, wait for the running one. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)
