"""The fuzz targets without libFuzzer: their corpus and half a second of random mutations under ASan and UBSan.

`make fuzz` is the real thing. A failure names its seed; the input that failed is kept beside the program.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests/fuzz"
FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-g",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Icsrc",
]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
WRAPPED = "-Wl," + ",".join(f"--wrap={call}" for call in ("accept4", "recv", "send", "sendmsg", "sendfile"))
ROOMS = {"request": ("http",), "connection": ("http", "engine", "table", "common")}


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(ROOMS))
def test_corpus_and_random_mutations_are_survived(tmp_path: Path, target: str) -> None:
    program, last = tmp_path / target, tmp_path / "last-input"
    sources = [FUZZ / f"fuzz_{target}.c", FUZZ / "replay.c"]
    sources += [source for room in ROOMS[target] for source in sorted((ROOT / "csrc" / room).glob("*.c"))]
    wrap = [WRAPPED] if target == "connection" else []
    subprocess.run(["cc", *FLAGS, *WARNINGS, "-o", program, *sources, *wrap], cwd=ROOT, check=True)
    corpus = sorted((FUZZ / "corpus" / target).iterdir())
    assert len(corpus) > 100
    seed = os.environ.get("FASTCAS_TEST_SEED", "1")
    done = subprocess.run(
        [program, seed, "500", *corpus], capture_output=True, text=True, errors="replace", timeout=100,
        env={**os.environ, "FUZZ_LAST": str(last)},
    )  # fmt: skip
    assert done.returncode == 0, f"FASTCAS_TEST_SEED={seed} input={last}\n{done.stdout}{done.stderr}"
    assert int(done.stdout.split()[-1]) > 0
