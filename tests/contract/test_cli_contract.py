"""What other people's scripts depend on: commands, flags, output lines, exit codes (architecture §9)."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import fastcas
from fastcas import errors
from fastcas.cli.main import command as fastcas_command
from fastcas.cli.node_command import command as node_command
from fastcas.cli.node_command import ready_line
from tests.support.nodes import READY, run_fastcas

HEX = "ab" * 32
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def content_file(tmp_path: Path) -> tuple[Path, str]:
    content = random.Random(7).randbytes(300_000)
    path = tmp_path / "my file.bin"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def flags(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


def test_commands_and_flags_are_those_of_the_contract() -> None:
    assert set(fastcas_command.commands) == {
        "store", "get", "cat", "ls", "info", "peers", "status", "verify", "rm", "gc", "migrate", "index",
        "rebuild", "pin", "unpin",
    }  # fmt: skip
    assert flags(fastcas_command.commands["store"]) >= {
        "--storage-dir", "--chunk-size", "--parity", "--in-place", "--json",
    }  # fmt: skip
    assert flags(fastcas_command.commands["get"]) >= {
        "-o", "--storage-dir", "--peer", "--bootstrap", "--network-key", "--timeout", "--json",
        "--origin", "--explain", "--max-download",
    }  # fmt: skip
    assert flags(fastcas_command.commands["verify"]) >= {"--repair", "--peer", "--rate", "--subset", "--restart"}
    assert "--json" in flags(fastcas_command.commands["index"])
    assert flags(node_command) == {
        "--workers", "--host", "--port", "--dht-port", "--storage-dir", "--node-id", "--bootstrap", "--peer", "--quota",
        "--no-dht", "--announce", "--max-announce", "--network-key", "--admin-port",
        "--max-download", "--max-upload", "--send-path",
    }  # fmt: skip


def test_ready_line_has_the_form_of_the_contract() -> None:
    facts = {"id": "MyNode", "host": "0.0.0.0", "port": 9000, "workers": 2, "dht_port": 8468}
    facts |= {"storage": "/s", "chunks": 7}
    line = "node MyNode ready: data tcp://0.0.0.0:9000 workers=2 dht udp://0.0.0.0:8468 storage=/s chunks=7"
    assert ready_line(facts) == line
    assert ready_line(facts | {"dht_port": None}) == line.replace("udp://0.0.0.0:8468", "off")
    assert READY.fullmatch(line)


def test_exit_codes_are_those_of_the_contract() -> None:
    codes = {
        "FastCASError": 1, "LocalProtocolError": 1, "UsageError": 2, "ConfigError": 2, "NotFound": 3, "NoPeers": 3,
        "StoreNotFound": 3, "ChunkNotFound": 3, "PeerTimeout": 4, "Stalled": 4, "DamageFound": 5, "ChunkCorrupt": 5,
        "TooFewShards": 5, "NetworkError": 6, "PeerUnreachable": 6, "Interrupted": 7, "StoreFull": 8,
        "PermissionDenied": 9, "PortInUse": 10, "StoreLocked": 10, "DestinationExists": 11, "SelfTestFailed": 12,
    }  # fmt: skip
    assert {name: getattr(errors, name).exit_code for name in codes} == codes


def test_python_names_are_those_of_the_contract() -> None:
    for name in ("P2PNode", "P2PClient", "P2PPeerManager", "P2PChunkDownloader", "FileMetadata", "store", "get"):
        assert callable(getattr(fastcas, name))
        assert name in fastcas.__all__
    names = {
        fastcas.P2PNode: ["node_id", "server_host", "server_port", "dht_port", "storage_dir", "workers", "bootstrap"],
        fastcas.P2PClient: ["dht_bootstrap_nodes", "download_dir"],
        fastcas.P2PChunkDownloader: ["storage_dir", "timeout", "max_connections"],
        fastcas.FileMetadata: ["file_hash", "original_name", "size", "data_chunks", "parity_chunks"],
    }
    for owner, expected in names.items():
        assert list(inspect.signature(owner).parameters)[: len(expected)] == expected
    for name in ("initialize", "download_file_from_peers", "shutdown"):
        assert inspect.iscoroutinefunction(getattr(fastcas.P2PNode, name))
    assert not inspect.iscoroutinefunction(fastcas.P2PNode.start_server)


def test_store_prints_hash_and_link_and_get_prints_the_path(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, file_hash = content_file
    storage = ["--storage-dir", str(tmp_path / "s")]
    done = run_fastcas("store", str(path), *storage)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == f"File stored with hash: {file_hash}"
    link = rf"Link: fastcas://{file_hash}\?m=[0-9a-f]{{64}}&name=my%20file\.bin&size=300000"
    assert re.fullmatch(link, second)
    out = tmp_path / "out.bin"
    done = run_fastcas("get", second.removeprefix("Link: "), "-o", str(out), *storage)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert out.read_bytes() == path.read_bytes()


def test_json_is_one_object_with_the_same_facts(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, file_hash = content_file
    storage = ["--storage-dir", str(tmp_path / "s"), "--json"]
    stored = json.loads(run_fastcas("store", str(path), *storage).stdout.splitlines()[-1])
    assert (stored["file_hash"], stored["size"], stored["n_chunks"]) == (file_hash, 300_000, 2)
    got = json.loads(run_fastcas("get", file_hash, "-o", str(tmp_path / "o"), *storage).stdout.splitlines()[-1])
    assert (got["file_hash"], got["path"], got["local_bytes"]) == (file_hash, str(tmp_path / "o"), 300_000)
    (row,) = json.loads(run_fastcas("ls", *storage).stdout)["files"]
    assert row["file_hash"] == file_hash
    assert json.loads(run_fastcas("info", file_hash, *storage).stdout)["file"] == row
    assert json.loads(run_fastcas("verify", *storage).stdout.splitlines()[-1])["is_clean"] is True
    assert json.loads(run_fastcas("status", *storage).stdout)["store"]["files"] == 1
    assert file_hash in json.dumps(json.loads(run_fastcas("index", *storage).stdout))
    assert json.loads(run_fastcas("rm", file_hash, *storage).stdout)["file_hash"] == file_hash
    assert json.loads(run_fastcas("gc", *storage).stdout)["bytes_freed"] >= 300_000
    assert json.loads(run_fastcas("ls", *storage).stdout) == {"files": []}


def test_storage_folder_comes_from_the_environment(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, file_hash = content_file
    environment = ENVIRONMENT | {"FASTCAS_STORAGE": str(tmp_path / "elsewhere")}
    assert run_fastcas("store", str(path), env=environment).returncode == 0
    assert file_hash in run_fastcas("ls", env=environment).stdout
    assert (tmp_path / "elsewhere" / "hashed_files").is_dir()
    hashed = ["--storage-dir", str(tmp_path / "elsewhere" / "hashed_files")]
    assert file_hash in run_fastcas("ls", *hashed).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["get", "abc123"], 2, "REF"),
        (["get", HEX.upper()], 2, "REF"),
        (["get", "fastcas://abc"], 2, "REF"),
        (["get", f"fastcas://{HEX}?m=12"], 2, "m"),
        (["get", HEX, "--peer", "nowhere"], 2, "--peer"),
        (["get", HEX, "--peer", "h:99999"], 2, "--peer"),
        (["get", HEX, "--bootstrap", "1.2.3:5"], 2, "--bootstrap"),
        (["get", HEX, "--timeout", "soon"], 2, "--timeout"),
        (["get", HEX, "--timeout", "0"], 2, "--timeout"),
        (["get"], 2, "REF"),
        (["get", HEX, "-o", ""], 2, "-o"),
        (["get", HEX, "--timeout", "nan"], 2, "--timeout"),
        (["get", HEX, "--timeout", "inf"], 2, "--timeout"),
        (["peers", HEX, "--bootstrap", "1.2.3:5"], 2, "--bootstrap"),
        (["store", ""], 2, "PATH"),
        (["store", "FILE", "--parity", ""], 2, "--parity"),
        (["store", "FILE", "--chunk-size", "3"], 2, "--chunk-size"),
        (["store", "FILE", "--chunk-size", "lots"], 2, "--chunk-size"),
        (["store", "FILE", "--chunk-size", "100000"], 2, "--chunk-size"),
        (["store", "FILE", "--parity", "4"], 2, "--parity"),
        (["store", "FILE", "--parity", "200+100"], 2, "--parity"),
        (["store", "FILE", "--parity", "0+2"], 2, "--parity"),
        (["store", "FILE", "--parity", "4+0"], 2, "--parity"),
        (["store", "FILE", "--parity", "-4+2"], 2, "--parity"),
        (["store", "FILE", "--parity", "4+2+1"], 2, "--parity"),
        (["store", "FILE", "--parity", "four+two"], 2, "--parity"),
        (["store", "FILE", "--parity", "4+99999999999999999999"], 2, "--parity"),
        (["store", "FILE", "--parity", "100+10", "--chunk-size", "16MiB"], 2, "stripe"),
        (["store", "FILE", "--quota", "little"], 2, "--quota"),
        (["store", "FILE", "--quota", "64K"], 8, "quota"),
        (["pin", HEX], 3, "abababab"),
        (["store", "FILE", "--chunking", "rabin"], 2, "--chunking"),
        (["store", "FILE", "--chunking", "cdc", "--parity", "4+2"], 2, "cannot have parity"),
        (["store", "FILE", "--chunking", "cdc", "--chunk-size", "16KiB"], 2, "64 KiB"),
        (["store", "FILE", "--chunking", "cdc", "--chunk-size", "8MiB"], 2, "4 MiB"),
        (["get", "a" * 64, "--seed-from", "MISSING", "--peer", "127.0.0.1:1"], 3, "--seed-from"),
        (["get", "a" * 64, "--seed-from", "", "--peer", "127.0.0.1:1"], 2, "--seed-from"),
        (["verify", "--rate", "fast"], 2, "--rate"),
        (["verify", "--rate", "0"], 2, "--rate"),
        (["verify", "--subset", "5/4"], 2, "--subset"),
        (["verify", "--subset", "0/4"], 2, "--subset"),
        (["verify", "--subset", "half"], 2, "--subset"),
        (["verify", "--repair", "--peer", "nowhere"], 2, "--peer"),
        (["store", "MISSING"], 3, "MISSING"),
        (["store"], 2, "PATH"),
        (["info", "xyz"], 2, "REF"),
        (["info", HEX], 3, "abababab"),
        (["rm", HEX], 3, "abababab"),
        (["nonsense"], 2, "nonsense"),
        (["ls", "--nonsense"], 2, "--nonsense"),
        (["migrate", "MISSING"], 3, "MISSING"),
        (["get", HEX], 3, f"no peer has {HEX}"),
    ],
)
def test_bad_input_gets_its_status_and_one_line(
    tmp_path: Path, arguments: list[str], status: int, named: str
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    paths = {"FILE": str(tmp_path / "file"), "MISSING": str(tmp_path / "MISSING")}
    words = [paths.get(word, word) for word in arguments]
    environment = ENVIRONMENT | {"FASTCAS_STORAGE": str(tmp_path / "s")}
    run_fastcas("store", str(tmp_path / "file"), env=environment)
    done = run_fastcas(*words, env=environment)
    assert done.returncode == status, done.stderr
    assert named in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["ls", "status", "verify", "gc", "index", f"info {HEX}", f"rm {HEX}"])
def test_commands_without_a_store_exit_3_naming_it(tmp_path: Path, command: str) -> None:
    done = run_fastcas(*command.split(), "--storage-dir", str(tmp_path / "nothing"))
    assert done.returncode == 3
    assert str(tmp_path / "nothing") in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_busy_folder_exits_10_naming_it(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    from fastcas.store import Store

    with Store.open(tmp_path / "s", create=True):
        done = run_fastcas("ls", "--storage-dir", str(tmp_path / "s"))
    assert done.returncode == 10
    assert str(tmp_path / "s") in done.stderr


def test_other_content_at_the_destination_exits_11(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, file_hash = content_file
    storage = ["--storage-dir", str(tmp_path / "s")]
    run_fastcas("store", str(path), *storage)
    out = tmp_path / "out"
    out.write_text("mine")
    assert run_fastcas("get", file_hash, "-o", str(out), *storage).returncode == 11
    assert out.read_text() == "mine"
    assert run_fastcas("get", file_hash, "-o", str(out), "--force", *storage).returncode == 0
    assert out.read_bytes() == path.read_bytes()


def test_damage_exits_5_and_repair_from_parity_mends_it(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, _ = content_file
    storage = ["--storage-dir", str(tmp_path / "s")]
    assert run_fastcas("store", str(path), "--chunk-size", "64KiB", "--parity", "4+2", *storage).returncode == 0
    (blob,) = (tmp_path / "s" / "hashed_files").rglob("*.blob")
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(70_000)
        file.write(b"damage")
    done = run_fastcas("verify", *storage)
    assert done.returncode == 5
    assert "1 damaged, 0 repaired" in done.stdout
    done = run_fastcas("verify", "--repair", *storage)
    assert done.returncode == 0, done.stderr
    assert "1 damaged, 1 repaired" in done.stdout
    assert run_fastcas("verify", *storage).returncode == 0


def test_reader_that_goes_away_is_no_error(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, _ = content_file
    run_fastcas("store", str(path), "--storage-dir", str(tmp_path / "s"))
    words = [sys.executable, "-m", "fastcas", "ls", "--storage-dir", str(tmp_path / "s")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(words, stdout=write_end, stderr=subprocess.PIPE, timeout=30, check=False)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["cat"]])
def test_full_disk_behind_stdout_exits_8_with_one_line(
    tmp_path: Path, content_file: tuple[Path, str], command: list[str], unbuffered: str
) -> None:
    path, file_hash = content_file
    run_fastcas("store", str(path), "--storage-dir", str(tmp_path / "s"))
    words = [*command, *([file_hash] if command == ["cat"] else []), "--storage-dir", str(tmp_path / "s")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastcas", *words], stdout=full, stderr=subprocess.PIPE, timeout=30, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 8
    assert done.stderr.count(b"\n") == 1 and b"stdout: No space left on device" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_notes_that_nobody_can_read_are_no_error(
    tmp_path: Path, content_file: tuple[Path, str], unbuffered: str
) -> None:
    path, file_hash = content_file
    run_fastcas("store", str(path), "--storage-dir", str(tmp_path / "s"))
    words = ["get", file_hash, "-o", str(tmp_path / "o"), "--storage-dir", str(tmp_path / "s"), "--json"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastcas", *words], stdout=subprocess.PIPE, stderr=full, timeout=30, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["size"] == path.stat().st_size


def test_closed_standard_files_reach_no_file_of_ours(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    """Without care the destination would be opened as number 1 or 2 and be told what belongs there."""
    path, file_hash = content_file
    run_fastcas("store", str(path), "--storage-dir", str(tmp_path / "s"))
    words = [sys.executable, "-m", "fastcas", "get", file_hash, "-o", str(tmp_path / "o")]
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*closing, *words, "--storage-dir", str(tmp_path / "s")], timeout=30, check=False)
    assert done.returncode == 0
    assert (tmp_path / "o").read_bytes() == path.read_bytes()


def script(name: str) -> list[str]:
    """The words that run a console script the way an installed one does."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        module, _, function = tomllib.load(file)["project"]["scripts"][name].partition(":")
    return ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


@pytest.mark.parametrize("program", ["fastcas", "fastcas-node", "python -m fastcas"])
@pytest.mark.parametrize("module", ["click", "json"])
def test_interrupt_while_python_imports_exits_7_with_one_line(tmp_path: Path, program: str, module: str) -> None:
    """A module that everything imports sends the signal from its first line."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(1000):\n    pass\n"
    )
    words = ["-m", "fastcas"] if program.startswith("python") else script(program)
    done = subprocess.run(
        [sys.executable, *words, "--version"], capture_output=True, text=True, timeout=30, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path,
    )  # fmt: skip
    name = "fastcas-node" if program == "fastcas-node" else "fastcas"
    assert (done.returncode, done.stdout, done.stderr) == (7, "", f"{name}: interrupted\n")


@pytest.mark.parametrize("name", ["fastcas", "fastcas-node"])
def test_console_scripts_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, *script(name), "--help"], capture_output=True, text=True, timeout=30, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name}" in done.stdout


def test_interrupt_while_waiting_exits_7_with_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(20)
        port = silent.getsockname()[1]
        words = ["get", HEX, "-o", str(tmp_path / "out"), "--peer", f"127.0.0.1:{port}"]
        process = subprocess.Popen([sys.executable, "-m", "fastcas", *words], stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=20)
    assert process.returncode == 7
    assert complaint.count("\n") == 1
    assert f"resume with: fastcas get {HEX}" in complaint


def test_unexpected_error_exits_1_and_shows_a_traceback_only_on_demand(tmp_path: Path) -> None:
    program = (
        "import fastcas.cli.main as m, sys\n"
        "def broken(*a, **k): raise RuntimeError('broken')\n"
        "import fastcas.node.access as access\n"
        "access.open_access = broken\n"
        "sys.exit(m.main(['ls']))\n"
    )
    for debug, shown in (("0", False), ("1", True)):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT | {"FASTCAS_DEBUG": debug},
            timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "internal error: RuntimeError: broken" in done.stderr
        assert ("Traceback" in done.stderr) is shown


def test_names_of_files_are_escaped_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil\x1b[31m\u202e.bin"
    path.write_bytes(b"x")
    storage = ["--storage-dir", str(tmp_path / "s")]
    assert run_fastcas("store", str(path), *storage).returncode == 0
    for words in (["ls"], ["info", hashlib.sha256(b"x").hexdigest()]):
        shown = run_fastcas(*words, *storage).stdout
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "evil" in shown


def test_get_works_in_a_running_loop(tmp_path: Path, content_file: tuple[Path, str]) -> None:
    path, file_hash = content_file

    async def main() -> Path:
        fastcas.store(path, storage_dir=tmp_path / "s")
        return fastcas.get(file_hash, tmp_path / "o", storage_dir=tmp_path / "s")

    assert asyncio.run(main()).read_bytes() == path.read_bytes()
