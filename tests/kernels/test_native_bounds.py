"""tests/native/kernels_guard.c: every kernel against guard pages: optimised, sanitized, without instruction sets."""

import subprocess
from pathlib import Path

import pytest

from fastcas import hashing, parity

ROOT = Path(__file__).parents[2]
C_FILES = ("common/cpu.c", "sha256/*.c", "gf256/*.c", "cdc/*.c")
SOURCES = ["tests/native/kernels_guard.c", *(f"csrc/{name}" for name in C_FILES)]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]


def build_and_run(flags: list[str], program: Path) -> list[str]:
    sources = [str(path) for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    compiled = subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-Icsrc", *WARNINGS, *flags, *sources, "-o", str(program)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-O3"], ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
def test_every_kernel_stays_within_its_buffers(flags, tmp_path):
    assert build_and_run(flags, tmp_path / "guard") == ["ok", *hashing.kernels(), *parity.kernels()]


@pytest.mark.slow
def test_without_instruction_sets_generic_alone_is_built(tmp_path):
    flags = ["-O1", "-DFCAS_NO_SHA256_SIMD", "-DFCAS_NO_GF256_SIMD"]
    assert build_and_run(flags, tmp_path / "guard") == ["ok", "generic", "generic"]
