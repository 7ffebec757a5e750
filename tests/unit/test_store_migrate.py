"""The older layout: every accepted shape of its index, every byte checked, and what is left out is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastcas.errors import NotFound, UsageError
from fastcas.store import Store
from tests.support.store_rig import check_replay, data_of, followed, sha

DATA = data_of(100_000)
CHUNKS = [DATA[at : at + 30_000] for at in range(0, 100_000, 30_000)]
NAMES = [sha(chunk).hex() for chunk in CHUNKS]
FILE = sha(DATA).hex()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def older(root: Path, index: object, *, index_at: str = "cas_index.json", whole: bool = False) -> Path:
    folder = root / "hashed_files"
    folder.mkdir(parents=True)
    for name, chunk in [(FILE, DATA)] if whole else zip(NAMES, CHUNKS, strict=True):
        (folder / name).write_bytes(chunk)
    (root / index_at).write_text(index if isinstance(index, str) else json.dumps(index))
    return root


SHAPES: list[object] = [
    {"files": {FILE: {"original_name": "a.bin", "size": 100_000, "data_chunks": NAMES, "parity_chunks": []}}},
    {"version": 3, "files": [{"file_hash": FILE, "name": "a.bin", "chunks": NAMES}]},
    {FILE: {"filename": "a.bin", "chunks": [{"hash": name, "size": 30_000, "index": 0} for name in NAMES]}},
    [{"hash": FILE, "file_name": "a.bin", "file_size": 100_000, "chunk_hashes": NAMES}],
    {"a.bin": {"file_hash": FILE, "chunks": [{"chunk_hash": name} for name in NAMES], "name": "a.bin"}},
]


@pytest.mark.parametrize("index", SHAPES)
def test_every_accepted_shape_is_imported(store: Store, tmp_path: Path, index: object) -> None:
    mirror = followed(store)
    report = store.migrate(older(tmp_path / "old", index))
    assert report.left_out == []
    assert report.bytes == 100_000
    assert [(file.file_hash, file.name) for file in report.files] == [(FILE, "a.bin")]
    assert mirror.content(mirror.files[bytes.fromhex(FILE)]) == DATA
    check_replay(store, mirror)


@pytest.mark.parametrize("index", [{FILE: NAMES}, {"files": {FILE: {"chunks": NAMES}}}])
def test_missing_fields_are_tolerated(store: Store, tmp_path: Path, index: object) -> None:
    report = store.migrate(older(tmp_path / "old", index))
    assert [file.name for file in report.files] == [FILE]


@pytest.mark.parametrize("index", [{FILE: "a.bin"}, {"files": {FILE: {"name": "a.bin", "chunks": []}}}])
def test_file_stored_whole_is_imported(store: Store, tmp_path: Path, index: object) -> None:
    report = store.migrate(older(tmp_path / "old", index, whole=True))
    assert [(file.file_hash, file.name) for file in report.files] == [(FILE, "a.bin")]


@pytest.mark.parametrize("inside", [True, False])
def test_folder_may_be_named_in_three_ways(tmp_path: Path, inside: bool) -> None:
    at = "hashed_files/cas_index.json" if inside else "cas_index.json"
    root = older(tmp_path / "old", {FILE: NAMES}, index_at=at)
    for number, name in enumerate((root, root / "hashed_files")):
        with Store.open(tmp_path / f"store{number}", create=True) as store:
            assert len(store.migrate(name).files) == 1


def test_older_folder_is_left_as_it_is(store: Store, tmp_path: Path) -> None:
    root = older(tmp_path / "old", {FILE: NAMES})
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    store.migrate(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def lose(folder: Path) -> None:
    (folder / NAMES[1]).unlink()


def damage(folder: Path) -> None:
    (folder / NAMES[1]).write_bytes(b"x" * 30_000)


def link(folder: Path) -> None:
    (folder / NAMES[1]).rename(folder.parent / "elsewhere")
    (folder / NAMES[1]).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("harm", [lose, damage, link])
def test_file_with_a_bad_chunk_is_left_out_and_the_rest_imported(
    store: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    other = sha(CHUNKS[0]).hex()
    root = older(
        tmp_path / "old", {FILE: {"name": "bad", "chunks": NAMES}, other: {"name": "good", "chunks": NAMES[:1]}}
    )
    harm(root / "hashed_files")
    report = store.migrate(root)
    assert [file.name for file in report.files] == ["good"]
    ((subject, reason),) = report.left_out
    assert subject == f"{FILE} bad"
    assert NAMES[1][:8] in reason or "hashed_files" in reason
    assert [row.name for row in store.files()] == ["good"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"chunks": NAMES[::-1]}, "expected SHA-256"),
        ({"chunks": NAMES, "size": 99_999}, "expected 99999 B"),
        ({"chunks": ["../../etc/passwd"]}, "no hash of 64"),
        ({"chunks": {"0": NAMES[0]}}, "not a list"),
        ({"chunks": [None]}, "no hash of 64"),
        (17, "expected an object"),
    ],
)
def test_entry_that_makes_no_sense_is_left_out(store: Store, tmp_path: Path, entry: object, reason: str) -> None:
    report = store.migrate(older(tmp_path / "old", {FILE: entry}))
    assert report.files == []
    assert reason in report.left_out[0][1]
    assert store.files() == []


def test_chunks_that_no_file_needs_are_told(store: Store, tmp_path: Path) -> None:
    report = store.migrate(older(tmp_path / "old", {FILE: NAMES[:0]}))
    assert {subject for subject, _ in report.left_out} >= set(NAMES)


def test_hostile_names_are_escaped(store: Store, tmp_path: Path) -> None:
    report = store.migrate(older(tmp_path / "old", {FILE: {"name": "a\x1b[2Jb\n", "chunks": NAMES}}))
    assert report.files[0].name == "a\\x1b[2Jb\\x0a"


@pytest.mark.parametrize("text", ["", "{", "17", '"x"', "[" * 100_000, "nul\0"])
def test_index_that_is_no_index_is_refused(store: Store, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"cas_index\.json"):
        store.migrate(older(tmp_path / "old", text))


def test_folder_without_an_index_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"cas_index\.json"):
        store.migrate(tmp_path)


def test_index_json_can_be_migrated_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    stored = store.store_file(tmp_path / "f", chunk_size=16384, parity=(2, 1))
    index = json.loads(json.dumps(store.index_json()))
    assert index["version"] == 1
    entry = index["files"][stored.file_hash]
    assert (entry["original_name"], entry["size"], len(entry["data_chunks"])) == ("f", 100_000, 7)
    assert len(entry["parity_chunks"]) == 4
    folder = tmp_path / "old" / "hashed_files"
    folder.mkdir(parents=True)
    for key in entry["data_chunks"]:
        chunk = store.read_chunk(bytes.fromhex(key))
        assert chunk is not None
        (folder / key).write_bytes(chunk)
    (tmp_path / "old" / "cas_index.json").write_text(json.dumps(index))
    with Store.open(tmp_path / "new", create=True) as other:
        assert other.migrate(tmp_path / "old").files[0].file_hash == stored.file_hash
