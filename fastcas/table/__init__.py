"""Shared memory between the processes of a node: chunk table, snapshots, rings, counters, channels.

In: hashes and places on disk from the store, small messages from any process, descriptors.
Out: lock-free lookups for workers, sealed memfds that can be passed on, messages in order.
Owns: memfd layouts, publication protocols and seals (csrc/table/*.h); never what lies at a place.
Never: opens the catalog, a blob or a network socket; waits for another process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcas.table._shared import Bucket, Counters, GivenBoard, HaveLog, Ring
    from fastcas.table._table import ChunkTable, TableReader
    from fastcas.table.channel import Channel
    from fastcas.table.entries import BlobEntry
    from fastcas.table.owner import TableOwner
    from fastcas.table.snapshot import read_keys, read_swarm, write_keys, write_swarm

__all__ = [
    "BlobEntry",
    "Bucket",
    "Channel",
    "ChunkTable",
    "Counters",
    "GivenBoard",
    "HaveLog",
    "Ring",
    "TableOwner",
    "TableReader",
    "read_keys",
    "read_swarm",
    "write_keys",
    "write_swarm",
]

_WHERE = {
    "BlobEntry": "entries",
    "Bucket": "_shared",
    "Channel": "channel",
    "ChunkTable": "_table",
    "Counters": "_shared",
    "GivenBoard": "_shared",
    "HaveLog": "_shared",
    "Ring": "_shared",
    "TableOwner": "owner",
    "TableReader": "_table",
    "read_keys": "snapshot",
    "read_swarm": "snapshot",
    "write_keys": "snapshot",
    "write_swarm": "snapshot",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is (PEP 562): a process loads only what it uses."""
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module 'fastcas.table' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastcas.table.{module}"), name)
    globals()[name] = value
    return value
