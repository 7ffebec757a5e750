"""Stores, pins, removes and collects without end on a mount that is about to lose its power.

usage: python -m tests.support.store_power_child STORE SEED
Each line on stdout is an acknowledgement: "hash HASH STAMP" (CLOCK_MONOTONIC, ns), after the call returned, or
"gone HASH STAMP", before a removal.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from fastcas.store import Store
from tests.support.store_rig import data_of, sha

UNIT = 16384


def say(word: bytes, file_hash: str) -> None:
    os.write(1, b"%s %s %d\n" % (word, file_hash.encode(), time.monotonic_ns()))


def main() -> None:
    """Work until the disk is gone."""
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    chooser = random.Random(seed)
    here: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as given, Store.open(root, create=True) as store:
        for number in range(1, 100_000):
            name, size = seed * 100_000 + number, chooser.choice([3, 5_000, 70_000, 400_000])
            path = Path(given) / "f"
            if chooser.random() < 0.2:
                (Path(given) / "tree").mkdir(exist_ok=True)
                (Path(given) / "tree" / "f").write_bytes(data_of(size, name))
                (Path(given) / "tree" / "small").write_bytes(data_of(100, name))
                stored = store.store_tree(Path(given) / "tree", chunk_size=UNIT)
                say(b"hash", stored.file_hash)
            else:
                path.write_bytes(data_of(size, name))
                store.store_file(path, chunk_size=UNIT, parity=chooser.choice([None, (4, 2)]))
                here[name] = sha(data_of(size, name))
                say(b"hash", here[name].hex())
            if here and chooser.random() < 0.3:
                victim = chooser.choice(sorted(here))
                say(b"gone", here[victim].hex())  # from here on it need not be there
                store.remove(here.pop(victim))
            if chooser.random() < 0.2:
                store.gc(lambda: None)


if __name__ == "__main__":
    main()
