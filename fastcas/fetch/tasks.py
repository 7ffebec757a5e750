"""The tasks of one download: started, tracked, ended together; one that fails fails the download."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastcas.errors import FastCASError

__all__ = ["TaskSet"]


class TaskSet:
    """Background tasks with one owner."""

    def __init__(self, subject: str, on_error: Callable[[FastCASError], None]) -> None:
        """Start empty.

        Args:
            subject: First words of the message when a task fails unexpectedly.
            on_error: Called with the error of a task that failed.
        """
        self._subject = subject
        self._on_error = on_error
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` until it ends or `close` cancels it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (exc := task.exception()) is None:
            return
        if isinstance(exc, FastCASError):
            self._on_error(exc)
            return
        error = FastCASError(f"{self._subject}: {exc!r}")
        error.__cause__ = exc
        self._on_error(error)

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
