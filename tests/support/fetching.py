"""What tests of downloads in this process share: a budget for a coroutine, and deadlines that come soon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fastcas.fetch import receiver
from fastcas.fetch.receiver import AsyncReceiver

__all__ = ["quick_deadlines", "run"]


def run(work: Callable[[], Awaitable[Any]], budget_s: float = 60.0) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(budget_s):
            return await work()

    return asyncio.run(bounded())


def quick_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make deadlines of one request tenths of a second, so that silence is noticed soon."""

    def quick(**_: Any) -> AsyncReceiver:
        return AsyncReceiver(n_threads=1, connect_s=1.0, first_byte_s=0.3, stall_s=0.3)

    monkeypatch.setattr(receiver, "AsyncReceiver", quick)
