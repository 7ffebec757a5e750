"""The receiver's direct writes under a kernel that does not do what it was asked for: see receiver_direct.c."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
N = 300
WHOLE = N - 1  # the last chunk is odd: it goes through the page cache

TAKES_ALL = ["plain", "short", "error", "few", "interrupted", "slow"]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def binary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("direct") / "receiver_direct"
    sources = [*sorted(ROOT.glob("csrc/receiver/*.c")), *ROOT.glob("csrc/sha256/*.c"), *ROOT.glob("csrc/common/*.c")]
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", f"-fsanitize={request.param}", "-Icsrc",
         "-fno-sanitize-recover=all", "-Wl,--wrap=syscall", "tests/native/receiver_direct.c", *map(str, sources),
         "-o", str(out)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    return out


def run(binary: Path, mode: str, path: Path) -> tuple[int, int, int]:
    """Return the chunks whose writes the kernel took, and those that ended right and as WRITE_FAILED."""
    return counts(binary, mode, path)[1:]


def counts(binary: Path, mode: str, path: Path) -> tuple[int, int, int, int]:
    """Return the writes that the kernel took, too."""
    done = subprocess.run([str(binary), mode, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{mode}: exit {done.returncode}\n{done.stderr}"
    word, writes, taken, right, failed = done.stdout.split()
    assert word == "ok"
    return int(writes), int(taken), int(right), int(failed)


@pytest.mark.parametrize("mode", TAKES_ALL)
def test_every_chunk_is_right_whatever_becomes_of_its_write(binary: Path, tmp_path: Path, mode: str) -> None:
    assert run(binary, mode, tmp_path / "out") == (WHOLE, N, 0)


def test_neighbours_are_written_together(binary: Path, tmp_path: Path) -> None:
    assert counts(binary, "neighbours", tmp_path / "out") == (4, 9, 10, 0)  # 5-7, 9, 20-23, 40; the odd one apart


@pytest.mark.parametrize("mode", ["refused", "no-aio"])
def test_refused_writes_go_through_the_page_cache(binary: Path, tmp_path: Path, mode: str) -> None:
    assert run(binary, mode, tmp_path / "out") == (0, N, 0)


def test_submissions_refused_at_times_are_made_up_for(binary: Path, tmp_path: Path) -> None:
    taken, right, failed = run(binary, "refused-at-times", tmp_path / "out")
    assert 0 < taken < WHOLE
    assert (right, failed) == (N, 0)


def test_lost_completions_end_in_ordinary_writes(binary: Path, tmp_path: Path) -> None:
    taken, right, failed = run(binary, "lost", tmp_path / "out")
    assert taken < WHOLE
    assert (right, failed) == (N, 0)


def test_writes_that_nobody_can_account_for_are_reported_as_failed(binary: Path, tmp_path: Path) -> None:
    _, right, failed = run(binary, "lost-for-good", tmp_path / "out")
    assert failed > 0
    assert right + failed == N


def test_stop_waits_for_the_writes_under_way(binary: Path, tmp_path: Path) -> None:
    _, right, failed = run(binary, "stop", tmp_path / "out")
    assert 0 < right < N
    assert failed == 0


@pytest.mark.parametrize("mode", ["plain", "stop"])
def test_memory_file_system(binary: Path, mode: str) -> None:
    path = Path(f"/dev/shm/fastcas-receiver-direct-{mode}-{binary.parent.name}")
    try:
        _, right, failed = run(binary, mode, path)
    finally:
        path.unlink(missing_ok=True)
    assert (right > 0, failed) == (True, 0)
