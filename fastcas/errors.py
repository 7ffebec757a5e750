"""Every error that fastcas raises on purpose: one tree, each class with blame, retryability and exit code.

A message names its subject first, then what was expected and got with units, then what happened to the
data. `exit_code` is the command line's exit status (architecture §9); `retryable` says whether the same
call may succeed later without a change; `blame` says whose fault it is: "peer" or "local".
"""

from __future__ import annotations

from typing import Literal, Self

__all__ = [
    "BlobTruncated",
    "CatalogCorrupt",
    "ChunkCorrupt",
    "ChunkNotFound",
    "CollectionCorrupt",
    "ConfigError",
    "DamageFound",
    "DestinationExists",
    "FastCASError",
    "FileChanged",
    "IntegrityError",
    "Interrupted",
    "KernelUnavailable",
    "LocalProtocolError",
    "ManifestCorrupt",
    "ManifestNotFound",
    "ManifestUnknown",
    "NetworkError",
    "NoPeers",
    "NodeUnavailable",
    "NotFound",
    "PeerBusy",
    "PeerError",
    "PeerTimeout",
    "PeerUnreachable",
    "PermissionDenied",
    "PortInUse",
    "RemoteProtocolError",
    "SelfTestFailed",
    "Stalled",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreNotFound",
    "TableFull",
    "TooFewShards",
    "UsageError",
]


class FastCASError(Exception):
    """Root of the tree; raised itself only when nothing below fits (exit 1).

    `paths` names what on disk is at fault, (path, reason) each, escaped for a terminal.
    """

    exit_code: int = 1
    retryable: bool = False
    blame: Literal["peer", "local"] = "local"
    paths: tuple[tuple[str, str], ...] = ()

    def about(self, *paths: tuple[str, str]) -> Self:
        """Name what is at fault; returns the error."""
        self.paths = paths
        return self


class UsageError(FastCASError, ValueError):
    """An argument is malformed; the message names the argument."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting, or a combination of settings, cannot work."""


class IntegrityError(FastCASError):
    """Bytes are not what their name says."""

    exit_code = 5


class ChunkCorrupt(IntegrityError):
    """A chunk's SHA-256 differs from its name; nothing was stored."""

    blame = "peer"


class ManifestCorrupt(IntegrityError):
    """A manifest's bytes are malformed, or contradict the hash that they are named by."""

    blame = "peer"


class CollectionCorrupt(IntegrityError):
    """A collection is malformed or names a path that is not allowed; nothing of it was used."""

    blame = "peer"


class CatalogCorrupt(IntegrityError):
    """The catalog cannot be read; the blobs are untouched."""


class BlobTruncated(IntegrityError):
    """A blob is shorter than one of its extents."""


class FileChanged(IntegrityError):
    """A user's file changed while it was read or after it was linked; nothing of it was stored."""


class DamageFound(IntegrityError):
    """`verify` found damage that is not (or cannot be) repaired."""


class NotFound(FastCASError):
    """What was asked for is not there."""

    exit_code = 3


class ChunkNotFound(NotFound):
    """No one who was asked holds the chunk."""

    retryable = True


class ManifestNotFound(NotFound):
    """No one who was asked holds a manifest for the file."""

    retryable = True


class ManifestUnknown(NotFound):
    """This node holds no manifest with exactly these chunks; nothing was published."""


class NoPeers(NotFound):
    """No peer has the file."""

    retryable = True


class StoreNotFound(NotFound):
    """The storage folder does not exist or is not a store."""


class NodeUnavailable(NotFound):
    """No node answers on the storage folder's control socket."""

    retryable = True


class PeerTimeout(FastCASError):
    """A peer's budget is spent; nothing was stored."""

    exit_code = 4
    retryable = True
    blame = "peer"


class Stalled(FastCASError):
    """A download made no progress for its budget; the part file is kept."""

    exit_code = 4
    retryable = True


class NetworkError(FastCASError):
    """The network failed in a way that no single peer is to blame for."""

    exit_code = 6
    retryable = True


class PeerError(NetworkError):
    """One peer failed."""

    blame = "peer"


class PeerUnreachable(PeerError):
    """Connection refused, reset or unroutable."""


class PeerBusy(PeerError):
    """The peer answered 503: it has no upload slot at the moment."""


class RemoteProtocolError(PeerError):
    """The peer broke the wire protocol; it is banned."""

    retryable = False


class LocalProtocolError(FastCASError):
    """Our own processes disagree about an internal message (a bug, or mixed versions)."""


class Interrupted(FastCASError):
    """The user stopped it; what is there can be resumed."""

    exit_code = 7
    retryable = True


class StoreError(FastCASError):
    """The store cannot do what was asked."""


class StoreFull(StoreError):
    """Disk full or quota reached; part files are kept."""

    exit_code = 8
    retryable = True


class PermissionDenied(StoreError):
    """The operating system refuses access to a path."""

    exit_code = 9


class StoreLocked(StoreError):
    """Another process holds the storage folder."""

    exit_code = 10
    retryable = True


class PortInUse(FastCASError):
    """A port that was asked for is taken."""

    exit_code = 10
    retryable = True


class DestinationExists(FastCASError):
    """The destination exists with other content; it was left alone."""

    exit_code = 11


class SelfTestFailed(FastCASError):
    """A kernel gives wrong results on this machine; nothing is served."""

    exit_code = 12


class TableFull(StoreError):
    """The chunk table has no free slot; the writer must grow it."""


class TooFewShards(FastCASError):
    """Fewer than k shards of a stripe are left; nothing was rebuilt."""

    exit_code = 5


class KernelUnavailable(ConfigError):
    """A kernel that was demanded is unknown, not built, or not supported by this CPU."""
