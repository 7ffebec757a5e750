"""Which way a command takes when the storage folder is in use and its node is just getting a new agent."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.errors import StoreLocked
from fastcas.node import access
from fastcas.node.access import FolderAccess, NodeAccess, open_access
from fastcas.store import Store


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A storage folder that another process has, as far as this one can tell."""
    with Store.open(tmp_path, create=True):
        yield tmp_path


def dead_socket(root: Path) -> None:
    """Leave a control socket behind, as a killed agent does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "node.sock"))


class Clock:
    """Stands in for the time; `at` runs instead of the sleep of that number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.naps = 0
        monkeypatch.setattr(access, "monotonic", lambda: self.now)
        monkeypatch.setattr(access, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        self.on_nap()

    def on_nap(self) -> None:
        """Nothing happens meanwhile."""


def test_new_agent_is_waited_for(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_socket(locked)
    clock = Clock(monkeypatch)
    with socket.socket(socket.AF_UNIX) as agent:

        def on_nap() -> None:
            if clock.naps == 1:
                (locked / "node.sock").unlink()  # the new agent replaces what the old one left
            elif clock.naps == 2:
                agent.bind(str(locked / "node.sock"))
                agent.listen()

        clock.on_nap = on_nap  # type: ignore[method-assign]
        way = open_access(locked)
        assert isinstance(way, NodeAccess)
        way.close()
    assert clock.naps == 2


@pytest.mark.parametrize("optional", [False, True])
def test_agent_that_does_not_come_back_is_given_up(
    locked: Path, monkeypatch: pytest.MonkeyPatch, optional: bool
) -> None:
    dead_socket(locked)
    clock = Clock(monkeypatch)
    if optional:
        assert isinstance(open_access(locked, optional=True), FolderAccess)
    else:
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
            open_access(locked)
    assert 5.0 <= clock.now < 5.1


def test_another_command_is_not_waited_for(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(StoreLocked):
        open_access(locked)
    assert clock.naps == 0
