"""The receiver in C without Python, under sanitizers: see receiver_stress.c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_receiver_is_clean_under_a_lying_server(tmp_path: Path, sanitizer: str) -> None:
    binary = tmp_path / "receiver_stress"
    sources = [*sorted(ROOT.glob("csrc/receiver/*.c")), *ROOT.glob("csrc/sha256/*.c"), *ROOT.glob("csrc/common/*.c")]
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}", "-Icsrc",
         "-fno-sanitize-recover=all", "tests/native/receiver_stress.c", *map(str, sources), "-o", str(binary)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    seed = os.environ.get("FASTCAS_TEST_SEED", "1")
    done = subprocess.run([str(binary), seed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"seed {seed}: exit {done.returncode}\n{done.stderr}"
    assert done.stdout.startswith("ok ")
