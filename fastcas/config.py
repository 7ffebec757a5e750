"""The settings of a node, once: name, type, default, environment variable and help of every field.

The flags of `fastcas-node` and the keyword arguments of the library come from here. Precedence: flag, then
`FASTCAS_<FIELD>`, then the default. Reads no file but the
network key's, and the environment only where a caller passes it in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from fastcas.errors import ConfigError, PermissionDenied
from fastcas.ids import PeerAddr, parse_peer, parse_quota, parse_rate
from fastcas.limits import DATA_PORT, DHT_PORT, WORKERS_MAX

__all__ = [
    "ANNOUNCE_POLICIES", "SEND_PATHS", "SETTINGS", "NodeConfig", "Setting", "default_storage", "read_network_key",
    "storage_root",
]  # fmt: skip

SEND_PATHS = ("auto", "sendfile", "copy")
NETWORK_KEY_MIN = 16  # bytes
NETWORK_KEY_MAX = 4096
ANNOUNCE_POLICIES = ("auto", "off", "rare", "all")


@dataclass(frozen=True)
class Setting:
    """How people give one field: what kind of value, what stands for it in the help, and the help."""

    kind: str
    metavar: str
    help: str


SETTINGS = {
    "workers": Setting("count", "N", "worker processes; the default is one per core"),
    "host": Setting("text", "ADDR", "address to serve on"),
    "port": Setting("port", "PORT", "TCP port to serve on; 0 takes a free one"),
    "dht_port": Setting("port", "PORT", "UDP port of the DHT; 0 takes a free one"),
    "storage_dir": Setting("path", "DIR", "storage folder; the default is $FASTCAS_STORAGE, else ./storage"),
    "node_id": Setting("text", "ID", "a name for people, shown in the ready line and status"),
    "bootstrap": Setting("peers", "HOST:PORT", "a DHT node to join through (repeatable)"),
    "peer": Setting("peers", "HOST:PORT", "a node to ask for every file, without discovery (repeatable)"),
    "no_dht": Setting("flag", "", "run without discovery"),
    "announce": Setting(
        "choice", "|".join(ANNOUNCE_POLICIES),
        "which chunks are announced one by one beside their files: rare are those registered by name only, auto is "
        "all in networks of up to 10,000 nodes and rare in larger ones",
    ),
    "max_announce": Setting("rate", "RATE", "traffic that announcing chunks again may take, bytes per second"),
    "network_key": Setting(
        "path", "FILE", "join the private DHT of those who have the same file: 16 to 4096 bytes, kept secret"
    ),
    "admin_port": Setting("port", "PORT", "HTTP status and metrics on 127.0.0.1 at this TCP port; 0 = off"),
    "max_download": Setting("rate", "RATE", "limit of all downloads through this node together, bytes per second"),
    "max_upload": Setting("rate", "RATE", "limit of all uploads together, bytes per second"),
    "quota": Setting(
        "size", "SIZE|none", "disk that stored chunks may take, remembered in the storage folder; the longest unused "
        "files that are not pinned are removed for others",
    ),
    "send_path": Setting("choice", "|".join(SEND_PATHS), "how chunks are sent"),
}


def default_workers() -> int:
    """Return one worker per core that this process may use."""
    return min(len(os.sched_getaffinity(0)), WORKERS_MAX)


def default_storage(environment: Mapping[str, str] | None = None) -> Path:
    """Return the storage folder to use where none is named: `$FASTCAS_STORAGE`, else `./storage`."""
    values = os.environ if environment is None else environment
    return Path(values.get("FASTCAS_STORAGE") or "storage")


def storage_root(path: str | os.PathLike[str]) -> Path:
    """Return the storage folder's root, absolute; `path` may name its `hashed_files` folder instead."""
    root = Path(path).expanduser().absolute()
    return root.parent if root.name == "hashed_files" else root


def read_network_key(path: str) -> bytes:
    """Return the bytes of a network key file.

    Raises:
        ConfigError: No such file, or not 16 to 4096 bytes; nothing of it is shown.
        PermissionDenied: It may not be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            key = file.read(NETWORK_KEY_MAX + 1) or b""
    except PermissionError as exc:
        raise PermissionDenied(f"--network-key: {path}: permission denied") from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--network-key: {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    if not NETWORK_KEY_MIN <= len(key) <= NETWORK_KEY_MAX:
        size = f"{len(key)} B" if len(key) <= NETWORK_KEY_MAX else "more"
        raise ConfigError(f"--network-key: {path}: expected {NETWORK_KEY_MIN}..{NETWORK_KEY_MAX} B, got {size}")
    return key


@dataclass
class NodeConfig:
    """Everything that one node is told at its start. `check()` says what cannot work.

    `SETTINGS` describes the fields. `dht_port_required` is derived: a port that the user named must be had, the
    default one may be replaced.
    """

    workers: int = -1
    host: str = "0.0.0.0"
    port: int = DATA_PORT
    dht_port: int = DHT_PORT
    storage_dir: str = ""
    node_id: str = ""
    bootstrap: list[str] = field(default_factory=list)
    peer: list[str] = field(default_factory=list)
    no_dht: bool = False
    announce: str = "auto"
    max_announce: str = "20000"
    network_key: str = ""
    admin_port: int = 0
    max_download: str = ""
    max_upload: str = ""
    quota: str = ""
    send_path: str = "auto"
    dht_port_required: bool = False

    def check(self) -> NodeConfig:
        """Fill in what depends on the machine and return self.

        Raises:
            ConfigError: A value outside its range; the message names the setting.
            UsageError: A malformed address or rate; the message names the setting.
        """
        if self.workers < 0:
            self.workers = default_workers()
        if self.workers > WORKERS_MAX:
            raise ConfigError(f"--workers: expected 0..{WORKERS_MAX}, got {self.workers}")
        for name in ("port", "dht_port", "admin_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 0..65535, got {value}")
        if self.send_path not in SEND_PATHS:
            raise ConfigError(f"--send-path: expected {', '.join(SEND_PATHS)}, got {self.send_path!r}")
        if self.announce not in ANNOUNCE_POLICIES:
            raise ConfigError(f"--announce: expected {', '.join(ANNOUNCE_POLICIES)}, got {self.announce!r}")
        self.max_announce_rate()
        if not self.host or len(self.host) > 255:
            raise ConfigError(f"--host: expected an address, got {self.host!r}")
        if len(self.node_id) > 64 or not all(c.isprintable() and not c.isspace() for c in self.node_id):
            raise ConfigError("--node-id: expected at most 64 printable characters without spaces")
        if self.max_upload:
            parse_rate(self.max_upload, "--max-upload")
        self.max_download_rate()
        if self.quota:
            parse_quota(self.quota, "--quota")
        self.bootstrap_peers()
        self.static_peers()
        if self.network_key:
            self.network_key = str(Path(self.network_key).expanduser().absolute())
        self.storage_dir = str(storage_root(self.storage_dir or default_storage()))
        return self

    @property
    def root(self) -> Path:
        """The storage folder, absolute once `check()` ran."""
        return Path(self.storage_dir)

    def max_upload_rate(self) -> int | None:
        """Return the upload limit in bytes per second, None = unlimited."""
        return parse_rate(self.max_upload, "--max-upload") if self.max_upload else None

    def max_download_rate(self) -> int | None:
        """Return the download limit in bytes per second, None = unlimited."""
        return parse_rate(self.max_download, "--max-download") if self.max_download else None

    def max_announce_rate(self) -> int:
        """Return what announcing chunks again may cost, bytes per second."""
        return parse_rate(self.max_announce, "--max-announce")

    def read_network_key(self) -> bytes | None:
        """Return the private network's key, None for the open network.

        Raises:
            ConfigError: No such file, or not a key; nothing of it is shown.
            PermissionDenied: It may not be read.
        """
        return read_network_key(self.network_key) if self.network_key else None

    def bootstrap_peers(self) -> list[PeerAddr]:
        """Return the DHT nodes to join through."""
        return [parse_peer(text, "--bootstrap") for text in self.bootstrap]

    def static_peers(self) -> list[PeerAddr]:
        """Return the nodes to ask for every file."""
        return [parse_peer(text, "--peer") for text in self.peer]

    def to_json(self) -> str:
        """Return all settings as one JSON object, for a child process's command line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> NodeConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: Not such an object.
        """
        try:
            values = json.loads(text)
        except ValueError as exc:
            raise ConfigError("--config: not JSON") from exc
        known = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ConfigError("--config: expected an object of known settings")
        return cls(**values)
