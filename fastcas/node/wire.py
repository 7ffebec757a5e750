"""What crosses a process border inside one node: errors and settings as plain maps, and the frames of `node.sock`.

A frame is a 4-byte little-endian length (at most 64 MiB) and a msgpack map. Descriptors travel as SCM_RIGHTS beside
the bytes of the request that announces them ("n_fds"). Pure: no sockets here.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from fastcas import errors
from fastcas.config import NodeConfig
from fastcas.errors import FastCASError, LocalProtocolError
from fastcas.limits import CONTROL_MESSAGE_MAX

__all__ = ["FrameReader", "config_from_map", "config_to_map", "error_from_map", "error_to_map", "pack_frame"]

_LENGTH = struct.Struct("<I")
_SHORT_NAMES = {"port_in_use": "PortInUse", "permission": "PermissionDenied", "network": "NetworkError"}


def error_to_map(error: BaseException) -> dict[str, Any]:
    """Return {error, message, exit_code, paths} of an error."""
    ours = error if isinstance(error, FastCASError) else FastCASError()
    return {
        "error": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "exit_code": ours.exit_code,
        "paths": [list(pair) for pair in ours.paths],
    }


def error_from_map(values: dict[str, Any]) -> FastCASError:
    """Return the error that `error_to_map` described; an unknown class becomes FastCASError."""
    name = str(values.get("error", ""))
    known = getattr(errors, _SHORT_NAMES.get(name, name), None)
    message = str(values.get("message") or name or "unknown error")
    if isinstance(known, type) and issubclass(known, FastCASError):
        paths = values.get("paths")
        pairs = [pair for pair in paths if isinstance(pair, list) and len(pair) == 2] if isinstance(paths, list) else []
        return known(message).about(*((str(path), str(reason)) for path, reason in pairs))
    return FastCASError(message if not name or name in message else f"{name}: {message}")


def config_to_map(config: NodeConfig) -> dict[str, Any]:
    """Return what the agent has to know of the settings."""
    return {
        "bootstrap": list(config.bootstrap),
        "peer": list(config.peer),
        "admin_port": config.admin_port,
        "max_download": config.max_download,
        "max_upload": config.max_upload,
        "workers": config.workers,
        "quota": config.quota,
    }


def config_from_map(values: dict[str, Any]) -> NodeConfig:
    """Return settings with the fields that `config_to_map` carries."""
    return NodeConfig(
        workers=int(values.get("workers", 0)),
        bootstrap=[str(item) for item in values.get("bootstrap", [])],
        peer=[str(item) for item in values.get("peer", [])],
        admin_port=int(values.get("admin_port", 0)),
        max_download=str(values.get("max_download", "")),
        max_upload=str(values.get("max_upload", "")),
        quota=str(values.get("quota", "")),
    )


def pack_frame(message: dict[str, Any]) -> bytes:
    """Return the bytes of one frame.

    Raises:
        LocalProtocolError: Over 64 MiB.
    """
    body: bytes = msgpack.packb(message)
    if len(body) > CONTROL_MESSAGE_MAX:
        raise LocalProtocolError(f"control message: {len(body)} B is over the limit {CONTROL_MESSAGE_MAX} B")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages; fed as bytes come, whole or one by one."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that `data` completes.

        Raises:
            LocalProtocolError: A length over the limit, or a body that is not a map.
        """
        self._buffer += data
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > CONTROL_MESSAGE_MAX:
                raise LocalProtocolError(f"control message: {length} B is over the limit {CONTROL_MESSAGE_MAX} B")
            if len(self._buffer) < _LENGTH.size + length:
                break
            body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
            del self._buffer[: _LENGTH.size + length]
            try:
                message = msgpack.unpackb(body, strict_map_key=False)
            except (ValueError, TypeError, msgpack.UnpackException) as exc:  # TypeError: a list or map as a key
                raise LocalProtocolError("control message: not msgpack") from exc
            if not isinstance(message, dict):
                raise LocalProtocolError("control message: not a map")
            messages.append(message)
        return messages
