"""The receiver in C against spoilt answers, under ASan with UBSan and under TSan.

A second here; `make fuzz` (FASTCAS_FUZZ_S, seconds) goes on with further seeds. A failure names its seed.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 1500


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_only_right_bytes_get_through_and_every_request_ends(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "receiver_mutations"
    sources = [ROOT / "tests/native/receiver_mutations.c"]
    for room in ("receiver", "sha256", "common"):
        sources += sorted((ROOT / "csrc" / room).glob("*.c"))
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    subprocess.run(
        ["cc", *flags, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-o", program, *sources], check=True
    )
    first = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
    end = time.monotonic() + float(os.environ.get("FASTCAS_FUZZ_S", "0"))
    seed = first
    while seed < first + 2 or time.monotonic() < end:
        done = subprocess.run([program, str(seed), str(REQUESTS)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"FASTCAS_TEST_SEED={seed}\n{done.stdout}{done.stderr}"
        seed += 1
