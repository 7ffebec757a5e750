"""Nodes that have something: started, filled, and what they gave."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tests.support.nodes import Node, run_fastcas, start_node

__all__ = ["bytes_sent", "link_of", "seeding_node"]


@contextlib.contextmanager
def seeding_node(folder: Path, content: bytes) -> Iterator[tuple[Node, str]]:
    """Yield a node that has a file with this content, and the file's link."""
    source = folder / "source.bin"
    source.write_bytes(content)
    with start_node(folder / "node") as node:
        yield node, link_of(node, source)


def link_of(node: Node, path: Path, *options: str) -> str:
    """Store a file or directory in a node and return its link."""
    done = run_fastcas("store", str(path), "--storage-dir", str(node.storage), "--json", *options)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["link"])


def bytes_sent(node: Node) -> int:
    """Return how many bytes the node's workers have sent."""
    status = json.loads(run_fastcas("status", "--json", "--storage-dir", str(node.storage)).stdout)
    return sum(worker["counters"]["bytes_sent"] for worker in status["workers"])
