"""The store against a dict: any order of put, get, remove, pin, gc, crash, restart, damage, verify, quota, rebuild and
edits gives the same files."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from fastcas.errors import StoreFull
from fastcas.store import Store
from tests.support.store_rig import Mirror, check_replay, data_of, disk_bytes, flip, followed, sha, temps

UNIT = 16384
PIECES = [data_of(UNIT, seed) for seed in range(6)]
EXAMPLES = int(os.environ.get("FASTCAS_MODEL_EXAMPLES", "60"))
STEPS = int(os.environ.get("FASTCAS_MODEL_STEPS", "25"))
CALLS = ("pwrite", "pwritev", "fsync", "rename", "unlink", "link", "ftruncate", "fchmod", "posix_fallocate")

contents = st.builds(
    lambda pieces, tail: b"".join(PIECES[i] for i in pieces) + b"t" * tail,
    st.lists(st.integers(0, len(PIECES) - 1), max_size=4), st.integers(0, 40),
)  # fmt: skip


def killed_at(n: int, work: Callable[[], object]) -> bool:
    """Do something in a forked child that dies of SIGKILL before its n-th call that changes the disk.

    Returns:
        Whether it died; False: it came to its end first.
    """
    pid = os.fork()
    if pid == 0:
        left = n

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


class StoreMachine(RuleBasedStateMachine):
    """`model` maps file hashes to content; `maybe` has what a crash may or may not have left for a rebuild to find."""

    files = Bundle("files")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastcas-model-"))
        self.root = self.folder / "store"
        self.model: dict[bytes, bytes] = {}
        self.maybe: dict[bytes, bytes] = {}
        self.linked: dict[bytes, Path] = {}
        self.pins: set[bytes] = set()
        self.limit: int | None = None
        self.n_files = 0
        self.store = Store.open(self.root, create=True)
        self.opened()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    def opened(self) -> None:
        assert temps(self.folder) == []
        assert self.store.quota.limit == self.limit
        self.mirror: Mirror = followed(self.store)
        self.store.quota.on_evicted = self.evicted
        self.store.quota.barrier = self.mirror.check

    def evicted(self, file_hashes: list[bytes]) -> None:
        for file_hash in file_hashes:
            assert file_hash not in self.pins
            del self.model[file_hash]
            self.linked.pop(file_hash, None)

    def write(self, data: bytes) -> Path:
        self.n_files += 1
        path = self.folder / f"f{self.n_files}"
        path.write_bytes(data)
        return path

    @rule(target=files, data=contents, parity=st.sampled_from([None, (2, 1)]), in_place=st.booleans())
    def put(self, data: bytes, parity: tuple[int, int] | None, in_place: bool) -> bytes:
        path, file_hash = self.write(data), sha(data)
        try:
            stored = self.store.store_file(path, chunk_size=UNIT, parity=parity, in_place=in_place)
        except StoreFull:
            assert self.limit is not None
            return file_hash  # what is drawn next must not depend on how full the disk happens to be
        assert stored.file_hash == file_hash.hex()
        self.model[file_hash] = data
        self.maybe.pop(file_hash, None)
        if in_place and file_hash not in self.linked:
            self.linked[file_hash] = path
        return file_hash

    @rule(file_hash=files)
    def get(self, file_hash: bytes) -> None:
        row = self.store.file(file_hash)
        assert (row is not None) == (file_hash in self.model)
        if row is None or not row.is_complete:
            return
        manifest = self.store.manifest(row.manifest_hash)
        assert manifest is not None
        pieces = [self.store.read_chunk(manifest.hash_of(i)) for i in range(manifest.n_chunks)]
        assert b"".join(piece or b"" for piece in pieces) == self.model[file_hash]

    @rule(file_hash=files, pinned=st.booleans())
    def pin(self, file_hash: bytes, pinned: bool) -> None:
        assert self.store.pin(file_hash, pinned) == (file_hash in self.model)
        if file_hash in self.model:
            self.pins = self.pins | {file_hash} if pinned else self.pins - {file_hash}

    @rule(file_hash=consumes(files))
    def remove(self, file_hash: bytes) -> None:
        assert self.store.remove(file_hash) == (file_hash in self.model)
        self.forget(file_hash)

    def forget(self, file_hash: bytes) -> None:
        self.model.pop(file_hash, None)
        self.linked.pop(file_hash, None)
        self.pins.discard(file_hash)

    @rule()
    def gc(self) -> None:
        live = {key for key in self.model if key in self.mirror.files}
        self.store.gc(self.mirror.check)
        assert live <= self.mirror.files.keys()
        self.maybe.clear()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.root)
        self.opened()

    @rule(at=st.integers(1, 40), what=st.sampled_from(["put", "remove", "gc", "rebuild"]), data=contents)
    def crash(self, at: int, what: str, data: bytes) -> None:
        file_hash = sha(data) if what == "put" else min(self.model, default=b"")
        path = self.write(data)
        self.store.close()

        def work() -> None:
            if what == "rebuild":
                Store.rebuild(self.root)
                return
            with Store.open(self.root) as store:
                store.quota.limit = None  # nothing is evicted unseen
                if what == "put":
                    store.store_file(path, chunk_size=UNIT)
                elif what == "remove":
                    store.remove(file_hash)
                else:
                    store.gc(lambda: None)

        died = killed_at(at, work)
        self.store = Store.open(self.root)
        is_here = self.store.file(file_hash) is not None if file_hash else False
        if what == "put":
            assert is_here or died
            if is_here:
                self.model[file_hash] = data
            else:
                self.maybe[file_hash] = data
        elif what == "remove" and file_hash and not is_here:
            self.maybe[file_hash] = self.model[file_hash]
            self.forget(file_hash)
        elif what == "rebuild":
            self.found_again()
        self.opened()
        if what == "put" and self.limit is not None and disk_bytes(self.root) > self.limit:
            self.store.quota.set_limit(None)  # it was stored without one
            self.limit = None

    @rule()
    def rebuild(self) -> None:
        self.store.close()
        Store.rebuild(self.root)
        self.store = Store.open(self.root)
        self.found_again()
        self.opened()

    def found_again(self) -> None:
        """What a crash had left unfinished may be back."""
        for file_hash, data in self.maybe.items():
            if self.store.file(file_hash) is not None:
                self.model.setdefault(file_hash, data)

    @rule(more=st.one_of(st.none(), st.integers(0, 6 * UNIT)))
    def quota(self, more: int | None) -> None:
        limit = None if more is None else disk_bytes(self.root) + more
        try:
            self.store.quota.set_limit(limit)
        except StoreFull:
            return
        self.limit = limit

    @rule()
    def store_again_what_is_lost(self) -> None:
        for file_hash, data in list(self.model.items()):
            if file_hash not in self.mirror.files:
                try:
                    self.store.store_file(self.write(data), chunk_size=UNIT)
                except StoreFull:
                    assert self.limit is not None
                    continue
                self.model[file_hash] = data
                assert file_hash in self.mirror.files

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
        try:
            report = self.store.verify(repair=True)
        except StoreFull:
            assert self.limit is not None
        else:
            assert [damage.kind for damage in report.damages].count("chunk") == 1

    @rule(slices=st.integers(1, 4))
    def scrub_some(self, slices: int) -> None:
        with self.store.scrub(name="model") as scrub:
            for _ in range(slices):
                if not scrub.step(UNIT):
                    break
        assert [damage for damage in scrub.report.damages if damage.kind == "chunk"] == []

    @rule()
    def edit_a_linked_file(self) -> None:
        for path in self.linked.values():
            path.write_bytes(b"edited")
            os.utime(path, ns=(1, 1))
        self.linked.clear()
        self.reopen()

    @invariant()
    def what_is_live_is_right(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.mirror.files.keys() <= self.model.keys()
        for file_hash, manifest_hash in self.mirror.files.items():
            assert self.mirror.content(manifest_hash) == self.model[file_hash]
        rows = self.store.files()
        assert {row.file_hash for row in rows} == self.model.keys()
        assert {row.file_hash for row in rows if row.is_complete} == self.mirror.files.keys()
        assert {row.file_hash for row in rows if row.pinned} == self.pins
        assert self.limit is None or disk_bytes(self.root) <= self.limit
        check_replay(self.store, self.mirror)


StoreMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStoreModel = StoreMachine.TestCase
