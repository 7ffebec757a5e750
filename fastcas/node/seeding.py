"""A download that is served while it runs: its verified chunks in the table, its have log with the workers.

The hooks of `fastcas.fetch.download`, called in the loop's thread. Parity chunks lie nowhere in the part file, so
they are not offered. When the download ends the entries go, unless the finished file has taken their places.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from fastcas.metadata import Manifest
from fastcas.node.publisher import Publish, Publisher
from fastcas.table import HaveLog

__all__ = ["Seeding"]

log = logging.getLogger(__name__)


class Seeding:
    """The `DownloadHooks` of one download.

    Attributes:
        manifest: What is being fetched, once known.
        finished: [(path, manifest, content_proven)] of the files that are complete.
    """

    def __init__(
        self, publisher: Publisher, publish: Publish, on_first_manifest: Callable[[Manifest], None]
    ) -> None:
        self._publisher = publisher
        self._publish = publish
        self._on_first_manifest = on_first_manifest
        self._blob: int | None = None
        self._log: HaveLog | None = None
        self._keys: list[bytes] = []
        self.manifest: Manifest | None = None
        self.finished: list[tuple[Path, Manifest, bool]] = []

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """Begin to offer a part file; what an earlier manifest offered goes."""
        self.close()
        self.manifest = manifest
        try:
            self._blob = self._publisher.begin_partial(part_path)
        except OSError as exc:
            log.warning("part file is not seeded path=%s error=%s", part_path, exc.strerror)
            return
        self._log = HaveLog.create(manifest.file_hash, manifest.manifest_hash, manifest.n_total)
        self._publish(
            "workers", self._key,
            {"op": "have", "file_hash": manifest.file_hash, "manifest_hash": manifest.manifest_hash},
            [os.dup(self._log.fd)], None,
        )  # fmt: skip
        self._on_first_manifest(manifest)

    def on_chunk(self, index: int) -> None:
        """Offer one verified chunk."""
        manifest = self.manifest
        if manifest is None or self._blob is None or self._log is None or index >= manifest.n_chunks:
            return
        key = manifest.hash_of(index)
        if self._publisher.put_partial(self._blob, key, index * manifest.chunk_size, manifest.length_of(index)):
            self._keys.append(key)
        self._log.append(index)

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        """Remember a finished file; whoever runs the download registers it."""
        self.finished.append((path, manifest, content_proven))

    def close(self) -> None:
        """Offer the part file no more. Idempotent."""
        if self._blob is not None:
            self._publisher.end_partial(self._blob, self._keys)
            self._blob = None
            self._keys = []
        if self._log is not None and self.manifest is not None:
            forward = {"op": "have_end", "manifest_hash": self.manifest.manifest_hash}
            self._publish("workers", self._key, None, [], forward)
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None

    @property
    def _key(self) -> str:
        assert self.manifest is not None
        return "have:" + self.manifest.manifest_hash.hex()
