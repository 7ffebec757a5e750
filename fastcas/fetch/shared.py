"""One receiver for several files that are fetched at once: the same threads, connections and memory cap for all.

A download sets `on_batch` of its receiver and drives its scheduler from it, so each file gets a share with an
`on_batch` of its own. It is called after the batches that had an answer for that file.
"""

from __future__ import annotations

from collections.abc import Callable

from fastcas.fetch._receiver import Answer, Connection
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.ids import PeerAddr

__all__ = ["ReceiverShare", "SharedReceiver"]


class SharedReceiver:
    """Gives shares of a receiver; while there are any, its `on_batch` is ours."""

    def __init__(self, receiver: AsyncReceiver) -> None:
        self.receiver = receiver
        self._answered: dict[ReceiverShare, None] = {}

    def share(self) -> ReceiverShare:
        """Return a receiver for one more file."""
        self.receiver.on_batch = self._after_batch
        return ReceiverShare(self)

    def note(self, share: ReceiverShare) -> None:  # hot
        """A file got an answer in this batch."""
        self._answered[share] = None

    def _after_batch(self) -> None:  # hot
        answered, self._answered = self._answered, {}
        for share in answered:
            if share.on_batch is not None:
                share.on_batch()

    def close(self) -> None:
        """Take no more notice of batches. The receiver itself stays open."""
        self.receiver.on_batch = None


class ReceiverShare(AsyncReceiver):
    """What one file sees of a receiver that it has in common with others."""

    def __init__(self, shared: SharedReceiver) -> None:
        self._shared = shared
        self.loop = shared.receiver.loop
        self.core = shared.receiver.core
        self.on_batch: Callable[[], None] | None = None

    def listen(self, callback: Callable[[list[Answer]], None]) -> int:
        """See `AsyncReceiver`."""

        def arrived(answers: list[Answer]) -> None:  # hot
            self._shared.note(self)
            callback(answers)

        return self._shared.receiver.listen(arrived)

    def forget(self, listener: int) -> None:
        """See `AsyncReceiver`."""
        self._shared.receiver.forget(listener)

    def open(self, peer: PeerAddr, node_id: str | None = None) -> Connection:
        """See `AsyncReceiver`."""
        return self._shared.receiver.open(peer, node_id)

    def close(self) -> None:
        """Nothing to stop: the threads belong to all."""
