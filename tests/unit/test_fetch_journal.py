"""The journal and the part file: damage costs a re-hash, never an error, never a wrong claim about another file."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from fastcas.errors import DestinationExists, StoreLocked, UsageError
from fastcas.fetch.journal import HEADER, RECORD, Journal
from fastcas.fetch.partfile import PartFile, clear_leftovers, has_content, prepare_folder, safe_name
from tests.support.evil_peer import content_of, make_manifest

MANIFEST = bytes(range(32))
LISTED = {0: True, 3: False, 7: True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal that lists three chunks."""
    where = tmp_path / "x.fastcas-journal"
    journal = Journal(where, MANIFEST)
    journal.start([(0, True)])
    journal.add([3], link_checked=False)
    journal.add([7], link_checked=True)
    journal.close()
    return where


def append(where: Path, index: int) -> None:
    """List one more chunk, as a resumed download does."""
    journal = Journal(where, MANIFEST)
    journal.read(10)
    journal.add([index], link_checked=True)
    journal.close()


def listed(where: Path, manifest_hash: bytes = MANIFEST, n: int = 10) -> dict[int, bool]:
    """Return what a journal lists."""
    journal = Journal(where, manifest_hash)
    try:
        return journal.read(n).chunks
    finally:
        journal.close()


def test_what_was_written_is_read(path: Path) -> None:
    assert listed(path) == LISTED


def test_cut_at_every_byte_lists_a_prefix(path: Path) -> None:
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        found = listed(path)
        whole = max(0, n - HEADER.size) // RECORD.size
        assert found == dict(list(LISTED.items())[:whole])


def test_any_flipped_bit_loses_at_most_its_record(path: Path) -> None:
    data = path.read_bytes()
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            found = listed(path)
            assert found.items() <= LISTED.items()
            assert len(found) >= (2 if at >= HEADER.size else 0)


def test_torn_record_does_not_shift_the_next(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\xff" * 16)
    append(path, 9)
    assert listed(path) == LISTED | {9: True}


@pytest.mark.parametrize("n", range(1, RECORD.size))
def test_record_cut_short_is_overwritten_by_the_next(path: Path, n: int) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes()[-RECORD.size :][:n])
    append(path, 9)
    assert listed(path) == LISTED | {9: True}


def test_failed_append_does_not_shift_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, MANIFEST)
    journal.read(10)
    pwrite = os.pwrite

    def torn(fd: int, data: bytes, at: int) -> int:
        if len(data) != RECORD.size:
            raise OSError(errno.ENOSPC, "no room")
        return pwrite(fd, data[:5], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", torn)
        with pytest.raises(OSError, match="no room"):
            journal.add([8], link_checked=True)
    journal.add([9], link_checked=True)
    journal.close()
    assert listed(path) == LISTED | {9: True}


def test_endless_journal_counts_as_damaged(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 30)
    journal = Journal(path, MANIFEST)
    found = journal.read(10)
    journal.close()
    assert (found.chunks, found.readable, found.is_ours) == ({}, False, True)


def test_journal_of_another_manifest_lists_nothing(path: Path) -> None:
    assert listed(path, bytes(32)) == {}


def test_chunk_numbers_outside_the_file_are_ignored(path: Path) -> None:
    assert listed(path, n=5) == {0: True, 3: False}


def test_second_download_of_the_same_destination_is_refused(path: Path) -> None:
    journal = Journal(path, MANIFEST)
    with pytest.raises(StoreLocked, match="another download"):
        Journal(path, MANIFEST)
    journal.close()
    Journal(path, MANIFEST).close()


def test_damaged_header_makes_written_parts_candidates(tmp_path: Path) -> None:
    content = content_of(10 * 16384)
    manifest = make_manifest(content)
    part = PartFile(tmp_path / "x", manifest)
    os.pwrite(part.fd, content[16384:32768], 16384)
    part.close()
    (tmp_path / "x.fastcas-journal").write_bytes(b"garbage" * 20)
    again = PartFile(tmp_path / "x", manifest)
    assert 1 in again.candidates
    again.close()


def test_part_file_of_another_manifest_starts_over(tmp_path: Path) -> None:
    one, two = make_manifest(content_of(50_000, 1)), make_manifest(content_of(50_000, 2))
    part = PartFile(tmp_path / "x", one)
    os.pwrite(part.fd, b"old", 0)
    part.journal.add([0], link_checked=True)
    part.close()
    again = PartFile(tmp_path / "x", two)
    assert again.candidates == {}
    assert again.read_all(3) == bytes(3)
    again.close()


def test_finish_does_not_replace_a_file_that_appeared(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "x", make_manifest(content_of(50_000)))
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(DestinationExists, match="left alone"):
        part.finish(force=False)
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert part.path.exists()
    part.finish(force=True)
    assert not part.path.exists()
    part.close()


def test_part_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x.fastcas-part").symlink_to(victim)
    with pytest.raises(Exception, match="fastcas-part"):
        PartFile(tmp_path / "x", make_manifest(content_of(50_000)))
    assert victim.read_bytes() == b"precious"


def test_has_content(tmp_path: Path) -> None:
    manifest = make_manifest(b"abc")
    assert has_content(tmp_path / "x", manifest.file_hash) is None
    (tmp_path / "x").write_bytes(b"abc")
    assert has_content(tmp_path / "x", manifest.file_hash) is True
    assert has_content(tmp_path / "x", bytes(32)) is False
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DestinationExists):
        has_content(tmp_path / "pipe", bytes(32))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("data.bin", "data.bin"),
        ("../../etc/passwd", "passwd"),
        ("..", "f"),
        ("", "f"),
        (None, "f"),
        ("a\\b\\c", "c"),
        ("evil\u202egnp.exe", "evil_u202egnp.exe"),
        ("\x1b[31mred", "_x1b[31mred"),
        ("/", "f"),
        ("x" * 400, "x" * 239),
    ],
)
def test_names_from_peers_become_one_plain_component(name: str | None, safe: str) -> None:
    found = safe_name(name, "f")
    assert found == safe
    assert "/" not in found
    assert len(os.fsencode(found + ".fastcas-journal")) <= 255


def test_prepare_folder_says_what_is_in_the_way(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(UsageError, match=re.escape(str(folder))):
            prepare_folder(folder)


def test_part_file_with_any_damage_in_its_journal_keeps_what_is_there(tmp_path: Path) -> None:
    content = content_of(4 * 16384)
    manifest = make_manifest(content)
    out = tmp_path / "x"
    part = PartFile(out, manifest)
    for index in (1, 2):
        os.pwrite(part.fd, content[index * 16384 : (index + 1) * 16384], index * 16384)
    part.journal.add([1, 2], link_checked=True)
    part.close()
    journal = tmp_path / "x.fastcas-journal"
    whole = journal.read_bytes()
    in_header = [(at, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]) for at in range(HEADER.size)]
    cut = [(at, whole[:at]) for at in range(HEADER.size)]
    for at, damaged in (*in_header, *cut):
        journal.write_bytes(damaged)
        again = PartFile(out, manifest)
        assert {1, 2} <= again.candidates.keys(), at
        again.close()
        once_more = PartFile(out, manifest)
        assert {1, 2} <= once_more.candidates.keys(), at
        once_more.close()
    for at in range(HEADER.size, len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            journal.write_bytes(damaged)
            again = PartFile(out, manifest)
            assert again.candidates.keys() <= {1, 2}
            again.close()


def test_leftovers_beside_a_finished_file_are_removed_and_others_are_not(tmp_path: Path) -> None:
    out, part, journal = tmp_path / "x", tmp_path / "x.fastcas-part", tmp_path / "x.fastcas-journal"
    out.write_bytes(b"done")
    journal.touch()
    clear_leftovers(out)
    assert not journal.exists()
    journal.touch()
    part.hardlink_to(out)
    clear_leftovers(out)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    journal.touch()
    part.write_bytes(b"half of something else")
    clear_leftovers(out)
    assert part.exists()
    part.unlink()
    running = Journal(journal, MANIFEST)
    clear_leftovers(out)
    assert journal.exists()
    running.close()
