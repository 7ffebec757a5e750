"""The serve engine in C under ASan and UBSan, against hostile clients and a restless owner.

A second here; `make fuzz` (FASTCAS_FUZZ_S, seconds) goes on with further seeds. A failure names its seed.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 700


def test_no_wrong_byte_no_leak_no_bad_access(tmp_path: Path) -> None:
    program = tmp_path / "engine_hostile"
    sources = [ROOT / "tests/native/engine_hostile.c", ROOT / "csrc/http/parser.c"]
    for room in ("engine", "table", "common"):
        sources += sorted((ROOT / "csrc" / room).glob("*.c"))
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
    subprocess.run(["cc", *flags, *warnings, f"-I{ROOT / 'csrc'}", "-o", program, *sources], check=True)
    first = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
    end = time.monotonic() + float(os.environ.get("FASTCAS_FUZZ_S", "0"))
    seed = first
    while seed < first + 2 or time.monotonic() < end:
        done = subprocess.run([program, str(seed), str(STEPS), tmp_path], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"FASTCAS_TEST_SEED={seed}\n{done.stdout}{done.stderr}"
        seed += 1
