"""Sources of connections and their cap, in C under ASan and UBSan."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_who_shares_a_source_and_who_is_exempt(tmp_path: Path) -> None:
    program = tmp_path / "engine_source"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
    sources = [ROOT / "tests/native/engine_source.c", ROOT / "csrc/engine/source.c"]
    subprocess.run(["cc", *flags, *warnings, f"-I{ROOT / 'csrc'}", "-o", program, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
