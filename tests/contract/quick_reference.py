"""The blocks of docs/quick-reference.md, with their placeholders filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "quick-reference.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROW = re.compile(r'^\| "(?P<problem>[^"]+)" \| (?P<cause>[^|]+) \| (?P<solution>[^|]+) \|$', re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What the placeholders stand for: a running node with one file of two chunks and one of a single chunk."""

    file_hash: str
    chunks: tuple[str, str, str]
    data_port: int
    dht_port: int
    folder: Path


def python_blocks() -> list[str]:
    """Return the Python blocks in order."""
    return BLOCK.findall(DOCUMENT.read_text())


def troubleshooting() -> dict[str, str]:
    """Return {problem: solution} of the troubleshooting table."""
    return {match["problem"]: match["solution"].strip() for match in ROW.finditer(DOCUMENT.read_text())}


def filled_in(block: str, facts: Facts) -> str:
    """Return a block with real hashes, addresses and folders in place of the placeholders."""
    first, second, third = facts.chunks
    for placeholder, value in (
        ("abc123def456...", facts.file_hash),
        ("file_abc123", facts.file_hash),
        ("file_hash", facts.file_hash),
        ("output_dir", str(facts.folder / "out")),
        ("chunk_hash_1", first),
        ("chunk_hash_2", second),
        ("chunk_hash_3", third),
        ("test_chunk_hash", first),
        ("chunk_hash", first),
        ("chunk_1", first),
        ("chunk_2", second),
        ("chunk_3", third),
        ("abc123", first),
        ("downloads", str(facts.folder / "downloads")),
        ("storage/hashed_files", str(facts.folder / "storage" / "hashed_files")),
        ("peer_ip", "127.0.0.1"),
        ("ip1", "127.0.0.1"),
        ("ip2", "127.0.0.1"),
        ("ip3", "127.0.0.1"),
        ("192.168.1.100", "127.0.0.1"),
        ("192.168.1.1", "127.0.0.1"),
        ("192.168.1.2", "127.0.0.1"),
    ):
        block = block.replace(f'"{placeholder}"', f'"{value}"')
    return re.sub(r"\b9000\b", str(facts.data_port), re.sub(r"\b8468\b", str(facts.dht_port), block))
