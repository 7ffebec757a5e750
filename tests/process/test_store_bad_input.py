"""What cannot be stored is named, in one line or with `--json` as fields; nothing of it is half there."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcas.errors import FileChanged
from fastcas.store import Store
from tests.support.store_rig import temps

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def fastcas(*words: object, user: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the command; `user`: without privileges, as somebody else."""
    code = "import sys; from fastcas.cli.start import fastcas; sys.exit(fastcas())"
    if user is not None:  # imports need our privileges where the sources are private
        code = (
            "import sys, os, unicodedata, fastcas.cli.main, fastcas.node.access, fastcas.store.store\n"
            "from fastcas.cli.start import fastcas\n"
            f"os.setgroups([]); os.setgid({user}); os.setuid({user}); sys.exit(fastcas())"
        )
    arguments = [os.fsencode(word) if isinstance(word, (str, bytes, os.PathLike)) else word for word in words]
    return subprocess.run(
        [sys.executable.encode(), b"-c", code.encode(), *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )


def refused(tmp_path: Path, path: Path | bytes, status: int, *named: str, user: int | None = None) -> None:
    """Store `path` in both forms and check what is said; the store has nothing of it."""
    storage = tmp_path / "st"
    plain = fastcas("store", path, "--storage-dir", storage, user=user)
    assert plain.returncode == status, plain.stderr
    assert plain.stdout == b""
    assert plain.stderr.count(b"\n") == 1
    for name in named:
        assert name in plain.stderr.decode()
    fields = fastcas("store", path, "--storage-dir", storage, "--json", user=user)
    assert fields.returncode == status
    error = json.loads(fields.stderr.splitlines()[-1])["error"]
    assert error["exit_code"] == status
    assert f"fastcas: {error['message']}\n" == plain.stderr.decode()
    listed = [item["path"] for item in error["paths"]]
    for name in named:
        assert any(name in item for item in listed), (name, listed)
    if storage.exists() and user is None:
        with Store.open(storage) as store:
            assert store.files() == []
            assert list(store.root.glob("hashed_files/*/*")) + list(store.root.glob("manifests/*/*")) == []


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_way_up(path: Path) -> None:
    path.symlink_to("..")


def make_device(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero: never ends


ODD = [(make_fifo, 2), (make_socket, 2), (make_loop, 2)]
ODD += [(make_device, 2)] if os.geteuid() == 0 else []  # making one needs root


@pytest.mark.parametrize(("make", "status"), ODD)
def test_what_is_no_file_is_named_alone_and_in_a_tree(
    tmp_path: Path, make: Callable[[Path], None], status: int
) -> None:
    make(tmp_path / "odd")
    refused(tmp_path, tmp_path / "odd", status, "odd")
    tree = tmp_path / "tree/sub"
    tree.mkdir(parents=True)
    (tree / "good").write_bytes(b"good" * 50_000)
    make(tree / "strange")
    refused(tmp_path, tmp_path / "tree", status, "sub/strange")


def test_link_that_leads_back_up_is_named_not_followed(tmp_path: Path) -> None:
    tree = tmp_path / "tree/sub"
    tree.mkdir(parents=True)
    (tree / "good").write_bytes(b"good" * 50_000)
    make_way_up(tree / "again")
    refused(tmp_path, tmp_path / "tree", 2, "sub/again")


def rewrite(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.write(b"%d" % at)


def shorten(path: Path, at: int) -> None:
    os.truncate(path, (64 << 20) - at)


def lengthen(path: Path, at: int) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("in_tree", [False, True])
@pytest.mark.parametrize("change", [rewrite, shorten, lengthen])
def test_file_that_changes_while_it_is_read_is_named_and_not_stored(
    tmp_path: Path, change: Callable[[Path, int], None], in_tree: bool
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "good").write_bytes(b"good" * 50_000)
    (tree / "restless").write_bytes(bytes(64 << 20))
    done = threading.Event()

    def disturb() -> None:
        at = 0
        while not done.is_set():
            change(tree / "restless", at := at + 1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        answer = fastcas("store", tree if in_tree else tree / "restless", "--storage-dir", tmp_path / "st", "--json")
    finally:
        done.set()
        thread.join()
    assert answer.returncode == FileChanged.exit_code, answer.stderr
    error = json.loads(answer.stderr.splitlines()[-1])["error"]
    assert "restless" in error["message"]
    assert any("restless" in item["path"] for item in error["paths"])
    with Store.open(tmp_path / "st") as store:
        assert store.files() == []
        assert [*store.root.glob("hashed_files/*/*"), *store.root.glob("manifests/*/*")] == []
        assert temps(store.root) == []


def test_device_and_too_long_name_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Path("/dev/zero"), 2, "/dev/zero")
    refused(tmp_path, tmp_path / ("n" * 300), 2, "nnnn")


def test_path_over_the_limit_is_named_and_the_tree_is_not_half_there(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "good").write_bytes(b"good" * 50_000)
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(18):  # 18 * 230 B > 4096 B
        os.mkdir("d" * 230, dir_fd=fd)
        below = os.open("d" * 230, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    done = fastcas("store", tree, "--storage-dir", tmp_path / "st")
    assert done.returncode == 2, done.stderr
    assert b"4096" in done.stderr or b"longer" in done.stderr or b"over" in done.stderr
    with Store.open(tmp_path / "st") as store:
        assert store.files() == []


def test_name_that_is_not_utf8_is_escaped_alone_and_refused_in_a_tree(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/bad\xff.bin"
    Path(os.fsdecode(path)).write_bytes(b"content")
    for options in ([], ["--in-place"]):
        done = fastcas("store", path, "--storage-dir", tmp_path / "other", "--json", *options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "bad\\xff.bin"
    for command in ("ls", "index"):
        assert fastcas(command, "--storage-dir", tmp_path / "other", "--json").returncode == 0
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "good").write_bytes(b"good" * 50_000)
    Path(os.fsdecode(os.fsencode(tree) + b"/n\xff")).write_bytes(b"x")
    refused(tmp_path, tree, 2, "n\\xff")


@pytest.mark.parametrize("kind", ["file", "tree", "folder"])
def test_unreadable_is_named_with_permission(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    (tree / "closed").mkdir(parents=True)
    (tree / "good").write_bytes(b"good" * 50_000)
    (tree / "secret").write_bytes(b"x" * 100_000)
    (tree / "secret" if kind != "folder" else tree / "closed").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "st").mkdir()
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None:
        os.chown(tmp_path / "st", user, user)
    path = tree / "secret" if kind == "file" else tree
    refused(tmp_path, path, 9, "closed" if kind == "folder" else "secret", user=user)
    tree.joinpath("closed").chmod(0o700)
