"""The store against a dict: any order of put, remove, gc, reopen, damage, verify and edits gives the same files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from fastcas.store import Store
from tests.support.store_rig import Mirror, check_replay, data_of, flip, followed, sha, temps

UNIT = 16384
PIECES = [data_of(UNIT, seed) for seed in range(6)]


class StoreMachine(RuleBasedStateMachine):
    """`model` maps file hashes to content."""

    files = Bundle("files")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastcas-model-"))
        self.store = Store.open(self.folder / "store", create=True)
        self.mirror: Mirror = followed(self.store)
        self.model: dict[bytes, bytes] = {}
        self.linked: dict[bytes, Path] = {}
        self.n_files = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    @rule(
        target=files,
        pieces=st.lists(st.integers(0, len(PIECES) - 1), max_size=4),
        tail=st.integers(0, 40),
        parity=st.sampled_from([None, (2, 1)]),
        in_place=st.booleans(),
    )
    def put(self, pieces: list[int], tail: int, parity: tuple[int, int] | None, in_place: bool) -> bytes:
        data = b"".join(PIECES[i] for i in pieces) + b"t" * tail
        self.n_files += 1
        path = self.folder / f"f{self.n_files}"
        path.write_bytes(data)
        stored = self.store.store_file(path, chunk_size=UNIT, parity=parity, in_place=in_place)
        assert stored.file_hash == sha(data).hex()
        file_hash = sha(data)
        self.model[file_hash] = data
        if in_place and file_hash not in self.linked:
            self.linked[file_hash] = path
        return file_hash

    @rule(file_hash=consumes(files))
    def remove(self, file_hash: bytes) -> None:
        assert self.store.remove(file_hash) == (file_hash in self.model)
        self.model.pop(file_hash, None)
        self.linked.pop(file_hash, None)

    @rule()
    def gc(self) -> None:
        live = {key for key in self.model if key in self.mirror.files}
        self.store.gc(self.mirror.check)
        assert live <= self.mirror.files.keys()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder / "store")
        self.mirror = followed(self.store)
        assert temps(self.folder) == []

    @rule(target=files)
    def store_again_what_is_lost(self) -> object:
        again = []
        for file_hash, data in self.model.items():
            if file_hash not in self.mirror.files:
                self.n_files += 1
                path = self.folder / f"f{self.n_files}"
                path.write_bytes(data)
                self.store.store_file(path, chunk_size=UNIT)
                assert file_hash in self.mirror.files
                again.append(file_hash)
        return multiple(*again)

    @rule(number=st.integers(0, 1000), bit=st.integers(0, 7))
    def flip_and_verify(self, number: int, bit: int) -> None:
        rows = self.store._core.catalog.query(
            "SELECT b.number, e.offset FROM extents e JOIN blobs b ON b.number=e.blob WHERE b.kind=0 ORDER BY 1, 2"
        )
        if not rows:
            return
        blob_number, offset = rows[number % len(rows)]
        blob = self.store._core.catalog.blob(blob_number)
        assert blob is not None
        flip(os.fsdecode(self.store._core.path_of(blob)), offset, bit)
        report = self.store.verify(repair=True)
        assert [damage.kind for damage in report.damages].count("chunk") == 1

    @rule()
    def edit_a_linked_file(self) -> None:
        for path in self.linked.values():
            path.write_bytes(b"edited")
            os.utime(path, ns=(1, 1))
        self.linked.clear()
        self.store.close()
        self.store = Store.open(self.folder / "store")
        self.mirror = followed(self.store)

    @invariant()
    def what_is_live_is_right(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.mirror.files.keys() <= self.model.keys()
        for file_hash, manifest_hash in self.mirror.files.items():
            assert self.mirror.content(manifest_hash) == self.model[file_hash]
        assert {row.file_hash for row in self.store.files()} == self.model.keys()
        assert {row.file_hash for row in self.store.files() if row.is_complete} == self.mirror.files.keys()
        check_replay(self.store, self.mirror)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStoreModel = StoreMachine.TestCase
