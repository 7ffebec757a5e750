"""One file being fetched: the order of the steps of architecture §5.1, and the decision to give up.

find peers -> manifest -> part file -> chunks (`filling`) -> proven -> renamed. The parts do the work: `crowd` knows
the peers, `filling` gets the chunks, `partfile` keeps them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastcas.errors import DestinationExists, FastCASError, NoPeers, UsageError
from fastcas.fetch.crowd import Crowd
from fastcas.fetch.download import DownloadResult, Progress, Settings
from fastcas.fetch.explain import Explained, Meter
from fastcas.fetch.filling import Filling
from fastcas.fetch.localwork import hash_content, hash_existing
from fastcas.fetch.origins import Origins
from fastcas.fetch.partfile import PartFile, clear_leftovers, has_content, prepare_folder, safe_name, storage_error
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.fetch.remote import Remote
from fastcas.fetch.tasks import TaskSet
from fastcas.fetch.trust import Chain, ManifestConvictedError
from fastcas.ids import Link, PeerAddr, short
from fastcas.limits import COLLECTION_SIZE_MAX, MIB
from fastcas.metadata import Manifest

__all__ = ["FileFetch"]

NAME_DEADLINE_S = 2.0
COLLECTION_LINE = b"fastcas-collection 1\n"
DIRECT_MIN = 64 * MIB  # below, the page cache costs little, and what is fetched is likely read at once


class FileFetch:
    """One file being fetched. Use `run` once, in the receiver's loop.

    Attributes:
        link: What is fetched.
        is_collection: After `run`: the content is a collection, `part` is open and holds it, nothing was renamed.
        over_folder: The destination is an existing folder.
    """

    def __init__(self, link: Link, out: Path | None, settings: Settings, receiver: AsyncReceiver) -> None:
        """Prepare; nothing is asked before `run`."""
        self.file_hash = link.file_hash
        self.settings = settings
        self.receiver = receiver
        self.is_collection = False
        self.over_folder = False
        self.part: PartFile | None = None
        self.link = link
        self._out = out
        self._rng = random.Random()
        self._tasks = TaskSet(f"file {short(link.file_hash)}", self._fail)
        self.crowd = Crowd(link, settings, receiver, self._rng, self._tasks)
        self._filling: Filling | None = None
        self._resumed_bytes = 0
        self._local_bytes = 0
        self._origins: Origins | None = None
        self._meter = Meter(time.monotonic())

    async def run(self) -> DownloadResult:
        """Fetch the file; arguments and errors as `download`."""
        started = time.monotonic()
        if self._out is not None:
            manifest = await self._existing(self._out)
            if manifest is not None:
                return DownloadResult(self._out, self.file_hash, manifest, manifest.size, time.monotonic() - started)
        try:
            self.crowd.find()
            while True:
                manifest, giver = await self._find_manifest()
                if self._out is None:
                    self._out = await self._destination()
                    if (there := await self._existing(self._out)) is not None:
                        return DownloadResult(self._out, self.file_hash, there, there.size, time.monotonic() - started)
                try:
                    content_proven = await self._fill(manifest, giver)
                    break
                except ManifestConvictedError as exc:
                    await self._convict(manifest, giver, str(exc))
            path = await self._finish(manifest)
        finally:
            await self._close()
        if self.settings.hooks is not None and not self.is_collection:
            self.settings.hooks.on_finished(path, manifest, content_proven)
        return DownloadResult(
            path,
            self.file_hash,
            manifest,
            manifest.size,
            time.monotonic() - started,
            {remote.addr: remote.n_bytes for remote in self.crowd.remotes.values() if remote.n_bytes},
            self._resumed_bytes,
            self._local_bytes,
            self.crowd.banned(),
            explained=self._explained(),
            **self._of_origins(),
        )

    async def _find_manifest(self) -> tuple[Manifest, Remote]:
        """From a peer, else one that this machine has."""
        try:
            return await self.crowd.wait_for_manifest(self._report_waiting)
        except NoPeers as exc:
            if not self.settings.origins:
                raise
            for manifest in self.settings.known:
                if self.link.manifest_hash in (None, manifest.manifest_hash):
                    return manifest, Remote(PeerAddr("localhost", 0), "user", self.receiver)
            raise NoPeers(
                f"{exc}; an origin gives bytes only, and no manifest is known to prove them by"
            ) from exc

    def _explained(self) -> Explained:
        return self._meter.end(time.monotonic())

    def _of_origins(self) -> dict[str, Any]:
        origins = self._origins.origins if self._origins is not None else []
        return {
            "bytes_by_origin": {origin.shown: origin.n_bytes for origin in origins if origin.n_bytes},
            "failed_origins": {origin.shown: origin.failed for origin in origins if origin.failed is not None},
        }

    async def _existing(self, out: Path) -> Manifest | None:
        """The manifest of the destination where it has the content already; other content is refused."""
        self.over_folder = await asyncio.to_thread(os.path.isdir, out)
        if self.over_folder and not self.settings.raw:
            return None  # the same collection may be there: that is known once its content is
        same = await asyncio.to_thread(has_content, out, self.file_hash)
        if same and self.settings.is_part_of_tree:
            raise self._no_collection()
        if same:
            await asyncio.to_thread(clear_leftovers, out)
            return await asyncio.to_thread(hash_existing, out)
        if same is False and not self.settings.force:
            raise DestinationExists(
                f"{out}: exists with other content than {short(self.file_hash)}; it was left alone, nothing was fetched"
            )
        return None

    async def _destination(self) -> Path:
        """Where a file without a given destination goes: the stored name, made safe."""
        name = self.link.name
        if name is None and self.settings.discovery is not None:
            with suppress(FastCASError, TimeoutError):
                async with asyncio.timeout(NAME_DEADLINE_S + 1):
                    hints = await self.settings.discovery.get_metadata(self.file_hash, NAME_DEADLINE_S)
                name = hints[0].name if hints else None
        return (self.settings.folder or Path.cwd()) / safe_name(name, self.file_hash.hex())

    async def _fill(self, manifest: Manifest, giver: Remote) -> bool:
        """Get every chunk of the manifest into the part file; returns whether the content is proven."""
        assert self._out is not None
        out = self._out
        if self.settings.is_part_of_tree and manifest.size > COLLECTION_SIZE_MAX:
            raise self._no_collection()
        if self.settings.reserve is not None:
            await self.settings.reserve(manifest, None)
        await asyncio.to_thread(prepare_folder, out.parent)
        is_direct = self.settings.data_port is None and manifest.size >= DIRECT_MIN
        self.part = await asyncio.to_thread(PartFile, out, manifest, is_direct=is_direct)
        if self.settings.hooks is not None:
            self.settings.hooks.on_manifest(manifest, self.part.path)
        if manifest.n_chunks == 0:
            return True
        trusted = self.link.manifest_hash is not None or giver.source in ("user", "link")
        # By link, chunks by themselves are proven; who will serve the file asks for its whole content, too.
        is_checked = self.link.manifest_hash is None or self.settings.hooks is not None
        wanted = self.settings.wanted(manifest) if self.settings.wanted is not None else None
        chain = Chain(manifest, trusted=trusted, is_checked=is_checked, wanted=wanted)
        filling = Filling(manifest, self.part, chain, self.crowd, self.receiver, self.settings, self._meter)
        self._filling = filling
        self._origins = filling.origins
        try:
            await filling.run()
        finally:
            self._filling = None
            self._resumed_bytes, self._local_bytes = filling.resumed_bytes, filling.local_bytes
        return filling.chain.content_proven or (wanted is None and await self._prove(manifest, self.part))

    async def _prove(self, manifest: Manifest, part: PartFile) -> bool:
        """Hash the whole content of chunks without links: what they add up to must be the file."""
        if not manifest.is_cdc:
            return False
        if self.settings.progress is not None:
            self.settings.progress(Progress(manifest.size, manifest.size, 0.0, 0, "the content's hash"))
        try:
            got = await hash_content(part.fd, manifest.size)
        except OSError as exc:
            raise storage_error(exc, str(part.path), "the part file is kept and can be resumed") from exc
        if got != self.file_hash:
            raise ManifestConvictedError(
                f"manifest {short(manifest.manifest_hash)}: its chunks are those of {short(got)}, not of "
                f"{short(self.file_hash)}; it is not used"
            )
        return True

    async def _convict(self, manifest: Manifest, giver: Remote, reason: str) -> None:
        """Try another manifest, with a new part file: what the old one has belongs to a lie."""
        self.crowd.convict(manifest, giver, reason)
        part, self.part = self.part, None
        if part is not None:
            await asyncio.to_thread(part.discard)
            part.close()

    async def _finish(self, manifest: Manifest) -> Path:
        assert self.part is not None
        part = self.part
        if not self.settings.raw and await asyncio.to_thread(part.starts_with, COLLECTION_LINE):
            self.is_collection = True
            return part.path
        if self.settings.is_part_of_tree:
            await asyncio.to_thread(part.discard)
            raise self._no_collection()
        if self.over_folder:
            await asyncio.to_thread(part.discard)
            raise DestinationExists(f"{part.out}: is a folder, {short(self.file_hash)} is a file; it was left alone")
        if self.settings.progress is not None:
            self.settings.progress(Progress(manifest.size, manifest.size, 0.0, 0, "the disk"))
        await asyncio.to_thread(part.finish, force=self.settings.force)
        return part.out

    async def _close(self) -> None:
        """Stop talking. The part file stays unless the download finished."""
        await self._tasks.close()
        self.crowd.close()
        if self.part is not None and not self.is_collection:
            self.part.close()

    def _no_collection(self) -> UsageError:
        return UsageError(
            f"REF: {short(self.file_hash)} is a file and no collection, so nothing can be chosen of it"
        )

    def _fail(self, error: FastCASError) -> None:
        self.crowd.fail(error)
        if self._filling is not None:
            self._filling.fail(error)

    def _report_waiting(self, waiting_on: str) -> None:
        if self.settings.progress is not None:
            self.settings.progress(Progress(0, self.link.size or 0, 0.0, 0, waiting_on))
