"""Parts of the engine in C under ASan and UBSan: sources of connections and their cap; progress checks; slots."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["engine_source", "engine_clock", "engine_slots"])
def test_part_of_the_engine(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
    sources = [ROOT / f"tests/native/{name}.c", ROOT / "csrc/http/parser.c"]
    for room in ("engine", "table", "common"):
        sources += sorted((ROOT / "csrc" / room).glob("*.c"))
    subprocess.run(["cc", *flags, *warnings, f"-I{ROOT / 'csrc'}", "-o", program, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
