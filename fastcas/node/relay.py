"""Published messages: the last one per key, kept with its descriptors and replayed to every new child of a kind.

Owns the descriptors that it keeps. Knows nothing of what a message means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from fastcas.node.child import Child

__all__ = ["Relay"]

Message = dict[str, Any]
KEYS_MAX = 4096


class Relay:
    """What was published to one kind of child."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Message, list[int]]] = {}

    def publish(
        self,
        children: Iterable[Child],
        key: str,
        message: Message | None,
        fds: list[int],
        forward: Message | None = None,
    ) -> None:
        """Send `message` to all children and remember it under `key`; without one forget the key.

        Args:
            children: Those that run now.
            key: Replaces what was published under it before.
            message: To send and keep, None = forget the key.
            fds: Belong to this object from here on.
            forward: With `message` None: sent once to all children, not kept.
        """
        self._forget(key)
        current = message if message is not None else forward
        if current is not None:
            for child in children:
                child.send(current, fds)
        if message is not None and len(self._kept) < KEYS_MAX:
            self._kept[key] = (message, fds)
        else:
            _close(fds)

    def replay(self, child: Child) -> None:
        """Send everything that is kept to a new child, in the order of publication."""
        for message, fds in self._kept.values():
            child.send(message, fds)

    def close(self) -> None:
        """Forget everything."""
        for key in list(self._kept):
            self._forget(key)

    def _forget(self, key: str) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            _close(old[1])


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
