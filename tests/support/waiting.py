"""Waiting for conditions instead of for time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, budget_s: float = 20.0) -> T:
    """Return the condition's first true value; AssertionError naming `what` after the budget."""
    deadline = time.monotonic() + budget_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {budget_s} s: {what}"
        time.sleep(0.02)
    return value


async def until(condition: Callable[[], T], what: str, budget_s: float = 20.0) -> T:
    """Do as `wait_until`, in an event loop."""
    deadline = time.monotonic() + budget_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {budget_s} s: {what}"
        await asyncio.sleep(0.02)
    return value


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_of(pid: int) -> str:
    """Return a process's command line, "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def child_of(pids: list[int], module: str) -> list[int]:
    """Return those processes that run `python -m module`."""
    return [pid for pid in pids if f"-m {module} " in command_of(pid)]
